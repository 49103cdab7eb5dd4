"""The notebooks as files: stripped, tagged, with stable ids, and each declaring what it makes."""

from __future__ import annotations

import json
from collections import Counter

import nbformat
import pytest

from lt_core import notebooks as nbs
from lt_core import paths
from lt_core.profiles import load_profile

NOTEBOOKS = [nbs.Notebook(path) for path in sorted(paths.NOTEBOOKS.glob("*.ipynb"))]
each = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)


def test_there_are_notebooks_and_the_runner_finds_them_all() -> None:
    assert [notebook.name for notebook in nbs.find()] == [notebook.name for notebook in NOTEBOOKS]
    assert max(Counter(notebook.number for notebook in NOTEBOOKS).values()) == 1


@each
def test_is_valid_with_ids_and_a_plain_kernel(notebook: nbs.Notebook) -> None:
    content = nbformat.read(notebook.path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(content)
    assert (content.nbformat, content.nbformat_minor >= 5) == (4, True)
    ids = [cell["id"] for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert content.metadata.kernelspec.name == "python3"


@each
def test_has_no_stored_outputs(notebook: nbs.Notebook) -> None:
    for cell in notebook.cells:
        assert not cell.get("outputs"), f"cell {cell['id']} has outputs: clear them"
        assert cell.get("execution_count") is None, f"cell {cell['id']} has an execution count"
        kept = set(cell["metadata"]) & {"execution", "papermill", "ExecuteTime", "collapsed", "scrolled"}
        assert not kept, f"cell {cell['id']} keeps {kept} of a run"
    assert not set(notebook.content["metadata"]) & {"papermill", "widgets"}


@each
def test_opens_with_a_heading_and_one_parameters_cell(notebook: nbs.Notebook) -> None:
    assert notebook.cells[0]["cell_type"] == "markdown"
    assert nbs.source_of(notebook.cells[0]).startswith("# ")
    tagged = [cell for cell in notebook.cells if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    assert notebook.fault == ""
    assert notebook.defaults["profile"] == "embedded"
    assert notebook.defaults["seed"] == 0


@each
def test_code_parses(notebook: nbs.Notebook) -> None:
    for cell in notebook.cells:
        if cell["cell_type"] == "code":
            compile(nbs.source_of(cell), f"{notebook.name}:{cell['id']}", "exec")


@each
def test_declares_what_it_makes_and_needs(notebook: nbs.Notebook) -> None:
    assert set(notebook.declared) >= {"produces", "backbones"}
    assert set(notebook.declared) <= {"produces", "backbones", "reads"}
    for names in notebook.declared.values():
        assert all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    assert set(notebook.backbones) <= set(load_profile("digits").backbones)


def test_nobody_makes_what_another_makes_and_what_is_read_is_made() -> None:
    made = Counter(name for notebook in NOTEBOOKS for name in notebook.produces)
    assert [name for name, count in made.items() if count > 1] == []
    for notebook in NOTEBOOKS:
        assert set(notebook.reads) <= set(made) - set(notebook.produces)


@each
def test_no_machine_path(notebook: nbs.Notebook) -> None:
    text = json.dumps(notebook.content)
    assert not [word for word in ("/home/", "/Users/", "/tmp/", "C:\\\\", str(paths.ROOT)) if word in text]
