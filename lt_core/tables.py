"""The paper's tables: printed values (`published.csv`) joined with the table of measured values.

table = build_table("T1", printed_rows("T1"), "embedded")
save_table(table, out)                          # T1.csv, T1.md, T1.tex, T1_wide.csv
show_table(table)                               # in a notebook
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import HTML, Markdown

from lt_core import paths, results
from lt_core.checks import InputError, unknown
from lt_core.metrics import COLUMNS as GROUPS
from lt_core.metrics import RULES, group_of
from lt_core.results import Subject

NUMBERS = (
    *("published", "reproduced", "ci_low", "ci_high"),
    *("published_effect", "reproduced_effect", "effect_ci_low", "effect_ci_high"),
)
COLUMNS = (
    *("table", "row", "group", *NUMBERS, "rule", "split", "n", "checkpoint", "backbone", "seeds", "note"),
    *("subject", "against", "effect_seeds"),
)
MINUS, ARROW = "\N{MINUS SIGN}", "\N{RIGHTWARDS ARROW}"
QUOTED = "published under the common grouping rule, so only the total is compared"
SIGNS = {  # of an effect here against the one in print
    "same": ("✓", "same sign as in print"),
    "other": ("✗", "opposite sign"),
    "open": ("○", "interval contains 0"),
}


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """One row of a table.

    row: its name, unique in the table, `block / label` where there are blocks.
    subject: what is measured (`lt_core.results`); empty for a system that is only quoted.
    against: the subject that effects are taken against.
    printed: (table, row) of published.csv.
    """

    row: str
    subject: str = ""
    against: str = ""
    printed: tuple[str, str] | None = None
    note: str = ""


@cache
def published() -> pd.DataFrame:
    """Every number printed in Tables 1 to 9: table, row, group, value, rule, subject, against, note.

    subject: what we measure for it; its backbone is the first stage that the system's authors use. rule: the
    grouping rule of the printed groups. Two rows of Table 3 are printed in Table 9.
    """
    return pd.read_csv(paths.PACKAGE / "published.csv", keep_default_na=False)


def printed_rows(table: str, block: str = "") -> list[Row]:
    """The rows of a printed table, or of one block of it, in order. Raises InputError for no such table."""
    lines = published()
    lines = lines[(lines["table"] == table) & lines["row"].str.startswith(block)]
    if lines.empty:
        raise InputError(unknown("published table", table, sorted(set(published()["table"]))))
    return [
        Row(line.row, line.subject, line.against, (table, line.row))
        for line in lines.drop_duplicates("row").itertuples()
    ]


def rows_on(backbone: str, classifiers: dict[str, str], against: str = "", block: str = "") -> list[Row]:
    """Rows of one backbone: label -> classifier; effects against that subject, by default the first row's."""
    against = against or f"{backbone}/{next(iter(classifiers.values()))}"
    place = f"{block} / " if block else ""
    rows = []
    for label, classifier in classifiers.items():
        subject = f"{backbone}/{classifier}"
        rows.append(Row(place + label, subject, "" if subject == against else against))
    return rows


# Labels of classifiers that the paper does not show, for `rows_on`.
NOT_IN_PRINT = {
    "logit adjustment of the learned classifier, t = 0.5": "logit_adjustment_0.5",
    "logit adjustment of the learned classifier, t = 1": "logit_adjustment_1",
    "logit adjustment of the learned classifier, t chosen": "logit_adjustment",
    "logit adjustment of the ensemble, t = 0.5": "ensemble+logit_adjustment_0.5",
    "logit adjustment of the ensemble, t = 1": "ensemble+logit_adjustment_1",
    "logit adjustment of the ensemble, t chosen": "ensemble+logit_adjustment",
    "ensemble, temperature chosen": "ensemble_tuned",
    "cRT": "crt",
    "NCM": "ncm",
    "Balanced softmax, head only": "balanced_softmax_head",
    "LADE, head only": "lade_head",
    "Class-balanced loss, head only": "class_balanced_head",
    "Focal loss, head only": "focal_head",
    "density of the training images, logit adjustment": "image_density",
    "transfer, evidence of the training images, balance": "image_evidence",
}


