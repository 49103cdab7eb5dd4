"""The feature cache: round trip, its own classifier, what it refuses, compression."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity

from lt_core import cache as cache_module
from lt_core import paths
from lt_core.cache import (
    META,
    OWN_HASH,
    TENSORS,
    FeatureCache,
    dequantise,
    kind_of,
    load_cache,
    meta_digest,
    own_classifier,
    principal_directions,
    quantise,
    save_cache,
)
from lt_core.checks import CacheError, InputError
from lt_core.models import build_classifier
from lt_core.train import extract_features, this_machine
from lt_core.transfer import prototypes

SPLITS = ("train", "val", "test")
HOSTILE_NAMES = (
    "<b>",
    "[a](javascript:x)",
    "$\\input{x}$",
    "a\x1b[2J",
    "a\nb",
    "=1+1",
    "`x`",
    "a | b",
    "\u202ea",
)


def make_cache(**changes: object) -> FeatureCache:
    torch.manual_seed(0)
    counts = torch.tensor([8, 6, 4, 2])
    labels = {"train": torch.arange(4).repeat_interleave(counts), "val": torch.arange(8) % 4}
    labels["test"] = torch.arange(12) % 4
    splits = {name: (torch.randn(len(labels[name]), 8), labels[name]) for name in SPLITS}
    values = {
        "weights": torch.randn(4, 8),
        "scale": 17.5,
        "counts": counts,
        "prototypes": prototypes(*splits["train"], 4),
        "splits": splits,
        "meta": {"class_names": ["a", "b", "c", "ü"], "backbone": "sqrt"},
    }
    return FeatureCache(**(values | changes))


def rewrite_meta(folder: Path, **changes: object) -> None:
    """Change entries of a description, as somebody would who writes such files: with its hash."""
    meta = json.loads((folder / META).read_text()) | changes
    (folder / META).write_text(json.dumps(meta | {OWN_HASH: meta_digest(meta)}))


# ---------------------------------------------------------------- what is kept


def test_round_trip(tmp_path):
    cache = make_cache(bias=torch.randn(4), direction=torch.rand(8))
    save_cache(tmp_path / "cache", cache)
    loaded = load_cache(tmp_path / "cache")
    for name in ("weights", "counts", "prototypes", "bias", "direction"):
        assert torch.equal(getattr(loaded, name), getattr(cache, name)), name
    assert loaded.scale == 17.5 and loaded.class_names == ["a", "b", "c", "ü"]
    for split in SPLITS:
        assert torch.equal(loaded.labels(split), cache.labels(split))
        error = (loaded.features(split) - cache.features(split)).abs().amax(1)
        assert (error <= cache.features(split).abs().amax(1) / 127 * 0.501).all()
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [TENSORS, META]


def test_classes_left_out_have_nan_rows(tmp_path):
    weights = torch.randn(4, 8)
    weights[2] = torch.nan
    save_cache(tmp_path, make_cache(weights=weights))
    assert load_cache(tmp_path).trained.tolist() == [True, True, False, True]
    weights[1, 3] = torch.nan
    with pytest.raises(InputError, match="NaN only in whole rows"):
        save_cache(tmp_path, make_cache(weights=weights))


@pytest.mark.parametrize("kind", ["cosine", "cosine_fixed", "dot_product", "causal_norm"])
def test_the_own_classifier_is_the_trained_module(tmp_path, kind):
    torch.manual_seed(1)
    module, features = build_classifier(kind, 8, 4), torch.randn(10, 8)
    if kind == "cosine":
        torch.nn.init.constant_(module.scale, 21.0)
    module(features)  # causal norm follows their mean
    module.eval()
    parts = {name: getattr(module, name).detach() for name in ("bias", "direction") if hasattr(module, name)}
    scale = module.scale.item() if hasattr(module, "scale") else 16.0
    save_cache(tmp_path, make_cache(weights=module.weight.detach(), scale=scale, **parts))
    cache, before = load_cache(tmp_path), torch.random.get_rng_state()
    own = own_classifier(cache)
    assert torch.equal(own(features), module(features)) and not own(features).requires_grad
    assert torch.equal(torch.random.get_rng_state(), before)
    assert kind_of(cache) == kind.removesuffix("_fixed")


def test_a_cache_may_leave_splits_out(tmp_path):
    save_cache(tmp_path, make_cache(splits={"test": make_cache().splits["test"]}))
    loaded = load_cache(tmp_path)
    assert loaded.features("test").shape == (12, 8)
    with pytest.raises(CacheError, match="the cache of sqrt has no train features, only test"):
        loaded.features("train")


def test_a_split_is_expanded_when_it_is_read(tmp_path, monkeypatch):
    save_cache(tmp_path, make_cache())
    expanded = []
    monkeypatch.setattr(cache_module, "dequantise", lambda *given: expanded.append(1) or dequantise(*given))
    loaded = load_cache(tmp_path)
    assert "train" in loaded.splits and list(loaded.splits) == list(SPLITS) and not expanded
    assert loaded.features("test") is loaded.features("test") and len(expanded) == 1
    (tmp_path / TENSORS).unlink()
    with pytest.raises(CacheError, match="cannot be read"):
        loaded.features("train")


# ---------------------------------------------------------------- features of another seed


def test_features_that_lie_in_another_cache_are_read_from_there(tmp_path):
    first = make_cache()
    save_cache(tmp_path / "seed0", first)
    save_cache(tmp_path / "seed1", make_cache(weights=first.weights + 1), "seed0")
    assert not any(name.endswith(".features") for name in load_file(tmp_path / "seed1" / TENSORS))
    loaded, whole = load_cache(tmp_path / "seed1"), load_cache(tmp_path / "seed0")
    assert set(loaded.splits) == set(SPLITS) and torch.equal(loaded.weights, first.weights + 1)
    for split in SPLITS:
        assert torch.equal(loaded.features(split), whole.features(split))


def test_another_cache_s_features_must_be_there_and_those_of_the_time_of_writing(tmp_path):
    for name in ("seed0", "elsewhere"):
        save_cache(tmp_path / name, make_cache())
    save_cache(tmp_path / "seed1", make_cache(), "seed0")
    meta = json.loads((tmp_path / "seed1" / META).read_text())
    for of in ("seed1", "missing", 3):  # itself, nothing, no name
        rewrite_meta(tmp_path / "seed1", shared_features=meta["shared_features"] | {"of": of})
        with pytest.raises(CacheError):
            load_cache(tmp_path / "seed1")
    # Of a path that leads out, the last part alone counts.
    rewrite_meta(tmp_path / "seed1", shared_features=meta["shared_features"] | {"of": "../elsewhere"})
    assert load_cache(tmp_path / "seed1").splits
    rewrite_meta(tmp_path / "seed1", **meta)
    save_cache(tmp_path / "seed0", make_cache(scale=3.0))
    with pytest.raises(CacheError, match="not those it was made with"):
        load_cache(tmp_path / "seed1")


def test_another_cache_s_features_must_fit(tmp_path):
    save_cache(tmp_path / "seed0", make_cache())
    wider = {"weights": torch.randn(4, 9), "prototypes": torch.randn(4, 9)}
    save_cache(
        tmp_path / "seed1", make_cache(splits={"test": (torch.ones(1, 9), torch.tensor([0]))}, **wider)
    )
    meta = json.loads((tmp_path / "seed0" / META).read_text())
    rewrite_meta(tmp_path / "seed1", shared_features={"of": "seed0", "sha256": meta["sha256"]})
    with pytest.raises(CacheError, match=r"train features must be int8 \[M, 9\]"):
        load_cache(tmp_path / "seed1")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": torch.randn(3, 8)},
        {"prototypes": torch.full((4, 8), float("nan"))},
        {"scale": 0.0},
        {"counts": torch.tensor([8, 6, 4, 0])},
        {"bias": torch.randn(3)},
        {"direction": torch.rand(7)},
        {"direction": torch.full((8,), float("nan"))},
        {"meta": {"class_names": ["a"]}},
        {"meta": {"class_names": ["a", "b", "c", 4]}},
        *({"meta": {"class_names": ["a", "b", "c", name]}} for name in HOSTILE_NAMES),
        {"meta": {"class_names": list("abcd"), "wnids": ["n00000001"]}},
        {"counts": torch.tensor([8, 6, 2, 4])},
        {"prototypes": make_cache().prototypes.flip(0)},
        {"splits": {}},
        {"splits": {"test": (torch.randn(3, 8), torch.tensor([0, 1, 4]))}},
        {"splits": {"test": (torch.randn(3, 7), torch.tensor([0, 1, 2]))}},
        {"splits": {"test": (torch.full((3, 8), float("inf")), torch.tensor([0, 1, 2]))}},
    ],
)
def test_wrong_content_is_never_written(tmp_path, changes):
    with pytest.raises(InputError):
        save_cache(tmp_path / "cache", make_cache(**changes))
    assert not (tmp_path / "cache").exists()


def test_damage_is_noticed(tmp_path):
    save_cache(tmp_path, make_cache())
    content = (tmp_path / TENSORS).read_bytes()
    flipped = bytearray(content)
    flipped[-5] ^= 1
    for damaged in (content[:-10], bytes(flipped), b""):
        (tmp_path / TENSORS).write_bytes(damaged)
        with pytest.raises(CacheError, match="does not have the hash"):
            load_cache(tmp_path)
    (tmp_path / TENSORS).unlink()
    with pytest.raises(CacheError, match="cannot be read"):
        load_cache(tmp_path)


def test_a_description_is_as_it_was_written_or_refused(tmp_path):
    """Whatever is flipped or cut in it; but for white space, which says nothing."""
    folder = tmp_path / "caches" / "letters" / "sqrt" / "seed0"
    save_cache(folder, make_cache())
    text, whole = (folder / META).read_bytes(), load_cache(folder).meta
    read = 0
    for place in range(len(text)):
        for damaged in (
            text[:place],
            text[:place] + bytes([text[place] ^ 1 << place % 7]) + text[place + 1 :],
        ):
            (folder / META).write_bytes(damaged)
            try:
                assert load_cache(folder).meta == whole
                read += 1
            except CacheError as error:
                assert "\n" not in str(error)
    assert read < len(text) / 10

    # One that is older than the hash must be listed as it is.
    meta = {key: value for key, value in whole.items() if key != OWN_HASH}
    (folder / META).write_text(json.dumps(meta))
    with pytest.raises(CacheError, match="does not have the hash that it states"):
        load_cache(folder)
    line = f"{hashlib.sha256((folder / META).read_bytes()).hexdigest()}  letters/sqrt/seed0/meta.json"
    (tmp_path / "caches" / paths.SUMS).write_text(f"{line}\n")
    assert load_cache(folder).meta == meta
    (folder / META).write_text(json.dumps(meta | {"class_names": list("abcd")}))
    with pytest.raises(CacheError, match="does not have the hash that it states"):
        load_cache(folder)


def without_prototypes(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["prototypes"]


def nan_step(tensors: dict[str, torch.Tensor]) -> None:
    tensors["val.step"][3] = torch.nan


def label_outside(tensors: dict[str, torch.Tensor]) -> None:
    tensors["test.labels"][0] = 4


def float_features(tensors: dict[str, torch.Tensor]) -> None:
    tensors["test.features"] = tensors["test.features"].float()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_prototypes, "prototypes"),
        (nan_step, "val steps must be 8 finite numbers"),
        (label_outside, r"test labels must lie in 0\.\.3"),
        (float_features, "test features must be int8"),
    ],
)
def test_a_wrong_cache_is_refused_even_with_the_right_hash(tmp_path, change, message):
    save_cache(tmp_path, make_cache())
    change(tensors := load_file(tmp_path / TENSORS))
    save_file(tensors, tmp_path / TENSORS)
    rewrite_meta(tmp_path, sha256=hashlib.sha256((tmp_path / TENSORS).read_bytes()).hexdigest())
    with pytest.raises(CacheError, match=f"does not hold a whole feature cache .*{message}"):
        load_cache(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 10**5, '{"sha256": "0"}', "\udc00".encode("utf-8", "surrogatepass").hex()]
)
def test_unreadable_descriptions_are_refused(tmp_path, text):
    save_cache(tmp_path, make_cache())
    (tmp_path / META).write_text(text)
    with pytest.raises(CacheError, match="not the description"):
        load_cache(tmp_path)


def test_other_versions_and_missing_caches_are_refused(tmp_path):
    with pytest.raises(CacheError, match="there is no feature cache in"):
        load_cache(tmp_path / "none")
    save_cache(tmp_path, make_cache())
    rewrite_meta(tmp_path, format_version=99)
    with pytest.raises(CacheError, match="format version 99, this code reads 1"):
        load_cache(tmp_path)


def test_an_interrupted_write_leaves_no_cache(tmp_path, monkeypatch):
    save_cache(tmp_path, make_cache())

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(cache_module, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save_cache(tmp_path, make_cache(scale=3.0))
    with pytest.raises(CacheError, match="there is no feature cache"):
        load_cache(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


# ---------------------------------------------------------------- compression


def test_features_beyond_the_range_of_float16_are_kept(tmp_path):
    """As networks in bfloat16 make them: from the network to the file and back."""
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    network, machine = torch.nn.Linear(3, 3, bias=False), replace(this_machine(), autocast=autocast)
    torch.nn.init.eye_(network.weight)
    labels = torch.arange(4) % 2
    features = extract_features(network, 2.0**17 + 2.0**15 * torch.rand(4, 3), 0, machine)
    cache = FeatureCache.from_arrays((features, labels), (features, labels), class_names=["a", "b"])
    save_cache(tmp_path, cache)
    kept = load_cache(tmp_path).features("train")
    assert features.min() >= 2 * torch.finfo(torch.float16).max
    assert ((kept - features).abs() <= features.abs().amax(1, keepdim=True) / 253).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.floats(1e-6, 1e6), st.integers(0, 99))
def test_quantisation_keeps_directions(rows, columns, size, seed):
    features = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    values, step = quantise(features)
    assert values.dtype == torch.int8
    error = (dequantise(values, step) - features).abs()
    assert (error <= features.abs().amax(1, keepdim=True) / 253).all()


def test_zero_features_stay_zero():
    assert torch.equal(dequantise(*quantise(torch.zeros(2, 3))), torch.zeros(2, 3))


def test_principal_directions_are_orthonormal_and_keep_cosines():
    torch.manual_seed(0)
    features = torch.randn(200, 5) @ torch.randn(5, 30) + 0.01 * torch.randn(200, 30)
    directions = principal_directions(features, 5)
    torch.testing.assert_close(directions.T @ directions, torch.eye(5), atol=1e-5, rtol=0)
    projected = features @ directions
    before, after = (cosine_similarity(x[:50], x[50:100]) for x in (features, projected))
    torch.testing.assert_close(after, before, atol=1e-3, rtol=0)
    strength = (projected**2).sum(0)
    assert (strength[:-1] >= strength[1:]).all()
    assert torch.equal(directions, principal_directions(features, 5))


MEMORY = """
import sys, threading
from pathlib import Path
import numpy as np, torch
from lt_core.cache import FeatureCache, load_cache, save_cache
from lt_core.classifiers import predict
from lt_core.transfer import prototypes

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 2**20

