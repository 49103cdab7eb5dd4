"""What the fault tests share: a count of the faults tried, and the command line in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lt_core import paths

TRIED = pytest.StashKey[Counter]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """How many faults of each kind this run tried."""
    counts = config.stash.get(TRIED, Counter())
    if counts:
        terminalreporter.section("faults tried")
        for kind, count in sorted(counts.items()):
            terminalreporter.line(f"{count:6} {kind}")
        terminalreporter.line(f"{counts.total():6} in all")


@pytest.fixture
def tried(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`tried(kind)` counts one fault once it has been tried and what came of it has been checked."""
    counts = request.config.stash.setdefault(TRIED, Counter())

    def count(kind: str, number: int = 1) -> None:
        counts[kind] += number

    return count


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs `python -m lt_core WORDS` (or `script WORDS`) with everything that it writes below `out`."""

    def run(*words: str, out: Path, script: Path | None = None) -> subprocess.CompletedProcess:
        program = [str(script)] if script else ["-m", "lt_core"]
        environment = os.environ | {
            "LT_OUTPUT_ROOT": str(out),
            "PYTHONPATH": str(paths.ROOT),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            [sys.executable, *program, *words],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


class Disk:
    """A file system of a few KiB that can be enlarged."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def resize(self, kib: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kib}k", self.path], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A small tmpfs; the test is skipped where mounting is not permitted."""
    path = tmp_path / "disk"
    path.mkdir()
    mount(path, "-t", "tmpfs", "-o", "size=16k", "tmpfs")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def mount(target: Path, *arguments: str) -> None:
    """`mount ARGUMENTS TARGET`; skips the test where that is not permitted."""
    if not shutil.which("mount"):
        pytest.skip("needs the command mount")
    done = subprocess.run(["mount", *arguments, str(target)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
