"""Runs the notebooks with papermill, side by side, and writes one HTML report each and an index.

A notebook runs when something that it depends on has changed or a product is missing or changed. One that
fails does not stop the others. Each runs in processes of its own (papermill and its kernel), so that one that
is killed takes nothing along, and in a folder of its own, from which a run that ended well hands over: what a
dead run left behind may write reaches nothing.

    status = run(Options(profile="digits", only="01,02"))      # 0: all well, 1: a notebook failed
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lt_core import paths
from lt_core.checks import InputError, LTError, ProfileError, check_seed, is_below, printable, unknown

CODE_SUFFIXES = {".py", ".toml", ".csv", ".json", ".txt", ".html", ".j2", ".css"}
REPORT = "LT_REPORT"  # environment variable: set while a report is made, which has no live widgets
FIT_LOG = "LT_FIT_LOG"  # environment variable: the account of compared systems (`lt_core.classifiers`)
RESERVED = ("profile", "seed")  # parameters with an option of their own
STAGGER_SECONDS = 1.0  # between two kernel starts: they look for free ports and read the same files
SCRATCH = ".run-"  # how the folders in which runs work begin, beside their reports
NEVER_STARTED = re.compile(r"Kernel died before replying|Kernel didn't respond|[Tt]imeout waiting for kernel")
FOREIGN = ("PYTHON", "IPYTHON", "JUPYTER", "PAPERMILL")  # variables through which other code could come in
VERDICTS = "claims.csv"  # of the notebook that judges; those that declare claims read it
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


# ---------------------------------------------------------------- notebooks as files


@dataclass(frozen=True)
class Notebook:
    """One notebooks/NN_name.ipynb. Its metadata, under "lt_core", says what it produces and needs."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def number(self) -> str:
        return self.name.partition("_")[0]

    @cached_property
    def content(self) -> dict[str, Any]:
        """The file as parsed JSON; {} when it is no notebook, or declares what cannot be files."""
        import nbformat

        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            nbformat.validate(content)
            declared = content["metadata"].get("lt_core", {})
            names = [declared.get("produces", []), declared.get("backbones", [])]
            fits = all(isinstance(some, list) and all(map(is_below, some)) for some in names)
        except Exception:  # whatever the content of a damaged file makes these raise
            return {}
        return content if fits else {}

    @property
    def cells(self) -> list[dict[str, Any]]:
        return self.content.get("cells", [])

    @property
    def declared(self) -> dict[str, Any]:
        return self.content.get("metadata", {}).get("lt_core", {})

    @property
    def produces(self) -> list[str]:
        """Files that a run writes to its figures folder."""
        return self.declared.get("produces", [])

    @property
    def backbones(self) -> list[str]:
        """Backbones whose feature caches a run reads."""
        return self.declared.get("backbones", [])

    @property
    def first(self) -> bool:
        """Whether it runs before the others, which read what it writes: the verdicts of the claims."""
        return bool(self.declared.get("first"))

    @property
    def title(self) -> str:
        """The first heading."""
        for cell in self.cells:
            if cell.get("cell_type") == "markdown":
                for line in source_of(cell).splitlines():
                    if line.startswith("#"):
                        return printable(line.lstrip("#").strip())
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
        try:
            missing = [name for name in RESERVED if name not in self.defaults]
        except Exception as error:  # whatever papermill raises about a damaged file
            return f"its parameters cannot be read: {error}"
        return f"its cell tagged `parameters` lacks {' and '.join(missing)}" if missing else ""


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


