"""The HTML reports: complete, self-contained, with formulas and alternative texts."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from pages import external_references
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lt_core import paths, site
from lt_core.runner import Record
from lt_core.tables import COLUMNS, NUMBERS, load_table, published, save_table

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
STORY = r"""# Main results

Inline $a_{ij} < 1$, price 5\$ and a formula:

$$w^{kt}_i(k) = \sum_{j : n_j > k} a_{ij} \frac{w_j}{\lVert w_j \rVert} \tag{5}$$

\begin{align} a &= b \\ c &= d \end{align}

$$\begin{aligned} x &= 1 \\ y &= 2 \end{aligned}$$

| group | accuracy |
| --- | --- |
| many | 46.7 |

![the scheme](scheme.png) and [a link](https://example.org/paper)
"""


def display(kind: str, data: str, **metadata: str) -> nbformat.NotebookNode:
    return new_output("display_data", data={kind: data}, metadata={kind: metadata} if metadata else {})


def described_png(path: Path, text: str) -> Path:
    information = PngInfo()
    information.add_text("Description", text)
    Image.new("RGBA", (1600, 900), (255, 0, 0, 0)).save(path, pnginfo=information)
    return path


@pytest.fixture
def render(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Renders cells and returns the page; pictures of the notebooks folder lie in tmp_path."""
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)

    def rendered(
        *cells: nbformat.NotebookNode, about: dict | None = None, whole: bool = True, **more: object
    ) -> str:
        (tmp_path / "scheme.png").write_bytes(b"picture")
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python"}}
        notebook = new_notebook(cells=list(cells), metadata=kernel | {"lt_core": about or {}})
        nbformat.write(notebook, tmp_path / "01_main.ipynb")
        target = tmp_path / "01_main.html"
        record = Record("01_main", "Main results", "ok", **more)
        site.render_notebook(tmp_path / "01_main.ipynb", target, record, out=tmp_path, whole=whole)
        return target.read_text(encoding="utf-8")

    return rendered


class Elements(HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.all.append((tag, dict(attributes)))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.all if name == tag]


# --- One notebook --------------------------------------------------------------------------------------


def test_story_with_formulas_tables_and_images(render) -> None:
    page = render(new_markdown_cell(STORY))
    elements = Elements(page)
    assert external_references(page) == []
    formulas = elements.named("math")
    assert [formula["display"] for formula in formulas] == ["inline", "block", "block", "block"]
    assert formulas[0]["alttext"] == "a_{ij} < 1"
    text = re.sub(r"<style.*?</style>|<[^>]*>", "", page, flags=re.DOTALL)
    assert "\\" not in text and "$$" not in text
    assert "price 5$" in text
    assert len(elements.named("mtable")) == 2
    assert page.count('<div class="box"') == page.count("<table") == 1
    assert elements.named("img") == [{"src": "data:image/png;base64,cGljdHVyZQ==", "alt": "the scheme"}]
    assert {"href": "https://example.org/paper"} in elements.named("a")
    assert {"href": "index.html"} in elements.named("a")
    assert elements.named("script") == elements.named("link") == []


@pytest.mark.parametrize("latex", [r"\left( x", "", r"\frac{a}{b}_", r"\begin{x}"])
def test_a_formula_that_cannot_be_read_stays_visible(latex: str) -> None:
    result = site.mathml(latex, display=True)
    assert result.startswith("<math ") or result == f"<code>{latex}</code>"


def test_formulas_in_output(render) -> None:
    page = render(new_code_cell("1", outputs=[display("text/latex", "$\\tau = 10$")]))
    assert [formula["alttext"] for formula in Elements(page).named("math")] == [r"\tau = 10"]