# ---------------------------------------------------------------- the join


def build_table(table: str, rows: Sequence[Row], profile: str, seed: int | None = None) -> pd.DataFrame:
    """The table in long form (`COLUMNS`): a line for each row, group and grouping rule.

    Percent, rounded to 0.01, NaN where a value does not exist. Published groups stand under the rule that
    they were computed with, published totals under both; a row that is quoted alone appears under its own.
    Effects are taken over the seeds that both rows have (`effect_seeds`). Raises InputError for row names
    that are not unique.
    """
    if len({row.row for row in rows}) != len(rows):
        raise InputError("rows must have different names")
    subjects = [text for row in rows for text in (row.subject, row.against) if text]
    frames = [_under_rule(table, rows, profile, seed, rule, subjects) for rule in RULES]
    frame = pd.concat(frames, ignore_index=True)[list(COLUMNS)]
    frame[list(NUMBERS)] = frame[list(NUMBERS)].astype(float).round(2) + 0.0  # no negative zero
    return frame.astype({"n": "Int64"})


def _under_rule(
    table: str, rows: Sequence[Row], profile: str, seed: int | None, rule: str, subjects: list[str]
) -> pd.DataFrame:
    values = results.measure(profile, subjects, seed, rule)
    measured = set(values.index.unique("subject"))
    lines = []
    for row in rows:
        printed = _printed(row, rule)
        reference = next((r for r in rows if row.against and r.subject == row.against), None)
        printed_reference = _printed(reference, rule) if reference else {}
        own, effect, seeds, effect_seeds = {}, {}, "", ""
        if row.subject in measured:
            draws = results.over_seeds(values.loc[row.subject])
            own, seeds = results.estimates(draws).T.to_dict(), _listed(draws)
        if {row.subject, row.against} <= measured:
            draws = results.difference(values, row.subject, row.against)
            effect, effect_seeds = results.estimates(draws).T.to_dict(), _listed(draws)
        if not own and _rule_of(row) not in ("", rule):
            continue
        origin = _origin(row, profile, seed, rule) if own else {}
        for group in _groups(row):
            measured_as = "total" if group == "count" else group
            here, there, nan = own.get(measured_as, {}), effect.get(measured_as, {}), np.nan
            shown = bool(here) and not np.isnan(here["value"]) and _has_value(row.subject, group)
            here, there = (here, there) if shown else ({}, {})
            if there and not _has_value(row.against, group):
                there = {}
            lines.append(
                {
                    "table": table,
                    "row": row.row,
                    "group": group,
                    "published": printed.get(group, nan),
                    "reproduced": here.get("value", nan),
                    "ci_low": here.get("low", nan),
                    "ci_high": here.get("high", nan),
                    "published_effect": printed.get(group, nan) - printed_reference.get(group, nan),
                    "reproduced_effect": there.get("value", nan),
                    "effect_ci_low": there.get("low", nan),
                    "effect_ci_high": there.get("high", nan),
                    "rule": rule,
                    "split": Subject.parse(row.subject).images if shown else "",
                    "n": origin["n"][group] if shown else None,
                    "checkpoint": "last" if shown else "",
                    "backbone": Subject.parse(row.subject).backbone if shown else "",
                    "seeds": seeds if shown else "",
                    "note": _note(row, group, rule, origin.get("chosen", "")),
                    "subject": row.subject,
                    "against": row.against,
                    "effect_seeds": effect_seeds if there else "",
                }
            )
    return pd.DataFrame(lines)


def _listed(draws: pd.DataFrame) -> str:
    return " ".join(map(str, draws.attrs["seeds"]))


def _lines_of(row: Row) -> pd.DataFrame:
    """The lines of published.csv of a row."""
    lines = published()
    table, name = row.printed or ("", "")
    return lines[(lines["table"] == table) & (lines["row"] == name)]


def _rule_of(row: Row) -> str:
    """The grouping rule of a row's printed groups; empty without print."""
    return next(iter(_lines_of(row)["rule"]), "")