def find(folder: Path | None = None) -> list[Notebook]:
    """All notebooks, in the order of their numbers. Raises InputError where two declare the same product."""
    folder = folder or paths.NOTEBOOKS
    found = [Notebook(path) for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"), key=lambda path: path.stem)]
    if not found:
        raise InputError(f"no notebooks (NN_name.ipynb) in {folder}")
    made = Counter(product for notebook in found for product in notebook.produces)
    for product in (product for product, makers in made.items() if makers > 1):
        makers = " and ".join(n.name for n in found if product in n.produces)
        raise InputError(f"{makers} both declare the product {product}: rename or remove one of them")
    return found


def select(notebooks: list[Notebook], only: str | None) -> list[Notebook]:
    """The notebooks named by a comma-separated list of numbers or names; all of them for None."""
    if only is None:
        return notebooks
    words = [word.strip().removesuffix(".ipynb") for word in only.split(",") if word.strip()]
    if not words:
        raise InputError("--only needs numbers or names of notebooks, as in --only 01,08")
    chosen = []
    for word in words:
        fits = [n for n in notebooks if word in (n.name, n.number) or word.zfill(2) == n.number]
        if not fits:
            raise ProfileError(unknown("notebook", word, [n.name for n in notebooks]))
        if len(fits) > 1:
            raise InputError(f"--only {word} fits {' and '.join(n.name for n in fits)}: name one of them")
        chosen += fits
    return [notebook for notebook in notebooks if notebook in chosen]


# ---------------------------------------------------------------- parameters


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


def check_assignments(
    notebooks: list[Notebook], assignments: dict[str, str], backbones: Iterable[str]
) -> None:
    """Raises InputError, listing the known ones, for a name that no selected notebook has, or a backbone."""
    known = {name for notebook in notebooks if not notebook.fault for name in notebook.defaults}
    for name in assignments:
        if name not in known:
            choices = sorted(known - set(RESERVED)) or ["(the selected notebooks have none)"]
            raise InputError(unknown("parameter", name, choices))
    if (chosen := assignments.get("backbone")) and chosen not in backbones:
        raise InputError(unknown("backbone", chosen, list(backbones)))


def own_parameters(notebook: Notebook, assignments: dict[str, str], seed: int | None) -> dict[str, Any]:
    """Seed, and the assignments that change one of the notebook's defaults: what names its folder of figures.

    A value takes the type of its default. Raises InputError where it cannot.
    """
    own: dict[str, Any] = {"seed": seed}
    for name, text in assignments.items():
        if name not in notebook.defaults:
            continue
        default, value = notebook.defaults[name], literal(text)
        if isinstance(default, str) or (value is None and default is None):
            value = text
        elif isinstance(default, bool) and text.lower() in ("true", "false"):
            value = text.lower() == "true"
        elif isinstance(default, float) and type(value) is int:
            value = float(value)
        if default is not None and type(value) is not type(default):
            wanted = f"of type {type(default).__name__}"
            raise InputError(f"parameter {name} of {notebook.name} must be {wanted}, found {text!r}")
        if value != default:
            own[name] = value
    return own


# ---------------------------------------------------------------- what a user can ask for


@dataclass(frozen=True)
class Options:
    """What `./run_all.sh` was asked for."""

    profile: str = "embedded"
    only: str | None = None  # comma-separated numbers or names; None: all
    jobs: int | None = None  # notebooks side by side; None: min(2, cores)
    force: bool = False
    data_root: Path | None = None
    seed: int | None = None  # None: all seeds of the profile
    assignments: list[str] = field(default_factory=list)  # NAME=VALUE

    @property
    def reports(self) -> Path:
        """Where this run's records and pages lie: runs with other parameters have a folder of their own."""
        return paths.reports(self.profile, seed=self.seed, **parse_assignments(self.assignments))


@dataclass
class Task:
    """A selected notebook, its parameters but for the profile, and why it must run (empty: it need not)."""

    notebook: Notebook
    parameters: dict[str, Any]
    options: Options
    reason: str = ""

    @property
    def out(self) -> Path:
        return paths.figures(self.options.profile, **self.parameters)

    @property
    def injected(self) -> dict[str, Any]:
        return {"profile": self.options.profile, **self.parameters}


@dataclass
class Record:
    """The account of one notebook, kept in reports/<profile>/NN_name.json."""

    notebook: str
    title: str
    status: str  # ok, failed, running (also: was interrupted)
    started: str = ""  # local date and time
    seconds: float = 0.0
    parameters: dict[str, Any] = field(default_factory=dict)
    products: dict[str, str] = field(default_factory=dict)  # name -> sha256
    error: str = ""
    cell: str = ""  # where the error was
    fingerprint: dict[str, str] = field(default_factory=dict)
    pages: dict[str, str] = field(default_factory=dict)  # report and executed notebook -> sha256

    def save(self, folder: Path) -> None:
        with paths.atomic(folder / f"{self.notebook}.json") as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, name: str) -> Record | None:
        """The record of the last run; None when there is none that can be read."""
        from pydantic import TypeAdapter

        try:
            return TypeAdapter(cls).validate_json((folder / f"{name}.json").read_bytes())
        except (OSError, ValueError):
            return None

    @property
    def what_went_wrong(self) -> str:
        return printable(f"{self.cell}: {self.error}" if self.cell else self.error)


