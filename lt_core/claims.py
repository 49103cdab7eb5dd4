"""The paper's claims as data (`claims.toml`) and the judge that reads them on the table of measured values.

    parts = judge_claims(values)          # a line for each part of each claim
    verdicts(parts)                       # a line for each claim

A rule is a list of lines `GROUPS: LEFT > RIGHT + MARGIN if CONDITION`; what is shown is what runs.

    >, <    the whole 95 % interval of LEFT - RIGHT lies on that side of the margin
    = ± m   the whole interval lies within m points
    RIGHT   a subject, a number, or the name of a set: then every member (`=`: the best of them)

Each part is in one of four states: it `holds`; it `fails`, when the interval lies on the other side; it is
`open`, when the interval contains the margin, so nothing is shown either way; it is `untestable`, when
something that it needs was not measured.
"""

from __future__ import annotations

import html
import re
import tomllib
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lt_core import paths, results
from lt_core.checks import InputError

BOOK = paths.PACKAGE / "claims.toml"
STATES = {  # of a part and of a claim, and what several of them do
    "holds": "hold",
    "fails": "fail",
    "open": "stay open",
    "untestable": "cannot be tested",
}
SINGULAR = dict(zip(STATES, ("holds", "fails", "stays open", "cannot be tested"), strict=True))
PRINT = {  # what print's own numbers say of a claim
    "yes": "its numbers support it",
    "partly": "its numbers support a part",
    "no": "its numbers do not support it",
    "plot": "no numbers",
}
LINE = re.compile(r"([\w, ]+?): (.+?) ([><=]) (.+?)(?: ([+±-]) ([\d.]+))?(?: if (\w+))?")
COLUMNS = (
    *("claim", "section", "statement", "print", "rule", "group", "state", "value", "low", "high"),
    *("against", "seeds", "needs"),
)


def read_book(path: Path = BOOK) -> dict[str, Any]:
    """The claims with `{name}` in their rules expanded, a line for each value of `each`."""
    book = tomllib.loads(path.read_text(encoding="utf-8"))
    for claim in book["claim"]:
        claim["rule"] = [line for rule in claim["rule"] for line in _expanded(rule, book["each"])]
    return book


def _expanded(rule: str, each: dict[str, list[str]]) -> list[str]:
    names = sorted(set(re.findall(r"{(\w+)}", rule)))
    choices = product(*(each[name] for name in names))
    return [rule.format(**dict(zip(names, values, strict=True))) for values in choices]


def subjects(book: dict[str, Any]) -> list[str]:
    """Every subject of the book that can be measured as it stands: those with a backbone and a name."""
    lines = [line for claim in book["claim"] for line in claim["rule"]]
    lines += [line for lines in book["conditions"].values() for line in lines]
    found = []
    for line in lines:
        _, left, _, right, *_ = _parsed(line)
        found += [left, *book["sets"].get(right, [right])]
    known = (*results.MEASURES, results.START, *results.classifiers.CLASSIFIERS, "own")
    return [
        text for text in dict.fromkeys(found) if "/" in text and results.Subject.parse(text).name in known
    ]


def _parsed(line: str) -> tuple[str, ...]:
    if not (match := LINE.fullmatch(line)):
        raise InputError(f"{BOOK.name}: a rule reads `GROUPS: LEFT > RIGHT`, found {line!r}")
    return match.groups()


# ---------------------------------------------------------------- the judge


def judge_claims(values: pd.DataFrame, book: dict[str, Any] | None = None) -> pd.DataFrame:
    """A line for each part of each claim (`COLUMNS`); values: the measured ones and derived rows."""
    book = book or read_book()
    lines = []
    for claim in book["claim"]:
        about = {
            "claim": claim["number"],
            "section": claim["section"],
            "statement": claim["statement"],
            "print": claim["print"],
        }
        for rule in claim["rule"]:
            lines += [about | {"rule": rule} | part for part in judge(rule, values, book)]
    frame = pd.DataFrame(lines, columns=list(COLUMNS))
    numbers = ["value", "low", "high"]
    frame[numbers] = frame[numbers].astype(float).round(3) + 0.0  # no negative zero
    return frame


