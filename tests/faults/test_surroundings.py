"""Awkward places: read-only checkout, odd path, no HOME, no network, two runs at once, a missing kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import mount
from test_killed import write_notebook

from lt_core import paths, runner
from lt_core.runner import Options, Record

NOTEBOOK = "00"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Variables of a run without HOME in this environment, under a path of its own, writing to tmp_path."""
    active = tmp_path / "environment"  # the checkout's own .venv would not count as an active one
    active.mkdir()
    for entry in Path(sys.prefix).iterdir():
        (active / entry.name).symlink_to(entry)
    kept = {key: value for key, value in os.environ.items() if key not in ("HOME", "PYTHONPATH")}
    return kept | {"VIRTUAL_ENV": str(active), "LT_OUTPUT_ROOT": str(tmp_path / "öut put")}


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    """This checkout once more, read-only, under a name with spaces and other letters."""
    place = tmp_path / "Sören's check out"
    place.mkdir()
    mount(place, "--bind", str(paths.ROOT))
    try:
        mount(place, "-o", "remount,ro,bind")
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def without_network() -> list[str]:
    """What to put before a command to cut it off."""
    if (
        shutil.which("unshare")
        and subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0
    ):
        # The loopback device, over which a notebook talks to its kernel, has to be switched on again.
        script = 'ip link set lo up 2>/dev/null || ifconfig lo up 2>/dev/null; exec "$@"'
        return ["unshare", "--net", "sh", "-c", script, "sh"]
    pytest.skip("cutting a process off from the network is not permitted here")


@pytest.mark.slow
def test_runs_read_only_under_an_odd_path_without_home_and_network(
    checkout: Path, environment: dict[str, str], tmp_path: Path, tried: Callable[..., None]
) -> None:
    words = [*without_network(), str(checkout / "run_all.sh"), "--only", NOTEBOOK]
    done = subprocess.run(words, env=environment, cwd="/", capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 notebooks are fine" in done.stdout
    out = tmp_path / "öut put"
    assert (out / "reports/embedded/index.html").is_file() and (out / "figures/embedded/F1.png").is_file()
    for kind in ("read-only checkout", "path with spaces and other letters", "no HOME", "no network"):
        tried(kind)


@pytest.mark.slow
def test_a_read_only_checkout_without_an_environment_is_one_clear_error(
    checkout: Path, environment: dict[str, str], tried: Callable[..., None]
) -> None:
    del environment["VIRTUAL_ENV"]
    done = subprocess.run(
        [checkout / "run_all.sh"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write to") and done.stderr.count("\n") == 1, done.stderr
    tried("read-only checkout")


@pytest.mark.slow
def test_two_runs_at_once(environment: dict[str, str], tmp_path: Path, tried: Callable[..., None]) -> None:
    words = [str(paths.ROOT / "run_all.sh"), "--only", NOTEBOOK]
    both = [
        subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    outputs = [one.communicate(timeout=600)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], outputs
    assert sum("another run of profile embedded is at work" in output for output in outputs) == 1
    assert sum("00_overview: up to date" in output for output in outputs) == 1
    tried("two runs at once")


def test_a_missing_kernel_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: Callable[..., None]
) -> None:
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path))
    write_notebook(tmp_path / "notebooks", seconds=0)
    wait_for = runner.Processes.wait_for

    def another_kernel(self, command: list[str], *rest: object) -> int:
        return wait_for(
            self, [word.replace("python3", "gone") if word == "python3" else word for word in command], *rest
        )

    monkeypatch.setattr(runner.Processes, "wait_for", another_kernel)
    assert runner.run(Options(profile="digits"), tmp_path / "notebooks") == 1
    record = Record.load(paths.reports("digits"), "01_table")
    assert record.status == "failed" and "No such kernel named gone" in record.error
    tried("missing kernel")
