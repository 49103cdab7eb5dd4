"""Counts the faults that were tried; the account stands at the end of the run."""

from collections import Counter
from collections.abc import Callable

import pytest

TRIED: Counter[str] = Counter()


@pytest.fixture
def tried() -> Callable[..., None]:
    """`tried("kind")` counts one fault of that kind, `tried("kind", 5)` five, once they were survived."""
    return lambda kind, number=1: TRIED.update({kind: number})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TRIED:
        terminalreporter.section(f"{sum(TRIED.values())} faults tried and survived")
        for kind, number in sorted(TRIED.items()):
            terminalreporter.write_line(f"{number:6}  {kind}")
