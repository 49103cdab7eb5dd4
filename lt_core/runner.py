"""Runs the notebooks with papermill, side by side, and writes one HTML report each and an index.

A notebook runs when something that it depends on has changed or an output is missing. One that fails does
not stop the others. Each runs in processes of its own (papermill and its kernel), so that one that is killed
takes nothing along.

    status = run(Options(profile="digits", only="01,02"))      # 0: all well, 1: a notebook failed
"""

from __future__ import annotations

import base64
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from lt_core import notebooks as nbs
from lt_core import paths
from lt_core.errors import InputError, LTError
from lt_core.notebooks import Notebook, Record

STAGGER_SECONDS = 1.0  # between two kernel starts: they look for free ports and read the same files
CLOCK_SLACK_SECONDS = 2.0  # file times are coarser than the clock
NEVER_STARTED = re.compile(r"Kernel died before replying|Kernel didn't respond|[Tt]imeout waiting for kernel")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Options:
    """What `./run_all.sh` was asked for."""

    profile: str = "embedded"
    only: str | None = None  # comma-separated numbers or names; None: all
    jobs: int | None = None  # notebooks side by side; None: min(2, cores)
    force: bool = False
    data_root: Path | None = None
    seed: int = 0
    assignments: list[str] = field(default_factory=list)  # NAME=VALUE


@dataclass
class Task:
    """A selected notebook, with what is injected and why it must run (empty: it is up to date)."""

    notebook: Notebook
    parameters: dict[str, Any]
    reason: str = ""


# --- The three things a user can ask for ---------------------------------------------------------------


def listing(folder: Path | None = None) -> str:
    """Number, title and products of every notebook."""
    lines = []
    for notebook in nbs.find(folder):
        lines.append(f"{notebook.name}: {notebook.title}")
        lines.append(f"    produces {', '.join(notebook.produces) or 'a report only'}")
    return "\n".join(lines)


def dry_run(options: Options, folder: Path | None = None) -> str:
    """What would run, and why."""
    lines = []
    for task in plan(options, folder):
        reason = f"would run ({task.reason})" if task.reason else "up to date"
        lines.append(f"{task.notebook.name}: {reason}")
    return "\n".join(lines)


def run(options: Options, folder: Path | None = None) -> int:
    """Runs what is out of date: 1 if a notebook failed, else 0.

    Raises LTError, before anything runs, for bad input.
    """
    began = time.monotonic()
    plan(options, folder)  # refuses wrong names before waiting for the lock
    reports = paths.reports(options.profile)
    with _one_at_a_time(reports, options.profile):
        tasks = plan(options, folder)
        records = _run_tasks(tasks, options)
        _write_index(options, nbs.find(folder), time.monotonic() - began)
    print(_summary(tasks, records, reports, options.profile, time.monotonic() - began), flush=True)
    return int(any(record.status != "ok" for record in records.values()))


# --- What is out of date -------------------------------------------------------------------------------


def plan(options: Options, folder: Path | None = None) -> list[Task]:
    """The selected notebooks with their parameters and reasons to run; raises LTError for wrong options."""
    from lt_core.profiles import load_profile

    load_profile(options.profile)
    if options.jobs is not None and options.jobs < 1:
        raise InputError(f"--jobs must be at least 1, found {options.jobs}")
    if options.seed < 0:
        raise InputError(f"--seed must be 0 or above, found {options.seed}")
    if options.data_root is not None:
        paths.data_root(options.data_root)
    everything = nbs.find(folder)
    selected = nbs.select(everything, options.only)
    assignments = nbs.parse_assignments(options.assignments)
    if assignments:
        nbs.check_assignments(selected, assignments)
    tasks = []
    for notebook in selected:
        known = {} if notebook.fault else assignments
        parameters = nbs.parameters_of(notebook, known, options.profile, options.seed)
        tasks.append(Task(notebook, parameters, _reason(notebook, parameters, options)))
    rerun: set[str] = set()
    for task in _in_order(tasks):  # what reads the tables of a notebook that runs must run after it
        if not task.reason and rerun.intersection(task.notebook.reads):
            task.reason = "a table it reads is made again"
        if task.reason:
            rerun.update(task.notebook.produces)
    return tasks


