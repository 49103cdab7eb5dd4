"""CIFAR-10-LT and CIFAR-100-LT as the field cuts them, from the official archive, Python's or the binary one.

Class c of N keeps int(largest * (1 / imbalance)^(c / (N - 1))) images, drawn with NumPy's seed 0 (Cui et al.,
CVPR 2019; Cao et al., NeurIPS 2019): `cifar100_lt_100` has imbalance 100 and 10,847 training images. The cut
has no validation split; what this repository needs as one is taken out of the training images.

    counts, images = cut(labels, imbalance=100)      # the field's own, before that
"""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lt_core.checks import DataError, first_line

Splits = dict[str, tuple[Tensor, Tensor]]  # images uint8 [M, 32, 32, 3], labels [M]
IMBALANCES = (10, 50, 100)
PIXELS = 3 * 32 * 32
ARRAYS = {"_reconstruct", "ndarray", "dtype"}  # of NumPy: all that the Python archives need
FILES = {  # training files, test file, names of classes, key of the labels, bytes before an image
    10: {
        "python": ([f"data_batch_{n}" for n in range(1, 6)], "test_batch", "batches.meta", b"label_names"),
        "binary": ([f"data_batch_{n}.bin" for n in range(1, 6)], "test_batch.bin", "batches.meta.txt", 1),
    },
    100: {
        "python": (["train"], "test", "meta", b"fine_label_names"),
        "binary": (["train.bin"], "test.bin", "fine_label_names.txt", 2),
    },
}


def long_tail_counts(num_classes: int, largest: int, imbalance: float) -> list[int]:
    """Training images of each class [N], largest first."""
    return [int(largest * (1 / imbalance) ** (c / (num_classes - 1.0))) for c in range(num_classes)]


def cut(labels: np.ndarray, imbalance: float) -> np.ndarray:
    """Indices of the training images that the field's cut of balanced labels [M] keeps, class after class."""
    generator, kept = np.random.RandomState(0), []
    classes, sizes = np.unique(labels, return_counts=True)
    for label, count in zip(
        classes, long_tail_counts(len(classes), int(sizes.max()), imbalance), strict=True
    ):
        rows = np.flatnonzero(labels == label)
        generator.shuffle(rows)
        kept.append(rows[:count])
    return np.concatenate(kept)


def read_archive(root: Path, num_classes: int) -> tuple[Splits, tuple[str, ...]]:
    """Images uint8 [M, 32, 32, 3] and labels [M] of `train` and `test`, and the names of the classes.

    Reads `cifar-N-python.tar.gz` or `cifar-N-binary.tar.gz` in the root. Raises DataError where there is
    neither, or it cannot be read.
    """
    for kind in FILES[num_classes]:
        path = root / f"cifar-{num_classes}-{kind}.tar.gz"
        if path.is_file():
            try:
                return _read(path, num_classes, kind)
            except Exception as error:  # tarfile, zlib and pickle raise many kinds
                raise DataError(f"{path} cannot be read ({first_line(error)}): fetch it again") from None
    raise DataError(
        f"{root} has neither cifar-{num_classes}-python.tar.gz nor cifar-{num_classes}-binary.tar.gz"
    )


def _read(
    path: Path, num_classes: int, kind: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], tuple[str, ...]]:
    train, test, about, how = FILES[num_classes][kind]
    wanted, contents = {*train, test, about}, {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name.rpartition("/")[2]
            if member.isfile() and name in wanted:
                contents[name] = archive.extractfile(member).read()
    if missing := wanted - contents.keys():
        raise DataError(f"{min(missing)} is missing in it")
    read = _plain_pickle if kind == "python" else lambda content: _records(content, how)
    splits = {}
    for split, files in (("train", train), ("test", [test])):
        parts = [read(contents[name]) for name in files]
        if kind == "python":
            key = b"labels" if num_classes == 10 else b"fine_labels"
            parts = [(part[b"data"], np.array(part[key])) for part in parts]
        pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy())
        splits[split] = images, torch.from_numpy(labels.astype(np.int64))
    if kind == "python":
        names = [name.decode() for name in _plain_pickle(contents[about])[how]]
    else:
        names = contents[about].decode().split()
    return splits, tuple(name.replace("_", " ") for name in names)


def _records(content: bytes, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [M, 3072] and labels [M] of a binary file; the last byte before an image is its label."""
    records = np.frombuffer(content, np.uint8).reshape(-1, labels + PIXELS)
    return records[:, labels:], records[:, labels - 1]


class _Arrays(pickle.Unpickler):
    """Reads plain values and NumPy's arrays, and nothing else: what a file names is not run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how Python 3 spells bytes in old protocols
            return lambda text, _: text.encode("latin1")
        if module.partition(".")[0] == "numpy" and name in ARRAYS:
            return {"ndarray": np.ndarray, "dtype": np.dtype}.get(name) or np.zeros(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no array")


def _plain_pickle(content: bytes) -> Any:
    return _Arrays(io.BytesIO(content), encoding="bytes").load()
