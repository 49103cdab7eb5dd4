"""HTML reports that open from disk: one file a notebook and an index, nothing loaded from anywhere.

Formulas become MathML, images are part of the file, code and long logs are folded, live widgets are replaced
by a note. The index opens with the verdict on the claims, then one line of result for each notebook.

    render_notebook(executed, target, record, out)
    write_index(profile, reports, records, {record.notebook: out}, seconds=12.3)
    write_summary(figures, [(name, title, products)], target)      # the whole as one page
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import platform
import re
from collections.abc import Callable
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import nbformat
from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from traitlets.config import Config

from lt_core import paths
from lt_core.backbones import code_version
from lt_core.checks import first_line, printable
from lt_core.tables import load_table, to_html

if TYPE_CHECKING:
    from lt_core.data.profiles import Profile
    from lt_core.runner import Record

TEMPLATES = paths.PACKAGE / "site_template"
SUMMARY_WIDTH = 1000  # pixels of a picture in the one-page report
LONG_OUTPUT_LINES = 20  # longer printed output is folded
POLICY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"script-src 'none'; object-src 'none'; "
    "frame-src 'none'; base-uri 'none'; form-action 'none'\">"
)
CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
KINDS = {"T": "Table ", "F": "Figure ", "S": "Table S"}
SHOWN_FIRST = [
    "text/html",
    "text/markdown",
    "image/svg+xml",
    "image/png",
    "image/jpeg",
    "text/latex",
    "text/plain",
]
BIB_FIELD = re.compile(r"^  (\w+) += \{(.*)\},?$", re.MULTILINE)
WIDGET = "application/vnd.jupyter.widget-view+json"
WIDGET_NOTE = '<p class="note">A live control stands here when the notebook is opened in JupyterLab.</p>'


# --- Formulas ------------------------------------------------------------------------------------------


def mathml(latex: str, display: bool) -> str:
    """A formula as MathML, with its source as alternative text; the source itself when it cannot be read."""
    source = re.sub(r"\\(begin|end)\{aligned\}", r"\\\1{split}", latex.strip())
    source = re.sub(r"\\tag\{([^}]*)\}", r"\\qquad \\text{(\1)}", source)
    try:
        formula = convert(source, display="block" if display else "inline")
    except Exception:  # latex2mathml has many, without a common base
        return f"<code>{html.escape(latex)}</code>"
    return formula.replace("<math ", f'<math alttext="{html.escape(latex.strip())}" ', 1)


def strip_delimiters(latex: str) -> str:
    """`$x$`, `$$x$$` and `\\[x\\]` without what stands around."""
    return re.sub(r"^\s*(\$\$?|\\\[|\\\()|(\$\$?|\\\]|\\\))\s*$", "", latex)


class _Renderer(IPythonRenderer):
    """nbconvert's Markdown renderer, with MathML in place of text for a script to find."""

    def inline_math(self, body: str) -> str:
        return mathml(body, display=False)

    def block_math(self, body: str) -> str:
        return mathml(body, display=True)

    def latex_environment(self, name: str, body: str) -> str:
        return mathml(f"\\begin{{{name}}}{body}\\end{{{name}}}", display=True)


# --- One notebook --------------------------------------------------------------------------------------


class ReportExporter(HTMLExporter):
    """nbconvert with the template of this package."""

    def __init__(self, **settings: Any) -> None:
        config = Config()
        config.NbConvertBase.display_data_priority = SHOWN_FIRST
        config.HTMLExporter.exclude_input_prompt = True
        config.HTMLExporter.exclude_output_prompt = True
        super().__init__(
            config=config,
            extra_template_basedirs=[str(TEMPLATES)],
            template_name="report",
            embed_images=True,
            **settings,
        )

    def default_filters(self) -> Any:
        yield from super().default_filters()
        yield "boxed_tables", boxed_tables
        yield "referenced", referenced
        yield "last_states", last_states
        yield "mathml", lambda latex: mathml(strip_delimiters(latex), display=True)

    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        """Markdown with MathML, embedded images and tables that scroll in their own box."""
        renderer = _Renderer(
            escape=False,
            attachments=context.get("cell", {}).get("attachments", {}),
            embed_images=True,
            path=context.get("resources", {}).get("metadata", {}).get("path", ""),
            exclude_anchor_links=True,
        )
        return boxed_tables(MarkdownWithMath(renderer=renderer).render(source))


