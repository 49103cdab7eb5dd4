"""The command line: what reaches the functions, exit statuses, one-line errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import lt_core
from lt_core import cli, paths, runner
from lt_core.errors import DataError, LTError, TrainingError

MACHINE = {"workers": None, "decodes_on_device": False, "micro_batch": 0, "compiles": False}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand-ins for the modules that do the work; `calls` has what they were asked."""
    calls: list[tuple[object, ...]] = []
    fake = SimpleNamespace(
        calls=calls,
        train_command=lambda *given: calls.append(("train", *given)),
        extract_command=lambda *given: calls.append(("extract", *given)),
        check_data=lambda *given: calls.append(("check", *given)) or ["all", "well"],
    )
    for name in ("backbones", "datasets"):
        monkeypatch.setitem(sys.modules, f"lt_core.{name}", fake)
        monkeypatch.setattr(lt_core, name, fake, raising=False)
    return fake


def test_train(fakes: SimpleNamespace) -> None:
    assert cli.main(["train", "--profile", "digits", "--backbone", "all"]) == 0
    assert (
        cli.main(
            [
                "train",
                "--profile",
                "small",
                "--backbone",
                "sqrt",
                "--seed",
                "0",
                "--data-root",
                "d",
                "--out",
                "o",
                "--workers",
                "4",
                "--micro-batch",
                "64",
            ]
        )
        == 0
    )
    assert fakes.calls == [
        ("train", "digits", "all", None, None, None, MACHINE),
        ("train", "small", "sqrt", 0, Path("d"), Path("o"), MACHINE | {"workers": 4, "micro_batch": 64}),
    ]


def test_extract(fakes: SimpleNamespace) -> None:
    assert (
        cli.main(
            ["extract", "--profile", "small", "--backbone", "sqrt", "--checkpoint", "c.pt", "--out", "o"]
        )
        == 0
    )
    options = {"workers": None, "decodes_on_device": False}
    assert fakes.calls == [("extract", "small", "sqrt", Path("c.pt"), Path("o"), None, options)]


def test_check_data(fakes: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-data", "--profile", "small", "--data-root", "d", "--deep"]) == 0
    assert fakes.calls == [("check", "small", Path("d"), True)]
    assert capsys.readouterr().out == "all\nwell\n"


def test_notebooks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[runner.Options] = []
    monkeypatch.setattr(runner, "run", lambda options: asked.append(options) or 1)
    words = f"--profile digits --only 01 --jobs 3 --force --seed 4 --data-root {tmp_path} -p a=1 -p b=2"
    assert cli.main(["notebooks", *words.split()]) == 1
    assert cli.main(["notebooks"]) == 1
    assert asked == [
        runner.Options("digits", "01", 3, True, tmp_path, 4, ["a=1", "b=2"]),
        runner.Options("embedded", None, None, False, None, 0, []),
    ]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (LTError("wrong"), 2),
        (DataError("wrong"), 2),
        (TrainingError("wrong"), 1),
        (OSError("wrong"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_are_one_line(
    error: BaseException,
    status: int,
    fakes: SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error

    fakes.train_command = fail
    assert cli.main(["train", "--profile", "digits", "--backbone", "sqrt"]) == status
    shown = capsys.readouterr().err
    assert shown == ("interrupted\n" if status == 130 else "error: wrong\n")


def test_a_bug_keeps_its_traceback(fakes: SimpleNamespace) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    fakes.train_command = fail
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "--profile", "digits", "--backbone", "sqrt"])


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = os.environ | {"PYTHONPATH": str(paths.PACKAGE.parent)} | environment
    return subprocess.run(
        [sys.executable, "-m", "lt_core", *words], capture_output=True, text=True, env=known, timeout=60
    )


def test_unknown_profile_at_the_command_line(tmp_path: Path) -> None:
    done = run("notebooks", "--profile", "tiny", LT_OUTPUT_ROOT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown profile 'tiny': choose one of ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [(), ("train",), ("nonsense",), ("notebooks", "--jobs", "two")])
def test_wrong_usage(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(words))
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom lt_core import cli\n"
        "try: cli.main(['notebooks', '--help'])\nexcept SystemExit: pass\n"
        "print('heavy' if {'torch', 'papermill', 'nbconvert'} & set(sys.modules) else 'light')"
    )
    environment = os.environ | {"PYTHONPATH": str(paths.PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.endswith("light\n")
