"""Forks, signals, the umask and small limits."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lt_core import cli, paths
from lt_core.train import sigterm_noted

FORK = """
import os, signal
import numpy as np, torch
from lt_core import CompositionalTransferClassifier
torch.set_num_threads(2)
y = np.arange(2000) % 4
X = np.eye(256)[y] + np.random.default_rng(0).normal(size=(2000, 256))
expected = CompositionalTransferClassifier(epochs=1).fit(X, y).predict(X)
if not (child := os.fork()):
    signal.alarm(60)
    again = CompositionalTransferClassifier(epochs=1).fit(X, y).predict(X)
    os._exit(int((again != expected).mean() > 0.01))
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def run(code: str, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(paths.ROOT), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_a_forked_child_fits_after_its_parent_used_threads(tried: Callable[..., None]) -> None:
    done = run(FORK)
    assert done.returncode == 0, done.stderr
    tried("fit in a forked child")


@pytest.fixture
def handler() -> object:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_signal_in_fit_reaches_who_asked_for_it(handler: object, tried: Callable[..., None]) -> None:
    received = []
    signal.signal(signal.SIGTERM, lambda *given: received.append(given[0]))
    with pytest.raises(KeyboardInterrupt), sigterm_noted() as noted:
        os.kill(os.getpid(), signal.SIGTERM)
        assert noted.wait(5) and not received  # first the step and its checkpoint
    assert received == [signal.SIGTERM]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(KeyboardInterrupt), sigterm_noted():
        os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with sigterm_noted() as noted:
        os.kill(os.getpid(), signal.SIGTERM)
    assert not noted.is_set() and signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    tried("SIGTERM in fit", 3)


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_files_have_the_permissions_of_the_umask(
    umask: int, mode: int, tmp_path: Path, tried: Callable[..., None]
) -> None:
    from test_cache import make_cache

    from lt_core.cache import save_cache
    from lt_core.train import save_checkpoint

    before = os.umask(umask)
    try:
        save_cache(tmp_path / "cache", make_cache())
        save_checkpoint(tmp_path / "last.pt", {"x": torch.ones(3)})
        paths.write_sealed(tmp_path / "sealed", b"content")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == dict.fromkeys(["features.safetensors", "meta.json", "last.pt", "sealed"], mode)
    tried("umask")


def test_what_is_printed_controls_no_terminal(
    capsys: pytest.CaptureFixture, tried: Callable[..., None]
) -> None:
    assert cli.main(["train", "--profile", "a\x1b[2J\nb", "--backbone", "x"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "\x1b" not in printed and "\\x1b" in printed
    tried("control characters in an error")


STRANGERS = ("torch", "csv", "random", "lt_core", "numpy", "site", "sitecustomize", "papermill")


@pytest.mark.parametrize("where", ["current folder", "PYTHONPATH", "PYTHONSTARTUP"])
def test_code_comes_from_the_checkout_and_its_environment_alone(
    where: str, tmp_path: Path, tried: Callable[..., None]
) -> None:
    """Files of known names lie where Python would look, and make a folder when they run."""
    for name in STRANGERS:
        mark = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).mkdir(exist_ok=True)\n"
        (tmp_path / f"{name}.py").write_text(f"{mark}raise SystemExit('code of a stranger')\n")
    environment = os.environ | {"LT_OUTPUT_ROOT": str(tmp_path / "out"), "VIRTUAL_ENV": sys.prefix}
    environment.pop("PYTHONPATH", None)
    if where == "PYTHONPATH":
        environment["PYTHONPATH"] = str(tmp_path)
    if where == "PYTHONSTARTUP":
        environment["PYTHONSTARTUP"] = str(tmp_path / "torch.py")
    place = tmp_path if where == "current folder" else "/"
    command = [str(paths.ROOT / "run_all.sh"), "--list"]
    done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "01_main_results" in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "ran").exists(), done.stdout + done.stderr
    tried(f"code of strangers: {where}")


def test_one_clone_never_runs_another(tmp_path: Path, tried: Callable[..., None]) -> None:
    other = tmp_path / "clone"
    shutil.copytree(paths.PACKAGE, other / "lt_core")
    (other / "notebooks").mkdir()
    (other / "torch.py").write_text("raise SystemExit('code of a stranger')\n")
    (other / "notebooks" / "01_stranger.ipynb").write_text("{}")
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix}
    done = subprocess.run(
        [str(paths.ROOT / "run_all.sh"), "--list"], env=environment, cwd=other, capture_output=True, text=True
    )
    assert done.returncode == 0 and "01_main_results" in done.stdout and "stranger" not in done.stdout
    tried("another clone as current folder")


def test_the_module_reads_no_code_of_the_current_folder(tmp_path: Path, tried: Callable[..., None]) -> None:
    """Also where Python is called without -P, but for a folder that has the package itself."""
    for name in ("torch", "csv", "random", "numpy", "pathlib", "argparse", "logging"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of a stranger')\n")
    environment = os.environ | {"PYTHONPATH": str(paths.ROOT)}
    environment.pop("PYTHONSAFEPATH", None)
    command = [sys.executable, "-m", "lt_core", "notebooks", "--list"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "01_main_results" in done.stdout, done.stdout + done.stderr
    tried("module called in a folder of strangers' code")
