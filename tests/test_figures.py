"""Figures 1, 3, 6 and 9: their numbers by hand, the tests behind them, and the pictures themselves."""

from __future__ import annotations

from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from lt_core import report
from lt_core.errors import InputError
from lt_core.report import schematics, semantics, umap_figure
from lt_core.report.semantics import drawn_classes, nearest_classes, nearest_shown
from lt_core.report.umap_figure import CENTRES, Example, example_classes
from lt_core.transfer import attention, hybrid_classifier, prototypes

matplotlib.use("Agg")

COUNTS = np.array([120, 104, 75, 54, 39, 28, 20, 14, 9, 5])
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """Everything is written below tmp_path."""
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path))
    return tmp_path / "figures" / "digits"


@pytest.fixture
def plain_map(monkeypatch):
    """In place of UMAP, which takes long to load: the first two dimensions."""
    monkeypatch.setattr(umap_figure, "_embedding", lambda points, seed: points[:, :2].numpy())


def small_cache() -> SimpleNamespace:
    """Ten noisy classes in 16 dimensions, the rarer the noisier their weights."""
    generator = np.random.default_rng(0)
    means = generator.normal(size=(10, 16))

    def images(per_class):
        labels = np.repeat(np.arange(10), per_class)
        noise = generator.normal(size=(len(labels), 16))
        return torch.as_tensor(means[labels] + noise, dtype=torch.float32), torch.as_tensor(labels)

    splits = {"train": images(COUNTS), "val": images(15)}
    return SimpleNamespace(
        weights=torch.as_tensor(means + generator.normal(size=(10, 16)) * (8 / COUNTS)[:, None]).float(),
        counts=torch.as_tensor(COUNTS),
        prototypes=prototypes(*splits["train"], 10),
        class_names=list(NAMES),
        features=lambda split: splits[split][0],
        labels=lambda split: splits[split][1],
        meta={"dataset": "digits"},
    )


def random_similarity(num_classes: int, seed: int = 0) -> np.ndarray:
    """Symmetric, with few different values, as WordNet's."""
    values = np.random.default_rng(seed).integers(1, 6, size=(num_classes, num_classes)).astype(float)
    return np.triu(values, 1) + np.triu(values, 1).T + np.diag(np.full(num_classes, 9.0))


def random_attention(num_classes: int, seed: int = 1) -> np.ndarray:
    shares = np.random.default_rng(seed).random((num_classes, num_classes))
    return shares / shares.sum(axis=1, keepdims=True)


def save_twice(draw, data: pd.DataFrame, output) -> list[bytes]:
    """The files of a figure, after checking that a second time gives the same bytes."""
    found = []
    for _ in range(2):
        with report.figure_style():
            report.save_figure(draw(data), "F0", "digits", data, "a picture")
        found.append([(output / f"F0.{suffix}").read_bytes() for suffix in ("png", "svg", "csv")])
    assert found[0] == found[1]
    return found[0]


# ------------------------------------------------------------------ Figure 9


def test_the_classes_of_figure_9_are_drawn_blindly_and_always_the_same():
    assert drawn_classes(200) == drawn_classes(200) == sorted(set(drawn_classes(200)))
    assert len(drawn_classes(200)) == 5 and max(drawn_classes(200)) < 200
    assert drawn_classes(3) == [0, 1, 2]


def test_ten_nearest_but_at_most_half_of_the_others():
    assert [nearest_shown(n) for n in (3, 10, 21, 22, 1000)] == [1, 4, 10, 10, 10]


def test_a_class_is_no_neighbour_of_its_own():
    shares = [[0.9, 0.04, 0.06], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]
    assert nearest_classes(shares).tolist() == [[2, 1], [0, 2], [0, 1]]


def test_figure_9_numbers_by_hand():
    shares = np.array(
        [[0.5, 0.1, 0.3, 0.1], [0.2, 0.6, 0.1, 0.1], [0.1, 0.2, 0.6, 0.1], [0.4, 0.3, 0.2, 0.1]]
    )
    similarity = np.array([[9, 1, 2, 3], [1, 9, 4, 5], [2, 4, 9, 6], [3, 5, 6, 9]], float)
    data = report.figure9_data(shares, similarity, ["a", "b", "c", "d"], [100, 50, 20, 5], [0, 3])
    assert data["class"].tolist() == ["a", "d"] and data["neighbour"].tolist() == ["c", "a"]
    assert data["neighbour_group"].tolist() == ["few", "many"] and data["n"].tolist() == [100, 5]
    assert data["attention"].tolist() == pytest.approx([30, 40]) and data["own"].tolist() == [50, 10]
    assert data["similarity"].tolist() == [2, 3] and data["random"].tolist() == pytest.approx([2, 14 / 3])
    assert report.figure9_in_words(data)[1].startswith("- d (n = 5, 10 % of its attention goes to itself)")


