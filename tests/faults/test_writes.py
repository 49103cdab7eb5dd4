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

from lt_core import classifiers, site
from lt_core.cache import FeatureCache, load_cache, save_cache
from lt_core.checks import CacheError
from lt_core.classifiers import Prediction
from lt_core.data.datasets import ImageSource, decode_split
from lt_core.estimator import CompositionalTransferClassifier
from lt_core.figures import save_figure
from lt_core.runner import Record
from lt_core.tables import COLUMNS, NUMBERS, save_table
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


def table(folder: Path, version: int) -> None:
    row = dict.fromkeys(COLUMNS, "") | dict.fromkeys(NUMBERS, np.nan)
    row |= {
        "table": "T1",
        "row": "x",
        "group": "total",
        "rule": "paper",
        "reproduced": float(version),
        "n": 1,
    }
    save_table(pd.DataFrame([row]), folder)


def read_table(folder: Path) -> int | None:
    """The version in T1.csv; the files made from it are whole, too."""
    for path in folder.glob("T1.tex"):
        assert path.read_text().endswith("\\end{tabular}\n")
    for path in (*folder.glob("T1.md"), *folder.glob("T1_wide.csv")):
        assert path.read_text().endswith("\n")
    path = folder / "T1.csv"
    return int(pd.read_csv(path)["reproduced"].iloc[0]) if path.exists() else None


def figure(folder: Path, version: int) -> None:
    nothing = plt.figure(figsize=(0.3, 0.3))  # quickly drawn
    save_figure(nothing, folder / "F1", pd.DataFrame({"y": [version] * 50}), "nothing")


def read_figure(folder: Path) -> int | None:
    for path in folder.glob("F1.png"):
        Image.open(path).load()
    for path in folder.glob("F1.svg"):
        assert path.read_text().rstrip().endswith("</svg>")
    path = folder / "F1.csv"
    return int(pd.read_csv(path).y.loc[49]) if path.exists() else None


def prediction(folder: Path, version: int) -> None:
    classifiers._write(folder / "p.npz", Prediction(np.full(300, version), {"tau": 1.0}, [], 0.5))


def read_prediction(folder: Path) -> int | None:
    """One that is there is whole, so it is not made again."""
    found = classifiers._read(folder / "p.npz", 2)
    assert (found is None) == (not (folder / "p.npz").exists())
    return None if found is None else int(found.classes[299])


def read_record(folder: Path) -> int | None:
    record = Record.load(folder, "01_a")
    return record and int(record.seconds)


def index(folder: Path, version: int) -> None:
    profile = SimpleNamespace(name="digits", description="x")
    record = Record("01_a", "A", "ok", products={"T1.csv": "0"})
    site.write_index(profile, folder, [record], {}, float(version))


def read_index(folder: Path) -> int | None:
    path = folder / "index.html"
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
    "prediction": Writer(prediction, read_prediction),
    "table": Writer(table, read_table),
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
    monkeypatch.setattr(site, "facts", lambda last: {})  # asks git, in a process of its own
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
