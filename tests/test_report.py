"""Published numbers, methods by name on a small cache, tables, figures."""

from __future__ import annotations

import csv
import itertools
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lt_core.errors import DataError, InputError
from lt_core.metrics import COLUMNS as GROUPS
from lt_core.metrics import bootstrap_accuracies, group_accuracy, per_class_accuracy
from lt_core.report import (
    METHODS,
    STYLES,
    TABLE1,
    TABLE2,
    Row,
    accuracy_by_class_size,
    build_table,
    classifiers,
    crossings,
    effect_in_words,
    figure2_data,
    figure_style,
    load_table,
    method_rows,
    per_class_table,
    predict,
    probabilities,
    provenance,
    published,
    published_notes,
    published_rows,
    published_rule,
    quoted_rows,
    save_figure,
    save_table,
    show_table,
    style_of,
    to_summary,
)
from lt_core.report.published import FILE
from lt_core.report.tables import COLUMNS
from lt_core.transfer import cosine_logits, hybrid_classifier, prototypes

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COUNTS = np.array([120, 104, 75, 54, 39, 28, 20, 14, 9, 5])  # the digits profile's
LABELS = np.repeat(np.arange(10), 40)
COSINE, OURS = ("T1", "Ours* / Cosine classifier"), ("T1", "Ours* / w^h(20)")


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """Everything is written below tmp_path."""
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path))
    return tmp_path / "figures" / "digits"


def small_cache(excluded: int = 0, bias: bool = False) -> SimpleNamespace:
    """Ten noisy classes in 16 dimensions; the smallest `excluded` classes have no weights."""
    generator = np.random.default_rng(0)
    means = generator.normal(size=(10, 16))

    def images(per_class):
        labels = np.repeat(np.arange(10), per_class)
        noise = generator.normal(size=(len(labels), 16))
        return torch.as_tensor(means[labels] + 1.2 * noise, dtype=torch.float32), torch.as_tensor(labels)

    splits = {"train": images(COUNTS), "val": images(15), "test": images(40)}
    weights = torch.as_tensor(means + generator.normal(size=(10, 16)) * (8 / COUNTS)[:, None]).float()
    weights[10 - excluded :] = float("nan")
    return SimpleNamespace(
        weights=weights,
        scale=14.0,
        bias=torch.linspace(-3, 3, 10) if bias else None,
        direction=splits["train"][0].mean(0),
        counts=torch.as_tensor(COUNTS),
        prototypes=prototypes(*splits["train"], 10),
        features=lambda split: splits[split][0],
        labels=lambda split: splits[split][1],
    )


def some_predictions(accuracy: float, key: int = 0) -> np.ndarray:
    generator = np.random.default_rng(key)
    return np.where(generator.random(len(LABELS)) < accuracy, LABELS, (LABELS + 1) % 10)


def two_rows(**extra) -> list[Row]:
    run = {"backbone": "sqrt", "seeds": (0,)}
    return [
        Row("Cosine classifier", [some_predictions(0.5)], COSINE, **run),
        Row("w^h(20)", [some_predictions(0.8, 1)], OURS, reference="Cosine classifier", **run, **extra),
    ]


# ------------------------------------------------------------------ published numbers


def test_all_published_numbers_are_there_once():
    with open(FILE, encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))
    assert len(records) == 306
    assert len({(r["table"], r["printed_row"], r["group"]) for r in records}) == 306
    tables = ("T1", "T2", "T3", "T4a", "T4b", "T5", "T6", "T7", "T8", "T9")
    found = [sum(len(published(table, row)) for row in published_rows(table)) for table in tables]
    assert found == [48, 38, 36, 8, 12, 12, 16, 16, 4, 116]


def test_published_values_and_their_rule():
    assert published(*OURS) == {"many": 64.0, "medium": 44.4, "few": 48.2, "total": 52.7}
    assert published("T2", "Few-shot excluded / Cosine classifier") == {"many": 66.0, "medium": 40.8}
    assert published_rule(*OURS) == "paper"
    assert published_rule("T1", "LWS [16]") == published_rule("T4a", "Dot product") == "common"
    assert published_notes(*OURS)["many"] == "printed without a decimal"


