"""The field's cut of CIFAR, and its archives in both forms, made small."""

from __future__ import annotations

import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch

from lt_core.checks import DataError
from lt_core.data import cifar
from lt_core.data.datasets import load_dataset


@pytest.mark.parametrize(("imbalance", "total"), [(10, 19_573), (50, 12_608), (100, 10_847)])
def test_totals_are_the_published_ones(imbalance, total):
    labels = np.repeat(np.arange(100), 500)
    rows = cifar.cut(labels, imbalance)
    assert len(rows) == len(set(rows.tolist())) == total
    counts = np.bincount(labels[rows])
    assert (counts[0], counts[-1]) == (500, int(500 / imbalance)) and (np.diff(counts) <= 0).all()


def test_cifar10s_totals_are_the_published_ones():
    assert [sum(cifar.long_tail_counts(10, 5000, i)) for i in (10, 50, 100)] == [20_431, 13_996, 12_406]


def small(per_class: int, classes: int = 100, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(classes), per_class))
    return generator.integers(0, 256, (len(labels), cifar.PIXELS), np.uint8), labels


def packed(path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def python_archive(root) -> None:
    files = {"meta": {b"fine_label_names": [f"class_{c}".encode() for c in range(100)]}}
    for split, number in (("train", 10), ("test", 2)):
        pixels, labels = small(number)
        files[split] = {b"data": pixels, b"fine_labels": labels.tolist()}
    packed(root / "cifar-100-python.tar.gz", {n: pickle.dumps(content, 2) for n, content in files.items()})


def binary_archive(root) -> None:
    files = {"fine_label_names.txt": "\n".join(f"class_{c}" for c in range(100)).encode()}
    for split, number in (("train", 10), ("test", 2)):
        pixels, labels = small(number)
        records = np.concatenate([labels[:, None] // 5, labels[:, None], pixels], axis=1)
        files[f"{split}.bin"] = records.astype(np.uint8).tobytes()
    packed(root / "cifar-100-binary.tar.gz", files)


def test_both_archives_hold_the_same(tmp_path):
    (tmp_path / "p").mkdir(), (tmp_path / "b").mkdir()
    python_archive(tmp_path / "p")
    binary_archive(tmp_path / "b")
    one, other = (load_dataset("cifar100_lt_10", tmp_path / form) for form in ("p", "b"))
    assert one.class_names == other.class_names and one.class_names[3] == "class 3"
    for split in ("train", "val", "test"):
        assert torch.equal(one.splits[split].images, other.splits[split].images)
        assert torch.equal(one.splits[split].labels, other.splits[split].labels)
    pixels, labels = small(2)
    assert torch.equal(one.splits["test"].labels, torch.from_numpy(labels))
    first = one.splits["test"].images[0].permute(2, 0, 1).numpy()
    assert np.array_equal(first.ravel(), pixels[0])  # red, green, blue planes
    assert len(one.splits["train"]) + len(one.splits["val"]) == sum(cifar.long_tail_counts(100, 10, 10))
    assert one.counts.min() >= 1


class Evil:
    def __reduce__(self):
        return os.system, ("touch was_run",)


def test_what_an_archive_names_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packed(
        tmp_path / "cifar-100-python.tar.gz", dict.fromkeys(("train", "test", "meta"), pickle.dumps(Evil()))
    )
    with pytest.raises(DataError, match="system, which is no array"):
        load_dataset("cifar100_lt_100", tmp_path)
    assert not (tmp_path / "was_run").exists()


def test_missing_and_damaged_archives_are_refused(tmp_path):
    with pytest.raises(DataError, match="neither cifar-10-python.tar.gz nor cifar-10-binary.tar.gz"):
        load_dataset("cifar10_lt_50", tmp_path)
    packed(tmp_path / "cifar-10-python.tar.gz", {"test_batch": b""})
    with pytest.raises(DataError, match="batches.meta is missing"):
        load_dataset("cifar10_lt_50", tmp_path)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="cannot be read .*: fetch it again"):
        load_dataset("cifar10_lt_50", tmp_path)