def test_images_have_the_best_alternative_text(render, tmp_path: Path) -> None:
    given = display("image/png", PNG, alt='Accuracy "by" <group>')
    svg = '<svg xmlns="http://www.w3.org/2000/svg"><path id="p"/></svg>'
    file = base64.b64encode(described_png(tmp_path / "x.png", "From the file").read_bytes()).decode()
    page = render(
        new_markdown_cell("## How features\nmove"),
        new_code_cell("1", outputs=[given, display("image/png", PNG), display("image/svg+xml", svg)]),
        new_code_cell("2", outputs=[display("image/png", PNG)], metadata={"alt": "From the cell"}),
        new_code_cell("3", outputs=[display("image/png", file)]),
    )
    under = "Figure under the heading: How features"
    alts = [image["alt"] for image in Elements(page).named("img")]
    assert alts == ['Accuracy "by" <group>', under, under, "From the cell", "From the file"]
    assert external_references(page) == []
    assert "<svg" not in page  # as an image: names inside it cannot clash


def test_code_is_folded_and_long_output_too(render) -> None:
    long = "\n".join(f"epoch {index}" for index in range(100))
    page = render(
        new_code_cell(
            "# Train it\nvalue = '<b>'",
            outputs=[
                new_output("stream", name="stdout", text=long),
                new_output("stream", name="stdout", text="10 %\r50 %\r100 %\nshort \x1b[31mred\x1b[0m"),
                new_output("stream", name="stderr", text="warning: x"),
            ],
        )
    )
    assert "<summary>Code: Train it</summary>" in page
    assert "<summary>Output, 100 lines</summary>" in page
    assert "<summary>Log, 1 line</summary>" in page
    assert "50 %" not in page
    assert 'class="ansi-red-fg"' in page
    assert "&lt;b&gt;" in page
    assert not any("open" in attributes for attributes in Elements(page).named("details"))


def test_code_that_shows_nothing_joins_the_next(render) -> None:
    page = render(
        new_markdown_cell("# Main"),
        new_code_cell("# Parameters\nseed = 1"),
        new_code_cell("# The answer\nseed", outputs=[display("text/plain", "1")]),
        new_code_cell("# Alone\nx = 1"),
        new_markdown_cell("## Next"),
    )
    assert re.findall("<summary>(Code.*?)</summary>", page) == ["Code: The answer", "Code: Alone"]
    assert page.index("# Parameters") < page.index("# The answer")


def test_a_tutorial_shows_its_code(render) -> None:
    cells = [new_code_cell(f"x = {i}", outputs=[display("text/plain", "1")]) for i in range(3)]
    for about, opened in (({}, [False] * 3), ({"tutorial": True}, [False, True, True])):
        page = render(*cells, about=about)
        assert ["open" in one for one in Elements(page).named("details")] == opened


def test_bracket_numbers_lead_to_their_bibtex(render) -> None:
    row = '<table class="lt-table"><tr><th scope="row">LWS [16]</th><td>[16]</td></tr></table>'
    page = render(new_code_cell("1", outputs=[display("text/html", row)]))
    assert page.count('<a href="index.html#ref-16">[16]</a>') == 1
    quoted = {number for row in published()["row"] for number in re.findall(r"\[(\d+)\]", row)}
    anchors = {one["anchor"] for one in site.references()}
    assert {f"ref-{number}" for number in quoted} <= anchors
    assert all(one[field] for one in site.references() for field in ("first", "title", "booktitle", "year"))


def test_wide_tables_scroll_in_their_own_box(render) -> None:
    table = '<div><table border="1" class="dataframe"><tr><td>1</td></tr></table></div>'
    page = render(new_code_cell("1", outputs=[display("text/html", table)]))
    assert re.search(r'<div class="box" tabindex="0"><table border="1" class="dataframe">', page)


def test_a_live_control_becomes_a_note(render) -> None:
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "interactive()"}
    both = widget | {"image/png": PNG}
    page = render(
        new_code_cell("1", outputs=[new_output("display_data", data=widget)]),
        new_code_cell("2", outputs=[new_output("display_data", data=both)]),
    )
    assert page.count("A live control stands here") == 1
    assert len(Elements(page).named("img")) == 1
    assert "interactive()" not in page and "model_id" not in page


