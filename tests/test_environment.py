"""The pins, their copies, and the shell scripts, with a Python that only pretends to install."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["environment.sh", "run_all.sh", "run_tests.sh", ".ci/run"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def versions() -> dict[str, str]:
    return dict(pin.split("==") for pin in pins())


# --- One list of pins ----------------------------------------------------------------------------------


def test_requirements_are_exact_pins_without_repetition() -> None:
    for pin in pins():
        assert re.fullmatch(r"[a-z0-9-]+==\d+(\.\d+)*", pin), pin
    assert len(versions()) == len(pins())


def test_environment_yml_has_the_same_pins() -> None:
    content = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [entry for entry in content["dependencies"] if isinstance(entry, str)]
    (pip,) = (entry["pip"] for entry in content["dependencies"] if isinstance(entry, dict))
    assert conda == ["python=3.11", "pip"]
    assert pip == [*pins(), "-e ."]
    assert content["channels"] == ["conda-forge"]


def test_ranges_of_the_package_accept_the_pins() -> None:
    extras = PROJECT["optional-dependencies"]
    texts = [*PROJECT["dependencies"], *extras["train"], *extras["notebooks"], *extras["dev"]]
    ranges = [Requirement(text) for text in texts if not text.startswith("lt_core[")]
    for wanted in ranges:
        assert wanted.name in versions(), f"{wanted.name} has no pin"
        assert wanted.specifier.contains(versions()[wanted.name]), wanted
    only_pinned = set(versions()) - {wanted.name for wanted in ranges}
    assert only_pinned == {"numba", "setuptools"}  # umap-learn's compiler; what builds the editable package


GUARDED = """
import builtins, re, sys
from pathlib import Path
real = builtins.__import__

def guarded(name, given=None, *more):
    ours = str((given or {}).get("__name__")).startswith("lt_core")
    if ours and name.split(".")[0] in sys.argv[1].split(","):
        raise ModuleNotFoundError(f"{name} is in an extra")
    return real(name, given, *more)

