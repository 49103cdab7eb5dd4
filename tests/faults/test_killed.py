"""Processes that are killed: a plain rerun ends with what an undisturbed run gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import psutil
import pytest

from lt_core import paths
from lt_core.cache import load_cache, read_meta
from lt_core.checks import CacheError
from lt_core.runner import Record

KILLER = Path(__file__).with_name("killed_writer.py")
TRAIN = ("train", "--profile", "digits", "--backbone", "sqrt")
CACHE = Path("caches/digits/sqrt/seed0")
# Each at its first write in a process, one process after the other: each finds what the one before left.
WRITES = (
    ("history.jsonl", "written"),
    ("history.jsonl", "replaced"),
    ("best.pt", "half"),
    ("last.pt", "opened"),
    ("last.pt", "half"),
    ("last.pt", "replaced"),
    ("features.safetensors", "opened"),
    ("features.safetensors", "half"),
    ("features.safetensors", "replaced"),
    ("meta.json", "half"),
    ("meta.json", "written"),
)

pytestmark = pytest.mark.slow


def heed_signals() -> None:
    """Tests that run in the background, or under nohup, pass on that two signals are ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def content_of(folder: Path) -> dict[str, object]:
    """What a cache holds, without what differs between two runs by nature."""
    meta = read_meta(folder)
    return {key: value for key, value in meta.items() if key not in ("seconds", "date", "meta_sha256")}


def test_training_killed_at_each_of_its_writes(
    tmp_path: Path, command: Callable, tried: Callable[..., None]
) -> None:
    assert command(*TRAIN, out=tmp_path / "whole").returncode == 0
    out = tmp_path / "killed"
    for file, moment in WRITES:
        done = command(file, moment, *TRAIN, out=out, script=KILLER)
        assert done.returncode == -signal.SIGKILL, (file, moment, done.stderr)
        with pytest.raises(CacheError):  # nothing half-written is taken for whole
            load_cache(out / CACHE)
        tried("killed while training writes")
    assert command(*TRAIN, out=out).returncode == 0
    assert content_of(out / CACHE) == content_of(tmp_path / "whole" / CACHE)
    assert sorted(path.name for path in (out / CACHE).glob("[!.]*")) == ["features.safetensors", "meta.json"]


def test_extraction_killed_at_each_of_its_writes(
    tmp_path: Path, command: Callable, tried: Callable[..., None]
) -> None:
    assert command(*TRAIN, out=tmp_path).returncode == 0
    (checkpoint,) = tmp_path.glob("runs/digits/sqrt/*/last.pt")
    words = ("extract", *TRAIN[1:], "--checkpoint", str(checkpoint), "--out")
    assert command(*words, str(tmp_path / "whole"), out=tmp_path).returncode == 0
    again = tmp_path / "again"
    for file in ("features.safetensors", "meta.json"):
        for moment in ("half", "written"):
            done = command(file, moment, *words, str(again), out=tmp_path, script=KILLER)
            assert done.returncode == -signal.SIGKILL, done.stderr
            with pytest.raises(CacheError):
                load_cache(again)
            tried("killed while extraction writes")
    assert command(*words, str(again), out=tmp_path).returncode == 0
    assert content_of(again) == content_of(tmp_path / "whole")


# --- Notebooks and reports -----------------------------------------------------------------------------

PARAMETERS = 'profile = "digits"\nseed = 0'
FIGURE = """
import time
from lt_core import paths
folder = paths.figures(profile)
def write():
    with paths.atomic(folder / "A.csv") as temporary:
        temporary.write_text("a,b\\n1,VALUE\\n")
write()
(paths.output_root() / "drawing").touch()
time.sleep(SECONDS)
write()
"""


def write_notebook(folder: Path, seconds: float, value: int = 2) -> None:
    """A notebook that writes A.csv, takes its time and writes it again."""
    cells = [
        nbformat.v4.new_markdown_cell("# A table", id="title"),
        nbformat.v4.new_code_cell(PARAMETERS, id="parameters", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(
            FIGURE.replace("SECONDS", str(seconds)).replace("VALUE", str(value)), id="table"
        ),
    ]
    declared = {"produces": ["A.csv"], "backbones": []}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    folder.mkdir(exist_ok=True)
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "lt_core": declared})
    nbformat.write(notebook, folder / "01_table.ipynb")


