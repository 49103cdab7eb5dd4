"""The notebooks as files: what there is, what each declares, and when one is out of date.

A notebook declares in its metadata, under "lt_core", what it `produces` (names in figures/<profile>/), which
`backbones` it needs, and which files of other notebooks it `reads`:

    find()  ->  [Notebook("00_overview"), ...];    select(notebooks, "01,08")
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lt_core import paths
from lt_core.errors import InputError, LTError, ProfileError, unknown

CODE_SUFFIXES = {".py", ".toml", ".csv", ".json", ".txt", ".html", ".j2", ".css", ".mplstyle"}
REPORT = "LT_REPORT"  # environment variable: set while a report is made, which has no live widgets
RESERVED = ("profile", "seed")  # parameters with an option of their own


@dataclass(frozen=True)
class Notebook:
    """One notebooks/NN_name.ipynb. A file that cannot be used has a `fault`: its run fails, others go on."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def number(self) -> str:
        return self.name.partition("_")[0]

    @cached_property
    def content(self) -> dict[str, Any]:
        """The file as parsed JSON; {} when it is none."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) and isinstance(content.get("cells"), list) else {}

    @property
    def cells(self) -> list[dict[str, Any]]:
        return self.content.get("cells", [])

    @property
    def declared(self) -> dict[str, list[str]]:
        return self.content.get("metadata", {}).get("lt_core", {})

    @property
    def produces(self) -> list[str]:
        """Files that a run writes to figures/<profile>/."""
        return self.declared.get("produces", [])

    @property
    def backbones(self) -> list[str]:
        """Backbones whose feature caches a run reads."""
        return self.declared.get("backbones", [])

    @property
    def reads(self) -> list[str]:
        """Files of other notebooks that a run reads: those run first."""
        return self.declared.get("reads", [])

    @property
    def title(self) -> str:
        """The first heading."""
        for cell in self.cells:
            if cell.get("cell_type") == "markdown":
                for line in source_of(cell).splitlines():
                    if line.startswith("#"):
                        return line.lstrip("#").strip()
        return self.name

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Name and default of each parameter; a default that is no literal is None."""
        import papermill

        logging.getLogger("papermill").setLevel(logging.ERROR)
        found = papermill.inspect_notebook(str(self.path))
        return {name: literal(parameter["default"]) for name, parameter in found.items()}

    @cached_property
    def fault(self) -> str:
        """Why this file cannot be run; empty when it can."""
        if not self.content:
            return "the file is not a notebook"
        if not any("parameters" in cell.get("metadata", {}).get("tags", []) for cell in self.cells):
            return "no cell is tagged `parameters`"
        try:
            missing = [name for name in RESERVED if name not in self.defaults]
        except Exception as error:  # whatever papermill raises about a damaged file
            return f"its parameters cannot be read: {error}"
        return f"its parameters lack {' and '.join(missing)}" if missing else ""


