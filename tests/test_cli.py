"""The command line: what reaches the functions, exit statuses, one-line errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lt_core import backbones, cli, paths, runner
from lt_core.checks import DataError, LTError, TrainingError
from lt_core.data import datasets
from lt_core.data.profiles import load_profile

OPTIONS = {"workers": None, "micro_batch": 0, "compiles": False}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[object, ...]]:
    """`train` without training; what it was asked for, and a place for its caches."""
    asked: list[tuple[object, ...]] = []

    def train_backbone(profile, name, seed, data_root, out, options) -> None:
        asked.append((profile.name, name, seed, data_root, options))
        folder = out / backbones.cache_place(profile, name, seed)
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text("{}")

    monkeypatch.setattr(backbones, "train_backbone", train_backbone)
    monkeypatch.setattr(backbones, "is_made", lambda folder, *_: (folder / "meta.json").exists())
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path))
    return asked


def test_train_one(trained: list[tuple[object, ...]]) -> None:
    words = "train --profile small --backbone sqrt --seed 0 --data-root d --workers 4 --micro-batch 64"
    assert cli.main(words.split()) == 0
    assert trained == [("small", "sqrt", 0, Path("d"), OPTIONS | {"workers": 4, "micro_batch": 64})]


def test_train_all_goes_on_where_it_stopped(
    trained: list[tuple[object, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--profile", "digits", "--backbone", "sqrt"]) == 0
    assert cli.main(["train", "--profile", "digits", "--backbone", "all"]) == 0
    names = [name for _, name, *_ in trained]
    profile = load_profile("digits")
    assert sorted(names) == sorted(set(profile.backbones) - set(profile.aliases))  # each once
    assert "sqrt seed 0: done already" in capsys.readouterr().out


def test_shares_of_all_are_every_backbone_once(trained: list[tuple[object, ...]]) -> None:
    sizes = []
    for part in (1, 2, 3):
        before = len(trained)
        assert cli.main(["train", "--profile", "digits", "--backbone", "all", "--share", f"{part}/3"]) == 0
        sizes.append(len(trained) - before)
    jobs = [(name, seed) for _, name, seed, *_ in trained]
    assert len(jobs) == len(set(jobs)) and max(sizes) - min(sizes) <= 1
    profile = load_profile("digits")
    assert {name for name, _ in jobs} == set(profile.backbones) - set(profile.aliases)


@pytest.mark.parametrize("share", ["0/3", "4/3", "2", "a/b", "1/0", "-1/2"])
def test_a_share_that_is_none_is_refused(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--profile", "digits", "--backbone", "all", f"--share={share}"])
    assert stopped.value.code == 2 and "a share reads I/N" in capsys.readouterr().err


def test_train_refuses_a_profile_that_ships_its_caches(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--profile", "embedded", "--backbone", "all"]) == 2
    assert "ships its caches and trains nothing" in capsys.readouterr().err


def test_check_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(datasets, "check_data", lambda *given: [str(one) for one in given])
    assert cli.main(["check-data", "--profile", "small", "--data-root", "d", "--deep"]) == 0
    assert capsys.readouterr().out == "small\nd\nTrue\n"


def test_check_data_of_shipped_caches_verifies_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-data", "--profile", "embedded"]) == 0
    assert "feature caches are there and whole" in capsys.readouterr().out


def test_notebooks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[runner.Options] = []
    monkeypatch.setattr(runner, "run", lambda options: asked.append(options) or 1)
    words = f"--profile digits --only 01 --jobs 3 --force --seed 4 --data-root {tmp_path} -p a=1 -p b=2"
    assert cli.main(["notebooks", *words.split()]) == 1
    assert cli.main(["notebooks"]) == 1
    assert asked == [
        runner.Options("digits", "01", 3, True, tmp_path, 4, ["a=1", "b=2"]),
        runner.Options("embedded", None, None, False, None, None, []),
    ]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (LTError("wrong"), 2),
        (DataError("wrong"), 2),
        (TrainingError("wrong"), 1),
        (OSError("wrong"), 1),
        (RuntimeError("can't start new thread"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_are_one_line(
    error: BaseException,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path))

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(backbones, "train_backbone", fail)
    assert cli.main(["train", "--profile", "digits", "--backbone", "sqrt"]) == status
    shown = capsys.readouterr().err
    threads = isinstance(error, RuntimeError) and "error: no more threads may be started: raise `ulimit -u`\n"
    assert shown == (threads or ("interrupted\n" if status == 130 else "error: wrong\n"))


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path))

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(backbones, "train_backbone", fail)
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


@pytest.mark.parametrize(
    "words",
    [
        ("train",),
        ("nonsense",),
        ("notebooks", "--jobs", "two"),
        ("notebooks", "--profil", "digits"),  # an abbreviation must not start anything
        ("notebooks", "--lis"),
    ],
)
def test_wrong_usage(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(words))
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_no_command_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "check-data" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("lt_core ")


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom lt_core import cli\n"
        "try: cli.main(['notebooks', '--help'])\nexcept SystemExit: pass\n"
        "print('heavy' if {'torch', 'papermill', 'nbconvert'} & set(sys.modules) else 'light')"
    )
    environment = os.environ | {"PYTHONPATH": str(paths.PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.endswith("light\n")
