"""The judge: each state by a made-up table, sets, conditions; the book of claims."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lt_core import claims
from lt_core.checks import InputError
from lt_core.claims import judge, judge_claims, read_book, state_of, verdicts

BOOK = {
    "sets": {"rivals": ["a/low", "a/middle"], "partly": ["a/low", "a/absent"]},
    "conditions": {"alike": ["total: a/high = a/twin ± 1"], "apart": ["total: a/high = a/low ± 1"]},
}


def rows(subject: str, value: float, half: float = 0.5, seeds: tuple[int, ...] = (0,), noise: int = 0):
    """A subject whose draws lie evenly within `half` of the value."""
    draws = value + half * np.linspace(-1, 1, 1000)
    draws = np.random.default_rng(noise).permutation(draws) if noise else draws
    index = pd.MultiIndex.from_product([[subject], seeds, ["total"]], names=["subject", "seed", "group"])
    return pd.DataFrame(np.tile([value, *draws], (len(seeds), 1)), index)


VALUES = pd.concat(
    [
        rows("a/low", 10, 0.5),
        rows("a/middle", 20, 0.5),
        rows("a/high", 30, 0.5),
        rows("a/twin", 30.1, 0.5),
        rows("a/loose", 30, 3.0, noise=1),
        rows("a/three", 30, 0.5, seeds=(0, 1, 2)),
        rows("a/later", 10, 0.5, seeds=(7,)),
    ]
)


@pytest.mark.parametrize(
    ("rule", "state"),
    [
        ("a/high > a/low", "holds"),
        ("a/low > a/high", "fails"),
        ("a/loose > a/high", "open"),
        ("a/high > a/absent", "untestable"),
        ("a/low < a/high", "holds"),
        ("a/high < a/low", "fails"),
        ("a/loose < a/high", "open"),
        ("a/high > a/low + 19", "holds"),
        ("a/high > a/low + 20", "open"),
        ("a/high > a/low + 21", "fails"),
        ("a/twin < a/high - 1", "fails"),
        ("a/low > a/middle - 11", "holds"),
        ("a/high = a/twin ± 1", "holds"),
        ("a/high = a/low ± 1", "fails"),
        ("a/loose = a/high ± 1", "open"),
        ("a/high = a/absent ± 1", "untestable"),
        ("a/high > 29", "holds"),
        ("a/high < 29", "fails"),
        ("a/high > 30", "open"),
        ("a/high > rivals", "holds"),
        ("a/low > rivals - 1", "fails"),
        ("a/middle = rivals ± 1", "holds"),
        ("a/high > partly", "untestable"),
        ("a/low > partly + 1", "fails"),
        ("a/three > a/low", "holds"),
        ("a/high > a/later", "untestable"),
        ("a/high > a/low if alike", "holds"),
        ("a/high > a/low if apart", "untestable"),
    ],
)
def test_every_state(rule, state):
    (part,) = judge(f"total: {rule}", VALUES, BOOK)
    assert part["state"] == state
    assert (state == "untestable") <= bool(part["needs"])


def test_equality_needs_its_whole_interval():
    """A point within the margin is not enough: noise does not make two things equal."""
    (part,) = judge("total: a/loose = a/high ± 1", VALUES, BOOK)
    assert abs(part["value"]) < 1 and part["state"] == "open"


def test_a_part_names_the_rival_that_decides_and_the_seeds():
    (part,) = judge("total: a/high > rivals", VALUES, BOOK)
    assert part["against"] == "a/middle" and part["seeds"] == "0"
    assert part["value"] == pytest.approx(10) and part["low"] <= part["value"] <= part["high"]


def test_a_group_without_classes_is_untestable():
    empty = rows("a/empty", float("nan"))
    (part,) = judge("total: a/empty > a/low", pd.concat([VALUES, empty]), BOOK)
    assert part["state"] == "untestable" and "classes in the group" in part["needs"]


@pytest.mark.parametrize(
    ("states", "verdict"),
    [
        (["holds", "holds"], "holds"),
        (["holds", "open"], "open"),
        (["open", "untestable"], "untestable"),
        (["holds", "fails", "untestable"], "fails"),
    ],
)
def test_the_verdict_of_a_claim(states, verdict):
    assert state_of(states) == verdict


def test_parts_and_verdicts_of_a_book():
    claim = {"number": 1, "section": "A", "statement": "High is high.", "print": "yes"}
    book = BOOK | {"claim": [claim | {"rule": ["total: a/high > a/low", "total: a/loose > a/high"]}]}
    parts = judge_claims(VALUES, book)
    assert list(parts.columns) == list(claims.COLUMNS) and list(parts["state"]) == ["holds", "open"]
    (found,) = verdicts(parts).to_dict("records")
    assert (found["state"], found["parts"], found["hold"]) == ("open", 2, 1)


@pytest.mark.parametrize("rule", ["few sqrt/cosine > sqrt/wh20", "few: a/b >= c/d", "few: a/b"])
def test_a_line_that_is_no_rule_is_refused(rule):
    with pytest.raises(InputError, match=r"GROUPS: LEFT > RIGHT"):
        judge(rule, VALUES, BOOK)


# ---------------------------------------------------------------- the book


def test_the_book_has_all_68_claims():
    book = read_book()
    assert [claim["number"] for claim in book["claim"]] == list(range(1, 69))
    assert {claim["print"] for claim in book["claim"]} <= {"yes", "partly", "no", "plot"}
    for claim in book["claim"]:
        assert claim["rule"] and all(claims.LINE.fullmatch(line) for line in claim["rule"])


def test_conditions_and_sets_of_the_book_are_used_and_known():
    book = read_book()
    lines = [line for claim in book["claim"] for line in claim["rule"]]
    used = {match[7] for line in lines if (match := claims.LINE.fullmatch(line)) and match[7]}
    assert used == set(book["conditions"])
    assert all(any(f" {name}" in line for line in lines) for name in book["sets"])


def test_compared_systems_stand_where_the_tables_have_them():
    """The sets of rivals are the quoted rows of Tables 1 and 3."""
    from lt_core.tables import published

    quoted = published()[published()["rule"] == "common"]
    book = read_book()
    assert set(book["sets"]["compared"]) == set(quoted[quoted["table"] == "T1"]["subject"])


def test_claims_are_shown_from_the_file(tmp_path):
    assert "run notebook 99" in claims.show_claims(tmp_path, [1])._repr_html_()
    claim = {"number": 1, "section": "A", "statement": "High & <b>mighty</b>", "print": "yes"}
    book = BOOK | {"claim": [claim | {"rule": ["total: a/high > a/low"]}]}
    judge_claims(VALUES, book).to_csv(tmp_path / "claims.csv", index=False)
    html = claims.show_claims(tmp_path, [1, 2])._repr_html_()
    assert "✓ 1 holds</span> (<a" in html and "&lt;b&gt;mighty" in html and "1 of 1 parts" in html


def test_claims_are_counted_in_words():
    found = pd.DataFrame({"state": ["holds", "holds", "fails", "open", "open"]})
    words = "2 hold here, 1 fails, 2 stay open and 0 cannot be tested"
    assert claims.counted(found, " here") == words