def test_figure_9_is_drawn_the_same_each_time(output):
    shares, similarity = random_attention(10), random_similarity(10)
    data = report.figure9_data(shares, similarity, NAMES, COUNTS, drawn_classes(10))
    assert len(data) == 5 * 4
    save_twice(report.figure9, data, output)


# ------------------------------------------------------------------ all classes


def test_the_rank_correlation_is_spearmans_without_the_own_class():
    shares, similarity = random_attention(30), random_similarity(30)
    counts = np.linspace(5, 300, 30).astype(int)
    table = report.semantic_test(shares, similarity, counts, permutations=9).table.set_index("group")
    off = ~np.eye(30, dtype=bool)
    each = np.array([spearmanr(shares[c][off[c]], similarity[c][off[c]]).statistic for c in range(30)])
    assert table.loc["total", "rank_correlation"] == pytest.approx(each.mean())
    assert table.loc["few", "rank_correlation"] == pytest.approx(each[counts <= 20].mean())
    assert table["classes"].tolist() == [
        *((counts >= 100).sum(), ((counts > 20) & (counts < 100)).sum()),
        2,
        30,
    ]


def test_the_null_permutes_rows_and_columns_together():
    shares, similarity, counts = random_attention(12), random_similarity(12), np.full(12, 50)
    null = report.semantic_test(shares, similarity, counts, permutations=5, seed=3).null["total"]
    generator, off = np.random.default_rng(3), ~np.eye(12, dtype=bool)
    for value in null:
        order = generator.permutation(12)
        moved = similarity[order][:, order]
        by_hand = [spearmanr(shares[c][off[c]], moved[c][off[c]]).statistic for c in range(12)]
        assert value == pytest.approx(np.mean(by_hand))


def test_attention_that_follows_meaning_is_found_and_other_is_not():
    similarity, counts = random_similarity(40), np.linspace(5, 300, 40).astype(int)
    follows = similarity + random_attention(40)
    test = report.semantic_test(follows, similarity, counts, permutations=199)
    line = test.table.set_index("group").loc["total"]
    assert line["rank_correlation"] > 0.9 and line["p_value"] == pytest.approx(1 / 200)
    assert line["ci_low"] > 0 and line["difference"] == pytest.approx(
        line["similarity_nearest"] - line["similarity_random"]
    )
    assert "**holds**" in report.semantics_in_words(test)[0]
    assert line["similarity_best"] == pytest.approx(line["similarity_nearest"])
    assert "100 % of the possible gain" in report.semantics_in_words(test)[0]
    against = report.semantic_test(-follows, similarity, counts, permutations=199)
    assert against.table.set_index("group").loc["total", "p_value"] == 1
    assert "**does not hold**" in report.semantics_in_words(against)[0]


def test_unrelated_attention_is_significant_as_often_as_it_should():
    similarity, counts = random_similarity(15), np.full(15, 50)
    p_values = [
        report.semantic_test(random_attention(15, seed), similarity, counts, permutations=99, replicates=10)
        .table["p_value"]
        .iloc[-1]
        for seed in range(100)
    ]
    assert 0.3 < np.mean(p_values) < 0.7 and np.mean(np.array(p_values) <= 0.05) <= 0.12


def test_classes_that_are_all_equally_far_apart_have_no_answer(output):
    similarity = np.full((10, 10), 2.5)
    test = report.semantic_test(random_attention(10), similarity, COUNTS, permutations=9)
    assert test.table["p_value"].isna().all() and test.table["difference"].eq(0).all()
    assert "no answer" in report.semantics_in_words(test)[0]
    save_twice(report.semantic_figure, report.semantic_figure_data(test), output)