@pytest.mark.parametrize("key, known", [(("T0", "x"), "T4a"), (("T1", "x"), r"LWS \[16\]")])
def test_unknown_published_rows_list_the_known_ones(key, known):
    with pytest.raises(InputError, match=known):
        published(*key)


# ------------------------------------------------------------------ methods


def test_every_method_of_the_published_tables_exists():
    with open(FILE, encoding="utf-8", newline="") as file:
        own = {r["method"] for r in csv.DictReader(file) if "baseline quoted" not in r["note"]}
    assert own - {"mismatch_count"} == set(METHODS) - {"causal_norm"}  # which another paper's backbone learns


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_probabilities_and_better_than_chance(method):
    cache = small_cache()
    scores = probabilities(cache, method, "val")
    assert scores.shape == (150, 10)
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(150))
    found = predict(cache, method)
    assert found.dtype == np.int64 and (found == cache.labels("test").numpy()).mean() > 0.4


def test_methods_are_the_equations():
    cache, features = small_cache(), small_cache().features("test")
    p, w = cache.prototypes, cache.weights
    expected = {
        "cosine": w,
        "prototypes": p,
        "prototypes+cosine": torch.nn.functional.normalize(p) + torch.nn.functional.normalize(w),
        "wh20": hybrid_classifier(p, w, COUNTS, 20),
        "wh100": hybrid_classifier(p, w, COUNTS, 100),
    }
    for method, rows in expected.items():
        torch.testing.assert_close(probabilities(cache, method), cosine_logits(features, rows, 14).softmax(1))
    single = [
        cosine_logits(features, hybrid_classifier(p, w, COUNTS, k), 14).softmax(1) for k in (0, 20, 100)
    ]
    torch.testing.assert_close(probabilities(cache, "ensemble_wh_0_20_100"), sum(single) / 3)
    both = [*classifiers(cache, "whc20"), *classifiers(cache, "whc100")]
    for name, rows in (("ensemble_whc_20_100", both), ("ensemble_proto_whc_20_100", [p, *both])):
        for found, row in zip(classifiers(cache, name), rows, strict=True):
            torch.testing.assert_close(found, row)


def test_roles_of_table_6():
    cache = small_cache()
    torch.testing.assert_close(
        probabilities(cache, "attention_p2w"), probabilities(cache, "ensemble_wh_0_20_100")
    )
    for one, other in itertools.combinations(("p2w", "w2p", "w2w", "p2p"), 2):
        a, b = (classifiers(cache, f"attention_{role}")[0] for role in (one, other))
        assert not torch.allclose(a, b, atol=1e-3), (one, other)


def test_dot_product_uses_norms_and_bias():
    cache = small_cache(bias=True)
    logits = cache.features("test") @ cache.weights.T + cache.bias
    torch.testing.assert_close(probabilities(cache, "dot_product"), logits.softmax(dim=1))
    assert (predict(small_cache(), "dot_product") != predict(cache, "dot_product")).any()


def test_classes_left_out_of_training():
    cache = small_cache(excluded=4)  # counts 20, 14, 9, 5
    scores = probabilities(cache, "cosine")
    assert (scores[:, 6:] == 0).all() and predict(cache, "cosine").max() < 6
    trained = cosine_logits(cache.features("test"), cache.weights[:6], 14).softmax(dim=1)
    torch.testing.assert_close(scores[:, :6], trained)
    torch.testing.assert_close(probabilities(cache, "whc20"), probabilities(small_cache(), "whc20"))
    assert set(predict(cache, "ensemble_proto_whc_20_100")) == set(range(10))
    with pytest.raises(InputError, match="weights"):
        predict(cache, "wh20")


def test_prediction_in_chunks(monkeypatch):
    whole = predict(small_cache(), "wh20")
    monkeypatch.setattr("lt_core.methods.CHUNK", 70)
    np.testing.assert_array_equal(predict(small_cache(), "wh20"), whole)


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(InputError, match="wh20"):
        predict(small_cache(), "wh30")
    with pytest.raises(InputError, match="wh20"):
        classifiers(small_cache(), "cosine")


# ------------------------------------------------------------------ tables


def line(frame: pd.DataFrame, row: str, group: str, rule: str = "paper") -> pd.Series:
    found = frame[(frame["row"] == row) & (frame["group"] == group) & (frame["rule"] == rule)]
    assert len(found) == 1
    return found.iloc[0]


