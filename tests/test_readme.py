"""The README is true: its numbers are the committed ones, its example runs, what it names exists."""

import re

from lt_core import claims, paths, runner, site, tables

README = (paths.ROOT / "README.md").read_text(encoding="utf-8")
COMMITTED = paths.ROOT / "figures" / "embedded"
REPORT = paths.ROOT / "docs" / "report.html"
ROWS = {  # of T1.csv, as README calls them
    "Ours* / Cosine classifier": "cosine classifier",
    "Ours* / Prototypes": "prototypes",
    "Ours* / w^h(20)": "w^h(20)",
    "Ours* / w^h(100)": "w^h(100)",
    "Ours* / ensemble(w^h(0), w^h(20), w^h(100))": "ensemble",
    "All on one backbone, square-root sampling / logit adjustment of the learned classifier, t = 0.5": (
        "logit adjustment, t = 0.5"
    ),
}


def test_its_table_is_the_committed_one():
    shown = re.search("<!-- T1 -->\n(.*?)\n<!-- /T1 -->", README, re.DOTALL).group(1)
    assert shown.strip() == tables.summary(tables.load_table(COMMITTED / "T1.csv"), ROWS)


def test_its_verdicts_are_the_committed_ones():
    found = claims.load_claims(COMMITTED, range(1, 69))
    counts = {state: int((found["state"] == state).sum()) for state in claims.STATES}
    expected = (
        f"Of the paper's {len(found)} claims **{counts['holds']} hold here, {counts['fails']} fail, "
        f"{counts['open']} stay open and {counts['untestable']} cannot be tested**"
    )
    assert expected in " ".join(README.split())
    mechanism = found[found["section"].str.startswith("B.")]["state"]
    assert f"({(mechanism == 'holds').sum()} of {len(mechanism)} claims hold)" in README


def test_the_report_is_made_of_the_committed_files(tmp_path):
    """docs/report.html is what `write_summary` makes of figures/embedded; of pictures their sources count."""
    notebooks = [(one.name, one.title, one.produces) for one in runner.find()]
    site.write_summary(COMMITTED, notebooks, tmp_path / "report.html")
    made, committed = (
        (folder / "report.html").read_text(encoding="utf-8") for folder in (tmp_path, REPORT.parent)
    )
    assert REPORT.stat().st_size <= 2_000_000
    picture = re.compile(r'src="data:image/webp;base64,[^"]+"')
    assert len(picture.findall(made)) == made.count("data-source=") > 0
    assert picture.sub("", made) == picture.sub("", committed), "copy reports/embedded/report.html to docs/"


def test_the_example_runs(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    exec(compile(code, "README.md", "exec"), {})
    assert "'total'" in capsys.readouterr().out


def test_what_is_linked_exists_in_readme_and_docs():
    for page in (paths.ROOT / "README.md", *(paths.ROOT / "docs").glob("*.md")):
        links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        for link in (link for link in links if "://" not in link):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_it_is_short():
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    assert len(prose.split()) < 1200
