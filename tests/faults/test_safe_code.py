"""Nothing is unpickled, evaluated, or handed to a shell as a text."""

import ast
import json
from pathlib import Path

import pytest

from lt_core import paths

FORBIDDEN = {
    *("eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "joblib.load", "yaml.load"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "pd.read_pickle", "dill.load"),
}


def sources() -> list[tuple[str, str]]:
    """Name and Python text of every module, benchmark and notebook."""
    files = [*(paths.ROOT / "lt_core").rglob("*.py"), *(paths.ROOT / "benchmarks").glob("*.py")]
    found = [(str(path.relative_to(paths.ROOT)), path.read_text(encoding="utf-8")) for path in files]
    for path in paths.NOTEBOOKS.glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        found.append((path.name, "\n".join(code)))
    return found


def unsafe(code: str) -> list[str]:
    """Calls in `code` that run, unpickle or pass on to a shell what they are given."""
    found = []
    for call in (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if (
            name in FORBIDDEN
            or given.get("shell", "False") != "False"
            or given.get("allow_pickle", "False") != "False"
            or (name == "torch.load" and given.get("weights_only") != "True")
        ):
            found.append(f"line {call.lineno}: {ast.unparse(call)}")
    return found


def test_the_code_is_safe(tried):
    checked = sources()
    assert len(checked) > 40
    assert [f"{name}, {one}" for name, code in checked for one in unsafe(code)] == []
    tried("unsafe calls looked for: source file", len(checked))


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')",
        "exec(text)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "pickle.load(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_unsafe_code_is_found(code):
    assert unsafe(f"def f():\n    {code}") == [f"line 2: {code}"]
    assert not unsafe("model.eval(); torch.load(path, weights_only=True); subprocess.run(['ls'])")


def test_no_shell_script_evaluates_text():
    for path in (*paths.ROOT.glob("*.sh"), Path(paths.ROOT / ".ci" / "run")):
        assert "eval " not in path.read_text(encoding="utf-8"), path.name
