"""A full disk at each write: one clear error, nothing half-written left, and a rerun with room succeeds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from conftest import Disk
from test_killed import CACHE, KILLER, TRAIN, content_of, write_notebook

from lt_core import paths
from lt_core.cache import load_cache
from lt_core.checks import CacheError
from lt_core.runner import Record


def is_one_clear_error(done: subprocess.CompletedProcess) -> bool:
    return done.returncode == 1 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_training_on_a_disk_that_is_too_small(
    disk: Disk, tmp_path, command: Callable, tried: Callable[..., None]
) -> None:
    assert command(*TRAIN, out=tmp_path / "whole").returncode == 0
    full, kib = 0, 16
    while (done := command(*TRAIN, out=disk.path)).returncode:
        assert is_one_clear_error(done) and "No space left on device" in done.stderr, done.stderr
        assert not list(disk.path.rglob("*.tmp"))
        with pytest.raises(CacheError):
            load_cache(disk.path / CACHE)
        tried("disk full in training")
        full, kib = full + 1, kib * 2
        disk.resize(kib)
    assert full >= 3
    assert content_of(disk.path / CACHE) == content_of(tmp_path / "whole" / CACHE)


@pytest.mark.slow
def test_reports_on_a_disk_that_is_too_small(
    disk: Disk, tmp_path, command: Callable, monkeypatch: pytest.MonkeyPatch, tried: Callable[..., None]
) -> None:
    write_notebook(tmp_path / "notebooks", seconds=0)
    monkeypatch.setenv("FAULTS_NOTEBOOKS", str(tmp_path / "notebooks"))
    full, kib = 0, 16
    while (
        done := command("-", "half", "notebooks", "--profile", "digits", out=disk.path, script=KILLER)
    ).returncode:
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert "FAILED 01_table" in done.stdout or is_one_clear_error(done), done.stdout + done.stderr
        tried("disk full in notebooks and reports")
        full, kib = full + 1, kib * 3
        disk.resize(kib)
    reports = disk.path / "reports" / "digits"
    assert full >= 2 and Record.load(reports, "01_table").status == "ok"
    for page in ("01_table.html", "index.html"):
        assert (reports / page).read_text(encoding="utf-8").rstrip().endswith("</html>")


FILL = """
import sys
from pathlib import Path
import torch
from lt_core import paths
from lt_core.checks import LTError
sys.path.insert(0, sys.argv[2])
folder = Path(sys.argv[1])
from test_cache import make_cache
from lt_core.cache import load_cache, save_cache
from lt_core.train import save_checkpoint
big = make_cache(splits={"test": (torch.randn(4000, 8), torch.arange(4000) % 4)})
for write in (
    lambda: save_cache(folder / "cache", big),
    lambda: save_checkpoint(folder / "last.pt", {"model": torch.randn(30_000)}),
):
    try:
        write()
    except OSError as error:
        assert "No space left on device" in str(error), error
    else:
        raise AssertionError("it fitted")
    assert not [path for path in folder.rglob("*") if path.is_file()]
"""


def test_caches_and_checkpoints_on_a_full_disk(disk: Disk, tried: Callable[..., None]) -> None:
    tests = str(paths.ROOT / "tests")
    environment = os.environ | {"PYTHONPATH": str(paths.ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(disk.path), tests], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    tried("disk full in one write", 2)
