"""Files of something else, damaged archives and annotations: one clear error, or the right content."""

import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_writes import cache

from lt_core import backbones, paths
from lt_core.cache import save_cache
from lt_core.checks import CacheError, DataError
from lt_core.data.datasets import ImageSource, decode_split, tiny_imagenet_classes, tiny_imagenet_lists
from lt_core.data.profiles import Recipe, load_profile
from lt_core.losses import build_loss
from lt_core.models import Model, build_backbone, build_classifier
from lt_core.train import fit, load_checkpoint, save_checkpoint


def damaged(content: bytes, number: int) -> list[tuple[str, bytes]]:
    """`content` cut short and with one flipped bit, at evenly spaced places."""
    places = sorted({int(place) for place in np.linspace(0, len(content) - 1, number)})
    flips = [content[:p] + bytes([content[p] ^ (1 << p % 8)]) + content[p + 1 :] for p in places]
    return [("truncated", content[:p]) for p in places] + [("bit flipped", one) for one in flips]


def test_a_cache_under_another_name_is_not_taken_for_it(tmp_path, monkeypatch, tried):
    monkeypatch.setattr(paths, "SHIPPED_CACHES", tmp_path)
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path / "out"))
    one = cache(0)
    one.meta.update(backbones.made_as(load_profile("embedded"), "sqrt", 0))
    for backbone, seed in (("sqrt", 0), ("uniform", 0), ("sqrt", 1)):
        save_cache(tmp_path / "tiny_imagenet_lt" / backbone / f"seed{seed}", one)
    assert backbones.load("embedded", "sqrt", 0).scale == 16
    for backbone, seed in (("uniform", 0), ("sqrt", 1)):
        with pytest.raises(CacheError, match="was made with .*(backbone 'sqrt'|seed 0) and not "):
            backbones.load("embedded", backbone, seed)
        tried("renamed: feature cache")


# ---------------------------------------------------------------- checkpoints

RECIPE = Recipe(epochs=1, batch_size=64, learning_rate=0.05, classifier_learning_rate=0.1)


def run_fit(run: Path, seed: int = 0, classes: int = 10) -> None:
    from lt_core.data.datasets import load_dataset

    data = load_dataset("digits")
    model = Model(build_backbone("digits_net"), build_classifier("cosine", 64, classes))
    fit(model, data, RECIPE, "uniform", build_loss("cross_entropy", data.counts), seed, run)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_fit(folder)
    return folder


def test_checkpoints_of_something_else_are_refused(finished, tmp_path, tried):
    state = load_checkpoint(finished / "last.pt")
    others = {
        "the best one": load_checkpoint(finished / "best.pt"),
        "another seed": state | {"seed": 5},
        "another network": state | {"model": {"x": torch.ones(2)}},
        "no model": state | {"model": 3},
        "another optimiser": state | {"optimiser": {"state": {}, "param_groups": []}},
        "another version": {name: value for name, value in state.items() if name != "step"},
        "a list": [1, 2],
        "a tensor": torch.ones(3),
    }
    for name, content in others.items():
        save_checkpoint(tmp_path / "last.pt", content)
        with pytest.raises(CacheError, match=r"last\.pt .*delete it to start again"):
            run_fit(tmp_path)
        tried(f"renamed: {name} as checkpoint")
    shutil.copy(finished / "last.pt", tmp_path / "last.pt")
    run_fit(tmp_path)  # its own is taken


# ---------------------------------------------------------------- decoded images


def check_decoded(folder: Path, content: bytes) -> None:
    """A cached array that is replaced by `content` is decoded again, without claiming memory for it."""
    (folder / "pets").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(folder / "pets" / "a.png")
    arguments = ImageSource(folder, "pets"), [("a.png", 0)], 8, "pets"
    decode_split(*arguments)
    (path,) = (paths.decoded() / "decoded").glob("*.npy")
    whole = path.read_bytes()
    path.write_bytes(content)
    assert (decode_split(*arguments).images == 9).all()
    assert path.read_bytes() == whole
    path.unlink()


def header(shape: tuple, dtype: str = "|u1") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def test_hostile_arrays_are_decoded_again(tmp_path, monkeypatch, tried):
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path / "out"))
    np.savez(tmp_path / "archive.npz", a=np.ones(3))
    for content in (
        header((10**15,)),
        header((2**70, 2**70)),
        header((-1,)),
        header((1, 8, 8, 3)),
        header((1, 8, 8, 3), "|O"),
        header((1, 8, 8, 3), "|S1000000000"),
        b"\x93NUMPY\x01\x00\xff\xff{",
        (tmp_path / "archive.npz").read_bytes(),
        b"",
    ):
        check_decoded(tmp_path, content)
        tried("hostile: decoded array")


# ---------------------------------------------------------------- lists and archives


def pack(folder: Path, kind: str, names: list[str], content: bytes) -> Path:
    path = folder / f"pets.{kind}"
    (folder / "member").write_bytes(content)
    with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
        for name in names:
            archive.add(folder / "member", name)
    return path


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_damaged_archives(kind, tmp_path, tried):
    content = np.random.default_rng(0).bytes(3000)
    path = pack(tmp_path, kind, ["pets/a", "pets/b"], content)
    for what, broken in damaged(path.read_bytes(), 80):
        path.write_bytes(broken)
        try:
            source = ImageSource(tmp_path, "pets")
            for name in ("a", "b"):
                source.read(name)
        except DataError as error:
            assert "pets" in str(error) and "\n" not in str(error)
        tried(f"{what}: {kind}")


def test_annotations_do_not_reach_out_of_the_data_root(tmp_path, tried):
    """Tiny-ImageNet's own files may say anything; a name that is not below its folder counts as missing."""
    from lt_core.data.datasets import Listing, check_listing

    root = tmp_path / "data"
    folder = root / "tiny-imagenet-200"
    (folder / "val").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    source = ImageSource(root, "tiny-imagenet-200")
    listing = Listing("tiny", source, {"test": [("val/images/../../../../secret", 0)]}, ("a",), 64)
    with pytest.raises(DataError, match="1 are missing"):
        check_listing(listing)
    tried("path traversal: annotations")
    for text in ("a.png\n", "a.png n99999999\n", "\n"):
        (folder / "val" / "val_annotations.txt").write_text(text)
        with pytest.raises(DataError, match="val_annotations"):
            tiny_imagenet_lists(ImageSource(root, "tiny-imagenet-200"), ["n00000001"])
        tried("damaged: annotations")
    (folder / "wnids.txt").write_bytes(b"\xff\xfe")
    (folder / "words.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"wnids\.txt"):
        tiny_imagenet_classes(ImageSource(root, "tiny-imagenet-200"))
    tried("damaged: class names")
