"""The README is true: its tables are the committed ones, its example runs, what it names exists."""

import re

import pandas as pd
import pytest

from lt_core import paths
from lt_core.report import load_table, to_summary

README = (paths.ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("table", ["T1", "S1"])
def test_tables_are_the_committed_ones(table, monkeypatch):
    monkeypatch.delenv("LT_OUTPUT_ROOT", raising=False)
    shown = re.search(f"<!-- {table} -->\n(.*?)\n<!-- /{table} -->", README, re.DOTALL).group(1)
    assert shown.strip() == to_summary(load_table(table, "embedded"))


def test_the_verdicts_are_the_committed_ones():
    claims = pd.read_csv(paths.ROOT / "figures" / "embedded" / "claims.csv", index_col="claim")["verdict"]
    held, failed, untestable = (int((claims == name).sum()) for name in ("holds", "fails", "untestable"))
    assert f"of {len(claims)}, **{held} hold here, {failed} fail and {untestable} cannot" in README
    mechanism = claims.loc[9:16]  # section B
    assert f"({(mechanism == 'holds').sum()} of {len(mechanism)} claims)" in README


def test_the_example_runs(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    exec(compile(code, "README.md", "exec"), {})
    assert "'total'" in capsys.readouterr().out


def test_linked_files_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) >= 4
    for link in links:
        assert (paths.ROOT / link).exists(), link


def test_every_notebook_is_listed():
    for notebook in paths.NOTEBOOKS.glob("*.ipynb"):
        assert f"notebooks/{notebook.name}" in README