def _printed(row: Row, rule: str) -> dict[str, float]:
    """The printed values of a row that belong to a rule: all groups under its own, the total under both."""
    lines = _lines_of(row)
    fits = (lines["rule"] == rule) | lines["group"].isin(["total", "count"])
    return dict(zip(lines["group"][fits], lines["value"][fits].astype(float), strict=True))


def _groups(row: Row) -> tuple[str, ...]:
    """Table 8 counts classes; the candidates of Table 5 are those of a group, so it has no total."""
    if row.subject.endswith("/mismatches"):
        return ("count",)
    return GROUPS


def _has_value(subject: str, group: str) -> bool:
    """Without few-shot classes in training a learned classifier has no few-shot and no total value."""
    subject = Subject.parse(subject)
    if subject.within:
        return group != "total"
    left_out = subject.backbone == "continual" and subject.name in ("cosine", "own")
    return not (left_out and group in ("few", "total"))


def _origin(row: Row, profile: str, seed: int | None, rule: str) -> dict[str, object]:
    """Number of test images by group, and the setting that validation chose."""
    subject = Subject.parse(row.subject)
    cache = results.caches_of(profile, subject.backbone, seed)[0]
    if subject.name in results.MEASURES:
        return {"n": {"count": len(cache.counts)}, "chosen": ""}
    labels = cache.labels(subject.images).numpy()
    images = {group: int(mask[labels].sum()) for group, mask in group_of(cache.counts, rule).items()}
    return {"n": images | {"total": len(labels)}, "chosen": chosen(row.subject, profile, seed)}


def chosen(subject: str, profile: str, seed: int | None = None) -> str:
    """The settings that validation chose: `chosen on validation images: learning rate 1 (seed 0) or ...`."""
    seeds_of: dict[str, list[int]] = {}
    for one, found in results.settings(profile, subject, seed).items():
        if len(found.tried) > 1:
            text = ", ".join(_setting(key, value, found.tried) for key, value in found.setting.items())
            seeds_of.setdefault(f"{text}, {found.note}" if found.note else text, []).append(one)
    if not seeds_of:
        return ""
    several = len(seeds_of) > 1
    texts = [f"{t} (seed {' '.join(map(str, s))})" if several else t for t, s in seeds_of.items()]
    return f"chosen on validation images: {' or '.join(texts)}"


def _setting(key: str, value: float, tried: Sequence[tuple[dict[str, float], float]]) -> str:
    """`learning rate 10 (edge of the grid)`; a choice of two values has nothing but edges."""
    grid = sorted({setting[key] for setting, _ in tried})
    edge = " (edge of the grid)" if len(grid) > 2 and value in (grid[0], grid[-1]) else ""
    return f"{key.replace('_', ' ')} {value:g}{edge}"


def _note(row: Row, group: str, rule: str, chosen: str) -> str:
    parts = [row.note, chosen]
    lines = _lines_of(row).set_index("group")
    if group in _printed(row, rule):
        parts.append(lines.loc[group, "note"])
        if _rule_of(row) == "common":
            parts.append(QUOTED)
    return "; ".join(part for part in parts if part)


# ---------------------------------------------------------------- files


def save_table(table: pd.DataFrame, out: Path) -> None:
    """Write <table>.csv, .md, .tex (booktabs, best in bold) and _wide.csv (row by group) into `out`."""
    name = str(table["table"].iloc[0])
    rules = [rule for rule in RULES if (table["rule"] == rule).any()]
    parts = [f"## Grouping rule `{rule}`\n\n{to_markdown(table, rule)}\n" for rule in rules]
    texts = {
        f"{name}.csv": table.to_csv(index=False, lineterminator="\n"),
        f"{name}.md": "\n".join([f"# Table {name.removeprefix('T')}\n", *parts]),
        f"{name}.tex": to_latex(table),
        f"{name}_wide.csv": wide(table).to_csv(lineterminator="\n"),
    }
    for file, text in texts.items():
        with paths.atomic(out / file) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    paths.add_sum(out / f"{name}.csv")