def _reason(notebook: Notebook, parameters: dict[str, Any], options: Options) -> str:
    """Why a notebook must run; empty when it need not."""
    reports, figures = paths.reports(options.profile), paths.figures(options.profile)
    last = Record.load(reports, notebook.name)
    if options.force:
        return "forced"
    if last is None:
        return "never run"
    if last.status != "ok":
        return "failed last time" if last.status == "failed" else "did not finish last time"
    products = [reports / f"{notebook.name}.html", *(figures / name for name in notebook.produces)]
    missing = [path.name for path in products if not path.is_file()]
    if missing:
        return f"missing output {missing[0]}"
    now = nbs.fingerprint(notebook, parameters, options.profile, options.seed)
    changed = [kind for kind in now if now[kind] != last.fingerprint.get(kind)]
    return f"changed {' and '.join(changed)}" if changed else ""


def _groups(tasks: list[Task]) -> Iterator[list[Task]]:
    """Groups of tasks that may run side by side; a task stands after those whose files it reads."""
    maker = {name: task.notebook.name for task in tasks for name in task.notebook.produces}
    by_name = {task.notebook.name: task for task in tasks}
    sorter = TopologicalSorter(
        {task.notebook.name: {maker[name] for name in task.notebook.reads if name in maker} for task in tasks}
    )
    try:
        sorter.prepare()
    except CycleError as error:
        raise InputError(f"these notebooks read each other's files: {', '.join(error.args[1])}") from None
    while sorter.is_active():
        ready = sorter.get_ready()
        yield sorted((by_name[name] for name in ready), key=lambda task: task.notebook.name)
        sorter.done(*ready)


def _in_order(tasks: list[Task]) -> list[Task]:
    return [task for group in _groups(tasks) for task in group]


# --- Running -------------------------------------------------------------------------------------------


@contextmanager
def _one_at_a_time(folder: Path, profile: str) -> Iterator[None]:
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


def _run_tasks(tasks: list[Task], options: Options) -> dict[str, Record]:
    """Runs the tasks that have a reason; the record of each, the skipped ones' from their last run."""
    reports = paths.reports(options.profile)
    due = [task for task in tasks if task.reason]
    records: dict[str, Record] = {}
    for task in tasks:
        last = Record.load(reports, task.notebook.name)
        if not task.reason and last:
            records[task.notebook.name] = last
            print(f"{task.notebook.name}: up to date", flush=True)
    if not due:
        return records
    broken = _ensure_backbones(due, options)
    jobs = options.jobs or min(2, cores())
    with tempfile.TemporaryDirectory(prefix="lt_core-") as scratch, _Processes() as processes:
        worker = _Worker(options, _environment(options, jobs, Path(scratch)), processes, len(due))
        with ThreadPoolExecutor(jobs) as pool:
            for group in _groups(due):
                try:
                    futures = [
                        pool.submit(worker.run, task, _obstacle(task, records, broken)) for task in group
                    ]
                    for future in as_completed(futures):
                        record = future.result()
                        records[record.notebook] = record
                except BaseException:
                    processes.stop()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    return records


def _ensure_backbones(tasks: list[Task], options: Options) -> dict[str, str]:
    """Makes the feature caches that the tasks need; backbones that failed, each with its error.

    Backbones that the profile does not have are left out: a notebook says itself what it shows without them.
    """
    from lt_core import backbones
    from lt_core.profiles import load_profile

    known = load_profile(options.profile).backbones
    needed = dict.fromkeys(name for task in tasks for name in task.notebook.backbones if name in known)
    failed = {}
    for name in needed:
        try:
            for seed in backbones.seeds_shown(options.profile, name, options.seed):
                backbones.ensure(options.profile, name, seed, data_root=options.data_root, progress=print)
        except LTError as error:
            failed[name] = f"backbone {name}: {error}"
        except Exception as error:  # its notebooks fail with it, the others run
            failed[name] = f"backbone {name}: {type(error).__name__}: {error}"
        if name in failed:
            print(failed[name], flush=True)
    return failed


