"""The runner on tiny notebooks: good, failing, killed, untagged, silent ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
from filelock import FileLock

import lt_core
from lt_core import paths, runner, site
from lt_core.checks import CacheError, InputError, ProfileError
from lt_core.runner import Options, Record

PARAMETERS = 'profile = "digits"  # scale\nseed = None\nshots = 5  # images a class\nname = "x"'
WRITE = (
    "from lt_core import paths\n"
    "folder = paths.figures(profile, shots=shots); folder.mkdir(parents=True, exist_ok=True)\n"
    "(folder / '{file}').write_text(f'{{profile}} {{seed}} {{shots}}')"
)
PLOT = "import matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()"


def write_notebook(
    folder: Path,
    name: str,
    *code: str,
    produces: tuple[str, ...] = (),
    backbones: tuple[str, ...] = (),
    parameters: str | None = PARAMETERS,
    **more: object,
) -> Path:
    """A small notebook with a heading, a parameters cell (unless None) and code cells."""
    cells = [nbformat.v4.new_markdown_cell(f"# Title of {name}", id="title")]
    if parameters is not None:
        cells.append(
            nbformat.v4.new_code_cell(parameters, id="parameters", metadata={"tags": ["parameters"]})
        )
    cells += [nbformat.v4.new_code_cell(text, id=f"code-{index}") for index, text in enumerate(code)]
    declared = {"produces": list(produces), "backbones": list(backbones), **more}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "lt_core": declared})
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def edit_last_cell(path: Path, source: str) -> None:
    notebook = nbformat.read(path, 4)
    notebook.cells[-1].source = source
    nbformat.write(notebook, path)


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Notebooks, code and outputs of the runner moved below tmp_path; the notebooks folder."""
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path / "out"))
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    code = tmp_path / "code.py"
    code.write_text("first")
    monkeypatch.setattr(runner, "code_files", lambda: [code])
    monkeypatch.setattr(runner, "STAGGER_SECONDS", 0.0)
    return tmp_path / "notebooks"


@pytest.fixture
def fake_backbones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for lt_core.backbones: `continual` has no cache, `uniform` three seeds."""

    def cache_folder(profile: str, backbone: str, seed: int) -> Path:
        return tmp_path / "caches" / backbone / f"seed{seed}"

    def ensure(profile: str, backbone: str, seed: int, data_root: object) -> Path:
        fake.asked.append((profile, backbone, seed))
        if backbone == "continual":
            raise CacheError("there is no such cache: train it")
        folder = cache_folder(profile, backbone, seed)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "meta.json").write_text(json.dumps({"sha256": "one"}))
        return folder

    def seeds_shown(profile: str, backbone: str, seed: int | None) -> list[int]:
        return [0, 1, 2] if seed is None else [seed]

    fake = SimpleNamespace(asked=[], cache_folder=cache_folder, ensure=ensure, seeds_shown=seeds_shown)
    assert site  # imported before, so that it and what it imports hold the real module
    monkeypatch.setitem(sys.modules, "lt_core.backbones", fake)
    monkeypatch.setattr(lt_core, "backbones", fake, raising=False)
    return fake


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs that only write the declared files, for tests of planning; the names of what ran."""
    ran: list[str] = []

    def execute(worker: runner.Worker, task: runner.Task, place: Path) -> tuple[str, str]:
        ran.append(task.notebook.name)
        for name in task.notebook.produces:
            (place / "figures" / task.out.name / name).write_text("made")
        (task.options.reports / f"{task.notebook.name}.ipynb").write_bytes(task.notebook.path.read_bytes())
        return "", ""

    monkeypatch.setattr(runner.Worker, "execute", execute)
    return ran


def options(**more: object) -> Options:
    return Options(profile="digits", **more)


# --- The real thing ------------------------------------------------------------------------------------