def load_table(file: Path) -> pd.DataFrame:
    """A table as `save_table` wrote it: cells without a text are "", cells without a number NaN.

    Raises InputError for any other file.
    """
    paths.check_sum(file)
    types = dict.fromkeys(COLUMNS, str) | dict.fromkeys((*NUMBERS, "n"), float)
    empty = {name: [""] for name in (*NUMBERS, "n")}
    try:
        table = pd.read_csv(file, dtype=types, keep_default_na=False, na_values=empty)
        accuracies = table.loc[table["group"] != "count", ["published", "reproduced", "ci_low", "ci_high"]]
        fits = (
            tuple(table.columns) == COLUMNS
            and set(table["table"]) == {file.stem}
            and set(table["rule"]) <= set(RULES)
            and not table.duplicated(["row", "group", "rule"]).any()
            and file.read_bytes().endswith(b"\n")
            and all(set(of) in ({"count"}, set(GROUPS)) for _, of in table.groupby(["row", "rule"])["group"])
            and not ((accuracies < 0) | (accuracies > 100)).any(axis=None)
        )
    except (ValueError, KeyError):  # what pandas raises for other files
        fits = False
    if not fits:
        raise InputError(f"{file} is damaged or no table of this repository: make it again")
    return table.astype({"n": "Int64"})


def wide(table: pd.DataFrame, column: str = "reproduced", rule: str = "paper") -> pd.DataFrame:
    """One column of the table as the paper prints it: a line for each row, a column for each group."""
    part = table[(table["rule"] == rule) & table[column].notna()]
    groups = [group for group in (*GROUPS, "count") if (part["group"] == group).any()]
    return part.pivot(index="row", columns="group", values=column).reindex(
        index=list(dict.fromkeys(part["row"])), columns=groups
    )


