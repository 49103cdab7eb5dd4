"""`run_all.sh` in unusual surroundings: places, home folder, network, kernel, two at once.

Each runs a small checkout (the scripts, the package and one notebook) on the digits, from training to the
report, with the environment of these tests.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_killed import write_notebook

from lt_core import paths

SCRIPTS = ("run_all.sh", "environment.sh", "requirements.txt", "pyproject.toml")
AWKWARD = "Söhne & Töchter 'lab' 日本"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout in a folder with spaces, quotes and letters that are not ASCII."""
    folder = tmp_path / AWKWARD / "check out"
    folder.mkdir(parents=True)
    for name in SCRIPTS:
        shutil.copy(paths.ROOT / name, folder)
    shutil.copytree(paths.PACKAGE, folder / "lt_core", ignore=shutil.ignore_patterns("__pycache__"))
    write_notebook(folder / "notebooks")
    return folder


def start(checkout: Path, prefix: tuple[str, ...] = (), **changes: str | None) -> subprocess.Popen:
    """`run_all.sh --profile digits`; a variable that is None is unset."""
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix, "PYTHONDONTWRITEBYTECODE": "1"} | changes
    environment = {name: value for name, value in environment.items() if value is not None}
    environment.pop("PYTHONPATH", None) if "PYTHONPATH" not in changes else None
    return subprocess.Popen(
        [*prefix, "bash", str(checkout / "run_all.sh"), "--profile", "digits"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
    )


def outcome(process: subprocess.Popen) -> str:
    return process.communicate(timeout=300)[0]


def check_results(root: Path) -> None:
    for name in ("T1.csv", "T2.csv"):
        assert (root / "figures" / "digits" / name).read_text() == "digits 0"
    for name in ("01_a.html", "index.html"):
        page = (root / "reports" / "digits" / name).read_text(encoding="utf-8")
        assert page.rstrip().endswith("</html>")


def in_namespace(*setting_up: str) -> tuple[str, ...]:
    """Words before a command that run it in namespaces of its own, after setting those up."""
    script = " && ".join([*setting_up, 'exec "$@"'])
    words = ("unshare", "--map-root-user", "--mount", "--net", "bash", "-c", script, "bash")
    if not shutil.which("unshare") or subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("namespaces cannot be made here")
    return words


def test_no_home_no_network_and_an_awkward_place(checkout, tried):
    prefix = in_namespace("ip link set lo up")
    process = start(checkout, prefix, HOME=None)
    output = outcome(process)
    assert process.returncode == 0, output
    check_results(checkout)
    for kind in ("spaces and non-ASCII letters in the path", "no HOME", "no network"):
        tried(f"surroundings: {kind}")


@pytest.mark.slow
def test_a_read_only_checkout(checkout, tmp_path, tried):
    prefix = in_namespace(f'mount --bind -o ro "{checkout}" "{checkout}"')
    process = start(checkout, prefix)
    output = outcome(process)
    assert process.returncode == 1 and output.splitlines()[-1].startswith("error: "), output
    assert "Read-only file system" in output.splitlines()[-1]
    tried("surroundings: read-only checkout, outputs into it")
    prefix = in_namespace(f'mount --bind -o ro "{checkout}" "{checkout}"', "ip link set lo up")
    process = start(checkout, prefix, LT_OUTPUT_ROOT=str(tmp_path / "out"))
    output = outcome(process)
    assert process.returncode == 0, output
    check_results(tmp_path / "out")
    tried("surroundings: read-only checkout, outputs elsewhere")


@pytest.mark.slow
def test_two_at_once(checkout, tried):
    both = [start(checkout), start(checkout)]
    outputs = [outcome(process) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("01_a: finished" in output for output in outputs) == 1
    assert sum("another run of profile digits is at work" in output for output in outputs) == 1
    check_results(checkout)
    tried("surroundings: two run_all.sh at once")


@pytest.mark.slow
def test_a_missing_kernel(checkout, tmp_path, tried):
    broken = tmp_path / "broken" / "ipykernel_launcher.py"
    broken.parent.mkdir()
    broken.write_text("raise ModuleNotFoundError('there is no kernel here')")
    process = start(checkout, PYTHONPATH=str(broken.parent))
    output = outcome(process)
    assert process.returncode == 1, output
    assert "FAILED 01_a: the kernel did not start" in output
    tried("surroundings: missing kernel")
    process = start(checkout)
    output = outcome(process)
    assert process.returncode == 0, output
    check_results(checkout)