def test_good_and_bad_notebooks_side_by_side(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")  # figures must show all the same
    write_notebook(place, "01_good", WRITE.format(file="T1.csv"), PLOT, produces=("T1.csv",))
    write_notebook(place, "02_fails", "values = [1]", "print('so far')\nvalues[3]", "print('never')")
    write_notebook(place, "03_killed", "import os", "os.kill(os.getpid(), 9)")
    write_notebook(place, "04_silent", "1 + 1", produces=("F4.png",))
    write_notebook(place, "05_untagged", "1 + 1", parameters=None)
    (place / "06_broken.ipynb").write_text("{ not json")

    status = runner.run(options(assignments=["shots=7"]))

    shown = capfd.readouterr().out
    reports = paths.reports("digits", shots="7")
    records = {path.stem: Record.load(reports, path.stem) for path in reports.glob("0*.json")}
    assert status == 1
    assert (paths.figures("digits", shots="7") / "T1.csv").read_text() == "digits None 7"
    assert {name: record.error for name, record in records.items()} == {
        "01_good": "",
        "02_fails": "IndexError: list index out of range",
        "03_killed": "the kernel was killed (out of memory?)",
        "04_silent": "did not write F4.png",
        "05_untagged": "its cell tagged `parameters` lacks profile and seed",
        "06_broken": "the file is not a notebook",
    }
    # papermill's injected cell is the third
    assert (records["02_fails"].cell, records["03_killed"].cell) == ("cell 5", "cell 5")
    summary = shown.split("\nnotebook ")[1]
    assert "FAILED 02_fails: cell 5: IndexError: list index out of range" in summary
    assert "1 of 6 notebooks are fine" in summary
    assert str(reports / "index.html") in summary
    assert str(paths.figures("digits", shots="7")) in summary
    assert sorted(path.stem for path in reports.glob("*.ipynb")) == [
        "01_good", "02_fails", "03_killed", "04_silent",
    ]  # fmt: skip
    assert 'src="data:image/png;base64,' in (reports / "01_good.html").read_text()
    assert "so far" in (reports / "02_fails.html").read_text()
    assert "list index out of range" in (reports / "02_fails.html").read_text()
    assert "IndexError: list index out of range" in (reports / "index.html").read_text()
    assert not [path for path in reports.iterdir() if path.name.startswith(".running")]

    began = time.monotonic()
    assert runner.run(options(assignments=["shots=7"], only="01")) == 0
    assert time.monotonic() - began < 3
    assert "01_good: up to date" in capfd.readouterr().out


def test_stopping_ends_children_and_theirs(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    note = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))"
    sleeps = f"{note}; time.sleep(60)"
    child = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleeps!r}], start_new_session=True)"
    )
    with runner.Processes() as processes:
        worker = threading.Thread(
            target=processes.wait_for, args=([sys.executable, "-c", child], dict(os.environ), None)
        )
        worker.start()
        wait_until(lambda: pid.is_file() and pid.read_text())
        sleeper = psutil.Process(int(pid.read_text()))
        processes.stop()
        assert not sleeper.is_running() or sleeper.status() == psutil.STATUS_ZOMBIE
        worker.join(timeout=5)
        assert not worker.is_alive()
        assert processes.wait_for([sys.executable, "-c", "print('too late')"], {}, None) < 0


@pytest.mark.slow
def test_interrupted_run_leaves_no_child(place: Path, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        f"import os, pathlib, time\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\ntime.sleep(120)"
    )
    write_notebook(place, "01_sleeps", code)
    program = (
        "import sys, pathlib; from lt_core import cli, paths; "
        "paths.NOTEBOOKS = pathlib.Path(sys.argv[1]); "
        "sys.exit(cli.main(['notebooks', '--profile', 'digits']))"
    )
    environment = os.environ | {"PYTHONPATH": str(paths.PACKAGE.parent)}
    child = subprocess.Popen([sys.executable, "-c", program, str(place)], env=environment, cwd=tmp_path)
    try:
        wait_until(lambda: pid.is_file() and pid.read_text())
        kernel = psutil.Process(int(pid.read_text()))
        child.terminate()
        assert child.wait(timeout=20) == 130
        psutil.wait_procs([kernel], timeout=5)
        assert not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE
    finally:
        child.kill()
    assert Record.load(paths.reports("digits"), "01_sleeps").status == "running"
    assert "did not finish last time" in runner.dry_run(options())


# --- What is out of date -------------------------------------------------------------------------------


def test_all_seeds_of_a_backbone_are_made_and_watched(
    place: Path, no_kernel: list[str], fake_backbones: SimpleNamespace
) -> None:
    write_notebook(place, "01_a", "1", produces=("T1.csv",), backbones=("uniform",))
    assert runner.run(Options()) == 0
    assert fake_backbones.asked == [("embedded", "uniform", seed) for seed in (0, 1, 2)]
    assert runner.plan(Options())[0].reason == ""
    meta = fake_backbones.cache_folder("embedded", "uniform", 2) / "meta.json"
    meta.write_text(json.dumps({"sha256": "another"}))
    assert runner.plan(Options())[0].reason == "changed feature caches"


