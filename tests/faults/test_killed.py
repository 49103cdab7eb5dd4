"""Killed in the middle of things: a plain rerun ends with what an undisturbed run gives."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lt_core import paths
from lt_core.features import META, TENSORS, load_cache
from lt_core.notebooks import Record

HERE = Path(__file__).parent


def command(root: Path, *words: str, die: tuple[str, int] = ("no such file", 1)) -> subprocess.Popen:
    """`python -m lt_core WORDS`, killed at the n-th use of a file with a word in its name."""
    program = [sys.executable, str(HERE / "dying.py"), str(root), die[0], str(die[1]), *words]
    environment = os.environ | {
        "LT_OUTPUT_ROOT": str(root),
        "PYTHONPATH": str(paths.ROOT),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


TRAIN = ("train", "--profile", "digits", "--backbone", "sqrt")
# Uses of a file: made, written, opened to be synchronised, given its rights, put in its place.
DEATHS = [
    ("training, a checkpoint begun", "last.pt", 12),
    ("training, the best checkpoint in the making", "best.pt", 9),
    ("training, a log in the making", "history.jsonl", 20),
    ("extraction", "best.pt", 40),
    ("cache writing, the tensors in the making", TENSORS, 2),
    ("cache writing, the description in the making", META, 4),
]


@pytest.mark.slow
def test_training_extraction_and_cache_writing(tmp_path, tried):
    killed = tmp_path / "killed"
    for where, name, number in DEATHS:
        process = command(killed, *TRAIN, die=(name, number))
        output = process.communicate(timeout=300)[0]
        if where == "extraction" and process.returncode == 0:
            pytest.fail(f"it was not killed: {output[-500:]}")
        assert process.returncode == -signal.SIGKILL, (where, output[-500:])
        folder = killed / "caches" / "digits" / "sqrt" / "seed0"
        assert not (folder / META).exists(), where
        tried(f"killed: {where}")
    for root in (killed, tmp_path / "whole"):
        process = command(root, *TRAIN)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
    place = Path("caches") / "digits" / "sqrt" / "seed0"
    one, two = killed / place, tmp_path / "whole" / place
    assert (one / TENSORS).read_bytes() == (two / TENSORS).read_bytes()
    metas = [load_cache(folder).meta for folder in (one, two)]
    for key in ("history", "accuracies", "epoch_of_best"):
        assert metas[0][key] == metas[1][key], key


def write_notebook(folder: Path, seconds: float = 0) -> None:
    """One notebook that writes a file, waits, and writes another."""
    import nbformat

    write = "(folder / '{}').write_text(f'{{profile}} {{seed}}')"
    cells = [
        nbformat.v4.new_markdown_cell("# A notebook", id="title"),
        nbformat.v4.new_code_cell(
            'profile = "digits"\nseed = 0', id="parameters", metadata={"tags": ["parameters"]}
        ),
        nbformat.v4.new_code_cell(
            "import time\nfrom lt_core import paths\nfolder = paths.figures(profile)\n"
            f"folder.mkdir(parents=True, exist_ok=True)\n{write.format('T1.csv')}\ntime.sleep({seconds})\n"
            f"{write.format('T2.csv')}",
            id="work",
        ),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    declared = {"produces": ["T1.csv", "T2.csv"], "backbones": [], "reads": []}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "lt_core": declared})
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / "01_a.ipynb")


@pytest.mark.slow
def test_notebook_execution_and_report_building(tmp_path, tried):
    """The real runner and a real notebook; `paths.NOTEBOOKS` is that of a small checkout."""
    checkout, root = tmp_path / "checkout", tmp_path / "out"
    write_notebook(checkout / "notebooks", seconds=2)
    (checkout / "lt_core").symlink_to(paths.ROOT / "lt_core")
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import dying\n"
        "from lt_core import cli, paths; paths.NOTEBOOKS = Path(sys.argv[2])\n"
        "dying.at_file_use(paths.output_root(), int(sys.argv[4]), dying.kill_me, sys.argv[3])\n"
        "sys.exit(cli.main(['notebooks', '--profile', 'digits']))"
    )
    environment = os.environ | {"LT_OUTPUT_ROOT": str(root), "PYTHONPATH": str(paths.ROOT)}

    def start(word: str, number: int) -> subprocess.Popen:
        words = [sys.executable, "-c", program, str(HERE), str(checkout / "notebooks"), word, str(number)]
        return subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    first = root / "figures" / "digits" / "T1.csv"
    process = start("no such file", 1)
    deadline = time.monotonic() + 120
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert Record.load(root / "reports" / "digits", "01_a").status == "running"
    tried("killed: notebook execution")
    for where, word, number in (
        ("a report in the making", ".01_a.html", 2),
        ("the index in the making", ".index.html", 2),
    ):
        process = start(word, number)
        output = process.communicate(timeout=120)[0]
        assert process.returncode == -signal.SIGKILL, output
        tried(f"killed: report building, {where}")
    process = start("no such file", 1)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    for name in ("T1.csv", "T2.csv"):
        assert (root / "figures" / "digits" / name).read_text() == "digits 0"
    reports = root / "reports" / "digits"
    assert Record.load(reports, "01_a").status == "ok"
    for name in ("01_a.html", "index.html"):
        assert (reports / name).read_text(encoding="utf-8").rstrip().endswith("</html>")
