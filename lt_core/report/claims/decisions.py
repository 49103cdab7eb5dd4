"""Claims as declarations, and the decisions that they are made of.

A test takes a Study and gives parts; a claim holds only if every part does. A claim of difference needs a
95 % interval without 0; a claim of equality has a margin in points.

    Claim(9, "...", "yes", "few-shot: prototypes above ...", beats(proto(), cos(), "few"))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps

from lt_core.report.claims.study import Entry, Estimate, Study, System
from lt_core.report.claims.untestable import Untestable
from lt_core.report.rendering import MINUS

EQUAL = 1.0  # points: equal, on a par, as good as
COMPARABLE = 1.5  # points: about level, little effect


@dataclass(frozen=True)
class Part:
    """One thing that a claim says: numbers, and whether it holds; None where it cannot be tested.

    needs: what a test would take, where it cannot be made. open: the interval of its difference contains 0,
    so that a part which does not hold is not shown rather than contradicted.
    """

    text: str
    holds: bool | None
    needs: str = ""
    open: bool = False


Test = Callable[[Study], list[Part]]


@dataclass(frozen=True)
class Claim:
    """One claim of the paper in our words.

    in_print: `yes`, `partly` or `no`, as far as the printed numbers support it; `plot`: print has no numbers.
    rule: in words, what decides; tests: what does, all parts together.
    """

    number: int
    statement: str
    in_print: str
    rule: str
    tests: Sequence[Test] = field(repr=False)

    def parts(self, study: Study) -> list[Part]:
        return [found for test in self.tests for found in test(study)]


def verdict(found: Sequence[Part]) -> str:
    """`fails` if any part does, else `untestable` if any part is, else `holds`."""
    outcomes = [one.holds for one in found]
    if False in outcomes:
        return "fails"
    return "untestable" if None in outcomes or not outcomes else "holds"


def parts(make: Callable[[Study], list[Part]]) -> Test:
    """A test that says what it would take where something that it needs does not exist."""

    @wraps(make)
    def test(study: Study) -> list[Part]:
        try:
            return make(study)
        except Untestable as missing:
            return [Part("", None, str(missing))]

    return test


def part(make: Callable[[Study], Part]) -> Test:
    """A test of one part, guarded likewise."""
    return wraps(make)(parts(lambda study: [make(study)]))


def together(tests: Sequence[Test]) -> Test:
    """All parts of several tests."""
    return lambda study: [found for test in tests for found in test(study)]


# ---------------------------------------------------------------- comparing accuracies


Side = Entry | System
Rivals = Side | Sequence[Side]


def beats(side: Side, rivals: Rivals, *groups: str, by: float | None = None) -> Test:
    """In each group: above every rival, the interval of each difference above 0.

    by: also, the least difference in points to the best rival; a negative one (at most so far below) alone
    decides, whatever the interval.
    """
    return _each_group(groups, lambda study, group: _against(study, side, rivals, group, by))


def level(side: Side, rivals: Rivals, *groups: str, margin: float = EQUAL) -> Test:
    """In each group: within the margin (points) of the rival, of several the best."""
    return _each_group(groups, lambda study, group: _against(study, side, rivals, group, -margin, margin))


def lowest(side: Side, rivals: Sequence[Side], *groups: str) -> Test:
    """In each group: below every rival, the interval of each difference below 0."""
    return _each_group(groups, lambda study, group: _below(study, side, rivals, group))


def _each_group(groups: Sequence[str], make: Callable[[Study, str], Part]) -> Test:
    return together([part(lambda study, group=group: make(study, group)) for group in groups])


def _against(
    study: Study, side: Side, rivals: Rivals, group: str, lower: float | None, upper: float = float("inf")
) -> Part:
    rivals = [rivals] if isinstance(rivals, Entry | System) else rivals
    own = study.accuracy(side, group)
    found, needs = [], []
    for rival in rivals:
        try:
            found.append((own - study.accuracy(rival, group), rival))
        except Untestable as missing:
            needs.append(str(missing))
    if not found:
        return Part("", None, "; ".join(needs))
    difference, closest = min(found, key=lambda pair: pair[0].low if lower is None else pair[0].value)
    enough = all(_enough(d, lower) for d, _ in found)
    text = _difference_text(group, side, closest, difference)
    if len(rivals) > 1:
        text += f" (closest of {len(found)} rivals)"
    # Another rival can only lower the difference to the best one.
    if enough and needs:
        return Part(text, None, "; ".join(needs))
    return Part(text, enough and difference.value <= upper, open=difference.open)


def _enough(difference: Estimate, least: float | None) -> bool:
    if least is not None and difference.value < least:
        return False
    return (least is not None and least <= 0) or difference.low > 0


def _below(study: Study, side: Side, rivals: Sequence[Side], group: str) -> Part:
    own = study.accuracy(side, group)
    found = [(own - study.accuracy(rival, group), rival) for rival in rivals]
    difference, closest = max(found, key=lambda pair: pair[0].high)
    text = _difference_text(group, side, closest, difference)
    if len(found) > 1:
        text += f" (closest of {len(found)} rivals)"
    return Part(text, all(d.high < 0 for d, _ in found), open=difference.open)


# ---------------------------------------------------------------- numbers in words


def signed(value: float, digits: int = 1) -> str:
    """A difference with its sign, without a negative zero."""
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", MINUS)


def with_interval(estimate: Estimate, digits: int = 1) -> str:
    """A difference as `+1.2 [+0.4, +2.0]`."""
    low, high = signed(estimate.low, digits), signed(estimate.high, digits)
    return f"{signed(estimate.value, digits)} [{low}, {high}]"


def plain(estimate: Estimate, digits: int = 1) -> str:
    """A number as `51.2 [50.1, 52.3]`."""
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]".replace(
        "-", MINUS
    )


def minus(one: Side, other: Side) -> str:
    """Both sides in words, the backbone once where it is the same or where only it differs."""
    if isinstance(other, System):
        return f"{one.what} on `{one.backbone}` {MINUS} {other.what}"
    if one.backbone == other.backbone:
        return f"{one.what} {MINUS} {other.what} on `{one.backbone}`"
    if one.what == other.what:
        return f"{one.what}, `{one.backbone}` {MINUS} `{other.backbone}`"
    return f"{one.what} on `{one.backbone}` {MINUS} {other.what} on `{other.backbone}`"


def _difference_text(group: str, one: Side, other: Side, difference: Estimate) -> str:
    return f"{group}: {minus(one, other)} {with_interval(difference)}"