def test_second_run_does_nothing_and_changes_rerun(
    place: Path, tmp_path: Path, no_kernel: list[str], fake_backbones: SimpleNamespace
) -> None:
    source = write_notebook(place, "01_a", "1", produces=("T1.csv",), backbones=("sqrt",))

    def reason(**more: object) -> str:
        return runner.plan(options(**more))[0].reason

    assert reason() == "never run"
    assert runner.run(options()) == 0
    assert reason() == ""
    assert runner.run(options()) == 0
    assert no_kernel == ["01_a"]
    assert fake_backbones.asked == [("digits", "sqrt", seed) for seed in (0, 1, 2)]

    assert reason(force=True) == "forced"
    assert reason(assignments=["shots=6"]) == "never run"  # in a folder of its own
    assert reason(seed=1) == "never run"
    (tmp_path / "code.py").write_text("second")
    assert reason() == "changed code"
    (tmp_path / "code.py").write_text("first")
    meta = fake_backbones.cache_folder("digits", "sqrt", 0) / "meta.json"
    meta.write_text(json.dumps({"sha256": "two"}))
    assert reason() == "changed feature caches"
    meta.write_text(json.dumps({"sha256": "one"}))
    (paths.figures("digits") / "T1.csv").rename(tmp_path / "kept")
    assert reason() == "missing product T1.csv"
    (paths.figures("digits") / "T1.csv").write_text("mad")
    assert reason() == "changed product T1.csv"
    (tmp_path / "kept").rename(paths.figures("digits") / "T1.csv")
    text = source.read_text()
    edit_last_cell(source, "2")
    assert reason() == "changed notebook"
    source.write_text(text)
    assert reason() == ""
    (paths.reports("digits") / "01_a.json").write_text("{ half")
    assert reason() == "never run"
    assert runner.run(options(force=True)) == 0
    assert no_kernel == ["01_a", "01_a"]


def test_outputs_stored_in_a_notebook_do_not_count(place: Path, no_kernel: list[str]) -> None:
    source = write_notebook(place, "01_a", "1")
    runner.run(options())
    notebook = nbformat.read(source, 4)
    notebook.cells[-1].outputs = [nbformat.v4.new_output("stream", text="1")]
    notebook.cells[-1].execution_count = 3
    nbformat.write(notebook, source)
    assert runner.plan(options())[0].reason == ""


def test_what_is_first_runs_before_its_readers(place: Path, no_kernel: list[str]) -> None:
    write_notebook(place, "00_shows", "1", claims=[1])
    judge = write_notebook(place, "99_judges", "1", produces=("claims.csv",), first=True)
    assert runner.run(options()) == 0
    assert no_kernel == ["99_judges", "00_shows"]
    assert [task.reason for task in runner.plan(options())] == ["", ""]
    claims = paths.figures("digits") / "claims.csv"
    claims.write_text("other verdicts")
    reasons = {task.notebook.name: task.reason for task in runner.plan(options())}
    assert reasons == {
        "00_shows": "changed verdicts that it shows",
        "99_judges": "changed product claims.csv",
    }
    edit_last_cell(judge, "2")
    assert runner.run(options()) == 0
    assert no_kernel[2:] == ["99_judges", "00_shows"] or no_kernel[2:] == ["99_judges"]


