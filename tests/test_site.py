"""The HTML reports: complete, self-contained, with formulas and alternative texts."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from pages import external_references
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lt_core import paths, site
from lt_core.runner import Record

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
def render(tmp_path: Path):
    """Renders cells and returns the page."""

    def rendered(*cells: nbformat.NotebookNode, **more: str) -> str:
        (tmp_path / "scheme.png").write_bytes(b"picture")
        notebook = new_notebook(
            cells=list(cells), metadata={"kernelspec": {"name": "python3", "display_name": "Python"}}
        )
        nbformat.write(notebook, tmp_path / "01_main.ipynb")
        target = tmp_path / "01_main.html"
        site.render_notebook(
            tmp_path / "01_main.ipynb", target, title="Main results", resources=tmp_path, **more
        )
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
    page = render(mark, new_code_cell("x", outputs=[error]), error="cell 1: ValueError: k < 0")
    assert "<strong>This notebook failed.</strong> cell 1: ValueError: k &lt; 0" in page
    assert "<strong>ValueError: k &lt; 0</strong>" in page
    assert "line 3" in page
    assert 'href="#failed-cell"' in page and 'id="failed-cell"' in page
    assert "An Exception was encountered" not in page


def test_a_failure_without_a_cell_has_no_link(render) -> None:
    page = render(new_code_cell("x"), error="the kernel was killed")
    assert "the kernel was killed" in page
    assert "#failed-cell" not in page


# --- The index -----------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An index over a good notebook with outputs and a failed one without."""
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path))
    figures, reports = paths.figures("digits"), paths.reports("digits")
    figures.mkdir(parents=True)
    reports.mkdir(parents=True)
    described_png(figures / "F2.png", "accuracy of two <methods>")
    for name in ("F2.svg", "F2.csv", "T1.md", "S1.csv"):
        (figures / name).write_text("x")
    (figures / "T1.csv").write_text(
        "table,row,group,published,reproduced,rule\n"
        "T1,Cosine,many,68.5,46.06,paper\nT1,Cosine,few,20.6,6.49,paper\n"
        "T1,LWS,many,,44.38,paper\nT1,LWS,few,,,paper\nT1,LWS,many,60.2,43.9,common\n"
    )
    (figures / "claims.csv").write_text("claim,verdict\n1,holds\n2,holds\n3,fails\n")
    (reports / "01_main.html").write_text("x")
    made = ["T1.csv", "T1.md", "S1.csv", "F2.png", "F2.svg", "F2.csv", "gone.csv"]
    records = [
        Record("01_main", "Main <results>", "ok", "2026-01-02 03:04:05", 61.2, {"seed": 3}, made),
        Record(
            "02_bad", "Bad", "failed", "2026-01-02", 2, {"seed": 3}, ["T2.csv"], "KeyError: 'x'", "cell 4"
        ),
    ]
    profile = SimpleNamespace(name="digits", description="small & quick")
    site.write_index(profile, records, seed=3, seconds=63.0)
    return (reports / "index.html").read_text(encoding="utf-8")


def test_index_shows_everything_that_was_made(index: str) -> None:
    elements = Elements(index)
    (image,) = elements.named("img")
    assert image["src"].startswith("data:image/png;base64,") and len(image["src"]) < 10_000
    assert image["alt"] == "Figure 2: accuracy of two <methods>"
    for name in ("Table 1", "Table S1", "Figure 2"):
        assert f'<a href="01_main.html">{name}</a>' in index
    assert "Table 2" not in index and "gone" not in index
    for line in (("", "many", "few"), ("Cosine", "68.5 → 46.1", "20.6 → 6.5"), ("LWS", "– → 44.4", "– → –")):
        assert f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" in index
    assert "small &amp; quick" in index
    assert "<strong>2</strong> hold, <strong>1</strong> fail" in index
    assert "KeyError: &#39;x&#39; (cell 4)" in index
    for fact in ("Seed", "Python", "PyTorch", "Processor", "Memory", "GPU", "Last run"):
        assert f"<dt>{fact}</dt><dd>" in index
    assert "63 s" in index


def test_index_has_no_broken_link_and_loads_nothing(index: str, tmp_path: Path) -> None:
    assert external_references(index) == []
    links = [attributes["href"] for attributes in Elements(index).named("a")]
    assert "../../figures/digits/F2.svg" in links
    for link in links:
        assert (paths.reports("digits") / link).is_file(), link


@pytest.mark.parametrize(
    ("stem", "name"),
    [("T4a", "Table 4a"), ("F12", "Figure 12"), ("S1", "Table S1"), ("per_class", "per class")],
)
def test_names(stem: str, name: str) -> None:
    assert site.name_of(stem) == name


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