RUN = ("notebooks", "--profile", "digits")


def test_reports_killed_at_each_of_their_writes(
    tmp_path: Path, command: Callable, monkeypatch: pytest.MonkeyPatch, tried: Callable[..., None]
) -> None:
    write_notebook(tmp_path / "notebooks", seconds=0)
    monkeypatch.setenv("FAULTS_NOTEBOOKS", str(tmp_path / "notebooks"))
    for file in ("01_table.json", "01_table.html", "index.html"):
        for moment in ("half", "replaced"):
            done = command(file, moment, *RUN, out=tmp_path, script=KILLER)
            assert done.returncode == -signal.SIGKILL, done.stderr
            tried("killed while a report is written")
    reports = tmp_path / "reports" / "digits"
    done = command("nothing", "half", *RUN, out=tmp_path, script=KILLER)
    assert (done.returncode, Record.load(reports, "01_table").status) == (0, "ok"), done.stderr
    for page in ("01_table.html", "index.html"):
        assert (reports / page).read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert (tmp_path / "figures/digits/A.csv").read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize(
    ("victim", "how"),
    [
        *[(name, signal.SIGKILL) for name in ("kernel", "papermill", "runner", "group", "stopped")],
        *[("runner", how) for how in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)],
    ],
)
def test_killed_while_a_notebook_runs(
    victim: str,
    how: signal.Signals,
    tmp_path: Path,
    command: Callable,
    monkeypatch: pytest.MonkeyPatch,
    tried: Callable[..., None],
) -> None:
    write_notebook(tmp_path / "notebooks", seconds=60)
    monkeypatch.setenv("FAULTS_NOTEBOOKS", str(tmp_path / "notebooks"))
    environment = os.environ | {"LT_OUTPUT_ROOT": str(tmp_path), "PYTHONPATH": str(paths.ROOT)}
    words = [sys.executable, str(KILLER), "nothing", "half", *RUN]
    runner = subprocess.Popen(
        words,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=heed_signals,
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "drawing").exists():
        assert time.monotonic() < deadline and runner.poll() is None
        time.sleep(0.1)
    family = psutil.Process(runner.pid).children(recursive=True)
    names = {"kernel": "ipykernel_launcher", "papermill": "import papermill"}
    named = {name: [p for p in family if word in " ".join(p.cmdline())] for name, word in names.items()}
    if victim == "stopped":  # they notice nothing, and live on
        for process in family:
            process.suspend()
    if victim == "group":
        os.killpg(runner.pid, how)
    else:
        (named[victim][0] if victim in named else psutil.Process(runner.pid)).send_signal(how)
    if victim == "stopped":  # the suspended ones hold the pipe open
        runner.wait()
        runner.stdout.close()
    else:
        output = runner.communicate(timeout=120)[0].decode()
    if victim in named:
        assert runner.returncode == 1 and "FAILED 01_table" in output and "out of memory?" in output
    else:
        assert runner.returncode == (-how if how == signal.SIGKILL else 130)
    if victim != "stopped":
        _, alive = psutil.wait_procs(family, timeout=15)
        assert not alive, "a process outlived the runner"
    assert not (tmp_path / "figures").exists(), "a run that did not end hands nothing over"

    # Run again, to the end: what is left of the dead run changes nothing of it.
    (tmp_path / "drawing").unlink()
    write_notebook(tmp_path / "notebooks", seconds=0, value=3)
    done = command("nothing", "half", *RUN, out=tmp_path, script=KILLER)
    reports = tmp_path / "reports" / "digits"
    assert (done.returncode, Record.load(reports, "01_table").status) == (0, "ok"), done.stdout
    for process in family if victim == "stopped" else []:
        process.resume()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert (tmp_path / "figures/digits/A.csv").read_text() == "a,b\n1,3\n"
    assert "time.sleep(0)" in json.dumps(nbformat.read(reports / "01_table.ipynb", 4))
    if victim == "stopped":
        done = command("nothing", "half", *RUN, out=tmp_path, script=KILLER)
        assert "01_table: up to date" in done.stdout
    assert not list(reports.glob(".run-*")), "a run leaves no scratch folder, nor what dead ones left"
    tried(f"{victim} ended by {how.name} while a notebook runs")