def _obstacle(task: Task, records: dict[str, Record], broken: dict[str, str]) -> str:
    """Why a notebook cannot run at all; empty when it can."""
    if task.notebook.fault:
        return task.notebook.fault
    for backbone in task.notebook.backbones:
        if backbone in broken:
            return broken[backbone]
    for record in records.values():
        lost = set(record.produces).intersection(task.notebook.reads)
        if record.status != "ok" and lost:
            return f"needs {min(lost)} of {record.notebook}, which failed"
    for name in task.notebook.reads:
        if not (paths.figures(task.parameters["profile"]) / name).is_file():
            return f"needs {name}, which does not exist: run the notebook that produces it first"
    return ""


class _Worker:
    """Runs one notebook after the other, called from several threads."""

    def __init__(
        self, options: Options, environment: dict[str, str], processes: _Processes, total: int
    ) -> None:
        self.options, self.environment, self.processes, self.total = options, environment, processes, total
        self.reports = paths.reports(options.profile)
        self.done, self.next_start = 0, 0.0
        self.starting, self.finishing = threading.Lock(), threading.Lock()

    def run(self, task: Task, obstacle: str) -> Record:
        """Executes, renders, records."""
        notebook = task.notebook
        record = Record(
            notebook=notebook.name,
            title=notebook.title,
            status="running",
            started=datetime.now().isoformat(sep=" ", timespec="seconds"),
            parameters=task.parameters,
            produces=notebook.produces,
        )
        began, clock = time.monotonic(), time.time()
        record.save(self.reports)
        if obstacle:
            record.error = obstacle
        else:
            self._wait_for_turn()
            print(f"{notebook.name}: started ({task.reason})", flush=True)
            # Read before it runs: a change made meanwhile counts as a change.
            record.fingerprint = nbs.fingerprint(
                notebook, task.parameters, self.options.profile, self.options.seed
            )
            record.error, record.cell = self._execute(task)
            record.error = record.error or self._lost_output(notebook, clock)
            if self.processes.stopped:  # interrupted: the record stays at "running"
                return record
        record.seconds = round(time.monotonic() - began, 1)
        record.status = "failed" if record.error else "ok"
        with self.finishing:
            self._finish(record, notebook)
        return record

    def _wait_for_turn(self) -> None:
        with self.starting:
            time.sleep(max(0.0, self.next_start - time.monotonic()))
            self.next_start = time.monotonic() + STAGGER_SECONDS

    def _execute(self, task: Task) -> tuple[str, str]:
        """Runs papermill, again if the kernel never started; error and cell, both empty if all is well."""
        name = task.notebook.name
        executed, log = self.reports / f"{name}.ipynb", self.reports / f"{name}.log"
        temporary = self.reports / f".{name}.running.ipynb"
        executed.unlink(missing_ok=True)
        try:
            for attempt in (1, 2):
                temporary.unlink(missing_ok=True)
                status = self._papermill(task, temporary, log)
                text = log.read_text(encoding="utf-8", errors="replace")
                if status == 0 or attempt == 2 or not NEVER_STARTED.search(text) or was_executed(temporary):
                    break
                print(f"{name}: its kernel did not start, trying once more", flush=True)
            if temporary.stat().st_size:
                os.replace(temporary, executed)
        except FileNotFoundError:
            pass  # papermill ended before it wrote anything
        finally:
            temporary.unlink(missing_ok=True)
        return ("", "") if status == 0 else explain(executed, text, status)

    def _papermill(self, task: Task, output: Path, log: Path) -> int:
        import yaml

        source = task.notebook.path
        injected = base64.b64encode(yaml.safe_dump(task.parameters).encode()).decode()
        command = [sys.executable, "-m", "papermill", str(source), str(output), "--kernel", "python3"]
        command += ["--cwd", str(source.parent), "--parameters_base64", injected]
        command += ["--no-progress-bar", "--log-output"]
        with open(log, "wb") as stream:
            return self.processes.wait_for(command, self.environment, stream)

    def _lost_output(self, notebook: Notebook, began: float) -> str:
        """A declared file that this run did not write (a committed one may lie there from before)."""
        for name in notebook.produces:
            path = paths.figures(self.options.profile) / name
            if not path.is_file() or path.stat().st_mtime < began - CLOCK_SLACK_SECONDS:
                return f"did not write {name}"
        return ""

    def _finish(self, record: Record, notebook: Notebook) -> None:
        from lt_core import site

        executed = self.reports / f"{notebook.name}.ipynb"
        try:
            site.render_notebook(
                executed if executed.is_file() else notebook.path,
                self.reports / f"{notebook.name}.html",
                title=record.title,
                error=error_line(record),
                resources=notebook.path.parent,
            )
        except Exception as error:  # a file that is no notebook has no report
            if record.status == "ok":
                record.status, record.error = "failed", f"its report could not be written: {error}"
        record.save(self.reports)
        self.done += 1
        outcome = f"FAILED, {error_line(record)}" if record.error else "finished"
        print(f"{notebook.name}: {outcome} in {record.seconds:.0f} s ({self.done}/{self.total})", flush=True)


