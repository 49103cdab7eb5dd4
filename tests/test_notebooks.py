"""The notebooks as files: stripped, tagged, with stable ids, and each declaring what it makes."""

from __future__ import annotations

import json
from collections import Counter

import nbformat
import pytest

from lt_core import paths, runner
from lt_core.claims import read_book
from lt_core.data.profiles import load_profile

NOTEBOOKS = [runner.Notebook(path) for path in sorted(paths.NOTEBOOKS.glob("*.ipynb"))]
each = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)


def test_there_are_notebooks_and_the_runner_finds_them_all() -> None:
    assert [notebook.name for notebook in runner.find()] == [notebook.name for notebook in NOTEBOOKS]
    assert max(Counter(notebook.number for notebook in NOTEBOOKS).values()) == 1


@each
def test_is_valid_with_ids_and_a_plain_kernel(notebook: runner.Notebook) -> None:
    content = nbformat.read(notebook.path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(content)
    assert (content.nbformat, content.nbformat_minor >= 5) == (4, True)
    ids = [cell["id"] for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert content.metadata.kernelspec.name == "python3"


@each
def test_has_no_stored_outputs(notebook: runner.Notebook) -> None:
    for cell in notebook.cells:
        assert not cell.get("outputs"), f"cell {cell['id']} has outputs: clear them"
        assert cell.get("execution_count") is None, f"cell {cell['id']} has an execution count"
        kept = set(cell["metadata"]) & {"execution", "papermill", "ExecuteTime", "collapsed", "scrolled"}
        assert not kept, f"cell {cell['id']} keeps {kept} of a run"
    assert not set(notebook.content["metadata"]) & {"papermill", "widgets"}


@each
def test_opens_with_a_heading_and_one_parameters_cell(notebook: runner.Notebook) -> None:
    assert notebook.cells[0]["cell_type"] == "markdown"
    assert runner.source_of(notebook.cells[0]).startswith("# ")
    tagged = [cell for cell in notebook.cells if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    assert notebook.fault == ""
    assert notebook.defaults["profile"] == "embedded"
    assert notebook.defaults["seed"] is None


@each
def test_code_parses(notebook: runner.Notebook) -> None:
    for cell in notebook.cells:
        if cell["cell_type"] == "code":
            compile(runner.source_of(cell), f"{notebook.name}:{cell['id']}", "exec")


@each
def test_declares_what_it_makes_and_needs(notebook: runner.Notebook) -> None:
    assert {"produces", "backbones", "claims"} <= set(notebook.declared)
    assert set(notebook.declared) <= {"produces", "backbones", "claims", "profiles", "first", "tutorial"}
    for names in (notebook.produces, notebook.backbones, notebook.declared["claims"]):
        assert len(set(names)) == len(names)
    assert set(notebook.backbones) <= set(load_profile("digits").backbones)
    assert f"answers/{notebook.name}.md" in notebook.produces


@each
def test_opens_with_question_and_answer(notebook: runner.Notebook) -> None:
    assert "**The question.**" in runner.source_of(notebook.cells[0])
    if notebook.first:
        return
    answers = ["save_answer(" in runner.source_of(cell) for cell in notebook.cells]
    before = notebook.cells[1 : answers.index(True)]  # code that shows nothing, which the page folds into one
    assert len(before) <= 4 and {cell["cell_type"] for cell in before} == {"code"}


def test_every_claim_is_quoted_on_the_page_of_its_table() -> None:
    numbers = {claim["number"] for claim in read_book()["claim"]}
    quoted = [number for notebook in NOTEBOOKS for number in notebook.declared["claims"]]
    assert set(quoted) <= numbers
    assert [one for one in NOTEBOOKS if one.first] == [one for one in NOTEBOOKS if one.name == "99_claims"]
    for notebook in NOTEBOOKS:  # a page that quotes verdicts runs again when these change
        source = "".join(runner.source_of(cell) for cell in notebook.cells)
        assert bool(notebook.declared["claims"]) == ("show_claims(" in source)


def test_every_table_and_figure_of_the_paper_has_a_notebook() -> None:
    made = {name for notebook in NOTEBOOKS for name in notebook.produces}
    tables = {f"T{name}" for name in ("1", "2", "3", "4a", "4b", "5", "6", "7", "8", "9")}
    assert {f"{table}{end}" for table in tables for end in (".csv", ".md", ".tex", "_wide.csv")} <= made
    assert {f"F{number}.{kind}" for number in range(1, 10) for kind in ("png", "svg", "csv")} <= made


@each
def test_no_machine_path(notebook: runner.Notebook) -> None:
    text = json.dumps(notebook.content)
    assert not [word for word in ("/home/", "/Users/", "/tmp/", "C:\\\\", str(paths.ROOT)) if word in text]