builtins.__import__ = guarded
exec(re.search("```python\\n(.*?)```", Path("README.md").read_text(), re.DOTALL)[1], {})
"""
MODULES = {"pyyaml": "yaml", "umap-learn": "umap"}  # imported by another name


def test_the_arithmetic_and_the_estimator_need_no_extra() -> None:
    """README's example runs with what `pip install .` brings."""
    extras = PROJECT["optional-dependencies"]
    names = {Requirement(text).name for text in [*extras["train"], *extras["notebooks"]]} - {
        "lt_core",
        "scipy",
    }
    modules = ",".join(sorted(MODULES.get(name, name) for name in names))
    run = subprocess.run([sys.executable, "-c", GUARDED, modules], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_this_environment_satisfies_the_pins() -> None:
    run = shell(ROOT, f'unsatisfied_pins "{sys.executable}"')
    assert (run.returncode, run.stdout) == (0, "")


def test_every_data_file_of_the_package_is_packaged() -> None:
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packaged = {pattern.rpartition(".")[2] for pattern in tables["package-data"]["lt_core"]}
    files = [
        path for path in (ROOT / "lt_core").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert {path.suffix[1:] for path in files} - {"py"} <= packaged


# --- The scripts ---------------------------------------------------------------------------------------


def shell(root: Path, commands: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Runs commands after sourcing environment.sh; a variable that is None is unset."""
    variables = {
        key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "CONDA_PREFIX")
    }
    variables |= {key: value for key, value in environment.items() if value is not None}
    for key in [key for key, value in environment.items() if value is None]:
        variables.pop(key, None)
    script = f'set -euo pipefail; root="$1"; source "{ROOT}/environment.sh"; {commands}'
    return subprocess.run(
        ["bash", "-c", script, "test", str(root)], env=variables, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse(name: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / name)], check=True)


@pytest.mark.parametrize("name", ["run_all.sh", "run_tests.sh"])
def test_scripts_can_be_run(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)


@pytest.mark.parametrize("name", ["run_all.sh", "run_tests.sh"])
def test_help_needs_no_environment(name: str, tmp_path: Path) -> None:
    script = shutil.copy(ROOT / name, tmp_path)  # alone: no environment.sh beside it
    run = subprocess.run(
        ["bash", script, "--help"], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}
    )
    assert run.returncode == 0
    assert f"./{name}" in run.stdout
    assert "#" not in run.stdout
    assert run.stderr == ""


def test_help_names_every_option_of_the_command() -> None:
    from lt_core.cli import parser

    shown = subprocess.run(
        ["bash", str(ROOT / "run_all.sh"), "--help"], capture_output=True, text=True
    ).stdout
    commands = next(action for action in parser()._actions if action.choices)
    for action in commands.choices["notebooks"]._actions:
        assert action.option_strings[-1] in shown


# --- environment.sh with a Python that pretends --------------------------------------------------------

FAKE_PYTHON = """#!/usr/bin/env bash
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
site="$here/../lib/python3.11/site-packages"
case "$1 ${2:-}" in
"-m venv")
    echo "venv" >>"$FAKE_LOG"
    mkdir -p "${@: -1}/bin" && cp "${BASH_SOURCE[0]}" "${@: -1}/bin/python" ;;
"-m pip")
    if [ "$3" = --version ]; then exit 0; fi
    echo "pip $*" >>"$FAKE_LOG"
    sleep "${FAKE_SECONDS:-0}"
    if [ -n "${FAKE_FAILURE:-}" ]; then echo "no such host" >&2; exit 1; fi
    if [ "$4" = -r ]; then
        mkdir -p "$site/tiny-1.0.dist-info"
        echo "Metadata-Version: 2.1
Name: tiny
Version: ${FAKE_VERSION:-1.0}" >"$site/tiny-1.0.dist-info/METADATA"
        touch "$site/tiny-1.0.dist-info/RECORD"
    fi ;;
*) PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" exec "$REAL_PYTHON" "$@" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout that needs one package, under an awkward name, with a fake Python in $PYTHON."""
    root = tmp_path / "Sören's check out"
    root.mkdir()
    (root / "requirements.txt").write_text("# comment\n\ntiny==1.0\n")
    (root / "pyproject.toml").write_text("")
    python = tmp_path / "base" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(python))
    monkeypatch.setenv("REAL_PYTHON", sys.executable)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("LT_DISK_GB", "0")
    return root


PREPARE = 'prepare_environment; echo "python: $LT_PYTHON"; echo "path: $PYTHONPATH"'


def log(checkout: Path) -> list[str]:
    path = checkout.parent / "log"
    lines = path.read_text().splitlines() if path.is_file() else []
    path.unlink(missing_ok=True)
    return [re.sub(r"(?<=-r ).*/", "", line) for line in lines]


INSTALL = ["pip -m pip install -r requirements.txt", "pip -m pip install --no-deps --no-build-isolation -e ."]


def test_makes_the_environment_once(checkout: Path) -> None:
    run = shell(checkout, PREPARE, HOME=None, PYTHONPATH="/elsewhere")
    assert run.returncode == 0, run.stderr
    assert f"python: {checkout}/.venv/bin/python" in run.stdout
    assert f"path: {checkout}\n" in run.stdout
    assert log(checkout) == ["venv", *INSTALL]

    run = shell(checkout, PREPARE, HOME=None)
    assert (run.returncode, log(checkout)) == (0, [])


def test_changed_pins_are_installed(checkout: Path) -> None:
    shell(checkout, PREPARE)
    log(checkout)
    (checkout / "requirements.txt").write_text("tiny==2.0\n")
    run = shell(checkout, PREPARE, FAKE_VERSION="2.0")
    assert (run.returncode, log(checkout)) == (0, INSTALL)


def test_a_failed_installation_says_so_and_is_taken_up_again(checkout: Path) -> None:
    run = shell(checkout, PREPARE, FAKE_FAILURE="yes")
    assert run.returncode == 1
    assert "error: the installation failed" in run.stderr
    assert "python:" not in run.stdout
    assert not (checkout / ".venv" / ".complete").exists()
    log(checkout)
    run = shell(checkout, PREPARE)
    assert (run.returncode, log(checkout)) == (0, INSTALL)  # the same .venv, completed