def test_a_table_has_published_and_reproduced_values_and_effects():
    rows = two_rows()
    frame = build_table("T1", rows, LABELS, COUNTS)
    assert tuple(frame.columns) == COLUMNS and len(frame) == 2 * 2 * 4
    base, ours = (group_accuracy(row.predictions[0], LABELS, COUNTS) for row in rows)
    few = line(frame, "w^h(20)", "few")
    assert (few["published"], few["published_effect"]) == (48.2, 27.6)
    assert few["reproduced"] == round(ours["few"], 2)
    assert few["reproduced_effect"] == pytest.approx(ours["few"] - base["few"], abs=0.006)
    assert few["ci_low"] < few["reproduced"] < few["ci_high"]
    assert few["effect_ci_low"] < few["reproduced_effect"] < few["effect_ci_high"]
    origin = [few[name] for name in ("split", "n", "checkpoint", "backbone", "seeds", "note")]
    assert origin == ["test", 160, "last", "sqrt", "0", ""]
    reference = line(frame, "Cosine classifier", "few")
    assert np.isnan(reference["published_effect"]) and np.isnan(reference["reproduced_effect"])


def test_intervals_come_from_the_paired_bootstrap():
    rows = two_rows()
    frame = build_table("T1", rows, LABELS, COUNTS, replicates=200, seed=5)
    correct = np.stack([row.predictions[0] == LABELS for row in rows])[None]
    samples = bootstrap_accuracies(correct, LABELS, COUNTS, "paper", 200, 5)
    for index, group in enumerate(GROUPS):
        low, high = np.percentile(samples[:, 1, index] - samples[:, 0, index], [2.5, 97.5])
        found = line(frame, "w^h(20)", group)
        assert [found["effect_ci_low"], found["effect_ci_high"]] == [round(low, 2), round(high, 2)]


def test_published_groups_stand_only_under_their_own_rule():
    quoted = Row("LWS", published=("T1", "LWS [16]"), reference="Cosine classifier")
    frame = build_table("T1", [*two_rows(), quoted], LABELS, COUNTS)
    assert np.isnan(line(frame, "w^h(20)", "few", "common")["published"])
    assert line(frame, "w^h(20)", "total", "common")["published"] == 52.7
    assert line(frame, "w^h(20)", "few", "common")["n"] == 120
    of_quoted = frame[frame["row"] == "LWS"]
    assert set(of_quoted["rule"]) == {"common"} and of_quoted["reproduced"].isna().all()
    assert line(frame, "LWS", "few", "common")["published"] == 30.3
    assert np.isnan(line(frame, "LWS", "few", "common")["published_effect"])
    assert line(frame, "LWS", "total", "common")["published_effect"] == -1.0
    assert "only the total is compared" in line(frame, "LWS", "few", "common")["note"]
    assert line(frame, "LWS", "total", "common")["seeds"] == "" and pd.isna(of_quoted["n"]).all()


def test_a_quoted_system_with_predictions_appears_under_both_rules():
    run = {"backbone": "lws", "seeds": (0,), "reference": "Cosine classifier"}
    rows = [*two_rows(), Row("LWS", [some_predictions(0.6, 2)], ("T1", "LWS [16]"), **run)]
    frame = build_table("T1", rows, LABELS, COUNTS)
    assert np.isnan(line(frame, "LWS", "few")["published"]) and line(frame, "LWS", "few")["reproduced"] > 0
    assert line(frame, "LWS", "few", "common")["published"] == 30.3


def test_groups_that_print_has_not_stay_empty():
    key = ("T2", "Few-shot excluded / Cosine classifier")
    run = {"backbone": "continual", "seeds": (0,)}
    rows = [
        Row("Cosine", [some_predictions(0.5)], key, groups=("many", "medium"), **run),
        Row("Prototypes", [some_predictions(0.6)], ("T2", "Few-shot excluded / Prototypes"), "Cosine", **run),
    ]
    frame = build_table("T2", rows, LABELS, COUNTS)
    total = line(frame, "Cosine", "total")
    assert total[["published", "reproduced", "ci_low", "n"]].isna().all() and total["backbone"] == ""
    assert line(frame, "Cosine", "many")["reproduced"] > 0
    assert np.isnan(line(frame, "Prototypes", "total")["reproduced_effect"])
    assert line(frame, "Prototypes", "many")["published_effect"] == -4.2


