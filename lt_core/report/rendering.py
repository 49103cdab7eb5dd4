"""How a table of `build_table` looks: Markdown for files and the README, HTML for notebooks."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from lt_core.groups import DESCRIPTIONS, RULES, check_rule
from lt_core.metrics import COLUMNS as GROUPS

MINUS = "\N{MINUS SIGN}"
ARROW = "\N{RIGHTWARDS ARROW}"
SIGNS = {
    "same": ("✓", "same sign as in print"),
    "other": ("✗", "opposite sign"),
    "open": ("○", "interval contains 0"),
}
KEY = "; ".join(f"{symbol} {meaning}" for symbol, meaning in SIGNS.values())
ACCURACY = ("published", "reproduced", "ci_low", "ci_high")
EFFECT = ("published_effect", "reproduced_effect", "effect_ci_low", "effect_ci_high")
STYLE = """<style>
figure.lt-table { margin: 0.5em 0; }
.lt-table .scroll { overflow-x: auto; max-width: 100%; }
.lt-table table { border-collapse: collapse; font-size: 0.85em; font-variant-numeric: tabular-nums; margin: 0; }
.lt-table th, .lt-table td { padding: 0.25em 0.7em; text-align: right; white-space: nowrap; border: 0; }
.lt-table td { vertical-align: top; }
.lt-table thead th { border-bottom: 1px solid currentColor; }
.lt-table th.block { text-align: left; padding-top: 0.8em; }
.lt-table th[scope=row] { text-align: left; font-weight: normal; white-space: normal; min-width: 9em; }
.lt-table .effect { opacity: 0.85; font-size: 0.92em; }
.lt-table .same { color: #0072B2; font-weight: bold; }
.lt-table .other { color: #D55E00; font-weight: bold; }
.lt-table figcaption { max-width: 60em; font-size: 0.85em; text-align: left; padding-top: 0.5em; }
</style>"""  # noqa: E501


@dataclass(frozen=True, repr=False)
class TableView:
    """A table under one grouping rule; shows itself as HTML in a notebook and as Markdown in print()."""

    frame: pd.DataFrame
    rule: str = "paper"

    def __post_init__(self) -> None:
        check_rule(self.rule)

    def _repr_html_(self) -> str:
        return to_html(self.frame, self.rule)

    def __repr__(self) -> str:
        return to_markdown(self.frame, self.rule)


def markdown_document(frame: pd.DataFrame) -> str:
    """The table under every grouping rule that it has rows for."""
    rules = [rule for rule in RULES if (frame["rule"] == rule).any()]
    parts = [f"## Grouping rule `{rule}`\n\n{to_markdown(frame, rule)}\n" for rule in rules]
    return "\n".join([f"# Table {frame['table'].iloc[0].removeprefix('T')}\n", *parts])


def to_markdown(frame: pd.DataFrame, rule: str) -> str:
    """One line a row; each cell `published → reproduced [interval]` and, below, the effect likewise."""
    notes = _Footnotes()
    columns = _columns(frame)
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for name, cells in _lines(frame, rule):
        label = _escaped(name) + notes.marks(cells, "<sup>({})</sup>") + _origin(frame, rule, cells)
        cell = [_markdown_cell(cells[group]) if group in cells else "" for group in columns]
        lines.append("| " + " | ".join([label, *cell]) + " |")
    footnotes = [f"({number}) {note}" for number, note in notes.numbered()]
    return "\n\n".join(["\n".join(lines), " ".join(_caption(frame, rule)), *footnotes])


def to_summary(frame: pd.DataFrame, rule: str = "paper") -> str:
    """The reproduced rows alone, `published → reproduced` without intervals: the table of the README."""
    columns = _columns(frame)
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for name, cells in _lines(frame[frame["reproduced"].notna()], rule):
        values = [_pair(cells[group], ACCURACY, _plain, "{}") if group in cells else "" for group in columns]
        lines.append("| " + " | ".join([_escaped(name.rpartition(" / ")[2]), *values]) + " |")
    return "\n".join(lines)


def to_html(frame: pd.DataFrame, rule: str) -> str:
    """A table that scrolls sideways in its own box; signs are marked by a symbol and by colour."""
    notes, groups = _Footnotes(), _columns(frame)
    lines = [
        (*name.rpartition(" / ")[::2], _origin(frame, rule, cells), cells)
        for name, cells in _lines(frame, rule)
    ]
    body, above = [], ""
    for block, label, run, cells in lines:
        runs = {other for name, _, other, _ in lines if name == block and other}
        shared = bool(block) and len(runs) == 1  # by all rows of the block: said once, in its heading
        if block and block != above:
            heading = _html_name(block) + (runs.pop() if shared else "")
            body.append(f'<tr><th class="block" colspan="{1 + len(groups)}">{heading}</th></tr>')
        above = block
        mark = notes.marks(cells, "<sup>({})</sup>")
        head = f'<th scope="row">{_html_name(label)}{mark}{"" if shared else run}</th>'
        body.append(f"<tr>{head}" + "".join(_html_cell(cells.get(group)) for group in groups) + "</tr>")
    columns = "".join(f'<th scope="col">{group}</th>' for group in groups)
    table = f"<table><thead><tr><th></th>{columns}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    below = [*_caption(frame, rule), *(f"({number}) {note}" for number, note in notes.numbered())]
    caption = "".join(f"<div>{html.escape(line)}</div>" for line in below)
    box = f'<div class="scroll" tabindex="0" role="region" aria-label="table">{table}</div>'
    return f'{STYLE}<figure class="lt-table">{box}<figcaption>{caption}</figcaption></figure>'


class _Footnotes:
    """Numbers the different notes of a table in the order of their first use."""

    def __init__(self) -> None:
        self.notes: dict[str, int] = {}

    def marks(self, cells: dict[str, pd.Series], form: str) -> str:
        numbers = [self.notes.setdefault(note, len(self.notes) + 1) for note in _notes(cells)]
        return form.format(", ".join(map(str, numbers))) if numbers else ""

    def numbered(self) -> list[tuple[int, str]]:
        return [(number, note) for note, number in self.notes.items()]


def _notes(cells: dict[str, pd.Series]) -> list[str]:
    """The different notes of a row; those of some printed values only name their groups."""
    groups: dict[str, list[str]] = {}
    for group, cell in cells.items():
        for note in filter(None, cell["note"].split("; ")):
            groups.setdefault(note, []).append(group)
    printed = {group for group, cell in cells.items() if not math.isnan(cell["published"])}
    return [
        note if printed <= set(having) else f"{', '.join(having)}: {note}" for note, having in groups.items()
    ]


def _columns(frame: pd.DataFrame) -> list[str]:
    """The groups that a table has values for: those of accuracies, or the `count` of Table 8."""
    filled = frame[frame[["published", "reproduced"]].notna().any(axis=1)]
    return [group for group in (*GROUPS, "count") if (filled["group"] == group).any()]


def _lines(frame: pd.DataFrame, rule: str) -> list[tuple[str, dict[str, pd.Series]]]:
    """(row name, {group: line of the frame}) in the order of the table.

    Rows that exist only under another rule (quoted systems) come with their total, which every rule shares.
    """
    lines = []
    for name in dict.fromkeys(frame["row"]):
        of_row = frame[frame["row"] == name]
        here = of_row[of_row["rule"] == rule]
        shown = here if len(here) else of_row[of_row["group"] == "total"]
        lines.append((name, {line["group"]: line for _, line in shown.iterrows()}))
    return lines


def _caption(frame: pd.DataFrame, rule: str) -> list[str]:
    here = frame[(frame["rule"] == rule) & frame["reproduced"].notna()]
    runs = [f"{run}." for run in dict.fromkeys(_run(line) for _, line in here.iterrows())]
    if _columns(frame) == ["count"]:
        return [f"Number of classes, printed {ARROW} reproduced (here of {here['n'].max()}).", *runs]
    text = [
        f"Top-1 accuracy in percent, printed {ARROW} reproduced with its 95 % interval; effect, "
        "below it, the difference to the reference row (the one without effects) in percentage points.",
        f"{KEY}.",
    ]
    if here.empty:
        return text
    sizes = here.drop_duplicates("group").set_index("group")["n"]
    images = ", ".join(f"{group} {sizes[group]}" for group in GROUPS if group in sizes)
    return [
        *text,
        f"Split {', '.join(dict.fromkeys(here['split']))}, n images: {images}.",
        f"Grouping rule {rule}: {DESCRIPTIONS[rule]} training images.",
        *runs,
    ]


def _run(line: pd.Series) -> str:
    return f"Backbone {line['backbone']}, checkpoint {line['checkpoint']}, seeds {line['seeds']}"


def _origin(frame: pd.DataFrame, rule: str, cells: dict[str, pd.Series]) -> str:
    """The row's run in small print where the rows of a table come from different runs."""
    here = frame[(frame["rule"] == rule) & frame["reproduced"].notna()]
    runs = dict.fromkeys(_run(line) for line in cells.values() if not math.isnan(line["reproduced"]))
    different = len(here.drop_duplicates(["backbone", "checkpoint", "seeds"])) > 1
    return f"<br><small>{html.escape('; '.join(runs))}</small>" if different and runs else ""


def _markdown_cell(line: pd.Series) -> str:
    accuracy = _pair(line, ACCURACY, _plain, "{} [{}, {}]")
    effect = _pair(line, EFFECT, _signed, "{} [{}, {}]")
    sign = _sign(line)
    mark = f" {SIGNS[sign][0]}" if sign else ""
    return accuracy + (f"<br>effect {effect}{mark}" if effect else "")


def _html_cell(line: pd.Series | None) -> str:
    """Accuracy and, below it, the effect."""
    if line is None:
        return "<td></td>"
    form = "<b>{}</b> <small>±{half}</small>"
    accuracy, effect = _pair(line, ACCURACY, _plain, form), _pair(line, EFFECT, _signed, form)
    if not effect:
        return f"<td>{accuracy}</td>"
    if sign := _sign(line):
        symbol, meaning = SIGNS[sign]
        effect += f' <span class="{sign}" title="{meaning}" aria-label="{meaning}">{symbol}</span>'
    return f'<td>{accuracy}<div class="effect">{effect}</div></td>'


def _html_name(name: str) -> str:
    """A row's name with its exponents raised: w^hc(20)."""
    return re.sub(r"w\^(hc?)", r"<i>w</i><sup>\1</sup>", html.escape(name))


def typeset(name: str) -> str:
    """A row's name for Markdown, with formulas: w^hc(20) becomes $w^{hc}(20)$."""
    return re.sub(r"w\^(hc?)\((\d+)\)", r"$w^{\1}(\2)$", name)


def _pair(line: pd.Series, columns: tuple[str, ...], number: Callable[[float], str], form: str) -> str:
    """`printed → reproduced`, the latter in a form of value, low, high and half width; empty without both."""
    printed, value, low, high = (line[column] for column in columns)
    if line["group"] == "count":
        number, form = _count, "{}"
    here = form.format(number(value), number(low), number(high), half=_plain((high - low) / 2))
    before, after = (number(printed) or "–"), ("–" if math.isnan(value) else here)
    return "" if before == after == "–" else f"{before} {ARROW} {after}"


def _sign(line: pd.Series) -> str:
    """same, other or open: the reproduced effect against the printed one; empty without both (or print 0)."""
    printed, low, high = line["published_effect"], line["effect_ci_low"], line["effect_ci_high"]
    if printed == 0 or any(math.isnan(value) for value in (printed, low, high)):
        return ""
    if low <= 0 <= high:
        return "open"
    return "same" if printed * low > 0 else "other"


def in_words(line: pd.Series) -> str:
    """The effect of one line of a table: in print, here with its interval, and whether the signs agree."""
    printed, value, low, high = (_signed(line[column]) for column in EFFECT)
    before = f"in print {printed}, " if printed else ""
    here = f"here {value} [{low}, {high}]" if value else "no value here"
    sign = _sign(line)
    return f"{before}{here} points" + (f" ({SIGNS[sign][1]})" if sign else "")


def _count(value: float) -> str:
    return "" if math.isnan(value) else f"{value:g}"


def _plain(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1f}".replace("-", MINUS)


def _signed(value: float) -> str:
    return "" if math.isnan(value) else f"{value:+.1f}".replace("-", MINUS)


def _escaped(name: str) -> str:
    return name.replace("|", "\\|").replace("*", "\\*")