def test_a_half_installed_package_is_installed_again(checkout: Path) -> None:
    shell(checkout, PREPARE)
    (checkout / ".venv" / ".complete").unlink()
    (checkout / ".venv/lib/python3.11/site-packages/tiny-1.0.dist-info/RECORD").unlink()
    log(checkout)
    assert shell(checkout, PREPARE).returncode == 0
    assert log(checkout) == INSTALL


def test_nothing_is_downloaded_when_only_the_place_changed(checkout: Path) -> None:
    shell(checkout, PREPARE)
    moved = checkout.rename(checkout.parent / "moved")
    log(checkout)
    assert shell(moved, PREPARE).returncode == 0
    assert log(checkout) == INSTALL[1:]


def test_an_active_environment_that_satisfies_is_used(checkout: Path) -> None:
    shell(checkout, PREPARE)
    active = shutil.move(checkout / ".venv", checkout.parent / "active")
    log(checkout)
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        run = shell(checkout, PREPARE, **{variable: str(active)})
        assert f"python: {active}/bin/python" in run.stdout, run.stderr
    assert log(checkout) == []
    assert not (checkout / ".venv").exists()


def test_an_active_environment_that_does_not_is_named(checkout: Path) -> None:
    shell(checkout, PREPARE)
    active = shutil.move(checkout / ".venv", checkout.parent / "active")
    (checkout / "requirements.txt").write_text("tiny==2.0\n")
    run = shell(checkout, PREPARE, VIRTUAL_ENV=str(active), FAKE_VERSION="2.0")
    assert "lacks tiny==2.0" in run.stderr
    assert f"python: {checkout}/.venv/bin/python" in run.stdout


def test_a_local_version_satisfies_its_pin(checkout: Path) -> None:
    shell(checkout, PREPARE, FAKE_VERSION="1.0+cpu")
    run = shell(checkout, f'unsatisfied_pins "{checkout}/.venv/bin/python"')
    assert (run.returncode, run.stdout) == (0, "")
    (checkout / "requirements.txt").write_text("tiny==1.0.1\n")
    assert shell(checkout, f'unsatisfied_pins "{checkout}/.venv/bin/python"').stdout == "tiny==1.0.1\n"


def test_two_at_once_install_once(checkout: Path) -> None:
    if not shutil.which("flock"):
        pytest.skip("needs flock")
    script = f'root="$1"; source "{ROOT}/environment.sh"; {PREPARE}'
    environment = {
        key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "CONDA_PREFIX")
    }
    both = []
    for _ in range(2):
        both.append(
            subprocess.Popen(
                ["bash", "-euc", script, "test", str(checkout)],
                env=environment | {"FAKE_SECONDS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        time.sleep(0.3)
    outputs = [one.communicate(timeout=60)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert "waiting for it" in outputs[1]
    assert log(checkout) == ["venv", *INSTALL]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PYTHON": "/nowhere/python"}, "PYTHON=/nowhere/python is not a Python 3.11 to 3.14"),
        ({"PYTHON": None, "PATH": "/nowhere"}, "no Python 3.11 to 3.14 found"),
        ({"LT_DISK_GB": "99999999"}, "needs about 99999999 GB of disk space"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    checkout: Path, environment: dict[str, str | None], message: str
) -> None:
    path = f'PATH="{environment.pop("PATH")}"; ' if "PATH" in environment else ""
    run = shell(checkout, f"{path}make_venv", **environment)
    assert run.returncode == 1
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
    assert message in run.stderr
    assert log(checkout) == []


def test_tests_run_without_the_slow_ones_by_default(checkout: Path) -> None:
    shutil.copy(ROOT / "environment.sh", checkout)
    shutil.copy(ROOT / "run_tests.sh", checkout)
    (checkout / "pytest.py").write_text("import sys; print(sys.argv[1:])")

    def run(*words: str) -> str:
        command = ["bash", str(checkout / "run_tests.sh"), *words]
        return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[-1]

    assert run("-x", "tests/a b.py") == "['-m', 'not slow', '-x', 'tests/a b.py']"
    assert run("--slow", "-q") == "['-m', '', '-q']"
    assert run() == "['-m', 'not slow']"