def test_several_seeds_are_averaged_and_rows_may_differ_in_number():
    predictions = [some_predictions(a, key) for key, a in enumerate((0.5, 0.7, 0.9))]
    rows = [
        Row("A", predictions, seeds=(0, 1, 2), backbone="a"),
        Row("B", predictions[:1], seeds=(4,), backbone="b", reference="A"),
    ]
    frame = build_table("S2", rows, LABELS, COUNTS)
    mean = np.mean([group_accuracy(p, LABELS, COUNTS)["total"] for p in predictions])
    one, other = line(frame, "A", "total"), line(frame, "B", "total")
    assert one["reproduced"] == pytest.approx(mean, abs=0.006) and one["seeds"] == "0 1 2"
    assert other["reproduced_effect"] == pytest.approx(other["reproduced"] - mean, abs=0.011)
    assert one["ci_high"] - one["ci_low"] > 2 * (other["ci_high"] - other["ci_low"])


def test_predictions_may_depend_on_the_rule():
    by_rule = {"paper": [LABELS], "common": [(LABELS + 1) % 10]}
    frame = build_table("T5", [Row("A", by_rule, seeds=(0,))], LABELS, COUNTS)
    assert line(frame, "A", "few")["reproduced"] == 100
    assert line(frame, "A", "few", "common")["reproduced"] == 0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Row("A"), "neither predictions nor"),
        (lambda: Row("A", [LABELS]), "1 predictions for 0 seeds"),
        (lambda: Row("A", [LABELS], seeds=(0,), groups=("some",)), "groups"),
        (lambda: build_table("T1", [], LABELS, COUNTS), "rows"),
        (lambda: build_table("T1", two_rows() * 2, LABELS, COUNTS), "different names"),
        (lambda: build_table("T1", two_rows()[1:], LABELS, COUNTS), "no row of this table"),
        (lambda: build_table("T1", two_rows(), LABELS[1:], COUNTS), "predictions of row 'Cosine"),
        (lambda: build_table("T1", two_rows(), LABELS + 1, COUNTS), "labels"),
        (lambda: per_class_table("T1", two_rows(), LABELS, COUNTS, ["one"]), "class_names"),
        (lambda: save_table(pd.DataFrame({"a": [1]}), "digits"), "build_table"),
    ],
)
def test_bad_tables_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_saved_table_reads_back_and_is_stable(output):
    quoted = Row("LWS", published=("T1", "LWS [16]"), reference="Cosine classifier", note="a | b, c")
    frame = build_table("T1", [*two_rows(), quoted], LABELS, COUNTS)
    save_table(frame, "digits")
    first = [(output / name).read_bytes() for name in ("T1.csv", "T1.md")]
    pd.testing.assert_frame_equal(load_table("T1", "digits"), frame)
    save_table(load_table("T1", "digits"), "digits")
    assert [(output / name).read_bytes() for name in ("T1.csv", "T1.md")] == first
    assert sorted(path.name for path in output.iterdir()) == ["T1.csv", "T1.md"]
    with pytest.raises(DataError, match="T2"):
        load_table("T2", "digits")


def test_the_markdown_says_everything(output):
    save_table(build_table("T1", two_rows(note="my note"), LABELS, COUNTS), "digits")
    text = (output / "T1.md").read_text(encoding="utf-8")
    assert "## Grouping rule `paper`" in text and "## Grouping rule `common`" in text
    rows = [row for row in text.splitlines() if row.startswith("| w^h(20)")]
    assert (
        len(rows) == 2 and rows[0].count("|") == 6 and "48.2 →" in rows[0] and "effect +27.6 → +" in rows[0]
    )
    for part in ("Split test", "few 160", "n <= 20", "Backbone sqrt, checkpoint last, seeds 0", "my note"):
        assert part in text
    assert "many: printed without a decimal" in text