def render_notebook(source: Path, target: Path, record: Record, out: Path, whole: bool = True) -> None:
    """Writes the executed notebook `source` as one HTML file beside the other pages of the report.

    Its images link to their full-size files in the figures folder `out`, where they lie there. whole: the
    run makes all pages; of a part of them (a study has one) those that are not there are not linked.
    """
    notebook = nbformat.read(source, as_version=4)
    _prepare(
        notebook,
        {file_text(out / n): link(out / n, target.parent) for n in record.products if n.endswith(".png")},
    )
    report = {
        "title": record.title,
        "error": record.what_went_wrong,
        "style": style(),
        "long": LONG_OUTPUT_LINES,
        "around": [p for p in neighbours(record.notebook) if whole or (target.parent / p[1]).is_file()],
        "contents": contents(notebook),
    }
    known = {"metadata": {"path": str(paths.NOTEBOOKS), "name": record.title}, "report": report}
    page, _ = ReportExporter().from_notebook_node(notebook, resources=known)
    write_page(target, page)


def write_page(target: Path, page: str) -> None:
    """Every page goes through here: whatever text came into it, nothing runs and nothing controls."""
    page = CONTROLS.sub("\N{REPLACEMENT CHARACTER}", page.replace("<head>", f"<head>\n{POLICY}", 1))
    with paths.atomic(target) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")