def test_a_failure_is_shown_with_its_cell(render) -> None:
    mark = new_markdown_cell("An Exception was encountered", metadata={"tags": ["papermill-error-cell-tag"]})
    error = new_output("error", ename="ValueError", evalue="k < 0", traceback=["\x1b[31mline 3\x1b[0m"])
    page = render(mark, new_code_cell("x", outputs=[error]), error="ValueError: k < 0", cell="cell 1")
    assert "<strong>This notebook failed.</strong> cell 1: ValueError: k &lt; 0" in page
    assert "<strong>ValueError: k &lt; 0</strong>" in page
    assert "line 3" in page
    assert 'href="#failed-cell"' in page and 'id="failed-cell"' in page
    assert "An Exception was encountered" not in page


def test_a_failure_without_a_cell_has_no_link(render) -> None:
    page = render(new_code_cell("x"), error="the kernel was killed")
    assert "the kernel was killed" in page
    assert "#failed-cell" not in page


def test_a_picture_links_to_its_full_size_file(render, tmp_path: Path) -> None:
    picture = described_png(tmp_path / "F2.png", "Accuracy").read_bytes()
    output = display("image/png", base64.b64encode(picture).decode())
    page = render(new_code_cell("1", outputs=[output]), products={"F2.png": "digest"})
    assert {"href": "F2.png"} in Elements(page).named("a")
    assert "<figcaption>Accuracy. A click shows it at full size.</figcaption>" in page


def test_a_page_has_its_contents_and_its_neighbours(render, tmp_path: Path) -> None:
    for name in ("00_before", "02_after"):
        (tmp_path / f"{name}.ipynb").write_text("{}")
    page = render(
        new_markdown_cell("# Main"), new_markdown_cell("## Table $1$\nx"), new_markdown_cell("## Why")
    )
    elements = Elements(page)
    addresses = [attributes["href"] for attributes in elements.named("a")]
    assert addresses == ["index.html", "00_before.html", "02_after.html", "#section-1", "#section-2"]
    anchors = {attributes.get("id") for _, attributes in elements.all}
    assert {"section-1", "section-2"} <= anchors


def test_a_run_of_some_notebooks_links_no_page_that_is_not_there(render, tmp_path: Path) -> None:
    for name in ("00_before", "02_after"):
        (tmp_path / f"{name}.ipynb").write_text("{}")
    (tmp_path / "00_before.html").write_text("")
    page = render(new_markdown_cell("# Main"), whole=False)
    addresses = [attributes["href"] for attributes in Elements(page).named("a")]
    assert addresses == ["index.html", "00_before.html"]


# --- The index -----------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An index over a good notebook with products, the judge of the claims, and a failed one."""
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path))
    figures, reports = paths.figures("digits"), paths.reports("digits")
    (figures / "answers").mkdir(parents=True)
    reports.mkdir(parents=True)
    described_png(figures / "F2.png", "Figure 2: accuracy of two <methods>")
    for name in ("F2.svg", "F2.csv", "T1.md", "T1.csv"):
        (figures / name).write_text("x")
    (figures / "answers" / "01_main.md").write_text(
        "`sqrt` gains **3.1** points, $k < 20$ & <b>more</b>, *all of them*. More of it on the page.\n"
    )
    (figures / "answers" / "99_claims.md").write_text("Of 68 claims 27 hold.\n")
    (reports / "01_main.html").write_text("x")
    names = ["T1.csv", "T1.md", "F2.png", "F2.svg", "F2.csv", "gone.csv", "answers/01_main.md"]
    records = [
        Record("01_main", "Main <results>", "ok", "2026-01-02 03:04:05", 61.2, {}, dict.fromkeys(names, "x")),
        Record("02_bad", "Bad", "failed", "2026-01-02", 2, {}, {}, "KeyError: 'x'", "cell 4"),
        Record("99_claims", "Claims", "ok", "2026-01-02", 2, {}, {"answers/99_claims.md": "x"}),
    ]
    profile = SimpleNamespace(name="digits", description="small & quick")
    site.write_index(profile, reports, records, {}, seconds=63.0)
    site.write_index(profile, reports, records, {}, seconds=None)  # a later call in which nothing ran
    return (reports / "index.html").read_text(encoding="utf-8")


