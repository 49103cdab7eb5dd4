"""Damaged and hostile files: each ends in one clear error, and nothing in them runs or is taken for whole."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cache import make_cache

from lt_core import classifiers, paths
from lt_core.cache import META, TENSORS, load_cache, save_cache
from lt_core.checks import CacheError, DataError, InputError
from lt_core.claims import load_claims
from lt_core.classifiers import Prediction
from lt_core.data import datasets
from lt_core.data.datasets import ImageSource, decode_split, read_list
from lt_core.estimator import CompositionalTransferClassifier
from lt_core.tables import load_table
from lt_core.train import load_checkpoint, save_checkpoint

GIB = 2**30


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.folder),))


def cut_and_flipped(content: bytes, places: int) -> list[bytes]:
    """The content cut short at many places, and with one bit flipped at many places."""
    at = sorted({len(content) * i // places for i in range(places)})
    cut = [content[:i] for i in at]
    return cut + [content[:i] + bytes([content[i] ^ (1 << (i % 8))]) + content[i + 1 :] for i in at]


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def test_every_cut_and_flip_of_a_cache_is_noticed(tmp_path: Path, tried: Callable[..., None]) -> None:
    save_cache(tmp_path, make_cache())
    whole = load_cache(tmp_path)
    for damaged in cut_and_flipped((tmp_path / TENSORS).read_bytes(), 150):
        (tmp_path / TENSORS).write_bytes(damaged)
        with pytest.raises(CacheError):
            load_cache(tmp_path)
        tried("cache cut or flipped")
    save_cache(tmp_path, make_cache())
    text = (tmp_path / META).read_bytes()
    for damaged in cut_and_flipped(text, 100):
        (tmp_path / META).write_bytes(damaged)
        with contextlib.suppress(CacheError):  # white space may differ
            assert load_cache(tmp_path).meta == whole.meta
        tried("description of a cache cut or flipped")


def test_every_cut_and_flip_of_a_checkpoint_is_noticed(tmp_path: Path, tried: Callable[..., None]) -> None:
    path = tmp_path / "last.pt"
    state = {"epoch": 3, "model": {"weight": torch.randn(64, 16)}, "history": [{"loss": 1.5}]}
    save_checkpoint(path, state)
    for damaged in cut_and_flipped(path.read_bytes(), 150):
        path.write_bytes(damaged)
        try:  # a flip in the padding or in a file's date changes nothing
            found = load_checkpoint(path)
            assert torch.equal(found["model"]["weight"], state["model"]["weight"])
            assert (found["epoch"], found["history"]) == (3, state["history"])
        except CacheError:
            pass
        tried("checkpoint cut or flipped")


def test_every_cut_and_flip_of_a_stored_classifier_is_noticed(
    tmp_path: Path, tried: Callable[..., None]
) -> None:
    path = tmp_path / "model.safetensors"
    features = np.random.default_rng(0).normal(size=(30, 5))
    model = CompositionalTransferClassifier(epochs=1).fit(features, np.arange(30) % 3)
    model.save(path)
    for damaged in cut_and_flipped(path.read_bytes(), 120):
        path.write_bytes(damaged)
        with pytest.raises(CacheError):
            CompositionalTransferClassifier.load(path)
        tried("stored classifier cut or flipped")


def test_every_cut_and_flip_of_what_can_be_made_again_is_noticed(
    tmp_path: Path, tried: Callable[..., None]
) -> None:
    """Decoded images and kept predictions: what is not as it was written is made again."""
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    content = io.BytesIO()
    np.save(content, images)
    paths.write_sealed(tmp_path / "images.npy", content.getvalue())
    classifiers._write(tmp_path / "p.npz", Prediction(np.arange(40) % 4, {"tau": 1.0}, [], 0.5))
    reads = {
        "images.npy": datasets.read_array,
        "p.npz": lambda path: classifiers._read(path, 4),
    }
    for name, read in reads.items():
        path = tmp_path / name
        assert read(path) is not None
        for damaged in cut_and_flipped(path.read_bytes(), 150):
            path.write_bytes(damaged)
            assert read(path) is None
            tried(f"{name}: cut or flipped")


@pytest.mark.parametrize("name", ["T6.csv", "claims.csv"])
def test_every_cut_and_flip_of_a_committed_table_is_noticed(
    name: str, tmp_path: Path, tried: Callable[..., None]
) -> None:
    committed = paths.ROOT / "figures" / "embedded"
    assert name in paths.sums_of(committed)
    shutil.copy(committed / paths.SUMS, tmp_path)
    read = load_table if name == "T6.csv" else lambda file: load_claims(file.parent, range(1, 69))
    (tmp_path / name).write_bytes(content := (committed / name).read_bytes())
    assert len(read(tmp_path / name))
    for damaged in cut_and_flipped(content, 150):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(InputError, match=f"{name} is not the one that {paths.SUMS} names"):
            read(tmp_path / name)
        tried(f"{name} cut or flipped")


def test_a_cache_under_another_name_is_the_same_cache(tmp_path: Path, tried: Callable[..., None]) -> None:
    save_cache(tmp_path / "seed0", make_cache())
    renamed = (tmp_path / "seed0").rename(tmp_path / "seed 7 ü")
    assert load_cache(renamed).scale == 17.5
    (renamed / TENSORS).rename(renamed / "other.safetensors")
    with pytest.raises(CacheError, match="cannot be read"):
        load_cache(renamed)
    tried("renamed cache", 2)


def test_nothing_pickled_runs(tmp_path: Path, tried: Callable[..., None]) -> None:
    bomb, exploded = Bomb(tmp_path / "exploded"), tmp_path / "exploded"
    torch.save({"model": bomb}, tmp_path / "last.pt")
    with pytest.raises(CacheError, match="cannot be read"):
        load_checkpoint(tmp_path / "last.pt")
    save_cache(tmp_path / "cache", make_cache())
    for target in (tmp_path / "cache" / TENSORS, tmp_path / "model"):
        shutil.copy(tmp_path / "last.pt", target)
    with pytest.raises(CacheError):
        load_cache(tmp_path / "cache")
    with pytest.raises(CacheError):
        CompositionalTransferClassifier.load(tmp_path / "model")
    np.save(tmp_path / "array.npy", np.array([bomb], dtype=object), allow_pickle=True)
    assert datasets.read_array(tmp_path / "array.npy") is None
    assert not exploded.exists()
    tried("pickle bomb", 4)


def safetensors_with(header: dict, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_absurd_sizes_allocate_nothing(tmp_path: Path, tried: Callable[..., None]) -> None:
    import hashlib

    huge = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
    names = ("weights", "prototypes", "counts", "scale")
    save_cache(tmp_path, make_cache())
    meta = json.loads((tmp_path / META).read_text())
    before = peak_gib()
    for content in (
        struct.pack("<Q", 2**62) + b"{}",
        safetensors_with(dict.fromkeys(names, huge)),
        safetensors_with({name: huge | {"data_offsets": [0, 4]} for name in names}, b"\0" * 4),
        safetensors_with(
            {name: {"dtype": "F32", "shape": [0, 2**60], "data_offsets": [0, 0]} for name in names}
        ),
    ):
        (tmp_path / TENSORS).write_bytes(content)
        honest = meta | {"sha256": hashlib.sha256(content).hexdigest()}
        (tmp_path / META).write_text(json.dumps(honest))
        with pytest.raises(CacheError):
            load_cache(tmp_path)
        with pytest.raises(CacheError):
            CompositionalTransferClassifier.load(tmp_path / TENSORS)
        tried("absurd size in a header", 2)
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        array, {"descr": "|u1", "fortran_order": False, "shape": (10**7, 64, 64, 3)}
    )
    (tmp_path / "array.npy").write_bytes(array.getvalue() + b"\0" * 100)
    assert datasets.read_array(tmp_path / "array.npy") is None
    tried("absurd size in a header")
    assert peak_gib() - before < 0.5


@pytest.mark.parametrize(
    "name", ["../secret.png", "/secret.png", "a/../../secret.png", "a/./../../secret.png"]
)
def test_lists_do_not_lead_out_of_the_data_root(
    name: str, tmp_path: Path, tried: Callable[..., None]
) -> None:
    (tmp_path / "list.txt").write_text(f"{name} 0\n")
    with pytest.raises(DataError, match="points out of the data set"):
        read_list(tmp_path / "list.txt")
    tried("list that leads out of the data root")


def png() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "png")
    return buffer.getvalue()


def test_archives_do_not_lead_out_of_the_data_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: Callable[..., None]
) -> None:
    """Nothing is unpacked, and a link in an archive is no image, wherever it points."""
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path / "out"))
    root = tmp_path / "data"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    links = {
        "set/link.png": tarfile.SYMTYPE,
        "set/hard.png": tarfile.LNKTYPE,
        "set/device.png": tarfile.CHRTYPE,
    }
    with tarfile.open(root / "set.tar", "w") as archive:
        for member in ("../secret.png", "set/../../secret.png", "/etc/passwd", "set/good.png"):
            info = tarfile.TarInfo(member)
            info.size = len(png())
            archive.addfile(info, io.BytesIO(png()))
        for member, kind in links.items():
            info = tarfile.TarInfo(member)
            info.type, info.linkname = kind, "../../secret.png"
            archive.addfile(info)
    source = ImageSource(root, "set")
    for name in ("link.png", "hard.png", "device.png"):
        assert name not in source.names
        with pytest.raises(DataError):
            decode_split(source, [(name, 0)], 4, "test")
        tried("archive that leads out of the data root")
    assert decode_split(source, [("good.png", 0)], 4, "test").images.shape == (1, 4, 4, 3)
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"data", "secret.png", "out"} and list(root.iterdir()) == [root / "set.tar"]
    tried("archive that leads out of the data root", 3)


def test_an_image_that_claims_to_be_huge_is_refused(tmp_path: Path, tried: Callable[..., None]) -> None:
    import zlib

    header = struct.pack(">IIBBBBB", 10**5, 10**5, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    before = peak_gib()
    with pytest.raises(DataError, match="not a readable image"):
        datasets.decode(content, 64, "bomb.png")
    assert peak_gib() - before < 0.5
    tried("decompression bomb")