def judge(rule: str, values: pd.DataFrame, book: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of one line of a rule, one for each group."""
    groups, left, operator, right, sign, number, condition = _parsed(rule)
    margin = float(number or 0) * (-1 if sign == "-" else 1)
    rivals = book["sets"].get(right, [right])
    parts = []
    for group in groups.split(", "):
        if condition and (needs := _unmet(condition, values, book)):
            parts.append({"group": group, "state": "untestable", "needs": needs})
            continue
        found = [(rival, _difference(values, left, rival, group)) for rival in rivals]
        missing = {n for text in (left, *rivals) for n in _missing(values, text, group)}
        known = [(rival, d, seeds) for rival, (d, seeds) in found if d is not None]
        if not known and not missing:
            missing = {f"a training seed that {left} and {right} share"}
        if operator == "=" and len(known) > 1:  # the best rival, draw by draw
            best = min(known, key=lambda one: one[1][0])
            known = [(best[0], np.min([d for _, d, _ in known], axis=0), best[2])]
        judged = [(rival, d, seeds, _state(d, operator, margin)) for rival, d, seeds in known]
        parts.append(
            {"group": group, "needs": ", ".join(sorted(missing))} | _worst(judged, operator, missing)
        )
    return parts


def _missing(values: pd.DataFrame, subject: str, group: str) -> list[str]:
    """The subject, if it was not measured for this group; with the reason where the table knows one."""
    if _number(subject) is not None:
        return []
    index = values.index
    if subject in index.get_level_values("subject") and (
        group in values.loc[subject].index.get_level_values("group")
    ):
        one = values.loc[subject].xs(group, level="group")
        if not np.isnan(one.iloc[0, 0]):
            return []
        return [f"classes in the group {group}"]
    return [values.attrs.get("missing", {}).get(subject, subject)]


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"-?[\d.]+", text) else None


def _difference(
    values: pd.DataFrame, left: str, right: str, group: str
) -> tuple[np.ndarray | None, list[int]]:
    """LEFT - RIGHT and its draws [1001] over the seeds that both have, and these; None: one is missing."""
    if _missing(values, left, group) or _missing(values, right, group):
        return None, []
    sides = [
        _number(text)
        if _number(text) is not None
        else values.loc[text].xs(group, level="group", drop_level=False)
        for text in (left, right)
    ]
    frames = [side for side in sides if not isinstance(side, float)]
    shared = set.intersection(*(set(frame.index.unique("seed")) for frame in frames))
    if not shared:
        return None, []
    frames = [f[f.index.get_level_values("seed").isin(shared)] for f in frames]
    sides = [side if isinstance(side, float) else frames.pop(0) for side in sides]
    draws = results.over_seeds(sides[0] - sides[1])
    return draws.loc[group].to_numpy(), sorted(shared)


def _state(draws: np.ndarray, operator: str, margin: float) -> str:
    low, high = np.percentile(draws[1:], [2.5, 97.5])
    if operator == "=":
        margin = abs(margin)
        return "holds" if -margin <= low and high <= margin else _open_unless(low > margin or high < -margin)
    if operator == "<":
        low, high, margin = -high, -low, -margin
    return "holds" if low > margin else _open_unless(high < margin)


def _open_unless(fails: bool) -> str:
    return "fails" if fails else "open"


def _worst(judged: Sequence[tuple], operator: str, missing: set[str]) -> dict[str, Any]:
    """The state of a part and the rival that decides it: one that fails, then what is missing, then open."""
    order = {"fails": 0, "open": 1, "holds": 2}
    part: dict[str, Any] = {"state": "untestable"}
    if judged:
        side = -1 if operator == "<" else 1
        rival, draws, seeds, state = min(judged, key=lambda one: (order[one[3]], side * one[1][0]))
        low, high = np.percentile(draws[1:], [2.5, 97.5])
        part |= {"value": draws[0], "low": low, "high": high, "against": rival}
        part["seeds"] = " ".join(map(str, seeds))
        part["state"] = "untestable" if missing and state != "fails" else state
    return part


def _unmet(condition: str, values: pd.DataFrame, book: dict[str, Any]) -> str:
    """Why a condition does not hold; empty when it does."""
    for rule in book["conditions"][condition]:
        for part in judge(rule, values, book):
            if part["state"] != "holds":
                found = f", found {part['value']:.1f}" if "value" in part else f" ({part['needs']})"
                return f"{rule}{found}"
    return ""


# ---------------------------------------------------------------- verdicts


def state_of(states: Sequence[str]) -> str:
    """The verdict of a claim from the states of its parts."""
    for state in ("fails", "untestable", "open"):
        if state in list(states):
            return state
    return "holds"


def verdicts(parts: pd.DataFrame) -> pd.DataFrame:
    """A line for each claim: claim, section, statement, print, state, parts (how many), hold (how many)."""
    by_claim = parts.groupby("claim", sort=True)
    found = by_claim[["section", "statement", "print"]].first()
    found["state"] = by_claim["state"].agg(state_of)
    found["parts"] = by_claim["state"].size()
    found["hold"] = by_claim["state"].agg(lambda states: int((states == "holds").sum()))
    return found.reset_index()


def counted(found: pd.DataFrame, where: str = "") -> str:
    """How many claims are in each state: `27 hold here, 20 fail, 11 stay open and 10 cannot be tested`."""
    numbers = found["state"].value_counts()
    parts = [f"{numbers.get(s, 0)} {(STATES if numbers.get(s, 0) != 1 else SINGULAR)[s]}" for s in STATES]
    return f"{parts[0]}{where}, {parts[1]}, {parts[2]} and {parts[3]}"


def load_claims(out: Path, numbers: Sequence[int]) -> pd.DataFrame:
    """The verdicts of some claims as the last run of notebook 99 wrote them; empty where there is none."""
    file = out / "claims.csv"
    if not file.is_file():
        return pd.DataFrame(columns=["claim", "section", "statement", "print", "state", "parts", "hold"])
    paths.check_sum(file)
    parts = pd.read_csv(file, keep_default_na=False)
    return verdicts(parts[parts["claim"].isin(numbers)]).set_index("claim").reset_index()


MARKS = {"holds": "✓", "fails": "✗", "open": "○", "untestable": "?"}


class ClaimsView:
    """Some claims with their verdicts, as notebook 99 judged them; HTML in a notebook, text in print().

    First a line: how many are in each state, and which; then, folded, what each says.
    """

    def __init__(self, found: pd.DataFrame) -> None:
        self.found = found

    def _repr_html_(self) -> str:
        if self.found.empty:
            return '<p class="note">The claims are not judged yet: run notebook 99_claims.</p>'
        counts = "; ".join(self._of_state(state) for state in STATES if (self.found["state"] == state).any())
        lines = [
            f'<tr><td class="{c.state}"><b>{MARKS[c.state]}</b> {c.state}</td><th scope="row">'
            f"{_link(c.claim)}. {html.escape(c.statement)} "
            f"<small>({c.hold} of {c.parts} parts; print: {PRINT[c.print]})</small></th></tr>"
            for c in self.found.itertuples()
        ]
        return (
            f'<p class="verdicts"><strong>Claims of the paper on this page:</strong> {counts}.</p>'
            f"<details><summary>What they say</summary>"
            f'<table class="claims"><tbody>{"".join(lines)}</tbody></table></details>'
        )

    def _of_state(self, state: str) -> str:
        """`✓ 3 hold (9, 10, 12)`."""
        numbers = self.found["claim"][self.found["state"] == state]
        words = STATES[state] if len(numbers) > 1 else SINGULAR[state]
        links = ", ".join(map(_link, numbers))
        return f'<span class="{state}">{MARKS[state]} {len(numbers)} {words}</span> ({links})'

    def __repr__(self) -> str:
        return "\n".join(
            f"{MARKS[c.state]} {c.claim}. {c.statement} {c.state}" for c in self.found.itertuples()
        )


def _link(claim: int) -> str:
    return f'<a href="99_claims.html#claim-{claim}">{claim}</a>'


def show_claims(out: Path, numbers: Sequence[int]) -> ClaimsView:
    """The verdicts of some claims, from the claims.csv in the folder `out`, for display in a notebook."""
    return ClaimsView(load_claims(out, numbers))