def test_the_index_opens_with_the_verdict_and_shows_what_was_made(index: str) -> None:
    elements = Elements(index)
    assert '<p class="lead">Of 68 claims 27 hold.</p>' in index
    (image,) = elements.named("img")
    assert image["alt"] == "Figure 2: accuracy of two <methods>"
    assert '<a href="01_main.html">Figure 2</a>: accuracy of two &lt;methods&gt;.' in index
    assert 'id="ref-16"' in index
    assert '<a href="01_main.html">Main &lt;results&gt;</a>' in index
    answer = "<code>sqrt</code> gains <strong>3.1</strong> points"
    assert "<em>all of them</em>.\n" in index and "More of it" not in index  # a line of result each
    assert answer in index and "&amp; &lt;b&gt;more&lt;/b&gt;" in index
    assert "Table 1" in index and "Figure 2" in index and "gone" not in index
    assert "small &amp; quick" in index
    assert "cell 4: KeyError: &#39;x&#39;" in index
    for fact in ("Python", "PyTorch", "Machine", "GPU"):
        assert f"<dt>{fact}</dt><dd>" in index
    assert "<dd>63 s</dd>" in index  # of the last run in which notebooks ran


def test_the_index_has_no_broken_link(index: str) -> None:
    elements = Elements(index)
    links = [attributes["href"] for attributes in elements.named("a")]
    assert "../../figures/digits/F2.svg" in links
    for address in [*links, *(attributes["src"] for attributes in elements.named("img"))]:
        assert (paths.reports("digits") / address).is_file(), address
    assert [one for one in external_references(index) if "../../figures/digits/" not in one] == []


