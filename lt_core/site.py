"""HTML reports that open from disk: one file a notebook and an index, nothing loaded from anywhere.

Formulas become MathML, images are part of the file, code and long logs are folded, live widgets are replaced
by a note.

    render_notebook(executed, target, title="Table 1")
    write_index(profile, records, seed=0, seconds=12.3)
"""

from __future__ import annotations

import base64
import csv
import html
import io
import os
import platform
import re
import shutil
import subprocess
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

if TYPE_CHECKING:
    from lt_core.notebooks import Record
    from lt_core.profiles import Profile

TEMPLATES = paths.PACKAGE / "site_template"
LONG_OUTPUT_LINES = 20  # longer printed output is folded
THUMBNAIL_PIXELS = 640
MINIATURE = (9, 5)  # rows and columns of a table that its card shows
KINDS = {"T": "Table", "F": "Figure", "S": "Table S"}
SHOWN_FIRST = [
    "text/html",
    "text/markdown",
    "image/svg+xml",
    "image/png",
    "image/jpeg",
    "text/latex",
    "text/plain",
]
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
        yield "last_states", last_states
        yield "first_comment", first_comment
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


def render_notebook(source: Path, target: Path, *, title: str, error: str = "", resources: Path) -> None:
    """Writes the executed notebook `source` as one HTML file; `resources`: where its relative images lie."""
    notebook = nbformat.read(source, as_version=4)
    _prepare(notebook)
    report = {"title": title, "error": error, "style": style(), "long": LONG_OUTPUT_LINES}
    known = {"metadata": {"path": str(resources), "name": title}, "report": report}
    page, _ = ReportExporter().from_notebook_node(notebook, resources=known)
    with paths.atomic(target) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _prepare(notebook: nbformat.NotebookNode) -> None:
    """Drops papermill's marks, replaces live widgets, and gives every image a text."""
    notebook.cells = [
        cell for cell in notebook.cells if "papermill-error-cell-tag" not in cell.metadata.get("tags", [])
    ]
    heading = notebook.metadata.get("title", "")
    for cell in notebook.cells:
        headings = (
            re.findall(r"^#+ +(.+)$", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else []
        )
        heading = headings[-1] if headings else heading
        for output in cell.get("outputs", []):
            _replace_widget(output)
            _describe_images(output, cell.metadata.get("alt") or f"Figure under the heading: {heading}")


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
    except OSError:
        return ""


def boxed_tables(page: str) -> str:
    """Each table in a box of its own that scrolls sideways."""
    opened = re.sub(r"<table\b", '<div class="box" tabindex="0"><table', page)
    return re.sub(r"</table\s*>", "</table></div>", opened)


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


def write_index(profile: Profile, records: list[Record], seed: int, seconds: float) -> None:
    """Writes reports/<profile>/index.html: what was made, by which notebook, with what, how long it took."""
    figures, reports = paths.figures(profile.name), paths.reports(profile.name)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    page = environment.get_template("index.html.j2").render(
        style=style(),
        profile=profile,
        date=datetime.now().strftime("%Y-%m-%d %H:%M"),
        facts=facts(seed, seconds),
        records=records,
        existing={record.notebook for record in records if (reports / f"{record.notebook}.html").is_file()},
        figures=[item for record in records for item in _pictures(record, figures, reports)],
        tables=[item for record in records for item in _tables(record, figures, reports)],
        claims=claim_counts(figures / "claims.csv"),
    )
    with paths.atomic(reports / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def name_of(stem: str) -> str:
    """`T4a` -> `Table 4a`, `F2` -> `Figure 2`, `S1` -> `Table S1`; other names as they are."""
    match = re.fullmatch(r"([TFS])(\d+[a-z]?)", stem)
    if not match:
        return stem.replace("_", " ")
    kind, number = match.groups()
    return f"{KINDS[kind]}{number}" if kind == "S" else f"{KINDS[kind]} {number}"


def _pictures(record: Record, figures: Path, reports: Path) -> list[dict[str, Any]]:
    """A thumbnail for each PNG that a notebook made, and links to its other forms."""
    made = [figures / name for name in record.produces if name.endswith(".png")]
    return [
        {
            "name": name_of(path.stem).replace("Table S", "Figure S"),
            "thumbnail": thumbnail(path),
            "alt": description(path) or f"from the notebook {record.title}",
            "record": record,
            "files": _files(record, path.stem, figures, reports),
        }
        for path in made
        if path.is_file()
    ]


def _tables(record: Record, figures: Path, reports: Path) -> list[dict[str, Any]]:
    """The tables that a notebook made: CSV files without a picture of the same name, each in miniature."""
    pictured = {Path(name).stem for name in record.produces if name.endswith((".png", ".svg"))}
    stems = dict.fromkeys(Path(name).stem for name in record.produces if name.endswith((".csv", ".md")))
    return [
        {
            "name": name_of(stem),
            "record": record,
            "files": files,
            "miniature": miniature(figures / f"{stem}.csv"),
        }
        for stem in stems
        if stem not in pictured and (files := _files(record, stem, figures, reports))
    ]


def miniature(path: Path) -> list[list[str]]:
    """The upper left corner of a CSV table, head first; results as printed -> reproduced values."""
    if not path.is_file():
        return []
    rows, columns = MINIATURE
    with open(path, encoding="utf-8", newline="") as file:
        lines = [line for line in csv.reader(file) if line]
    if lines and {"row", "group", "published", "reproduced", "rule"} <= set(lines[0]):
        lines = _as_printed([dict(zip(lines[0], line, strict=False)) for line in lines[1:]])
    return [line[:columns] for line in lines[:rows]]


def _as_printed(results: list[dict[str, str]]) -> list[list[str]]:
    """Long results as the paper prints them: a line for each row, a column for each group."""
    results = [one for one in results if one["rule"] == results[0]["rule"]]
    groups = list(dict.fromkeys(one["group"] for one in results))
    values: dict[str, dict[str, str]] = {}
    for one in results:
        printed, ours = (f"{float(one[key]):.1f}" if one[key] else "–" for key in ("published", "reproduced"))
        values.setdefault(one["row"], {})[one["group"]] = f"{printed} → {ours}"
    lines = [[row.split(" / ")[-1], *(cells.get(g, "") for g in groups)] for row, cells in values.items()]
    return [["", *groups], *lines]


def _files(record: Record, stem: str, figures: Path, reports: Path) -> list[tuple[str, str]]:
    """Suffix and relative address of each file of that name."""
    files = [figures / name for name in record.produces if Path(name).stem == stem]
    return [
        (path.suffix[1:].upper(), Path(os.path.relpath(path, reports)).as_posix())
        for path in files
        if path.is_file()
    ]


def thumbnail(path: Path) -> str:
    """A small copy of a picture as a data address."""
    from PIL import Image

    with Image.open(path) as picture:
        small = picture.convert("RGBA")
    paper = Image.new("RGBA", small.size, "white")
    paper.alpha_composite(small)
    paper.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    paper.convert("RGB").quantize(64).save(buffer, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def claim_counts(path: Path) -> dict[str, int]:
    """How many claims hold, fail, are untestable; empty when they have not been tested."""
    if not path.is_file():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        verdicts = [row.get("verdict", "") for row in csv.DictReader(file)]
    return {verdict: verdicts.count(verdict) for verdict in ("holds", "fails", "untestable")}


def facts(seed: int, seconds: float) -> dict[str, str]:
    """What was run with: versions, commit, hardware."""
    commit = _output("git", "-C", str(paths.ROOT), "rev-parse", "--short", "HEAD")
    changed = bool(commit and _output("git", "-C", str(paths.ROOT), "status", "--porcelain", "-uno"))
    return {
        "Seed": str(seed),
        "Last run": f"{seconds:.0f} s",
        "lt_core": f"{_version('lt_core')}{f', commit {commit}' if commit else ''}{', edited' * changed}",
        "Python": platform.python_version(),
        "PyTorch": _version("torch"),
        "Processor": f"{_processor()}, {os.cpu_count()} cores",
        "Memory": _memory(),
        "GPU": _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").replace("\n", ", ")
        or "none",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "from the checkout"


def _output(*command: str) -> str:
    """What a command prints; empty when it is missing or fails."""
    if not shutil.which(command[0]):
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def _memory() -> str:
    import psutil

    return f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
