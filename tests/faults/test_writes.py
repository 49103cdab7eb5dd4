"""Every file that is written: killed at each of its file operations, or on a disk that is full at any byte.

What was there before, what was to be written, or (for a feature cache) nothing is found afterwards, never a
part; and writing again gives what an undisturbed write gives.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from dying import at_file_use, forked, kill_me, limit_files
from PIL import Image

from lt_core import paths, site
from lt_core.datasets import ImageSource, decode_split
from lt_core.errors import CacheError, DataError
from lt_core.estimator import CompositionalTransferClassifier
from lt_core.features import FeatureCache, load_cache, save_cache
from lt_core.notebooks import Record
from lt_core.report.figures import save_figure
from lt_core.report.tables import COLUMNS, load_table, save_table
from lt_core.train import load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class Writer:
    """One kind of file: write version 0 or 1 of it, and read which one is there (None: none)."""

    write: Callable[[Path, int], None]
    read: Callable[[Path], int | None]


def cache(version: int) -> FeatureCache:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 8, generator=generator)
    splits = {"test": (rows, torch.arange(40) % 4)}
    counts = torch.tensor([8, 6, 4, 2])
    return FeatureCache(rows[:4], 16.0 + version, counts, rows[:4], splits, {"class_names": list("abcd")})


def read_cache(folder: Path) -> int | None:
    try:
        return int(load_cache(folder).scale) - 16
    except CacheError as error:
        assert "there is no feature cache" in str(error)
        return None


def read_checkpoint(folder: Path) -> int | None:
    return load_checkpoint(folder / "last.pt")["epoch"] if (folder / "last.pt").exists() else None


def save_model(folder: Path, version: int) -> None:
    X = np.eye(4)[[0, 1, 2, 3, 0]]
    model = CompositionalTransferClassifier(scale=1.0 + version).fit(X, [0, 1, 2, 3, 0], np.eye(4))
    model.save(folder / "model")


def read_model(folder: Path) -> int | None:
    path = folder / "model"
    return int(CompositionalTransferClassifier.load(path).scale_) - 1 if path.exists() else None


def decoded(folder: Path, version: int) -> None:
    decode_split(ImageSource(folder.parent, "pets"), [("a.png", 0)] * 50, 8, f"pets{version}")


def read_decoded(folder: Path) -> int | None:
    """Reading decodes again where the array is not whole."""
    split = decode_split(ImageSource(folder.parent, "pets"), [("a.png", 0)] * 50, 8, "pets1")
    assert (split.images == 9).all()
    return 1


def table(version: int) -> pd.DataFrame:
    row = dict.fromkeys(COLUMNS) | {"table": "T1", "row": "x", "group": "many", "reproduced": float(version)}
    return pd.DataFrame([row], columns=COLUMNS)


def read_table(folder: Path) -> int | None:
    try:
        return int(load_table("T1", "digits").reproduced[0])
    except DataError as error:
        assert "is missing" in str(error)
        return None


def figure(folder: Path, version: int) -> None:
    fig, ax = plt.subplots()
    ax.plot([version, 1])
    save_figure(fig, "F1", "digits", pd.DataFrame({"y": [version] * 50}), "a line")


def read_figure(folder: Path) -> int | None:
    place = paths.figures("digits")
    for path in place.glob("F1.png"):
        Image.open(path).load()
    for path in place.glob("F1.svg"):
        assert path.read_text().rstrip().endswith("</svg>")
    path = place / "F1.csv"
    return int(pd.read_csv(path).y.loc[49]) if path.exists() else None


def read_record(folder: Path) -> int | None:
    record = Record.load(folder, "01_a")
    return record and int(record.seconds)


def index(folder: Path, version: int) -> None:
    profile = SimpleNamespace(name="digits", description="x")
    site.write_index(profile, [Record("01_a", "A", "ok", produces=["T1.csv"])], version, 1.0)


def read_index(folder: Path) -> int | None:
    path = paths.reports("digits") / "index.html"
    if not path.exists():
        return None
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    return 1


WRITERS = {
    "feature cache": Writer(lambda folder, version: save_cache(folder, cache(version)), read_cache),
    "checkpoint": Writer(
        lambda folder, version: save_checkpoint(
            folder / "last.pt", {"epoch": version, "x": torch.ones(2000)}
        ),
        read_checkpoint,
    ),
    "stored classifier": Writer(save_model, read_model),
    "decoded images": Writer(decoded, read_decoded),
    "table": Writer(lambda folder, version: save_table(table(version), "digits"), read_table),
    "figure": Writer(figure, read_figure),
    "record of a notebook": Writer(
        lambda folder, version: Record("01_a", "A", "ok", seconds=float(version)).save(folder), read_record
    ),
    "index of reports": Writer(index, read_index),
}


@pytest.fixture(params=WRITERS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def writer(kind, tmp_path, monkeypatch) -> Writer:
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path))
    monkeypatch.setattr(site, "facts", lambda seed, seconds: {})  # asks git, in a process of its own
    (tmp_path.parent / "pets").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path.parent / "pets" / "a.png")
    return WRITERS[kind]


def start_over(folder: Path, writer: Writer, before: int | None) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if before is not None:
        writer.write(folder, before)


def check_and_repeat(folder: Path, writer: Writer, before: int | None) -> None:
    found = writer.read(folder)
    assert found in (None, before, 1)
    writer.write(folder, 1)
    assert writer.read(folder) == 1


@pytest.mark.parametrize("before", [None, 0])
def test_killed_at_every_file_operation(writer, kind, before, tmp_path, tried):
    for number in range(1, 60):
        start_over(tmp_path, writer, before)

        def work(number: int = number) -> None:
            at_file_use(tmp_path, number, kill_me)
            writer.write(tmp_path, 1)

        status = forked(work)
        check_and_repeat(tmp_path, writer, before)
        if status == 0:
            break
        assert status == -9
        tried(f"killed while writing: {kind}")
    assert number > 3, "the write has more operations than that"


def test_disk_full_at_any_byte(writer, kind, tmp_path, tried):
    limit = 0
    while True:
        start_over(tmp_path, writer, 0)

        def work(limit: int = limit) -> None:
            limit_files(limit)
            writer.write(tmp_path, 1)

        status = forked(work)
        check_and_repeat(tmp_path, writer, 0)
        if status == 0:
            break
        assert status == 3, "a full disk is an OSError that names the file"
        assert not list(tmp_path.rglob("*.tmp")), "what was begun is removed"
        tried(f"disk full while writing: {kind}")
        limit = 2 * limit + 7
    assert limit > 7