folder, sizes = Path(sys.argv[1]), {"train": 115846, "val": 20000, "test": 50000}
generator = np.random.default_rng(0)
splits = {}
for split, rows in sizes.items():
    array = np.lib.format.open_memmap(folder / f"{split}.npy", "w+", np.float16, (rows, 2048))
    for start in range(0, rows, 8192):
        array[start : start + 8192] = generator.random((min(8192, rows - start), 2048), dtype=np.float32)
    array.flush()
    del array
    mapped = torch.from_numpy(np.load(folder / f"{split}.npy", mmap_mode="r+"))
    splits[split] = (mapped, torch.arange(rows) % 1000)
before, peak, done = anonymous(), [0.0], threading.Event()

def watch():
    while not done.wait(0.02):
        peak[0] = max(peak[0], anonymous())

threading.Thread(target=watch, daemon=True).start()
p = prototypes(*splits["train"], 1000)
meta = {"class_names": [str(c) for c in range(1000)]}
counts = torch.bincount(splits["train"][1])
cache = FeatureCache(weights=p, scale=16.0, counts=counts, prototypes=p, splits=splits, meta=meta)
predict(cache, "ensemble")
save_cache(folder / "cache", cache)
print(peak[0] - before)
del cache, splits
again = load_cache(folder / "cache")
predict(again, "ensemble", "val")
done.set()
print(peak[0] - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_caches_of_the_papers_size_take_bounded_memory(tmp_path):
    """115,846 + 20,000 + 50,000 features of 2,048: 1.5 GB in float32, of which only blocks are held.

    Int8 values of all splits (0.38 GB) and blocks of 16,384 rows are; pages of mapped files do not count.
    """
    environment = os.environ | {"PYTHONPATH": str(paths.ROOT), "LT_OUTPUT_ROOT": str(tmp_path)}
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    written, read = map(float, done.stdout.split())
    assert written < 1.2 and read < 1.2, done.stdout
