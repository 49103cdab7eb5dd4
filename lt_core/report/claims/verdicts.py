"""All claims tested: the table, its files, and what it says in a few sentences.

found = evaluate_claims(Study.of_profile("embedded"))
save_claims(found, "embedded")
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lt_core import paths
from lt_core.report.claims import main_results, representations, training
from lt_core.report.claims.decisions import Claim, Part, verdict
from lt_core.report.claims.study import Study
from lt_core.report.rendering import typeset

CLAIMS: tuple[Claim, ...] = (*main_results.CLAIMS, *training.CLAIMS, *representations.CLAIMS)
COLUMNS = ("claim", "statement", "in_print", "verdict", "evidence", "rule")
VERDICTS = ("holds", "fails", "untestable")
PRINT = {  # what print's own numbers say of a claim
    "yes": "supported by the printed numbers",
    "partly": "supported by some of the printed numbers",
    "no": "not supported by the printed numbers",
    "plot": "without printed numbers (a plot or text)",
}
SECTIONS = {  # first claim -> title
    1: "A. Headline",
    9: "B. Classifier components on ImageNet-LT",
    17: "C. Places-LT comparison",
    23: "D. Unseen classes",
    27: "E. Classifier type",
    31: "F. Sampling on ImageNet-LT",
    42: "G. Attention roles",
    44: "H. Other backbones on ImageNet-LT",
    49: "I. Selected classes and geometry",
    53: "J. Places-LT backbones",
    67: "K. Stated limits",
}
SHOWN = 6  # parts that the evidence spells out
CONTRADICTED, NOT_SHOWN = "fails", "not shown (interval contains 0)"


def evaluate_claims(study: Study, claims: Sequence[Claim] = CLAIMS) -> pd.DataFrame:
    """A row a claim with the columns of `COLUMNS`."""
    records = []
    for claim in claims:
        found = claim.parts(study)
        start = (claim.number, claim.statement, claim.in_print)
        records.append((*start, verdict(found), evidence(found), claim.rule))
    return pd.DataFrame(records, columns=list(COLUMNS))


def evidence(found: Sequence[Part]) -> str:
    """The parts in words: first those that fail, then those that cannot be tested; of many only six."""
    words = list(dict.fromkeys(map(_in_words, sorted(found, key=_urgency))))
    held = sum(one.holds is True for one in found)
    start = f"{held} of {len(found)} parts hold. " if len(found) > 1 else ""
    more = f"; and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return start + "; ".join(words[:SHOWN]) + more


def _urgency(one: Part) -> tuple[int, bool]:
    return {False: 0, None: 1, True: 2}[one.holds], one.open


def _in_words(one: Part) -> str:
    if one.holds is None:
        return f"{one.text}{', ' if one.text else ''}untestable: it takes {one.needs}"
    return f"{'holds' if one.holds else NOT_SHOWN if one.open else CONTRADICTED}: {one.text}"


def section_of(number: int) -> str:
    """Title of the section that a claim belongs to."""
    return SECTIONS[max(first for first in SECTIONS if first <= number)]


def save_claims(found: pd.DataFrame, profile: str) -> None:
    """Writes claims.csv and claims.md to figures/<profile>/; each appears whole or not at all."""
    files = {"claims.csv": found.to_csv(index=False, lineterminator="\n"), "claims.md": document(found)}
    for name, text in files.items():
        with paths.atomic(paths.figures(profile) / name) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")


def document(found: pd.DataFrame) -> str:
    """The page in Markdown: summary, then a table a section."""
    parts = ["# Claims of the paper, tested\n", *(f"- {line}" for line in summary(found)), ""]
    for title, claims in found.groupby(found["claim"].map(section_of), sort=False):
        parts += [f"## {title}\n", section_table(claims), ""]
    return "\n".join(parts)


def section_table(claims: pd.DataFrame) -> str:
    """Claims as a Markdown table: statement and rule, what print says, the verdict here, the evidence."""
    lines = ["| | Claim and rule | Print | Here | Evidence |", "| --- |" + " --- |" * 4]
    for _, line in claims.iterrows():
        claim = f"**{line['statement']}**<br>{line['rule']}"
        cells = (str(line["claim"]), claim, line["in_print"], f"**{line['verdict']}**", line["evidence"])
        lines.append("| " + " | ".join(typeset(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def summary(found: pd.DataFrame) -> list[str]:
    """Sentences made from the verdicts: how many hold, how that compares with print, which ones surprise."""
    lines = [f"Of {len(found)} claims, {_counted(found)}."]
    for name, meaning in PRINT.items():
        of_kind = found[found["in_print"] == name]
        if len(of_kind):
            lines.append(f"Claims {meaning}, {len(of_kind)}: {_counted(of_kind)}.")
    failing = found[found["verdict"] == "fails"]
    contradicted = int(failing["evidence"].str.contains(f"{CONTRADICTED}:").sum())
    lines.append(
        f"Of the {len(failing)} that fail, the numbers contradict {contradicted} in at least one part; "
        f"{len(failing) - contradicted} are not shown, because an interval contains 0."
    )
    lost = found[(found["in_print"] == "yes") & (found["verdict"] == "fails")]
    won = found[found["in_print"].isin(["no", "partly"]) & (found["verdict"] == "holds")]
    lines.append(f"Supported in print and failing here: {_numbers(lost)}.")
    lines.append(f"Not or only partly supported in print and holding here: {_numbers(won)}.")
    lines.append(f"Untestable here: {_numbers(found[found['verdict'] == 'untestable'])}.")
    return lines


def _counted(found: pd.DataFrame) -> str:
    counts = {name: int((found["verdict"] == name).sum()) for name in VERDICTS}
    return f"{counts['holds']} hold, {counts['fails']} fail and {counts['untestable']} cannot be tested here"


def _numbers(found: pd.DataFrame) -> str:
    return ", ".join(map(str, found["claim"])) or "none"