def test_what_quotes_no_claim_does_not_wait_for_the_judge(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, other_ended = [], threading.Event()

    def papermill(worker: runner.Worker, task: runner.Task, output: Path, log: Path) -> int:
        if task.notebook.first:
            assert other_ended.wait(60)
        ended.append(task.notebook.name)
        if task.notebook.name == "02_alone":
            other_ended.set()
        log.write_text("")
        output.write_text(task.notebook.path.read_text())
        return 0

    monkeypatch.setattr(runner.Worker, "papermill", papermill)
    write_notebook(place, "00_shows", "1", claims=[1])
    write_notebook(place, "02_alone", "1")
    write_notebook(place, "99_judges", "1", first=True)
    assert runner.run(options(jobs=2)) == 0
    assert ended == ["02_alone", "99_judges", "00_shows"]


def test_an_old_product_does_not_pass_for_a_new_one(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_notebook(place, "01_a", "1", produces=("T1.csv",))
    old = paths.figures("digits") / "T1.csv"
    old.parent.mkdir(parents=True)
    old.write_text("committed long ago")
    monkeypatch.setattr(runner.Worker, "execute", lambda *_: ("", ""))
    assert runner.run(options()) == 1
    assert "did not write T1.csv" in capsys.readouterr().out


def test_other_parameters_never_touch_the_results_of_the_defaults(place: Path, no_kernel: list[str]) -> None:
    write_notebook(place, "01_a", "1", produces=("T1.csv",))
    assert runner.run(options()) == 0
    committed = paths.figures("digits") / "T1.csv"
    committed.write_text("of the defaults")
    assert runner.run(options(seed=1)) == 0
    assert runner.run(options(assignments=["shots=7"])) == 0
    assert committed.read_text() == "of the defaults"
    made = sorted(
        path.relative_to(paths.output_root()).as_posix() for path in paths.output_root().rglob("T1.csv")
    )
    assert made == ["figures/digits+seed=1/T1.csv", "figures/digits+shots=7/T1.csv", "figures/digits/T1.csv"]


# --- Backbones -----------------------------------------------------------------------------------------


def test_a_missing_cache_fails_its_notebooks_only(
    place: Path, no_kernel: list[str], fake_backbones: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    write_notebook(place, "01_needs", "1", backbones=("sqrt", "continual"))
    write_notebook(place, "02_needs_too", "1", backbones=("continual",))
    write_notebook(place, "03_does_not", "1", backbones=("sqrt",))
    assert runner.run(options()) == 1
    assert no_kernel == ["03_does_not"]
    assert {backbone for _, backbone, _ in fake_backbones.asked} == {"sqrt", "continual"}
    expected = "backbone continual: there is no such cache: train it"
    assert f"FAILED 02_needs_too: {expected}" in capsys.readouterr().out


# --- Processes -----------------------------------------------------------------------------------------


def test_a_kernel_that_never_started_is_tried_once_more(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_notebook(place, "01_a", "1")
    attempts = []

    def papermill(worker: object, task: runner.Task, output: Path, log: Path) -> int:
        attempts.append(output)
        log.write_text(
            "RuntimeError: Kernel died before replying to kernel_info" if len(attempts) < 2 else ""
        )
        output.write_text(task.notebook.path.read_text())
        return int(len(attempts) < 2)

    monkeypatch.setattr(runner.Worker, "papermill", papermill)
    assert runner.run(options()) == 0
    assert len(attempts) == 2
    assert "trying once more" in capsys.readouterr().out


def test_notebooks_side_by_side_share_the_cores(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = {}

    def papermill(worker: runner.Worker, task: runner.Task, output: Path, log: Path) -> int:
        threads[task.notebook.name] = worker.threads
        log.write_text("")
        output.write_text(task.notebook.path.read_text())
        return 0

    monkeypatch.setattr(runner.Worker, "papermill", papermill)
    monkeypatch.setattr(runner, "cores", lambda: 8)
    write_notebook(place, "01_a", "1")
    write_notebook(place, "99_b", "1", first=True)
    assert runner.run(options(jobs=3)) == 0
    assert threads == {"01_a": 2, "99_b": 2}


def test_children_see_this_checkout_and_absolute_paths(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LT_OUTPUT_ROOT", "mine")
    for name in ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "JUPYTER_PATH", "IPYTHONDIR"):
        monkeypatch.setenv(name, "/strangers")
    monkeypatch.setenv("LT_DATA_ROOT", "pictures")
    inherited = runner.child_environment(options(), tmp_path, tmp_path / "fits")
    assert inherited["LT_DATA_ROOT"] == str(tmp_path / "pictures")
    assert "/strangers" not in inherited.values()
    assert (inherited["PYTHONSAFEPATH"], inherited["PYTHONNOUSERSITE"]) == ("1", "1")
    environment = runner.child_environment(options(data_root=tmp_path), tmp_path, tmp_path / "fits")
    assert environment["LT_DATA_ROOT"] == str(tmp_path)
    assert environment["LT_OUTPUT_ROOT"] == str(tmp_path / "mine")
    assert environment["PYTHONPATH"] == str(paths.PACKAGE.parent)


def test_a_second_run_waits(place: Path, no_kernel: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    write_notebook(place, "01_a", "1")
    folder = paths.reports("digits")
    folder.mkdir(parents=True)
    held = threading.Event()

    def first_run() -> None:
        with FileLock(folder / ".lock"):
            held.set()
            time.sleep(0.5)

    threading.Thread(target=first_run).start()
    held.wait()
    assert runner.run(options()) == 0
    assert "another run of profile digits is at work" in capsys.readouterr().out
    assert no_kernel == ["01_a"]


# --- Bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"only": "07"}, "unknown notebook '07': choose one of 01_a, 02_b"),
        ({"only": " , "}, "--only needs"),
        ({"assignments": ["shot=5"]}, "unknown parameter 'shot': choose one of name, shots"),
        ({"assignments": ["shots"]}, "-p needs NAME=VALUE, found 'shots'"),
        ({"assignments": ["shots=many"]}, "parameter shots of 01_a must be of type int, found 'many'"),
        ({"assignments": ["seed=3"]}, "use --seed"),
        ({"assignments": ["profile=paper"]}, "use --profile"),
        ({"only": "02", "assignments": ["shots=6"]}, "unknown parameter 'shots'"),
        ({"jobs": 0}, "--jobs must be at least 1"),
        ({"seed": -1}, "--seed must be 0 or above"),
        ({"seed": 2**64}, "--seed must be 0 or above, found 18446744073709551616 (and below 2**32)"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    place: Path, no_kernel: list[str], more: dict[str, object], message: str
) -> None:
    write_notebook(place, "01_a", "1")
    write_notebook(place, "02_b", "1", parameters='profile = "digits"\nseed = None')
    with pytest.raises((InputError, ProfileError)) as caught:
        runner.run(options(**more))
    assert message in str(caught.value)
    assert no_kernel == []
    assert not (paths.output_root()).exists()


def test_an_unknown_backbone_is_refused_before_anything_runs(place: Path, no_kernel: list[str]) -> None:
    write_notebook(place, "01_a", "1", parameters='profile = "digits"\nseed = None\nbackbone = "sqrt"')
    with pytest.raises(InputError, match="unknown backbone 'nope': choose one of balanced_softmax"):
        runner.run(options(assignments=["backbone=nope"]))
    assert no_kernel == []


def test_unknown_profile_lists_the_known(place: Path) -> None:
    write_notebook(place, "01_a", "1")
    with pytest.raises(ProfileError, match=r"'tiny'.*digits.*embedded"):
        runner.run(Options(profile="tiny"))


def test_no_notebooks(place: Path) -> None:
    with pytest.raises(InputError, match="no notebooks"):
        runner.listing("digits")


def test_two_makers_of_a_product_are_refused(place: Path, no_kernel: list[str]) -> None:
    write_notebook(place, "01_a", "1", produces=("T1.csv",))
    write_notebook(place, "01_a-Copy1", "2", produces=("T1.csv",))  # JupyterLab's Duplicate
    with pytest.raises(InputError, match=r"01_a and 01_a-Copy1 both declare the product T1.csv"):
        runner.run(options())
    assert no_kernel == []


def damaged(change: Callable[[dict], object]) -> Callable[[str], str]:
    def changed(text: str) -> str:
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return changed


DAMAGES: list[Callable[[str], str]] = [
    lambda text: "",
    lambda text: text[:-40],
    lambda text: "[1]",
    lambda text: "[" * 10**5,
    lambda text: '{"cells": 3}',
    damaged(lambda content: content.update(metadata=None)),
    damaged(lambda content: content.update(metadata=[])),
    damaged(lambda content: content.update(cells=[1, 2])),
    damaged(lambda content: content["cells"][1].update(metadata={"tags": None})),
    damaged(lambda content: content["cells"][1].update(source=3)),
    damaged(lambda content: content["metadata"].update(lt_core=3)),
    damaged(lambda content: content["metadata"]["lt_core"].update(produces="T1.csv")),
    damaged(lambda content: content["metadata"]["lt_core"].update(produces=["../../T1.csv"])),
    damaged(lambda content: content["metadata"]["lt_core"].update(produces=["/tmp/T1.csv"])),
    damaged(lambda content: content["metadata"]["lt_core"].update(produces=[None])),
    damaged(lambda content: content["metadata"]["lt_core"].update(backbones=[{}])),
]


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_a_damaged_notebook_stops_itself_alone(
    place: Path, no_kernel: list[str], capsys: pytest.CaptureFixture[str], number: int
) -> None:
    write_notebook(place, "01_good", "1", produces=("T2.csv",))
    bad = write_notebook(place, "02_bad", "1", produces=("T1.csv",))
    bad.write_text(DAMAGES[number](bad.read_text()))
    assert "01_good" in runner.listing("digits") and "02_bad" in runner.dry_run(options())
    assert runner.run(options()) == 1
    assert no_kernel == ["01_good"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert line.startswith("FAILED 02_bad: ")


def test_a_damaged_record_or_page_means_run_again(place: Path, no_kernel: list[str]) -> None:
    write_notebook(place, "01_a", "1", produces=("T1.csv",))
    assert runner.run(options()) == 0
    reports = paths.reports("digits")
    whole = {path: path.read_bytes() for path in reports.glob("01_a.*")}
    record = json.loads(whole[reports / "01_a.json"])
    for name, content in {
        "01_a.html": whole[reports / "01_a.html"][:-20],
        "01_a.ipynb": whole[reports / "01_a.ipynb"].replace(b"Title", b"title"),
        "01_a.json": json.dumps(record | {"fingerprint": None}).encode(),
    }.items():
        for path, as_made in whole.items():
            path.write_bytes(as_made)
        assert runner.plan(options())[0].reason == ""
        (reports / name).write_bytes(content)
        assert runner.plan(options())[0].reason != ""
    for broken in ([], {"notebook": "01_a"}, record | {"products": [1]}, record | {"seconds": "long"}):
        (reports / "01_a.json").write_text(json.dumps(broken))
        assert runner.plan(options())[0].reason == "never run"


def test_a_number_that_fits_two_notebooks_is_refused(place: Path) -> None:
    write_notebook(place, "01_a", "1")
    write_notebook(place, "01_b", "1")
    with pytest.raises(InputError, match="--only 1 fits 01_a and 01_b: name one of them"):
        runner.select(runner.find(), "1")
    assert [notebook.name for notebook in runner.select(runner.find(), "01_b")] == ["01_b"]


# --- Choosing ------------------------------------------------------------------------------------------


def test_only_takes_numbers_and_names(place: Path) -> None:
    for name in ("00_overview", "01_main", "12_more"):
        write_notebook(place, name, "1")
    found = runner.find()
    for words, expected in {
        "01": ["01_main"],
        "1": ["01_main"],
        "12_more, 0": ["00_overview", "12_more"],
        "01_main.ipynb,01": ["01_main"],
    }.items():
        assert [notebook.name for notebook in runner.select(found, words)] == expected
    assert runner.select(found, None) == found


def test_parameters_take_the_type_of_their_default(place: Path) -> None:
    text = 'profile = "digits"\nseed = None\nrate = 0.5\nflag = False\nname = "x"\nlimits = [1]\nlimit = None'
    notebook = runner.Notebook(write_notebook(place, "01_a", "1", parameters=text))
    given = runner.parse_assignments(["rate=1", "flag=true", "name=08", "limits=[2, 3]", "limit=a=b"])
    expected = {"rate": 1.0, "flag": True, "name": "08", "limits": [2, 3], "limit": "a=b"}
    assert runner.own_parameters(notebook, given, 2) == {"seed": 2} | expected
    same = runner.parse_assignments(["rate=0.5", "name=x"])
    assert runner.own_parameters(notebook, same, None) == {
        "seed": None
    }  # the defaults: no folder of their own


def test_assignment_goes_to_the_notebooks_that_have_it(place: Path) -> None:
    write_notebook(place, "01_a", "1")
    write_notebook(place, "02_b", "1", parameters='profile = "digits"\nseed = None')
    first, second = runner.plan(options(assignments=["shots=9"]))
    assert first.injected == {"profile": "digits", "seed": None, "shots": 9}
    assert second.injected == {"profile": "digits", "seed": None}


def test_listing_and_dry_run_write_nothing(place: Path) -> None:
    write_notebook(place, "01_a", "1", produces=("T1.csv", "T1.md"))
    assert runner.listing("digits") == "01_a: Title of 01_a\n    produces T1.csv, T1.md"
    assert runner.dry_run(options()) == "01_a: would run (never run)"
    with pytest.raises(ProfileError, match="unknown profile 'tiny'"):
        runner.listing("tiny")
    assert not paths.output_root().exists()