def listing(profile: str, folder: Path | None = None) -> str:
    """Number, title and products of every notebook."""
    from lt_core.data.profiles import load_profile

    load_profile(profile)
    lines = []
    for notebook in find(folder):
        lines.append(f"{notebook.name}: {notebook.title}")
        lines.append(f"    produces {', '.join(notebook.produces) or 'a report only'}")
    return "\n".join(lines)


def dry_run(options: Options, folder: Path | None = None) -> str:
    """What would run, and why."""
    tasks = plan(options, folder)
    return "\n".join(
        f"{t.notebook.name}: {f'would run ({t.reason})' if t.reason else 'up to date'}" for t in tasks
    )


def run(options: Options, folder: Path | None = None) -> int:
    """Runs what is out of date: 1 if a notebook failed, else 0.

    Raises LTError, before anything runs, for bad input.
    """
    from lt_core import site
    from lt_core.data.profiles import load_profile

    began = time.monotonic()
    plan(options, folder)  # refuses wrong names before waiting for the lock
    with one_at_a_time(options.reports, options.profile):
        tasks = plan(options, folder)
        for left in options.reports.glob(f"{SCRATCH}*"):  # of dead runs: we hold the lock
            shutil.rmtree(left, ignore_errors=True)
        for left in [*options.reports.glob(".*.tmp"), *tasks[0].out.glob(".*.tmp")]:
            left.unlink()
        account = options.reports / ".fits"
        account.unlink(missing_ok=True)
        records = run_tasks(tasks, options, account)
        seconds = time.monotonic() - began
        out, every = tasks[0].out, find(folder)
        known = {n.name: r for n in every if (r := Record.load(options.reports, n.name))}

        def as_made(n: Notebook) -> list[str]:  # a damaged product is not shown
            made = known[n.name].products if n.name in known else {}
            return [name for name in n.produces if made.get(name, "") in ("", file_digest(out / name))]

        parts = [(n.name, n.title, as_made(n)) for n in every]
        site.write_summary(out, parts, options.reports / "report.html")
        everything = options.only is None and all(task.reason for task in tasks)
        figures = {task.notebook.name: task.out for task in tasks}
        shown = load_profile(options.profile), options.reports, list(known.values()), figures
        site.write_index(*shown, seconds if everything else None)
    print(summary(tasks, records, options, seconds, account), flush=True)
    return int(any(record.status != "ok" for record in records.values()))


def plan(options: Options, folder: Path | None = None) -> list[Task]:
    """The selected notebooks with reasons to run, in the order of running; raises LTError for bad options."""
    from lt_core.data.profiles import load_profile

    backbones = load_profile(options.profile).backbones
    if options.jobs is not None and options.jobs < 1:
        raise InputError(f"--jobs must be at least 1, found {options.jobs}")
    check_seed(options.seed)
    if options.data_root is not None:
        paths.data_root(options.data_root)
    selected = select(find(folder), options.only)
    assignments = parse_assignments(options.assignments)
    if assignments:
        check_assignments(selected, assignments, backbones)
    tasks = []
    for notebook in sorted(selected, key=lambda one: not one.first):
        own = own_parameters(notebook, {} if notebook.fault else assignments, options.seed)
        tasks.append(Task(notebook, own, options))
        tasks[-1].reason = reason_to_run(tasks[-1])
    return tasks


