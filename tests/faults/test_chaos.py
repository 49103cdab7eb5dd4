"""Chaos of bounded time: random kills, damage, limits and runs at once, each followed by a plain run.

After it there is what an undisturbed run gives, or one clear line; never another number. The random seed is
LT_CHAOS_SEED (default: 0), shown with a failure; LT_CHAOS_SECONDS is the time of each test.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from dying import limit_files
from PIL import Image
from test_killed import CACHE, KILLER, content_of, write_notebook

from lt_core import backbones, paths
from lt_core.checks import LTError
from lt_core.classifiers import predict
from lt_core.data.datasets import ImageSource, decode_split

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("LT_CHAOS_SECONDS", "30"))
SEED = int(os.environ.get("LT_CHAOS_SEED", "0"))
KINDS = {".npz": "kept prediction", ".npy": "decoded images"}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture
def dice() -> random.Random:
    print(f"LT_CHAOS_SEED={SEED}")  # pytest shows it with a failure
    return random.Random(SEED)


@pytest.fixture
def profile(tmp_path: Path) -> str:
    """Digits in four epochs: a training takes a second."""
    (tmp_path / "quick.toml").write_text('same_as = "digits"\nrecipes.from_scratch.epochs = 4\n')
    return str(tmp_path / "quick.toml")


def until(seconds: float = SECONDS) -> Iterator[int]:
    """Rounds until the time is over, one at least."""
    end, number = time.monotonic() + seconds, 0
    while not number or time.monotonic() < end:
        yield number
        number += 1


def training(profile: str, out: Path, limit: int | None = None) -> int:
    """The process id of a forked training; it ends with 0, 3 for one clear error and 4 for another end."""
    if child := os.fork():
        return child
    status = 4
    try:
        os.environ["LT_OUTPUT_ROOT"] = str(out)
        if limit is not None:
            limit_files(limit)
        backbones.ensure(profile, "sqrt", 0)
        status = 0
    except (LTError, OSError) as error:
        status = 3 if str(error) and "\n" not in str(error) else 4
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """The exit status of a child, which may not hang."""
    for _ in range(1200):
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("a training hangs")


@pytest.fixture
def whole(profile: str, tmp_path: Path) -> dict[str, object]:
    """What an undisturbed training gives."""
    assert ended(training(profile, tmp_path / "whole")) == 0
    return content_of(tmp_path / "whole" / CACHE)


def test_trainings_killed_at_random_and_at_once(
    profile: str, whole: dict, dice: random.Random, tmp_path: Path, tried: Callable[..., None]
) -> None:
    for number in until():
        out = tmp_path / str(number)
        for _ in range(dice.randint(1, 3)):
            children = [training(profile, out) for _ in range(dice.choice((1, 1, 2)))]
            time.sleep(dice.uniform(0, 1.5))
            for child in children:
                how = dice.choice(SIGNALS)
                os.kill(child, how)
                ended(child)
                tried(f"chaos: training ended by {how.name}")
        assert ended(training(profile, out)) == 0
        assert content_of(out / CACHE) == whole


def test_trainings_that_may_write_files_of_a_random_size(
    profile: str, whole: dict, dice: random.Random, tmp_path: Path, tried: Callable[..., None]
) -> None:
    largest = max(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    for number in until():
        out = tmp_path / str(number)
        status = ended(training(profile, out, limit=dice.randint(0, largest)))
        assert status in (0, 3)
        tried("chaos: training met a limit of file sizes" if status else "chaos: training below a limit")
        assert ended(training(profile, out)) == 0
        assert content_of(out / CACHE) == whole


def damage(content: bytes, dice: random.Random) -> tuple[str, bytes]:
    place = dice.randrange(len(content)) if content else 0
    kinds = {
        "flipped": content[:place] + bytes([content[place] ^ 1 << dice.randrange(8)]) + content[place + 1 :],
        "cut": content[:place],
        "zeroed": content[:place] + bytes(len(content) - place),
        "lengthened": content + dice.randbytes(9),
        "replaced": dice.randbytes(len(content)),
    }
    return dice.choice(list(kinds.items()))


def test_random_damage_to_every_stored_file(
    profile: str,
    dice: random.Random,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tried: Callable[..., None],
) -> None:
    """Features, description, checkpoints, kept predictions and decoded images; histories are logs."""
    out, data = tmp_path / "out", tmp_path / "data"
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(out))
    (data / "pets").mkdir(parents=True)
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(data / "pets" / "a.png")

    def results(again: bool) -> tuple:
        """All that is read from stored files; `again`: the cache is made from the checkpoints of its run."""
        if again:
            shutil.rmtree(out / CACHE)
        cache = backbones.load(profile, "sqrt", 0)
        images = decode_split(ImageSource(data, "pets"), [("a.png", 0)] * 20, 8, "pets").images
        found = [predict(cache, name).tolist() for name in ("cosine", "ensemble", "ncm")]
        return found, cache.class_names, content_of(out / CACHE)["accuracies"], images.tolist()

    expected = results(again=False)
    stored = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    files = [path for path in stored if path.suffix in (".safetensors", ".json", ".pt", ".npz", ".npy")]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".pt", ".npz", ".npy"}
    for number in until():
        path = files[number % len(files)]
        how, content = damage(stored[path], dice)
        path.write_bytes(content)
        try:
            assert results(again=path.suffix == ".pt") == expected, f"{path.name} {how}: silent"
        except (LTError, OSError) as error:
            assert str(error) and "\n" not in str(error)
        tried(f"chaos: {KINDS.get(path.suffix, path.name)} damaged")
        for other, as_made in stored.items():
            if not other.is_file() or other.read_bytes() != as_made:
                other.parent.mkdir(parents=True, exist_ok=True)
                other.write_bytes(as_made)


def family_of(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def test_notebooks_killed_damaged_and_run_at_once(
    profile: str, dice: random.Random, tmp_path: Path, tried: Callable[..., None]
) -> None:
    """Up to three runs of two profiles side by side; products are then those of an undisturbed run."""
    environment = os.environ | {
        "LT_OUTPUT_ROOT": str(tmp_path),
        "PYTHONPATH": str(paths.ROOT),
        "FAULTS_NOTEBOOKS": str(tmp_path / "notebooks"),
    }

    def start(name: str) -> subprocess.Popen:
        words = [sys.executable, str(KILLER), "nothing", "half", "notebooks", "--profile", name]
        return subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    write_notebook(tmp_path / "notebooks", seconds=0)
    profiles = {"digits": "digits", profile: "quick"}
    for number in until(2 * SECONDS):
        # Disturb: runs at once, killed at some moment; then damage to something that they left.
        runs = [start(name) for name in dice.sample([*profiles, *profiles], dice.randint(1, 3))]
        time.sleep(dice.uniform(0, 20))
        family = [process for run in runs for process in family_of(psutil.Process(run.pid))]
        for run in runs:
            how = dice.choice(SIGNALS)
            run.send_signal(how)
            run.communicate(timeout=120)
            tried(f"chaos: run of notebooks ended by {how.name}")
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive, "a process outlived its run"
        left = [
            path
            for place in ("figures", "reports")
            for path in (tmp_path / place).rglob("*")
            if path.is_file() and path.name != ".lock"
        ]
        if left:
            path = dice.choice(left)
            path.write_bytes(damage(path.read_bytes(), dice)[1])
            tried("chaos: product, record or page damaged")

        # A plain run of each profile, at once.
        write_notebook(tmp_path / "notebooks", seconds=0, value=number)
        for run in [start(name) for name in profiles]:
            output = run.communicate(timeout=300)[0]
            assert run.returncode == 0 and "Traceback" not in output, output
        for name in profiles.values():
            assert (tmp_path / "figures" / name / "A.csv").read_text() == f"a,b\n1,{number}\n"
            assert (tmp_path / "reports" / name / "01_table.html").read_text().rstrip().endswith("</html>")
            assert not list((tmp_path / "reports" / name).glob(".run-*"))


def test_the_damage_is_found_by_what_looks_for_it(dice: random.Random) -> None:
    """Nothing above passes because the damage changed nothing."""
    assert all(damage(b"content of a file", dice)[1] != b"content of a file" for _ in range(200))