def neighbours(name: str) -> list[tuple[str, str]]:
    """(label, page) of the notebooks before and after this one."""
    names = sorted(path.stem for path in paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    if name not in names:
        return []
    place = names.index(name)
    before = [("\N{LEFTWARDS ARROW} " + names[place - 1], f"{names[place - 1]}.html")] if place else []
    after = names[place + 1 : place + 2]
    return before + [(one + " \N{RIGHTWARDS ARROW}", f"{one}.html") for one in after]


def contents(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """(heading, anchor) of each second-level heading; the anchors are set in the Markdown."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for heading in re.findall(r"^## +(.+)$", cell.source, re.MULTILINE):
                anchor = f"section-{len(found) + 1}"
                found.append((re.sub(r"[$*`]", "", heading), anchor))
                mark = f'<span id="{anchor}"></span>\n\n## {heading}'
                cell.source = cell.source.replace(f"## {heading}", mark, 1)
    return found


def file_text(path: Path) -> str:
    """A file's content as base64 text; empty where there is none."""
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else ""


def link(path: Path, folder: Path) -> str:
    """The relative address of a file, seen from a folder."""
    return Path(os.path.relpath(path, folder)).as_posix()


def _prepare(notebook: nbformat.NotebookNode, files: dict[str, str]) -> None:
    """Drops papermill's marks, replaces live widgets, gives every image a text and the link to its file."""
    notebook.cells = [
        cell for cell in notebook.cells if "papermill-error-cell-tag" not in cell.metadata.get("tags", [])
    ]
    _merge_code(notebook.cells)
    if notebook.metadata.get("lt_core", {}).get("tutorial"):
        for cell in [cell for cell in notebook.cells if cell.cell_type == "code"][1:]:
            cell.metadata["open"] = True  # all but the answer's: here the code is what one came for
    heading = notebook.metadata.get("title", "")
    for cell in notebook.cells:
        headings = (
            re.findall(r"^#+ +(.+)$", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else []
        )
        heading = headings[-1] if headings else heading
        for output in cell.get("outputs", []):
            _replace_widget(output)
            _describe_images(output, cell.metadata.get("alt") or f"Figure under the heading: {heading}")
            if png := output.get("data", {}).get("image/png", "").replace("\n", ""):
                output.metadata["image/png"]["file"] = files.get(png, "")


def _merge_code(cells: list[nbformat.NotebookNode]) -> None:
    """Code that shows nothing joins the code cell after it, under its label: what a run shows comes early."""
    for cell in cells:
        cell.metadata["label"] = first_comment(cell.source)
    for place in reversed(range(len(cells) - 1)):
        one, after = cells[place : place + 2]
        if one.cell_type == after.cell_type == "code" and not one.get("outputs"):
            after.source = f"{one.source}\n\n{after.source}"
            del cells[place]


def _replace_widget(output: nbformat.NotebookNode) -> None:
    data = output.get("data", {})
    if data.pop(WIDGET, None) is not None and set(data) <= {"text/plain"}:
        data["text/html"] = WIDGET_NOTE


def _describe_images(output: nbformat.NotebookNode, text: str) -> None:
    """`alt` of each image: what the notebook gave (`Image(..., alt=...)`), else the file, else `text`."""
    for kind, data in output.get("data", {}).items():
        if kind.startswith("image/"):
            own = description(io.BytesIO(base64.b64decode(data))) if kind == "image/png" else ""
            output.metadata.setdefault(kind, {}).setdefault("alt", own or text)


def description(picture: Path | io.BytesIO) -> str:
    """The text that a PNG carries under "Description" (`save_figure` writes it); empty without one."""
    from PIL import Image

    try:
        with Image.open(picture) as image:
            return str(image.info.get("Description", ""))
    except Exception:  # a damaged picture makes Pillow raise many kinds
        return ""


def boxed_tables(page: str) -> str:
    """Each table in a box of its own that scrolls sideways."""
    opened = re.sub(r"<table\b", '<div class="box" tabindex="0"><table', page)
    return re.sub(r"</table\s*>", "</table></div>", opened)


def references() -> list[dict[str, str]]:
    """The entries of docs/references.bib: fields, BibTeX, and anchor (`ref-16` for [16] of the paper)."""
    text = (paths.ROOT / "docs" / "references.bib").read_text(encoding="utf-8")
    found = []
    for entry, key in re.findall(r"(@\w+\{(\w+),.*?\n\})", text, re.DOTALL):
        fields = {name: value.replace("{", "").replace("}", "") for name, value in BIB_FIELD.findall(entry)}
        number = re.search(r"\[(\d+)\] in the paper", entry)
        anchor = f"ref-{number[1]}" if number else key
        found.append(fields | {"bibtex": entry, "anchor": anchor, "first": fields["author"].split(",")[0]})
    return found


def referenced(page: str, index: str = "index.html") -> str:
    """Bracket numbers in the names of rows linked to their BibTeX entry on the page `index`."""
    return re.sub(r'(<th scope="row">[^<]*)\[(\d+)\]', rf'\1<a href="{index}#ref-\2">[\2]</a>', page)


def last_states(text: str) -> str:
    """Printed text as a terminal shows it: what a carriage return overwrites is gone."""
    return re.sub(r"[^\n]*\r(?!\n)", "", text)


def first_comment(source: str) -> str:
    """The comment that opens a code cell, as a label of the folded code."""
    line = source.lstrip().partition("\n")[0]
    return line.lstrip("# ").strip() if line.startswith("#") else ""


@cache
def style() -> str:
    """The style sheet of all pages, with colours for code, light and dark."""
    from pygments.formatters import HtmlFormatter

    light, dark = (
        HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark")
    )
    sheet = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}\n{sheet}"


# --- The index -----------------------------------------------------------------------------------------


def write_index(
    profile: Profile, reports: Path, records: list[Record], figures: dict[str, Path], seconds: float | None
) -> None:
    """Writes index.html: the verdict, a line of result for each notebook, figures with captions, tables.

    figures: the figures folder of each notebook; seconds: of this run, None where not everything ran, so that
    the time of the last full run is kept.
    """
    last = reports / ".last_run.json"
    if seconds is not None:
        with paths.atomic(last) as temporary:
            temporary.write_text(json.dumps({"seconds": round(seconds)}), encoding="utf-8")
    default = paths.figures(profile.name)
    lines = [_line(record, figures.get(record.notebook, default), reports) for record in records]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    page = environment.get_template("index.html.j2").render(
        style=style(),
        profile=profile,
        date=datetime.now().strftime("%Y-%m-%d %H:%M"),
        verdict=inline(figures.get("99_claims", default) / "answers" / "99_claims.md"),
        lines=lines,
        references=references(),
        facts=facts(last),
    )
    write_page(reports / "index.html", page)


def write_summary(figures: Path, notebooks: list[tuple[str, str, list[str]]], target: Path) -> None:
    """Writes the whole report as one page to send or to look at in a browser, pictures included.

    It is made of the files in `figures` alone: the answer, the tables and the figures of each notebook (name,
    title, products).
    """
    parts = []
    for name, title, products in notebooks:
        made = [product for product in products if (figures / product).is_file()]
        parts.append(
            {
                "title": title,
                "answer": inline(figures / "answers" / f"{name}.md"),
                "figures": [
                    (description(figures / n), picture, digest(figures / n))
                    for n in made
                    if n.endswith(".png") and (picture := readable(small_picture, figures / n))
                ],
                "tables": [
                    table
                    for n in made
                    if re.fullmatch(r"[TS]\d+[a-z]?\.csv", n)
                    for table in readable(_tables, figures / n) or []
                ],
            }
        )
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    verdict = inline(figures / "answers" / "99_claims.md")
    page = environment.get_template("summary.html.j2").render(
        style=style(), verdict=verdict, parts=parts, references=references()
    )
    write_page(target, page)


def readable(make: Callable[[Path], Any], file: Path) -> Any:
    """What `make` makes of a file; None, with a line that names the file, where it cannot be read."""
    try:
        return make(file)
    except Exception as error:  # pictures and tables that are damaged raise many kinds
        print(f"{file} is left out of the report: {printable(first_line(error))}")
        return None


def _tables(file: Path) -> list[tuple[str, str]]:
    """(title, HTML) of a table's rows that are in print, and of the others; none for another kind of CSV."""
    if not file.with_suffix(".tex").is_file():  # which every table has
        return []
    table = load_table(file)
    printed = table.groupby("row", sort=False)["published"].transform(lambda values: values.notna().any())
    title = name_of(file.stem)
    parts = [(title, table[printed]), (f"{title}, rows that are not in print", table[~printed])]
    return [(heading, referenced(boxed_tables(to_html(part)), "")) for heading, part in parts if len(part)]


def digest(file: Path) -> str:
    """What a picture was made of: equal pages have equal ones, whatever the compression does."""
    return paths.file_digest(file)[:16]


def small_picture(file: Path) -> str:
    """A PNG as the data address of a WebP, at most SUMMARY_WIDTH pixels wide."""
    from PIL import Image

    content = io.BytesIO()
    with Image.open(file) as image:
        size = min(SUMMARY_WIDTH, image.width), round(image.height * min(1, SUMMARY_WIDTH / image.width))
        small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        small.save(content, "WEBP", quality=85, method=6)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def _line(record: Record, out: Path, reports: Path) -> dict[str, Any]:
    """What the index shows of one notebook."""
    made = [name for name in record.products if (out / name).is_file()]
    stems = dict.fromkeys(Path(name).stem for name in made if not name.startswith("answers/"))
    pictured = {Path(name).stem for name in made if name.endswith(".png")}
    files = {
        stem: [(Path(n).suffix[1:].upper(), link(out / n, reports)) for n in made if Path(n).stem == stem]
        for stem in stems
    }
    return {
        "record": record,
        "name": record.notebook,
        "page": f"{record.notebook}.html" if (reports / f"{record.notebook}.html").is_file() else "",
        "answer": inline(out / "answers" / f"{record.notebook}.md", sentences=1),
        "figures": [
            {
                "name": name_of(stem, "Figure S"),
                "picture": link(out / f"{stem}.png", reports),
                "alt": description(out / f"{stem}.png") or f"{stem}.png, which does not say what it shows",
                "files": files[stem],
            }
            for stem in stems
            if stem in pictured
        ],
        "tables": [(name_of(stem), files[stem]) for stem in stems if stem not in pictured],
    }


def inline(file: Path, sentences: int | None = None) -> str:
    """A Markdown paragraph as safe HTML: strong, emphasis, code and formulas are all the markup.

    sentences: only so many, from the first on.
    """
    if not file.is_file():
        return ""
    text = ". ".join(file.read_text(encoding="utf-8", errors="replace").strip().split(". ")[:sentences])
    text = html.escape(text if text.endswith(".") else f"{text}.", quote=False)
    text = re.sub(r"\$([^$]+)\$", lambda found: mathml(html.unescape(found[1]), display=False), text)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"\*([^*]+)\*", r"<em>\1</em>", text)


def name_of(stem: str, own: str = "Table S") -> str:
    """`T4a` -> `Table 4a`, `F2` -> `Figure 2`, `S1` -> `Table S1`; other names as words."""
    match = re.fullmatch(r"([TFS])(\d+[a-z]?)(_wide)?", stem)
    if not match:
        return stem.removeprefix("S_").replace("_", " ")
    kind, number, wide = match.groups()
    return f"{own if kind == 'S' else KINDS[kind]}{number}{', wide' if wide else ''}"


def facts(last: Path) -> dict[str, str]:
    """What was run with."""
    import psutil
    import torch

    try:
        seconds = f"{json.loads(last.read_text(encoding='utf-8'))['seconds']} s"
    except (OSError, ValueError, KeyError, TypeError):
        seconds = "unknown"
    memory = psutil.virtual_memory().total / 2**30
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "Last run of all notebooks": seconds,
        "lt_core": f"{_version('lt_core')}, commit {code_version()}",
        "Python": platform.python_version(),
        "PyTorch": _version("torch"),
        "Machine": f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB",
        "GPU": ", ".join(gpus) or "none",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "from the checkout"