# ---------------------------------------------------------------- what is out of date


def reason_to_run(task: Task) -> str:
    """Why a notebook must run; empty when it need not."""
    last = Record.load(task.options.reports, task.notebook.name)
    if task.options.force:
        return "forced"
    if last is None:
        return "never run"
    if last.status != "ok":
        return "failed last time" if last.status == "failed" else "did not finish last time"
    for name in pages_of(task.notebook):
        if not last.pages.get(name) or file_digest(task.options.reports / name) != last.pages[name]:
            return "its page is missing or changed"
    for name in task.notebook.produces:
        found = file_digest(task.out / name)
        if found != last.products.get(name):
            return f"{'missing' if not found else 'changed'} product {name}"
    now = fingerprint(task)
    changed = [kind for kind in now if now[kind] != last.fingerprint.get(kind)]
    return f"changed {' and '.join(changed)}" if changed else ""


def fingerprint(task: Task) -> dict[str, str]:
    """sha256 of everything that a notebook's results depend on, by kind; equal means nothing changed."""
    notebook = task.notebook
    cells = [[cell.get("cell_type"), source_of(cell)] for cell in notebook.cells]
    pins = [file_digest(paths.ROOT / "requirements.txt"), installed("torch")]
    verdicts = file_digest(task.out / VERDICTS) if notebook.declared.get("claims") else ""
    return {
        "notebook": digest([cells, notebook.declared]),
        "parameters": digest(task.injected),
        "code": digest([[path.name, file_digest(path)] for path in code_files()]),
        "environment": digest(pins),
        "feature caches": digest(cache_hashes(task)),
        "verdicts that it shows": "" if VERDICTS in notebook.produces else verdicts,
    }


def pages_of(notebook: Notebook) -> tuple[str, str]:
    return f"{notebook.name}.html", f"{notebook.name}.ipynb"


def code_files() -> list[Path]:
    """Everything of the package that a result may depend on."""
    return sorted(path for path in paths.PACKAGE.rglob("*") if path.suffix in CODE_SUFFIXES)