def test_the_shown_table_marks_signs_by_symbol_and_word():
    run = {"backbone": "sqrt", "seeds": (0,)}
    rows = [
        *two_rows(),
        Row("Wrong", [some_predictions(0.2, 3)], OURS, reference="Cosine classifier", **run),
        Row("Open", [some_predictions(0.5)], OURS, reference="Cosine classifier", **run),
        Row("<LWS>", published=("T1", "LWS [16]"), reference="Cosine classifier"),
    ]
    frame = build_table("T1", rows, LABELS, COUNTS)
    view = show_table(frame)
    page = view._repr_html_()
    lines = [row for row in page.split("<tr>") if 'scope="row"' in row]
    body = {re.sub("<sup>[(].*?</sup>|<.*?>", "", line.split("</th>")[0]): line for line in lines}
    assert 'title="same sign as in print"' in body["wh(20)"] and "<i>w</i><sup>h</sup>(20)" in page
    assert 'title="opposite sign"' in body["Wrong"]
    assert "✗" in body["Wrong"] and "○" in body["Open"] and "✓" not in body["Open"]
    assert "&lt;LWS&gt;" in page and "<LWS>" not in page and "49.9" in page and "30.3" not in page
    assert "30.3" in show_table(frame, "common")._repr_html_()
    assert "overflow-x: auto" in page and "Split test" in page and "http" not in page
    assert str(view).startswith("| |")
    with pytest.raises(InputError, match="common, paper"):
        show_table(frame, "other")


def test_rows_of_different_runs_say_which():
    rows = [*two_rows(), Row("C", [some_predictions(0.6)], seeds=(0,), backbone="continual")]
    page = show_table(build_table("T2", rows, LABELS, COUNTS))._repr_html_()
    assert "<small>Backbone continual, checkpoint last, seeds 0</small>" in page
    assert "<small>Backbone" not in show_table(build_table("T2", rows[:2], LABELS, COUNTS))._repr_html_()


# ------------------------------------------------------------------ per-class accuracies


def test_per_class_accuracies():
    names = [f"digit, {c}" for c in range(10)]
    frame = per_class_table("T1", two_rows(), LABELS, COUNTS, names)
    assert len(frame) == 2 * 10
    found = frame[frame["row"] == "w^h(20)"]
    expected = per_class_accuracy(two_rows()[1].predictions[0], LABELS, 10)
    np.testing.assert_allclose(found["accuracy"], expected, atol=0.006)
    assert found["count"].tolist() == COUNTS.tolist() and set(found["n"]) == {40}


def test_per_class_file_does_not_depend_on_the_order(output):
    tables = ["T2", "T1", "S1"]
    saved = {}
    for order in (tables, tables[::-1], [*tables, "T1"]):
        (output / "per_class.csv").unlink(missing_ok=True)
        for table in order:
            rows = two_rows()
            frame = build_table(table, rows, LABELS, COUNTS, replicates=10)
            save_table(frame, "digits", per_class_table(table, rows, LABELS, COUNTS, ["nan"] * 10))
        saved[tuple(order)] = (output / "per_class.csv").read_bytes()
    assert len(set(saved.values())) == 1
    frame = pd.read_csv(output / "per_class.csv", keep_default_na=False)
    assert len(frame) == 3 * 20 and set(frame["class_name"]) == {"nan"}
    assert frame["class"].tolist()[:10] == list(range(10))


def test_tables_saved_at_the_same_time_all_arrive(output):
    def save(number):
        rows = two_rows()
        frame = build_table(f"S{number}", rows, LABELS, COUNTS, replicates=5)
        save_table(frame, "digits", per_class_table(f"S{number}", rows, LABELS, COUNTS))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, range(8)))
    assert len(pd.read_csv(output / "per_class.csv")) == 8 * 20


