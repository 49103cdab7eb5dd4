"""Tables as joins of print with measured values: effects, seeds, rules, files, display."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from study import accuracy, made_cache, study  # noqa: F401 (study is a fixture)

from lt_core import paths, tables
from lt_core.checks import InputError
from lt_core.classifiers import predict
from lt_core.tables import Row, build_table, printed_rows, published, rows_on, save_table, show_table, wide

HOSTILE = "<script>alert(1)</script> & $x$"
ROWS = [
    Row("Ours* / Cosine classifier", "sqrt/cosine", "", ("T1", "Ours* / Cosine classifier")),
    Row("Ours* / w^h(20)", "sqrt/wh20", "sqrt/cosine", ("T1", "Ours* / w^h(20)")),
    Row("LADE [14]", "lade/own", "sqrt/cosine", ("T1", "LADE [14]")),
    Row("Causal norm* [29]", "causal_norm/own", "sqrt/cosine", ("T1", "Causal norm* [29]")),
]


@pytest.fixture
def table(study):  # noqa: F811
    return build_table("T1", ROWS, "made_up")


def cell(table: pd.DataFrame, row: str, group: str, rule: str = "paper") -> pd.Series:
    return table[(table["row"] == row) & (table["group"] == group) & (table["rule"] == rule)].iloc[0]


def test_print_stands_beside_what_was_measured(table):
    found = cell(table, "Ours* / w^h(20)", "few")
    assert found["published"] == 48.2 and found["published_effect"] == pytest.approx(48.2 - 20.6)
    caches = [made_cache("sqrt", seed) for seed in (0, 1, 2)]
    mean = np.mean([accuracy(cache, predict(cache, "wh20")) for cache in caches])
    total = cell(table, "Ours* / w^h(20)", "total")
    assert total["reproduced"] == pytest.approx(mean, abs=0.005) and total["seeds"] == "0 1 2"
    assert total["ci_low"] < total["reproduced"] < total["ci_high"] and total["n"] == 180


def test_effects_use_common_seeds_and_say_which(table):
    """LADE has one seed, the cosine classifier three: their difference is over the one that both have."""
    found = cell(table, "LADE [14]", "total")
    one, other = made_cache("lade", 0), made_cache("sqrt", 0)
    expected = accuracy(one, predict(one, "own")) - accuracy(other, predict(other, "cosine"))
    assert found["effect_seeds"] == "0" and found["reproduced_effect"] == pytest.approx(expected, abs=0.005)
    assert cell(table, "Ours* / w^h(20)", "total")["effect_seeds"] == "0 1 2"


def test_printed_groups_stand_under_their_own_rule(table):
    assert np.isnan(cell(table, "LADE [14]", "few")["published"])
    assert cell(table, "LADE [14]", "few", "common")["published"] == 31.2
    assert (
        cell(table, "LADE [14]", "total")["published"]
        == cell(table, "LADE [14]", "total", "common")["published"]
    )
    assert np.isnan(cell(table, "Ours* / w^h(20)", "few", "common")["published"])


def test_a_system_without_a_run_keeps_its_printed_values_under_its_rule(table):
    of_row = table[table["row"] == "Causal norm* [29]"]
    assert set(of_row["rule"]) == {"common"} and of_row["reproduced"].isna().all()
    assert "Causal norm" in repr(show_table(table))


def test_left_out_classes_have_no_few_shot_value(study):  # noqa: F811
    rows = [Row("learned", "continual/cosine"), Row("prototypes", "continual/prototypes", "continual/cosine")]
    table = build_table("T2", rows, "made_up")
    assert np.isnan(cell(table, "learned", "few")["reproduced"])
    assert np.isnan(cell(table, "prototypes", "total")["reproduced_effect"])
    assert not np.isnan(cell(table, "prototypes", "total")["reproduced"])


def test_counts_of_classes(study):  # noqa: F811
    table = build_table("T8", [Row("Square root", "sqrt/mismatches")], "made_up")
    assert list(table["group"].unique()) == ["count"] and "of 6" in repr(show_table(table))


def test_within_group_rows_have_no_total(study):  # noqa: F811
    table = build_table("T5", [Row("Square root", "sqrt/prototypes within")], "made_up")
    assert np.isnan(cell(table, "Square root", "total")["reproduced"])
    assert cell(table, "Square root", "few")["reproduced"] > 0


def test_names_must_differ(study):  # noqa: F811
    with pytest.raises(InputError, match="different names"):
        build_table("T1", [ROWS[0], ROWS[0]], "made_up")


def test_the_note_says_what_validation_chose(study):  # noqa: F811
    table = build_table(
        "S1", rows_on("sqrt", {"cosine": "cosine", "adjusted": "logit_adjustment"}), "made_up"
    )
    assert cell(table, "adjusted", "total")["note"].startswith("chosen on validation images: strength ")


# ---------------------------------------------------------------- print


def test_every_printed_number_is_there():
    lines = published()
    assert len(lines[~lines["note"].str.contains("printed in Table 9")]) == 306
    assert set(lines["rule"]) == {"paper", "common"}
    assert not lines.duplicated(["table", "row", "group"]).any()


def test_quoted_systems_stand_on_the_first_stage_of_their_authors():
    rows = {row.row: row.subject for row in printed_rows("T1")}
    assert rows["LWS [16]"] == "uniform_dot/lws" and rows["BALMS [25]"] == "uniform_dot/balms"
    assert rows["Disalign* [34]"] == "uniform/disalign" and rows["LADE [14]"] == "lade/own"
    rows = {row.row.removeprefix("ResNet152 backbone / "): row.subject for row in printed_rows("T3")}
    assert rows["LWS [16]"] == "imagenet_deep_uniform/lws" and rows["LADE [14]"] == "places_lade/own"
    assert rows["BALMS [25]"] == "imagenet_deep_uniform/balms"
    assert rows["Disalign R152 [34]"] == "imagenet_deep_uniform/disalign"
    assert rows["ResNet101 backbone / Disalign R101 [34]"] == "imagenet_uniform/disalign"


@pytest.mark.parametrize("table", ["T1", "T2", "T3", "T4a", "T4b", "T5", "T6", "T7", "T9"])
def test_every_reference_is_a_row_of_its_table(table):
    """Print has no cosine classifier on the deeper network of Table 3; notebook 03 adds it."""
    rows = printed_rows(table)
    references = {row.against for row in rows if row.against} - {"imagenet_deep_sqrt/cosine"}
    assert references <= {row.subject for row in rows}


def test_an_unknown_table_lists_the_known_ones():
    with pytest.raises(InputError, match=r"unknown published table 'T10'.*T1"):
        printed_rows("T10")


# ---------------------------------------------------------------- files and display


def test_files(table, tmp_path):
    save_table(table, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "T1.csv",
        "T1.md",
        "T1.tex",
        "T1_wide.csv",
        paths.SUMS,
    }
    again = tables.load_table(tmp_path / "T1.csv")
    pd.testing.assert_frame_equal(again, table.reset_index(drop=True), check_dtype=False)
    assert list(again.columns) == list(tables.COLUMNS) and "-0.0" not in (tmp_path / "T1.csv").read_text()
    latex = (tmp_path / "T1.tex").read_text()
    assert latex.count("\\textbf") == 4 and "\\toprule" in latex and "$w^{h}$(20)" in latex
    assert wide(table).loc["LADE [14]", "total"] == cell(table, "LADE [14]", "total")["reproduced"]


def test_nobody_takes_us_for_the_authors(table):
    for text in (show_table(table)._repr_html_(), repr(show_table(table))):
        assert "Ours" not in text and "Parisot et al., re-run here" in text


def test_the_best_of_a_block_is_bold_and_signs_are_words_too(table):
    html = show_table(table)._repr_html_()
    best = max(
        cell(table, row, "total")["reproduced"] for row in ("Ours* / Cosine classifier", "Ours* / w^h(20)")
    )
    assert f"<b>{best:.1f}</b>" in html and html.count('class="best"') == 4
    assert 'aria-label="' in html and "<details>" in html


def test_only_some_rows_are_shown_and_all_are_a_click_below(table):
    html = show_table(table, rows=["LADE [14]", "Ours* / w^h(20)"])._repr_html_()
    shown, whole = html.split("<summary>All 4 rows</summary>")
    assert "Cosine classifier" not in shown and shown.index("LADE") < shown.index("<sup>h</sup>")
    assert "Cosine classifier" in whole and "Causal norm" in whole


def test_the_caption_names_the_reference_by_its_row(table):
    assert "difference in points to Cosine classifier," in repr(show_table(table))


def test_print_has_no_arrow_of_its_own(table):
    """LADE's groups are printed under another rule: nothing stands left of its values here."""
    row = show_table(table, rows=["LADE [14]"])._repr_html_().split("All 4 rows")[0]
    assert row.count("→") == 3  # total and its effect; one in the caption


def test_answers_have_a_proper_minus(tmp_path):
    tables.save_answer(tmp_path, "01_main", "many-shot -8.0 [-9.1, +0.2], a 2-way w-1")
    text = (tmp_path / "answers" / "01_main.md").read_text()
    assert text == "many-shot −8.0 [−9.1, +0.2], a 2-way w-1\n"


def test_estimates_as_texts():
    found = pd.DataFrame({"value": [-1.04], "low": [-2.0], "high": [0.06]}, index=["few"])
    assert tables.with_intervals(found)["few"] == "−1.0 [−2.0, +0.1]"
    assert tables.with_intervals(-found / 100, sign="")["few"] == "0.0 [0.0, 0.0]"


def test_names_are_text(study):  # noqa: F811
    table = build_table("S9", [Row(HOSTILE, "sqrt/cosine", note=HOSTILE)], "made_up")
    html = show_table(table)._repr_html_()
    assert "<script" not in html and "&lt;script&gt;" in html
