"""Every number printed in Tables 1 to 9 of the paper (`published.csv`, one a row).

published("T1", "Ours* / w^h(20)")           # {"many": 64.0, "medium": 44.4, "few": 48.2, "total": 52.7}
"""

from __future__ import annotations

import csv
from functools import cache

from lt_core.errors import InputError, unknown
from lt_core.paths import PACKAGE

FILE = PACKAGE / "report" / "published.csv"


@cache
def _records() -> dict[tuple[str, str], dict[str, dict[str, str]]]:
    """(table, printed row) -> group -> the CSV's record."""
    rows: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    with open(FILE, encoding="utf-8", newline="") as file:
        for record in csv.DictReader(file):
            rows.setdefault((record["table"], record["printed_row"]), {})[record["group"]] = record
    return rows


def published_rows(table: str) -> list[str]:
    """The rows of a table in the order of print; raises InputError for an unknown table."""
    tables = {name for name, _ in _records()}
    if table not in tables:
        raise InputError(unknown("published table", table, list(tables)))
    return [row for name, row in _records() if name == table]


def published(table: str, printed_row: str) -> dict[str, float]:
    """The printed values of one row: {group: percent} (Table 8: {"count": classes})."""
    return {group: float(record["value"]) for group, record in _row(table, printed_row).items()}


def published_notes(table: str, printed_row: str) -> dict[str, str]:
    """What is remarkable about each printed value: {group: note}, empty where nothing is."""
    return {group: record["note"] for group, record in _row(table, printed_row).items()}


def published_rule(table: str, printed_row: str) -> str:
    """The grouping rule that a printed row follows: quoted systems `common`, the paper's own rows `paper`."""
    notes = published_notes(table, printed_row).values()
    return "common" if any("quoted" in note for note in notes) else "paper"


def _row(table: str, printed_row: str) -> dict[str, dict[str, str]]:
    rows = published_rows(table)
    if printed_row not in rows:
        raise InputError(unknown(f"row of {table}", printed_row, rows))
    return _records()[table, printed_row]