def test_an_empty_group_is_left_out_of_the_words_and_the_figure(output):
    test = report.semantic_test(random_attention(10), random_similarity(10), np.full(10, 50), permutations=99)
    assert test.table.set_index("group").loc["few", ["rank_correlation", "difference"]].isna().all()
    assert len(report.semantics_in_words(test)) == 2
    data = report.semantic_figure_data(test)
    assert data.loc[data["kind"] == "null", "classes"].sum() == 99
    save_twice(report.semantic_figure, data, output)


@pytest.mark.parametrize("wrong", ["attention", "similarity"])
def test_wrong_matrices_are_named(wrong):
    given = {"attention": random_attention(10), "similarity": random_similarity(10)}
    given[wrong] = given[wrong][:9]
    with pytest.raises(InputError, match=f"{wrong} must be finite and of shape"):
        report.semantic_test(given["attention"], given["similarity"], COUNTS)


# ------------------------------------------------------------------ Figure 6


def pairs(best: dict[int, tuple[int, int]]) -> np.ndarray:
    """Attention [10, 10] in which a class attends most to itself and then to the given two."""
    shares = np.full((10, 10), 0.01) + np.eye(10)
    for c, (first, second) in best.items():
        shares[c, first], shares[c, second] = 0.3, 0.2
    return shares


def test_the_examples_are_few_shot_classes_with_a_many_and_a_medium_shot_neighbour():
    best = {6: (0, 1), 7: (3, 1), 8: (0, 2), 9: (7, 0), 3: (0, 4)}  # 3 is no few-shot class
    found = example_classes(pairs(best), COUNTS)
    assert found == [Example(7, many=1, medium=3), Example(8, many=0, medium=2)]
    assert example_classes(pairs(best), COUNTS, limit=1) == found[:1]


def test_without_such_a_class_the_rarest_is_shown_and_the_caption_says_so():
    best = {6: (0, 1), 7: (0, 1), 8: (0, 1), 9: (7, 0)}
    found = example_classes(pairs(best), COUNTS)
    assert found == [Example(9, 7, 0, by_rule=False)]
    assert "finds no class" in report.figure6_in_words(found, small_cache())
    assert "The rule chooses" in report.figure6_in_words([Example(7, 1, 3)], small_cache())


def test_figure_6_holds_all_samples_and_nine_centres(plain_map, output):
    cache, examples = small_cache(), [Example(7, 1, 3), Example(9, 7, 0, by_rule=False)]
    data = report.figure6_data(
        cache.features("val"), cache.labels("val"), report.centres_of(cache), examples, cache
    )
    first = data[data["panel"] == 0]
    assert first["kind"].value_counts().to_dict() == {"sample": 45} | dict.fromkeys(CENTRES, 3)
    one = first[(first["role"] == "first") & (first["kind"] == "classifier weight")].iloc[0]
    assert [one["class"], one["n"], one["group"]] == ["one", 104, "many"]
    assert [one["x"], one["y"]] == pytest.approx(cache.weights[1, :2].tolist())
    assert "of 2 panels" in report.drawn_distances_in_words(data)
    save_twice(report.figure6, data, output)


def test_an_example_needs_samples(plain_map):
    cache = small_cache()
    kept = cache.labels("val") != 7
    with pytest.raises(InputError, match="class seven has no samples"):
        report.figure6_data(
            cache.features("val")[kept],
            cache.labels("val")[kept],
            report.centres_of(cache),
            [Example(7, 1, 3)],
            cache,
        )


@pytest.mark.slow
def test_umap_gives_the_same_map_twice():
    points = small_cache().features("val")[:60]
    one, other = (umap_figure._embedding(points, seed=0) for _ in range(2))
    assert one.shape == (60, 2) and np.array_equal(one, other)


def test_cosines_of_the_centres_by_hand():
    cache = small_cache()
    cosines = report.centre_cosines(cache)
    p, w = cache.prototypes.numpy(), cache.weights.numpy()
    final = hybrid_classifier(cache.prototypes, cache.weights, cache.counts, k=20).numpy()

    def cosine(a, b):
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    for c in (0, 9):
        line = cosines.iloc[c]
        assert line["weight_prototype"] == pytest.approx(cosine(w[c], p[c]), abs=1e-5)
        assert line["final_prototype"] == pytest.approx(cosine(final[c], p[c]), abs=1e-5)
        assert line["final_weight"] == pytest.approx(cosine(final[c], w[c]), abs=1e-5)
        plain = p[c] / np.linalg.norm(p[c]) + w[c] / np.linalg.norm(w[c])
        assert line["sum_prototype"] == pytest.approx(cosine(plain, p[c]), abs=1e-5)


