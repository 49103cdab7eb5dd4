"""Figure S_claims: all claims on one page, print's verdict beside ours."""

from __future__ import annotations

import textwrap

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lt_core.report.claims.verdicts import VERDICTS, section_of
from lt_core.report.figures import BLACK, BLUE, GREY, ORANGE, VERMILLION

MARKS = {  # symbol, colour
    "holds": ("✓", BLUE),
    "fails": ("✗", VERMILLION),
    "untestable": ("?", GREY),
    "yes": ("✓", BLUE),
    "partly": ("◐", ORANGE),
    "no": ("✗", VERMILLION),
    "plot": ("–", GREY),
}
KEY = (
    "Print: {yes} printed numbers support it   {partly} some do   {no} they do not   {plot} no numbers in "
    "print\nHere: {holds} holds   {fails} fails   {untestable} cannot be tested"
)
WIDTH = 72  # characters a line
COLUMN = 12.0  # width of a column in the units of the axes, whose rows are 1 high
CELL = 0.62


def claims_page(found: pd.DataFrame) -> Figure:
    """All claims in two columns: number, statement, print's verdict and ours. found: of `evaluate_claims`."""
    rows = _rows(found)
    half = _break(rows)
    columns = [rows[:half], rows[half:]]
    height = max(sum(row[0] for row in column) for column in columns)
    fig, ax = plt.subplots(figsize=(11.6, 0.245 * height + 1.1))
    ax.set_xlim(0, 2 * COLUMN + 0.6)
    ax.set_ylim(height + 0.2, -2.6)
    ax.axis("off")
    for number, column in enumerate(columns):
        _column(ax, column, number * (COLUMN + 0.6))
    _key(ax, found)
    return fig


def page_data(found: pd.DataFrame) -> pd.DataFrame:
    """What the page shows: claim, section, statement, in_print, verdict."""
    sections = found["claim"].map(section_of)
    return found[["claim", "statement", "in_print", "verdict"]].assign(section=sections)


def _rows(found: pd.DataFrame) -> list[tuple[float, str, pd.Series | None]]:
    """(height, text, claim) of every line of the page; headings have no claim."""
    rows, section = [], ""
    for _, claim in found.iterrows():
        if section_of(claim["claim"]) != section:
            section = section_of(claim["claim"])
            rows.append((1.5, f"{section}  ({_tally(found, section)})", None))
        text = textwrap.fill(claim["statement"], WIDTH)
        rows.append((1.0 if "\n" not in text else 1.55, text, claim))
    return rows


def _tally(found: pd.DataFrame, section: str) -> str:
    """How many claims of a section hold, fail, cannot be tested: `2 ✓, 5 ✗, 1 ?`."""
    inside = found.loc[found["claim"].map(section_of) == section, "verdict"]
    counts = {name: int((inside == name).sum()) for name in VERDICTS}
    return ", ".join(f"{count} {MARKS[name][0]}" for name, count in counts.items() if count)


def _break(rows: list[tuple[float, str, pd.Series | None]]) -> int:
    """Where the second column begins: at the heading that makes the longer column shortest."""
    headings = [index for index, row in enumerate(rows) if row[2] is None][1:]
    if not headings:
        return len(rows)
    heights = [row[0] for row in rows]
    return min(headings, key=lambda index: max(sum(heights[:index]), sum(heights[index:])))


def _column(ax: Axes, rows: list[tuple[float, str, pd.Series | None]], left: float) -> None:
    print_at, here_at = left + COLUMN - 1.55, left + COLUMN - 0.6
    for x, name in ((print_at, "print"), (here_at, "here")):
        ax.text(x, -0.1, name, ha="center", va="bottom", size=8, color=GREY)
    top = 0.0
    for height, text, claim in rows:
        middle = top + height / 2
        if claim is None:
            ax.text(left, middle + 0.15, text, va="center", size=9.5, weight="bold")
        else:
            ax.text(left + 0.55, middle, f"{claim['claim']}", va="center", ha="right", size=8, color=GREY)
            ax.text(left + 0.75, middle, text, va="center", size=8, linespacing=1.1)
            _mark(ax, print_at, middle, claim["in_print"], filled=False)
            _mark(ax, here_at, middle, claim["verdict"], filled=True)
            ax.plot([left, left + COLUMN], [top + height] * 2, color=GREY, lw=0.3, alpha=0.5)
        top += height


def _mark(ax: Axes, x: float, y: float, name: str, filled: bool) -> None:
    """A cell with a symbol: print's in outline, ours filled."""
    symbol, colour = MARKS[name]
    box = {"facecolor": colour if filled else "white", "edgecolor": colour, "linewidth": 1.0}
    ax.add_patch(Rectangle((x - CELL / 2, y - 0.4), CELL, 0.8, **box))
    ax.text(
        x, y, symbol, ha="center", va="center", size=9, color="white" if filled else colour, weight="bold"
    )


def _key(ax: Axes, found: pd.DataFrame) -> None:
    text = KEY.format(**{name: symbol for name, (symbol, _) in MARKS.items()})
    ax.text(0, -2.5, text, va="top", size=8.5, color=BLACK, linespacing=1.5)
    counts = {name: int((found["verdict"] == name).sum()) for name in VERDICTS}
    text = f"{counts['holds']} hold, {counts['fails']} fail, {counts['untestable']} untestable"
    ax.text(2 * COLUMN + 0.3, -2.5, text, va="top", ha="right", size=11, weight="bold", color=BLACK)