def to_latex(table: pd.DataFrame, rule: str = "paper") -> str:
    """The reproduced values as a LaTeX table (booktabs), the best of each column in bold."""
    values = wide(table, rule=rule)
    best = values.max()
    lines = [f"\\begin{{tabular}}{{l{'r' * values.shape[1]}}}", "\\toprule"]
    lines += [" & ".join(["", *values.columns]) + " \\\\", "\\midrule"]
    for row, cells in values.iterrows():
        shown = [
            "" if np.isnan(v) else (f"\\textbf{{{v:.1f}}}" if v == best[g] else f"{v:.1f}")
            for g, v in cells.items()
        ]
        name = re.sub(r"w\^(hc?)", r"$w^{\1}$", plain_name(row)).replace("→", "$\\to$").replace("&", "\\&")
        lines.append(" & ".join([name.replace("_", "\\_"), *shown]) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def to_markdown(table: pd.DataFrame, rule: str) -> str:
    """One line a row; each cell `published → reproduced [interval]` and, below, the effect likewise."""
    groups = _columns(table)
    lines = ["| | " + " | ".join(groups) + " |", "| --- |" + " --- |" * len(groups)]
    for name, cells in _by_row(table, rule):
        label = plain_name(name).replace("|", "\\|").replace("*", "\\*")
        texts = [_markdown_cell(cells[g]) if g in cells else "" for g in groups]
        lines.append("| " + " | ".join([label, *texts]) + " |")
    notes = [f"- {plain_name(name)}: {note}" for name, note in notes_of(table, rule)]
    return "\n\n".join(["\n".join(lines), " ".join(caption(table, rule)), "\n".join(notes)]).strip() + "\n"


# ---------------------------------------------------------------- display


def plain_name(row: str) -> str:
    """A row's name for readers: nobody is to take us for the paper's authors."""
    return row.replace("Ours* - ", "Parisot et al., re-run here: ").replace(
        "Ours*", "Parisot et al., re-run here"
    )


class TableView:
    """A table as it is shown: HTML in a notebook, Markdown in print()."""

    def __init__(self, table: pd.DataFrame, rule: str = "paper", rows: Sequence[str] | None = None) -> None:
        self.table, self.rule, self.rows = table, rule, rows

    def _repr_html_(self) -> str:
        shown = to_html(self._main(), self.rule)
        if self.rows is not None:
            whole = TableView(self.table, self.rule)
            shown += folded(f"All {self.table['row'].nunique()} rows", whole)._repr_html_()
        return shown

    def __repr__(self) -> str:
        return to_markdown(self._main(), self.rule)

    def _main(self) -> pd.DataFrame:
        if self.rows is None:
            return self.table
        return pd.concat([self.table[self.table["row"] == row] for row in self.rows])


def show_table(table: pd.DataFrame, rule: str = "paper", rows: Sequence[str] | None = None) -> TableView:
    """The table under one grouping rule, for display in a notebook.

    rows: only these, in this order; the whole table is folded below them.
    """
    return TableView(table, rule, rows)


def folded(title: str, *parts: object) -> HTML:
    """Texts (a paragraph each) and views that a click on the title shows."""
    shown = [
        part._repr_html_() if hasattr(part, "_repr_html_") else f"<p>{html.escape(str(part))}</p>"
        for part in parts
    ]
    return HTML(f"<details><summary>{html.escape(title)}</summary>{''.join(shown)}</details>")


def with_intervals(found: pd.DataFrame, digits: int = 1, sign: str = "+") -> pd.Series:
    """Estimates (columns value, low, high) as texts: `+1.6 [+0.9, +2.1]`."""
    number = f"{{:{sign}.{digits}f}}"
    rounded = found[["value", "low", "high"]].round(digits) + 0.0  # no negative zero
    texts = rounded.apply(lambda one: f"{number} [{number}, {number}]".format(*one), axis=1)
    return texts.str.replace("-", MINUS)


STYLE = """<style>
.lt-table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.lt-table th, .lt-table td { padding: .25em .6em; text-align: right; vertical-align: top; }
.lt-table th[scope=row], .lt-table th.block { text-align: left; font-weight: normal; }
.lt-table th.block { font-weight: bold; padding-top: .8em; }
.lt-table :is(.effect, small) { color: color-mix(in srgb, currentColor 75%, transparent); }
.lt-table .effect { font-size: .9em; white-space: nowrap; }
.lt-table .same { color: #0072B2; } .lt-table .other { color: #D55E00; }
</style>"""


def to_html(table: pd.DataFrame, rule: str = "paper") -> str:
    """A table with its rows in blocks, the best of a block in bold, caption below and notes folded away."""
    groups, body, above = _columns(table), [], ""
    best = _best_of_blocks(table, rule)
    for name, cells in _by_row(table, rule):
        block, _, label = plain_name(name).rpartition(" / ")
        if block and block != above:
            body.append(f'<tr><th class="block" colspan="{1 + len(groups)}">{html_name(block)}</th></tr>')
        above = block
        texts = "".join(_html_cell(cells.get(g), best.get((block, g))) for g in groups)
        body.append(f'<tr><th scope="row">{html_name(label)}</th>{texts}</tr>')
    head = "".join(f'<th scope="col">{group}</th>' for group in groups)
    notes = notes_of(table, rule)

    def folded_notes(title: str, notes: list[tuple[str, str]]) -> str:
        items = "".join(f"<li>{html.escape(f'{plain_name(name)}: {note}')}</li>" for name, note in notes)
        return folded(title, HTML(f"<ul>{items}</ul>"))._repr_html_() if notes else ""

    rows = f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    whole = f'<table class="lt-table" style="--columns: {len(groups)}">{rows}</table>'
    below = f'<p class="note">{html.escape(" ".join(caption(table, rule)))}</p>'
    chosen = [one for one in notes if one[1].startswith("chosen")]
    others = [one for one in notes if one not in chosen]
    below += folded_notes("Settings chosen on validation images", chosen)
    return STYLE + whole + below + folded_notes("Seeds, backbones and notes", others)


def html_name(name: str) -> str:
    """A row's name with its exponents raised: w^hc(20)."""
    return re.sub(r"w\^(hc?)", r"<i>w</i><sup>\1</sup>", html.escape(name))


def _html_cell(line: pd.Series | None, best: float | None) -> str:
    """published → reproduced ± half the interval; below it the effect with the sign of print."""
    if line is None:
        return "<td></td>"
    text = _pair(
        line, ("published", "reproduced", "ci_low", "ci_high"), "{:.1f}", "<b>{}</b> <small>±{}</small>"
    )
    effect_of = ("published_effect", "reproduced_effect", "effect_ci_low", "effect_ci_high")
    effect = _pair(line, effect_of, "{:+.1f}", "{} <small>±{}</small>", '<span class="printed">{}</span>')
    if sign := sign_of(line):
        symbol, meaning = SIGNS[sign]
        effect += f' <span class="{sign}" title="{meaning}" aria-label="{meaning}">{symbol}</span>'
    mark = ' class="best"' if best is not None and line["reproduced"] == best else ""
    if not mark:
        text = text.replace("<b>", "").replace("</b>", "")
    return f"<td{mark}>{text}" + (f'<div class="effect">{effect}</div>' if effect else "") + "</td>"


def _markdown_cell(line: pd.Series) -> str:
    low_high = _interval(line, "ci_low", "ci_high", "{:.1f}")
    text = _pair(line, ("published", "reproduced", "ci_low", "ci_high"), "{:.1f}", "{}" + low_high)
    low_high = _interval(line, "effect_ci_low", "effect_ci_high", "{:+.1f}")
    effect_of = ("published_effect", "reproduced_effect", "effect_ci_low", "effect_ci_high")
    effect = _pair(line, effect_of, "{:+.1f}", "{}" + low_high)
    sign = sign_of(line)
    return text + (f"<br>effect {effect}{' ' + SIGNS[sign][0] if sign else ''}" if effect else "")


def _interval(line: pd.Series, low: str, high: str, form: str) -> str:
    if np.isnan(line[low]):
        return ""
    return f" [{form.format(line[low])}, {form.format(line[high])}]".replace("-", MINUS)


def _pair(line: pd.Series, names: tuple[str, ...], number: str, form: str, printed_form: str = "{}") -> str:
    """`published → reproduced`, or the one that exists."""
    printed, value, low, high = (line[name] for name in names)
    if line["group"] == "count":
        number, form = "{:g}", "{}"
    texts = ["" if np.isnan(v) else number.format(v).replace("-", MINUS) for v in (printed, value)]
    if texts[1]:
        texts[1] = form.format(texts[1], f"{(high - low) / 2:.1f}") if not np.isnan(low) else texts[1]
    if all(texts):
        texts[0] = printed_form.format(f"{texts[0]} {ARROW} ")
    return "".join(texts)


def sign_of(line: pd.Series) -> str:
    """same, other or open: the reproduced effect against the printed one; empty without both (or print 0)."""
    printed, low, high = line["published_effect"], line["effect_ci_low"], line["effect_ci_high"]
    if np.isnan([printed, low, high]).any() or printed == 0:
        return ""
    if low <= 0 <= high:
        return "open"
    return "same" if printed * low > 0 else "other"


def _columns(table: pd.DataFrame) -> list[str]:
    """The groups that a table has values for: those of accuracies, or the `count` of Table 8."""
    filled = table[table[["published", "reproduced"]].notna().any(axis=1)]
    return [group for group in (*GROUPS, "count") if (filled["group"] == group).any()]


def _by_row(table: pd.DataFrame, rule: str) -> list[tuple[str, dict[str, pd.Series]]]:
    """(row, {group: line}) in the order of the table; a row of another rule comes with its total alone."""
    found = []
    for name in dict.fromkeys(table["row"]):
        of_row = table[table["row"] == name]
        shown = of_row[of_row["rule"] == rule]
        shown = shown if len(shown) else of_row[of_row["group"] == "total"]
        found.append((name, {line["group"]: line for _, line in shown.iterrows()}))
    return found


def _best_of_blocks(table: pd.DataFrame, rule: str) -> dict[tuple[str, str], float]:
    """The highest reproduced value of each block and group (of blocks with several rows)."""
    part = table[(table["rule"] == rule) & table["reproduced"].notna() & (table["group"] != "count")]
    blocks = part["row"].map(lambda name: plain_name(name).rpartition(" / ")[0])
    return {key: one.max() for key, one in part.groupby([blocks, "group"])["reproduced"] if len(one) > 1}


def notes_of(table: pd.DataFrame, rule: str) -> list[tuple[str, str]]:
    """(row, note) of what is remarkable, settings first, and of the run behind each row."""
    notes = []
    for name, cells in _by_row(table, rule):
        groups: dict[str, list[str]] = {}
        for group, line in cells.items():
            for note in filter(None, line["note"].split("; ")):
                groups.setdefault(note, []).append(group)
        for note, having in groups.items():
            everywhere = len(having) == len(cells) or note.startswith("chosen")
            notes.append((name, note if everywhere else f"{', '.join(having)}: {note}"))
        run = next((line for line in cells.values() if line["seeds"]), None)
        if run is not None:
            against = f"effect against {_label(table, run['against'])} over seeds {run['effect_seeds']}"
            effect = f", {against}" if run["effect_seeds"] else ""
            notes.append(
                (name, f"backbone {run['backbone']}, {run['checkpoint']} epoch, seeds {run['seeds']}{effect}")
            )
    return notes


def caption(table: pd.DataFrame, rule: str) -> list[str]:
    """What the numbers are: unit, split, grouping rule, reference row, seeds."""
    here = table[(table["rule"] == rule) & table["reproduced"].notna()]
    if _columns(table) == ["count"]:
        classes = f" (here of {here['n'].max()})" if len(here) else ""
        return [f"Number of classes{classes}, printed {ARROW} reproduced."]
    printed = table["published"].notna().any()
    values = f", printed {ARROW} reproduced," if printed else ""
    text = [f"Top-1 accuracy in percent{values} with its 95 % interval."]
    if table["against"].any():
        signs = "; ".join(f"{symbol} {meaning}" for symbol, meaning in SIGNS.values())
        text.append(
            f"Below it the effect: the difference in points to {_references(table)}, "
            f"over the training seeds that both have{f' ({signs})' if printed else ''}."
        )
    if here.empty:
        return text
    sizes = here.drop_duplicates("group").set_index("group")["n"]
    images = ", ".join(f"{group} {int(sizes[group]):,}" for group in GROUPS if group in sizes)
    seeds = sorted(set(here["seeds"]), key=len, reverse=True)
    some = f", of some rows {' or '.join(seeds[1:])}" if seeds[1:] else ""
    limits = RULES[rule].replace(">=", "≥").replace("<=", "≤")
    text += [
        f"{here['split'].iloc[0].capitalize()} images: {images}; groups (rule {rule}): {limits}.",
        f"Training seeds {seeds[0]}{some}.",
    ]
    return text


def _references(table: pd.DataFrame) -> str:
    """The rows that effects are taken against, by their names."""
    subjects = sorted(set(table["against"]) - {""})
    names = list(dict.fromkeys(_label(table, subject) for subject in subjects))
    if len(names) > 2:
        return "the row's reference (named in the notes)"
    of_each = " of the same block" if len(subjects) > len(names) else ""
    return f"{' or '.join(names)}{of_each}"


def _label(table: pd.DataFrame, subject: str) -> str:
    """A subject by the name of its row, without the block; itself where the table has no such row."""
    rows = table["row"][table["subject"] == subject]
    if rows.empty:
        return subject
    return plain_name(rows.iloc[0]).rpartition(" / ")[2].removeprefix("Parisot et al., re-run here: ")


def save_answer(out: Path, notebook: str, text: str) -> Markdown:
    """Write a notebook's answer, one short Markdown paragraph, for the report's index, and show it."""
    text = re.sub(r"(?<!\w)-(?=\d)", MINUS, text)
    with paths.atomic(out / "answers" / f"{notebook}.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8", newline="\n")
    return Markdown(f"**Here.** {text}")


def summary(table: pd.DataFrame, rows: dict[str, str], rule: str = "paper") -> str:
    """Some rows (row -> label) as a small Markdown table, `published → reproduced` in percent: README's."""
    groups = _columns(table)
    lines = ["| | " + " | ".join(groups) + " |", "| --- |" + " --- |" * len(groups)]
    for name, cells in _by_row(table[table["row"].isin(list(rows))], rule):
        names = ("published", "reproduced", "ci_low", "ci_high")
        texts = [_pair(cells[g], names, "{:.1f}", "{}") if g in cells else "" for g in groups]
        lines.append("| " + " | ".join([rows[name], *texts]) + " |")
    return "\n".join(lines)