@dataclass
class Record:
    """The account of one notebook, kept in reports/<profile>/NN_name.json."""

    notebook: str
    title: str
    status: str  # ok, failed, running (also: was interrupted)
    started: str = ""  # local date and time
    seconds: float = 0.0
    parameters: dict[str, Any] = field(default_factory=dict)
    produces: list[str] = field(default_factory=list)
    error: str = ""
    cell: str = ""  # where the error was
    fingerprint: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        with paths.atomic(folder / f"{self.notebook}.json") as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, name: str) -> Record | None:
        """The record of the last run; None when there is none that can be read."""
        try:
            return cls(**json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return None


def source_of(cell: dict[str, Any]) -> str:
    """A cell's text (the file format allows a list of lines)."""
    source = cell.get("source", "")
    return source if isinstance(source, str) else "".join(source)


def literal(text: str) -> Any:
    """The Python value that a text spells; None when it is an expression."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None


# --- Choosing notebooks and parameters -----------------------------------------------------------------


def find(folder: Path | None = None) -> list[Notebook]:
    """All notebooks, in the order of their numbers; raises InputError when there are none."""
    folder = folder or paths.NOTEBOOKS
    found = [Notebook(path) for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))]
    if not found:
        raise InputError(f"no notebooks (NN_name.ipynb) in {folder}")
    return found


def select(notebooks: list[Notebook], only: str | None) -> list[Notebook]:
    """The notebooks named by a comma-separated list of numbers or names; all of them for None."""
    if only is None:
        return notebooks
    wanted = [word.strip().removesuffix(".ipynb") for word in only.split(",") if word.strip()]
    if not wanted:
        raise InputError("--only needs numbers or names of notebooks, as in --only 01,08")
    chosen = [_named(notebooks, word) for word in wanted]
    return [notebook for notebook in notebooks if notebook in chosen]


def _named(notebooks: list[Notebook], word: str) -> Notebook:
    for notebook in notebooks:
        if word in (notebook.name, notebook.number) or (word.isdigit() and int(word) == int(notebook.number)):
            return notebook
    raise ProfileError(unknown("notebook", word, [notebook.name for notebook in notebooks]))


def parse_assignments(words: list[str]) -> dict[str, str]:
    """`-p NAME=VALUE` options as a dictionary; raises InputError for another form."""
    parsed = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"-p needs NAME=VALUE, found {word!r}")
        if name in RESERVED:
            raise InputError(f"-p {name}=...: use --{name}")
        parsed[name] = value
    return parsed


def parameters_of(notebook: Notebook, assignments: dict[str, str], profile: str, seed: int) -> dict[str, Any]:
    """What papermill is to inject: profile, seed, and the assignments that this notebook knows."""
    own = {
        name: _typed(notebook, name, text) for name, text in assignments.items() if name in notebook.defaults
    }
    return {"profile": profile, "seed": seed, **own}


def check_assignments(notebooks: list[Notebook], assignments: dict[str, str]) -> None:
    """Raises InputError, listing the known ones, for a name that no selected notebook has."""
    known = {name for notebook in notebooks if not notebook.fault for name in notebook.defaults}
    for name in assignments:
        if name not in known:
            choices = sorted(known - set(RESERVED)) or ["(the selected notebooks have none)"]
            raise InputError(unknown("parameter", name, choices))


def _typed(notebook: Notebook, name: str, text: str) -> Any:
    """The text as a value of the default's type."""
    default = notebook.defaults[name]
    if isinstance(default, str):
        return text
    value = {"true": True, "false": False, "none": None, "null": None}.get(text.lower(), literal(text))
    value = text if value is None and text.lower() not in ("none", "null") else value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    same = type(value) is type(default) or (
        isinstance(value, list | tuple) and isinstance(default, list | tuple)
    )
    if default is not None and not same:
        kind = type(default).__name__
        raise InputError(f"parameter {name} of {notebook.name} must be of type {kind}, found {text!r}")
    return value


# --- What a run depends on -----------------------------------------------------------------------------


def fingerprint(notebook: Notebook, parameters: dict[str, Any], profile: str, seed: int) -> dict[str, str]:
    """sha256 of everything that a notebook's results depend on, by kind; equal means nothing changed."""
    cells = [[cell.get("cell_type"), source_of(cell)] for cell in notebook.cells]
    return {
        "notebook": _digest([cells, notebook.declared]),
        "parameters": _digest(parameters),
        "code": _digest(_contents(_code_files())),
        "environment": _digest([_contents([paths.ROOT / "requirements.txt"]), _version("torch")]),
        "feature caches": _digest([_cache_hashes(profile, name, seed) for name in notebook.backbones]),
        "tables it reads": _digest(_contents([paths.figures(profile) / name for name in notebook.reads])),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _code_files() -> list[Path]:
    return sorted(path for path in paths.PACKAGE.rglob("*") if path.suffix in CODE_SUFFIXES)


def _contents(files: list[Path]) -> list[list[str]]:
    return [
        [path.name, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""] for path in files
    ]


def _cache_hashes(profile: str, backbone: str, seed: int) -> list[str]:
    """The hash that the feature cache of each shown seed states of itself; empty where there is none."""
    from lt_core import backbones

    try:
        folders = [
            backbones.cache_folder(profile, backbone, one)
            for one in backbones.seeds_shown(profile, backbone, seed)
        ]
        return [
            str(json.loads((folder / "meta.json").read_text(encoding="utf-8"))["sha256"])
            for folder in folders
        ]
    except (LTError, OSError, ValueError, KeyError, TypeError):
        return []


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
