"""The code itself: nothing is evaluated, unpickled or handed to a shell as text."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lt_core import paths

SOURCES = [
    *sorted((paths.ROOT / "lt_core").rglob("*.py")),
    *sorted((paths.ROOT / "benchmarks").glob("*.py")),
    *sorted(paths.NOTEBOOKS.glob("*.ipynb")),
]
FORBIDDEN = {
    *("eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("pickle.load", "pickle.loads", "joblib.load", "yaml.load", "yaml.unsafe_load"),
}


def code_of(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def dangers(code: str) -> Iterator[str]:
    """Calls that run text or pickles, with their line."""
    for call in ast.walk(ast.parse(code)):
        if not isinstance(call, ast.Call):
            continue
        name = ast.unparse(call.func)
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if (
            name in FORBIDDEN
            or given.get("shell", "False") != "False"
            or (name == "torch.load" and given.get("weights_only") != "True")
            or given.get("allow_pickle", "False") != "False"
        ):
            yield f"line {call.lineno}: {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_runs_no_text_and_no_pickle(path: Path) -> None:
    assert list(dangers(code_of(path))) == []


@pytest.mark.parametrize(
    "code",
    [
        "eval(x)",
        "subprocess.run(x, shell=True)",
        "torch.load(f)",
        "pickle.load(f)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(code: str) -> None:
    assert list(dangers(code))