def test_per_class_of_another_table_or_a_strange_file_is_refused(output):
    rows = two_rows()
    frame, per_class = build_table("T1", rows, LABELS, COUNTS), per_class_table("T2", rows, LABELS, COUNTS)
    with pytest.raises(InputError, match="per_class_table of T1"):
        save_table(frame, "digits", per_class)
    (output / "per_class.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="delete it"):
        save_table(frame, "digits", per_class_table("T1", rows, LABELS, COUNTS))
    assert (output / "per_class.csv").read_text() == "a,b\n1,2\n"


# ------------------------------------------------------------------ figures


def example_data() -> pd.DataFrame:
    falling = np.linspace(30, 80, 10)
    return figure2_data(COUNTS, {"prototypes": falling[::-1], "cosine": falling})


def example_figure():
    fig, ax = plt.subplots()
    accuracy_by_class_size(ax, example_data())
    return fig, ax


def test_figure_2_numbers_by_hand():
    data = figure2_data([10, 10, 40, 40], {"prototypes": [10, 30, 50, 50], "cosine": [0, 0, 60, 80]}, bins=2)
    bins = data[data["kind"] == "bin"].set_index(["series", "images"])["accuracy"].round(6)
    assert bins.tolist() == [20, 50, 0, 70]
    difference = data[data["kind"] == "difference"]
    assert difference["images"].round(6).tolist() == [10, 40] and difference["accuracy"].tolist() == [20, -20]
    assert difference["ci_low"].iloc[0] == pytest.approx(20 - 1.96 * 10)
    assert crossings(data) == [pytest.approx(20)]
    assert (data["kind"] == "class").sum() == 8


@pytest.mark.parametrize("counts", [COUNTS, np.geomspace(5, 1280, 50).astype(int), np.array([7, 7, 7])])
def test_every_class_is_in_one_bin_and_bins_keep_the_mean(counts):
    values = np.random.default_rng(0).uniform(0, 100, len(counts))
    data = figure2_data(counts, {"prototypes": values, "cosine": values})
    bins = data[(data["kind"] == "bin") & (data["series"] == "cosine")]
    assert bins["classes"].sum() == len(counts) and bins["images"].is_monotonic_increasing
    assert np.average(bins["accuracy"], weights=bins["classes"]) == pytest.approx(values.mean())
    assert crossings(data) == []


def test_classes_without_images_are_left_out_and_bad_accuracies_refused():
    nan = np.full(10, np.nan)
    nan[:3] = 50
    data = figure2_data(COUNTS, {"prototypes": nan, "cosine": np.ones(10)})
    assert (data["kind"] == "class").sum() == 13 and data["accuracy"].notna().all()
    with pytest.raises(InputError, match=r"accuracies\['cosine'\]"):
        figure2_data(COUNTS, {"prototypes": nan, "cosine": [1, 2]})
    with pytest.raises(InputError, match="two series"):
        figure2_data(COUNTS, {"prototypes": nan})


def test_figure_2_is_labelled_and_marks_the_groups():
    with figure_style():
        fig, ax = example_figure()
    assert ax.get_xscale() == "log" and "%" in ax.get_ylabel() and "validation" in ax.get_ylabel()
    texts = {text.get_text() for text in ax.texts}
    assert texts == {"few", "medium", "many", "n = 20", "n = 100"}
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == [STYLES["prototypes"].label, STYLES["cosine"].label]
    plt.close(fig)


def test_saved_figures_are_stable_and_described(output):
    files = ["F2.csv", "F2.png", "F2.svg"]
    saved = []
    for _ in range(2):
        with figure_style():
            fig, _ = example_figure()
            save_figure(fig, "F2", "digits", example_data(), "Two curves that cross")
            plt.close(fig)
        saved.append([(output / name).read_bytes() for name in files])
    assert saved[0] == saved[1]
    assert sorted(path.name for path in output.iterdir()) == files
    svg = saved[0][2].decode()
    assert "<title>Two curves that cross</title>" in svg and "<dc:date>" not in svg
    with Image.open(output / "F2.png") as picture:
        assert picture.text["Description"] == "Two curves that cross"
        assert picture.size == (1280, 800)
    values = pd.read_csv(output / "F2.csv", dtype=str)["accuracy"]
    assert values.str.match(r"^-?\d+(\.\d{1,2})?$").all()


def test_figures_are_the_same_from_process_to_process(tmp_path):
    code = (
        "import matplotlib; matplotlib.use('Agg'); import matplotlib.pyplot as plt, pandas as pd\n"
        "from lt_core.report.figures import figure_style, save_figure\n"
        "with figure_style():\n"
        "    fig, ax = plt.subplots(); ax.fill_between([0, 1], [0, 1], [1, 2]); ax.plot([0, 1]);"
        "    save_figure(fig, 'F0', 'digits', pd.DataFrame({'a': [1]}), 'alt'); plt.close(fig)"
    )
    changed = {"LT_OUTPUT_ROOT": str(tmp_path / "other"), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | changed)
    exec(code, {})
    folders = [tmp_path / "other" / "figures" / "digits", tmp_path / "figures" / "digits"]
    one, other = (
        [(folder / f"F0.{kind}").read_bytes() for kind in ("svg", "png", "csv")] for folder in folders
    )
    assert one == other


def test_a_figure_needs_words():
    fig, _ = plt.subplots()
    with pytest.raises(InputError, match="alt"):
        save_figure(fig, "F2", "digits", example_data(), " ")
    plt.close(fig)


def test_styles_are_fixed_and_differ_within_a_family():
    for family in (
        ("cosine", "prototypes", "prototypes+cosine", "wh20", "wh100", "ensemble"),
        ("many", "medium", "few", "total"),
        ("uniform", "sqrt", "class_aware"),
        ("supervised", "simclr"),
        ("published", "reproduced"),
    ):
        for part in ("colour", "marker"):
            assert len({getattr(style_of(name), part) for name in family}) == len(family)
    with pytest.raises(InputError, match="prototypes"):
        style_of("blue")


# --- Rows from caches ----------------------------------------------------------------------------------


def named_cache(backbone: str = "sqrt", seed: int = 0, excluded: int = 0) -> SimpleNamespace:
    cache = small_cache(excluded)
    return SimpleNamespace(
        **vars(cache),
        meta={
            "backbone": backbone,
            "seed": seed,
            "dataset": "digits",
            "network": "digits_net",
            "start": "scratch",
            "classifier": "cosine",
            "loss": "cross_entropy",
            "sampler": "square_root",
            "leave_out": "few" if excluded else "nothing",
            "recipe": {
                "epochs": 3,
                "batch_size": 8,
                "learning_rate": 0.0,
                "classifier_learning_rate": 0.1,
                "weight_decay": 5e-4,
            },
            "seconds": 90.0,
            "hardware": "CPU",
            "code_version": "abc",
        },
        trained=~cache.weights.isnan().any(dim=1),
    )


def test_rows_of_a_block_refer_to_its_first_row_and_to_print():
    rows = method_rows([named_cache(), named_cache(seed=1)], TABLE1, "Ours*", printed="T1")
    assert [row.name for row in rows] == published_rows("T1")[:6]
    assert rows[0].reference is None and all(row.reference == rows[0].name for row in rows[1:])
    assert all(list(row.seeds) == [0, 1] and len(row.predictions) == 2 for row in rows)
    assert all(row.published == ("T1", row.name) for row in rows)


def test_both_blocks_of_table_2_stand_in_print():
    full = method_rows([named_cache()], TABLE2, "Full training", printed="T2")
    excluded = method_rows([named_cache("continual", excluded=4)], TABLE2, "Few-shot excluded", printed="T2")
    assert [row.name for row in [*full, *excluded]] == published_rows("T2")
    assert excluded[0].groups == ("many", "medium") and len(excluded[1].groups) == 4


def test_quoted_systems_have_no_predictions():
    rows = quoted_rows("T1", "Cosine classifier")
    assert len(rows) == 6 and rows[0].name == "LWS [16]" and not len(rows[0].predictions)


def test_provenance_names_recipe_seeds_time_and_code():
    text = provenance([named_cache(), named_cache(seed=1)])
    for part in ("`sqrt`", "3 epochs", "Seeds 0, 1", "1.5 min a seed", "backbone frozen", "code abc"):
        assert part in text, part


def test_rows_need_a_cache():
    with pytest.raises(InputError, match="caches must hold"):
        method_rows([], TABLE1)


def test_effects_in_words():
    frame = build_table("T1", two_rows(), LABELS, COUNTS)
    text = effect_in_words(frame, frame["row"].iloc[-1], "few")
    assert text.startswith("- $w^{h}(20)$, few: in print +27.6, here") and "points" in text
    with pytest.raises(InputError, match="unknown row 'none'"):
        effect_in_words(frame, "none", "few")


def test_the_summary_shows_reproduced_rows_only():
    rows = [*two_rows(), Row("LWS [16]", published=("T1", "LWS [16]"), reference="Cosine classifier")]
    text = to_summary(build_table("T1", rows, LABELS, COUNTS))
    assert "LWS" not in text and len(text.splitlines()) == 2 + 2 and "→" in text and "[" not in text