def cache_hashes(task: Task) -> list[str]:
    """The hash of the description, hashes included, of the feature cache of each seed, where there is one."""
    from lt_core import backbones
    from lt_core.data.profiles import load_profile

    hashes = []
    for profile in (task.options.profile, *task.notebook.declared.get("profiles", [])):
        known = load_profile(profile).backbones
        for name in (name for name in task.notebook.backbones if name in known):
            for seed in dict.fromkeys([*known[name].seeds, task.options.seed or 0]):
                meta = backbones.cache_folder(profile, name, seed) / "meta.json"
                hashes.append(file_digest(meta))
    return hashes


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file; empty where there is none."""
    return paths.file_digest(path) if path.is_file() else ""


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


# ---------------------------------------------------------------- running


@contextmanager
def one_at_a_time(folder: Path, profile: str) -> Iterator[None]:
    """Holds the lock of a profile's reports; a second run waits, and says so."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another run of profile {profile} is at work: waiting for it to end", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def run_tasks(tasks: list[Task], options: Options, account: Path) -> dict[str, Record]:
    """Runs the tasks that have a reason; the record of each, the skipped ones' from their last run."""
    records: dict[str, Record] = {}
    for task in (task for task in tasks if not task.reason):
        records[task.notebook.name] = Record.load(options.reports, task.notebook.name)
        print(f"{task.notebook.name}: up to date", flush=True)
    due = [task for task in tasks if task.reason]
    if not due:
        return records
    broken = make_backbones(due, options)
    jobs = options.jobs or min(2, cores())
    own = tempfile.TemporaryDirectory(prefix=SCRATCH, dir=options.reports, ignore_cleanup_errors=True)
    with own as scratch, Processes() as processes:
        environment = child_environment(options, Path(scratch), account)
        worker = Worker(environment, Path(scratch), processes, broken)
        worker.total = len(due)
        worker.threads = max(1, cores() // jobs)
        # What quotes claims waits for what judges them; the others run beside it.
        order = sorted(due, key=lambda t: (not t.notebook.first, bool(t.notebook.declared.get("claims"))))
        with ThreadPoolExecutor(jobs) as pool:
            try:
                futures: list[Future[Record]] = []
                judges = sum(task.notebook.first for task in order)
                for task in order:
                    after = futures[:judges] if task.notebook.declared.get("claims") else []
                    futures.append(pool.submit(worker.run, task, after))
                for future in as_completed(futures):
                    record = future.result()
                    records[record.notebook] = record
            except BaseException:
                processes.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return records


def make_backbones(tasks: list[Task], options: Options) -> dict[str, str]:
    """Makes the feature caches that the tasks need; backbones that failed, each with its error.

    Backbones that the profile does not have are left out: a notebook says itself what it shows without them.
    """
    from lt_core import backbones
    from lt_core.data.profiles import load_profile

    known = load_profile(options.profile).backbones
    failed = {}
    for name in dict.fromkeys(name for task in tasks for name in task.notebook.backbones if name in known):
        try:
            for seed in backbones.seeds_shown(options.profile, name, options.seed):
                backbones.ensure(options.profile, name, seed, options.data_root)
        except LTError as error:
            failed[name] = f"backbone {name}: {printable(str(error))}"
        except Exception as error:  # its notebooks fail with it, the others run
            failed[name] = f"backbone {name}: {type(error).__name__}: {printable(str(error))}"
        if name in failed:
            print(failed[name], flush=True)
    return failed


class Worker:
    """Runs one notebook after the other, called from several threads."""

    def __init__(
        self, environment: dict[str, str], scratch: Path, processes: Processes, broken: dict[str, str]
    ) -> None:
        self.environment, self.scratch = environment, scratch
        self.processes, self.broken = processes, broken
        self.total = 0  # notebooks that run
        self.threads, self.done, self.next_start = 1, 0, 0.0
        self.starting, self.finishing = threading.Lock(), threading.Lock()

    def run(self, task: Task, after: list[Future[Record]]) -> Record:
        """Executes in a folder of its own, hands over, renders, records; waits for other runs first."""
        wait(after)
        notebook, reports = task.notebook, task.options.reports
        record = Record(
            notebook=notebook.name,
            title=notebook.title,
            status="running",
            started=datetime.now().isoformat(sep=" ", timespec="seconds"),
            parameters=task.injected,
        )
        began = time.monotonic()
        record.save(reports)
        record.error = notebook.fault or next(
            (self.broken[name] for name in notebook.backbones if name in self.broken), ""
        )
        if not record.error:
            self.wait_for_turn()
            print(f"{notebook.name}: started ({task.reason})", flush=True)
            # Read before it runs: a change made meanwhile counts as a change.
            record.fingerprint = fingerprint(task)
            place = self.scratch / notebook.name
            made = place / "figures" / task.out.name
            made.mkdir(parents=True)
            shown = task.out / VERDICTS
            if reads := bool(notebook.declared.get("claims")) and shown.is_file():  # of another notebook
                for file in (shown, shown.with_name(paths.SUMS)):
                    if file.is_file():
                        shutil.copyfile(file, made / file.name)
            record.error, record.cell = self.execute(task, place)
            if self.processes.stopped:  # interrupted: the record stays at "running"
                return record
            unwritten = [name for name in notebook.produces if not (made / name).is_file()]
            if not record.error and unwritten:
                record.error = f"did not write {unwritten[0]}"
            if reads:
                (made / VERDICTS).unlink()
            if not record.error:
                with self.finishing:
                    hand_over(made, task.out)
            record.products = {name: file_digest(task.out / name) for name in notebook.produces}
        record.seconds = round(time.monotonic() - began, 1)
        record.status = "failed" if record.error else "ok"
        with self.finishing:
            self.finish(record, task)
        return record

    def wait_for_turn(self) -> None:
        with self.starting:
            time.sleep(max(0.0, self.next_start - time.monotonic()))
            self.next_start = time.monotonic() + STAGGER_SECONDS

    def execute(self, task: Task, place: Path) -> tuple[str, str]:
        """Runs papermill, again if the kernel never started; error and cell, both empty if all is well."""
        name, reports = task.notebook.name, task.options.reports
        executed, log = place / f"{name}.ipynb", place / f"{name}.log"
        for attempt in (1, 2):
            executed.unlink(missing_ok=True)
            status = self.papermill(task, executed, log)
            text = log.read_text(encoding="utf-8", errors="replace")
            if status == 0 or attempt == 2 or not NEVER_STARTED.search(text) or was_executed(executed):
                break
            print(f"{name}: its kernel did not start, trying once more", flush=True)
        for file in (executed, log):
            (reports / file.name).unlink(missing_ok=True)
            if file.is_file() and file.stat().st_size:  # papermill may end before it writes anything
                os.replace(file, reports / file.name)
        return ("", "") if status == 0 else explain(reports / executed.name, text, status)

    def papermill(self, task: Task, output: Path, log: Path) -> int:
        import yaml

        source = task.notebook.path
        injected = base64.b64encode(yaml.safe_dump(task.injected).encode()).decode()
        command = [sys.executable, "-P", "-c", "from lt_core.runner import papermill; papermill()"]
        command += [str(source), str(output), "--kernel", "python3", "--cwd", str(source.parent)]
        command += ["--parameters_base64", injected, "--no-progress-bar", "--log-output"]
        own = dict.fromkeys(THREAD_VARIABLES, str(self.threads)) | {
            paths.STAGED: str(output.parent / "figures")
        }
        with open(log, "wb") as stream:
            return self.processes.wait_for(command, self.environment | own, stream)

    def finish(self, record: Record, task: Task) -> None:
        from lt_core import site

        reports = task.options.reports
        executed = reports / f"{record.notebook}.ipynb"
        try:
            source = executed if executed.is_file() else task.notebook.path
            target, whole = reports / f"{record.notebook}.html", task.options.only is None
            site.render_notebook(source, target, record, task.out, whole)
        except Exception as error:  # a file that is no notebook has no report
            if record.status == "ok":
                record.status, record.error = "failed", f"its report could not be written: {error}"
        record.pages = {name: file_digest(reports / name) for name in pages_of(task.notebook)}
        record.save(reports)
        self.done += 1
        outcome = f"FAILED, {record.what_went_wrong}" if record.error else "finished"
        print(
            f"{record.notebook}: {outcome} in {record.seconds:.0f} s ({self.done}/{self.total})", flush=True
        )


def hand_over(made: Path, target: Path) -> None:
    """Puts all files of a folder in place, each whole; the hashes of its tables join those of the others."""
    for file in sorted(path for path in made.rglob("*") if path.is_file() and path.name != paths.SUMS):
        with paths.atomic(target / file.relative_to(made)) as temporary:
            shutil.copyfile(file, temporary)
    for name in paths.sums_of(made):
        if (made / name).is_file():
            paths.add_sum(target / name)


def papermill() -> None:
    """Papermill in a process that ends when the runner does, however that ended; its kernel ends with it."""
    from papermill.cli import papermill as command

    def end_with_the_runner() -> None:
        os.read(0, 1)  # the runner holds the other end and writes nothing
        os._exit(1)

    threading.Thread(target=end_with_the_runner, daemon=True).start()
    command()


class Processes:
    """The running children, so that all of them, kernels included, end when this process is interrupted."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen[bytes]] = []
        self.lock, self.stopped = threading.Lock(), False

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_for(self, command: list[str], environment: dict[str, str], stream: Any) -> int:
        """Runs a command to its end, in a session of its own: Ctrl-C comes to us alone, and we end it."""
        with self.lock:
            if self.stopped:
                return -signal.SIGTERM
            child = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,  # ends when we do
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.running.append(child)
        with child:
            status = child.wait()
        with self.lock:
            self.running.remove(child)
        return status

    def stop(self) -> None:
        """Ends all children and theirs: asks first, then kills."""
        import psutil

        with self.lock:
            self.stopped, children = True, list(self.running)
        family = []
        for child in children:
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(child.pid)
                family += [parent, *parent.children(recursive=True)]
        for ask in (psutil.Process.terminate, psutil.Process.kill):
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    ask(process)
            _, family = psutil.wait_procs(family, timeout=3)


def cores() -> int:
    """CPU cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def child_environment(options: Options, scratch: Path, account: Path) -> dict[str, str]:
    """The children's environment: this checkout, this Python's packages, and nothing of the user's own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
    own = {
        "PYTHONPATH": str(paths.PACKAGE.parent),
        "PYTHONSAFEPATH": "1",  # not the current folder
        "PYTHONNOUSERSITE": "1",
        "LT_OUTPUT_ROOT": str(paths.output_root()),  # absolute: a notebook runs in another folder
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MPLCONFIGDIR": str(
            paths.decoded() / "matplotlib"
        ),  # its font list is kept, a private style not read
        "IPYTHONDIR": str(scratch / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(scratch / "runtime"),
        "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel `python3` of this environment, not of the home folder
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        REPORT: "1",
        FIT_LOG: str(account),
    }
    if named := options.data_root or os.environ.get("LT_DATA_ROOT"):
        own["LT_DATA_ROOT"] = str(Path(named).expanduser().resolve())
    return kept | own


# ---------------------------------------------------------------- what went wrong, and the account at the end


def executed_cells(executed: Path) -> list[dict[str, Any]]:
    """Cells of an executed copy without papermill's error markers; none for an unreadable file."""
    cells = Notebook(executed).cells if executed.is_file() else []
    return [cell for cell in cells if "papermill-error-cell-tag" not in cell["metadata"].get("tags", [])]


def was_executed(executed: Path) -> bool:
    return any(cell.get("execution_count") for cell in executed_cells(executed))


def explain(executed: Path, log: str, status: int) -> tuple[str, str]:
    """Error (`ename: evalue`, first line) and cell of a failed run, from its executed copy and its log."""
    cells = executed_cells(executed)
    for index, cell in enumerate(cells):
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                return f"{output['ename']}: {output['evalue']}".strip().splitlines()[0], f"cell {index + 1}"
    if NEVER_STARTED.search(log):
        return "the kernel did not start: is ipykernel whole in this environment?", ""
    if "DeadKernelError" in log or "Kernel died" in log:
        begun = [i for i, cell in enumerate(cells) if cell["metadata"].get("papermill", {}).get("start_time")]
        return "the kernel was killed (out of memory?)", f"cell {begun[-1] + 1}" if begun else ""
    if status < 0:
        return f"papermill was ended by signal {-status} (out of memory?)", ""
    lines = [line for line in log.splitlines() if line.strip()]
    return (lines[-1].strip() if lines else f"papermill ended with status {status}"), ""


def summary(
    tasks: list[Task], records: dict[str, Record], options: Options, seconds: float, account: Path
) -> str:
    """Status, seconds and page of each notebook, the errors, how often systems were fitted, where to look."""
    width = max(len(name) for name in ["notebook", *records])
    lines = ["", f"{'notebook':{width}}  {'status':10}  {'seconds':>7}  report"]
    for task in tasks:
        record = records[task.notebook.name]
        status = record.status if task.reason else "up to date"
        report = options.reports / f"{record.notebook}.html"
        shown = report if report.is_file() else "none"
        lines.append(f"{record.notebook:{width}}  {status:10}  {record.seconds:7.1f}  {shown}")
    failed = [record for record in records.values() if record.status != "ok"]
    lines += [f"FAILED {record.notebook}: {record.what_went_wrong}" for record in failed]
    fits = account.read_text(encoding="utf-8").splitlines() if account.is_file() else []
    fitted = sum(line.startswith("fitted") for line in fits)
    lines += [
        "",
        f"{len(records) - len(failed)} of {len(records)} notebooks are fine; this took {seconds:.0f} s",
        f"compared systems    {fitted} fitted, {len(fits) - fitted} read from .cache",
        f"tables and figures  {tasks[0].out}",
        f"report              {options.reports / 'index.html'}",
    ]
    return "\n".join(lines)