def test_the_claims_about_centres_follow_the_numbers(output):
    summary = report.centre_summary(report.centre_cosines(small_cache()))
    lines = summary.set_index(["group", "measure"])
    moved = lines.loc[("few", "final_prototype"), "mean"] - lines.loc[("few", "weight_prototype"), "mean"]
    assert lines.loc[("few", "towards_prototype"), "mean"] == pytest.approx(moved)
    assert "**holds** here" in report.centres_in_words(summary)[0]
    save_twice(report.centres_by_group, summary, output)
    away = summary.assign(ci_low=-1.0, ci_high=1.0)
    assert all("**does not hold** here" in line for line in report.centres_in_words(away))


# ------------------------------------------------------------------ Figures 1 and 3, the data


def test_the_clearest_class_gives_one_class_the_largest_share():
    cache = small_cache()
    shares = attention(cache.prototypes, cache.weights, cache.counts, k=20).numpy()
    assert report.clearest_class(cache) == 6 + shares[6:].max(axis=1).argmax()
    cache.counts = torch.as_tensor(COUNTS + 30)
    assert report.clearest_class(cache) == 9


def test_figure_1_shows_the_tail_and_the_helpers(output):
    cache = small_cache()
    data = report.figure1_data(cache, 9)
    shares = 100 * attention(cache.prototypes, cache.weights, cache.counts, k=20)[9]
    near = data[data["kind"] == "prototype"]
    assert near["class"].iloc[0] == "nine" and len(near) == 4
    assert near["attention"].iloc[1:].tolist() == pytest.approx(shares.sort(descending=True)[0][:3].tolist())
    assert data.loc[data["kind"] == "class", "n"].tolist() == sorted(COUNTS, reverse=True)
    assert data["kind"].value_counts()["sample"] == 60 and data["kind"].value_counts()["final"] == 1
    assert report.figure1_in_words(data).startswith("**Figure 1.** The example is **nine**, which has 5")
    save_twice(report.figure1, data, output)


def test_the_projection_of_figure_1_keeps_sums():
    vectors = torch.nn.functional.normalize(small_cache().features("val")[:60], dim=1)
    labels = [*small_cache().labels("val")[:57].tolist(), -1, -1, -1]
    points = schematics._projected(vectors, labels)
    means = [points[np.array(labels) == c].mean(axis=0) for c in set(labels) - {-1}]
    assert np.mean(means, axis=0) == pytest.approx([0, 0], abs=1e-6)


def test_figure_3_the_three_parts_add_up_to_the_classifier(output):
    cache = small_cache()
    data = report.figure3_data(cache, 9, bars=4)
    parts = data[data["kind"] == "part"].set_index("name")
    final = hybrid_classifier(cache.prototypes, cache.weights, cache.counts, k=20)[9]
    assert parts.loc[list(schematics.PARTS), ["x", "y"]].sum().tolist() == pytest.approx(
        [float(final.norm()), 0], abs=1e-6
    )
    own = torch.nn.functional.cosine_similarity(final, cache.weights[9], dim=0)
    assert parts.loc["cosine", "cosine"] == pytest.approx(float(own), abs=1e-5)
    bars = data[data["kind"] == "attention"]
    assert bars["value"].sum() == pytest.approx(100, abs=1e-3) and bars["name"].iloc[-1] == "2 other classes"
    assert "nine" in report.figure3_in_words(data)
    save_twice(report.figure3, data, output)


def test_distributions_hold_every_class_of_both_data_sets(output):
    data = report.distribution_data({"one": COUNTS, "other": COUNTS[::-1] * 4})
    assert data.groupby("data set")["n"].sum().tolist() == [468, 4 * 468]
    assert data[data["data set"] == "other"]["n"].is_monotonic_decreasing
    save_twice(report.distributions, data, output)


def test_what_stands_in_place_of_the_papers_data_is_named():
    cache = small_cache()
    assert report.stands_for("ImageNet-LT", cache) == "In place of ImageNet-LT: digits"
    cache.meta = {"dataset": "places_lt"}
    assert report.stands_for("Places-LT", cache) == "Places-LT"


def test_group_names_follow_the_rule_of_the_paper():
    assert semantics.group_names(np.array([100, 99, 21, 20])) == ["many", "medium", "medium", "few"]