def test_the_summary_is_one_page_with_answers_tables_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is damaged is named in a line and left out."""
    described_png(tmp_path / "F2.png", "accuracy of two <methods>")
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "01_main.md").write_text("Few-shot classes gain **3.1** points.")
    committed = load_table(paths.ROOT / "figures" / "embedded" / "T6.csv")
    save_table(committed, tmp_path)
    (tmp_path / "T1.tex").write_text("a table")
    (tmp_path / "T1.csv").write_text("damaged")
    (tmp_path / "F1.png").write_bytes((tmp_path / "F2.png").read_bytes()[:60])
    site.write_summary(
        tmp_path,
        [("01_main", "Main <b>", ["T1.csv", "T6.csv", "F1.png", "F2.png", "per_class.csv"])],
        tmp_path / "report.html",
    )
    named = capsys.readouterr().out.splitlines()
    assert [re.search(r"(\w+\.\w+) is left out of the report", line)[1] for line in named] == [
        "F1.png",
        "T1.csv",
    ]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert external_references(page) == []
    (image,) = Elements(page).named("img")
    assert image["src"].startswith("data:image/webp;base64,") and image["alt"] == "accuracy of two <methods>"
    assert "Main &lt;b&gt;" in page and "<strong>3.1</strong>" in page
    assert 'id="ref-16"' in page and "data-source=" in page
    assert page.count('class="lt-table"') == 1 and f"{committed['reproduced'].max():.1f}" in page


@pytest.mark.parametrize(
    ("stem", "name"),
    [("T4a", "Table 4a"), ("F12", "Figure 12"), ("S1", "Table S1"), ("per_class", "per class")],
)
def test_names(stem: str, name: str) -> None:
    assert site.name_of(stem) == name


# --- Text is text ----------------------------------------------------------------------------------------

HOSTILE = (
    "<img src=x onerror=alert(1)><script>alert(1)</script>"
    "\"'`$\\input{x}$ **b** [a](javascript:alert(1)) \x1b[2J\n=1+1"
)


def is_harmless(page: str) -> bool:
    """Nothing in a page runs, and the policy that would stop it is there."""
    elements = Elements(page)
    return (
        not elements.named("script")
        and {"src": "x", "onerror": "alert(1)"} not in elements.named("img")
        and not [name for _, attributes in elements.all for name in attributes if name.startswith("on")]
        and not [link for link in elements.named("a") if (link.get("href") or "").startswith("javascript:")]
        and any("script-src 'none'" in (meta.get("content") or "") for meta in elements.named("meta"))
        and "\x1b" not in page
    )


def test_hostile_text_reaches_no_page_as_markup(
    render, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Titles, names of files, errors, labels, answers, descriptions of pictures, notes, what was printed."""
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path))
    for name in ("00_<img src=x onerror=alert(1)>", "02_<script>"):
        (tmp_path / f"{name}.ipynb").write_text("{}")
    outputs = [
        new_output("stream", name="stdout", text=HOSTILE),
        new_output("error", ename=HOSTILE, evalue=HOSTILE, traceback=[HOSTILE]),
        display("text/plain", HOSTILE),
        display("image/png", PNG, alt=HOSTILE),
    ]
    page = render(new_code_cell(f"# {HOSTILE}", outputs=outputs), error=HOSTILE, cell=HOSTILE)
    assert is_harmless(page)

    out, reports = paths.figures("digits"), paths.reports("digits")
    (out / "answers").mkdir(parents=True)
    described_png(out / "F1.png", HOSTILE)
    (out / "answers" / "99_claims.md").write_text(HOSTILE)
    row = dict.fromkeys(COLUMNS, "") | dict.fromkeys(NUMBERS, 1.0)
    row |= {
        "table": "T1",
        "row": HOSTILE,
        "note": HOSTILE,
        "group": "total",
        "rule": "paper",
        "n": 1,
        "seeds": "0",
    }
    save_table(pd.DataFrame([row]), out)
    record = Record("99_claims", HOSTILE, "failed", products={"F1.png": "x"}, error=HOSTILE, cell=HOSTILE)
    profile = SimpleNamespace(name=HOSTILE, description=HOSTILE)
    monkeypatch.setattr(site.paths, "figures", lambda name: out)
    site.write_index(profile, reports, [record], {}, 1.0)
    site.write_summary(out, [("99_claims", HOSTILE, ["F1.png", "T1.csv"])], reports / "report.html")
    for page in ("index.html", "report.html"):
        text = (reports / page).read_text(encoding="utf-8")
        assert is_harmless(text) and "&lt;img src=x" in text
    assert "\x1b" not in record.what_went_wrong and "\n" not in record.what_went_wrong


def test_hostile_text_would_be_found() -> None:
    assert not is_harmless(f"<meta content=\"script-src 'none'\"><p>{HOSTILE.replace(chr(27), '')}")
    assert not is_harmless("<p>no policy")


# --- The proof -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page",
    [
        '<script src="https://cdn.example.org/x.js"></script>',
        "<link rel=stylesheet href=//example.org/x.css>",
        '<img src="figures/F2.png">',
        '<img src="data:image/png;base64,AA" srcset="https://example.org/2x.png 2x">',
        '<iframe src="https://example.org"></iframe>',
        "<style>@import 'https://example.org/x.css';</style>",
        "<style>p { background: url( 'https://example.org/x.png') }</style>",
        '<p style="background:url(x.png)">',
        "<script>require.config({paths: {x: 'https://cdn.example.org/x'}})</script>",
        '<svg><image href="https://example.org/x.png"/></svg>',
        '<object data="x.svg"></object>',
    ],
)
def test_external_references_are_found(page: str) -> None:
    assert len(external_references(f"<html><body>{page}</body></html>")) == 1


def test_links_and_embedded_data_are_no_external_references() -> None:
    page = (
        '<a href="https://example.org">x</a><img src="data:image/png;base64,AA==" alt="">'
        "<style>p { background: url(data:image/png;base64,AA==) }</style>"
        "<p>url(https://example.org) @import</p><script>let a = 1; // a comment</script>"
    )
    assert external_references(page) == []