class _Processes:
    """The running children, so that all of them, kernels included, end when this process is interrupted."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen[bytes]] = []
        self.lock, self.stopped = threading.Lock(), False

    def __enter__(self) -> _Processes:
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
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.running.append(child)
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


def _environment(options: Options, jobs: int, scratch: Path) -> dict[str, str]:
    """The children's environment: thread caps, this checkout, and nothing of the user's own settings."""
    threads = str(max(1, cores() // jobs))
    search = [str(paths.PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {
        **dict.fromkeys(THREAD_VARIABLES, threads),
        "PYTHONPATH": os.pathsep.join(search),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MPLCONFIGDIR": str(
            paths.decoded() / "matplotlib"
        ),  # its font list is kept, a private style is not read
        "IPYTHONDIR": str(scratch / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(scratch / "runtime"),
        "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel `python3` of this environment, not of the home folder
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        nbs.REPORT: "1",
    }
    if options.data_root is not None:
        own["LT_DATA_ROOT"] = str(paths.data_root(options.data_root))
    return os.environ | own


# --- What went wrong -----------------------------------------------------------------------------------


def _cells_of(executed: Path) -> list[dict[str, Any]]:
    """Cells of an executed copy without papermill's error markers; none for an unreadable file."""
    cells = Notebook(executed).cells if executed.is_file() else []
    return [cell for cell in cells if "papermill-error-cell-tag" not in cell["metadata"].get("tags", [])]


def was_executed(executed: Path) -> bool:
    return any(cell.get("execution_count") for cell in _cells_of(executed))


def explain(executed: Path, log: str, status: int) -> tuple[str, str]:
    """Error (`ename: evalue`, first line) and cell of a failed run, from its executed copy and its log."""
    cells = _cells_of(executed)
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


def error_line(record: Record) -> str:
    return f"{record.cell}: {record.error}" if record.cell else record.error


# --- The account at the end ----------------------------------------------------------------------------


def _write_index(options: Options, notebooks: list[Notebook], seconds: float) -> None:
    """reports/<profile>/index.html over all notebooks that have ever run, those of earlier runs included."""
    from lt_core import site
    from lt_core.profiles import load_profile

    reports = paths.reports(options.profile)
    records = [record for notebook in notebooks if (record := Record.load(reports, notebook.name))]
    site.write_index(load_profile(options.profile), records, options.seed, seconds)


def _summary(
    tasks: list[Task], records: dict[str, Record], reports: Path, profile: str, seconds: float
) -> str:
    """Status, seconds and report of each notebook, the errors, and where to look."""
    width = max(len(name) for name in ["notebook", *records])
    lines = ["", f"{'notebook':{width}}  {'status':10}  {'seconds':>7}  report"]
    for task in tasks:
        record = records[task.notebook.name]
        status = record.status if task.reason else "up to date"
        report = reports / f"{record.notebook}.html"
        shown = report if report.is_file() else "none"
        lines.append(f"{record.notebook:{width}}  {status:10}  {record.seconds:7.1f}  {shown}")
    failed = [record for record in records.values() if record.status != "ok"]
    lines += [f"FAILED {record.notebook}: {error_line(record)}" for record in failed]
    lines += [
        "",
        f"{len(records) - len(failed)} of {len(records)} notebooks are fine; this took {seconds:.0f} s",
        f"tables and figures  {paths.figures(profile)}",
        f"report              {reports / 'index.html'}",
    ]
    return "\n".join(lines)
