"""The feature cache: everything downstream of training reads only this.

A cache is a folder with `features.safetensors` and `meta.json`, which states the hash of both. Loading checks
hashes, version, shapes and ranges, and never unpickles; anybody's cache of this format is accepted.

    cache = load_cache("caches/tiny_imagenet_lt/sqrt/seed0")
    cache.features("test"), cache.labels("test"), cache.weights, cache.scale, cache.prototypes, cache.counts
    cache = FeatureCache.from_arrays(train=(X, y), val=(X_val, y_val), test=(X_test, y_test))
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from lt_core import paths
from lt_core.checks import (
    CacheError,
    InputError,
    check_counts,
    check_label,
    check_labels,
    check_matrix,
    check_positive,
)
from lt_core.models import build_classifier
from lt_core.transfer import SCALE, prototypes

FORMAT_VERSION = 1
TENSORS, META = "features.safetensors", "meta.json"
SHARED = "shared_features"  # key of meta.json: the features lie in the cache of another seed
OWN_HASH = "meta_sha256"  # key of meta.json: the hash of all that it states
SPLITS = ("train", "val", "test")
ROWS = 2**14  # features looked at once: 128 MB of 2048 in float32
ALIKE = 0.99  # cosine of each prototype with the mean of its features, at least ...
LEAST_NORM = 1e-6  # ... where that mean is longer than this

Split = tuple[Tensor, Tensor]  # features [M, F], labels [M]


@dataclass(frozen=True)
class FeatureCache:
    """A trained backbone as the transfer step sees it: features, classifier, prototypes, training counts.

    weights [N, F]: rows of classes that were left out of training are NaN (`continual`). bias [N] only for a
    dot-product classifier, direction [F] only for a causal norm one. `splits` maps train / val / test (those
    stored) to (features [M, F], labels [M]).
    """

    weights: Tensor
    scale: float
    counts: Tensor
    prototypes: Tensor
    splits: Mapping[str, Split]
    meta: dict[str, Any] = field(repr=False)
    bias: Tensor | None = None
    direction: Tensor | None = None

    @classmethod
    def from_arrays(
        cls,
        train: tuple[object, object],
        val: tuple[object, object] | None = None,
        test: tuple[object, object] | None = None,
        weights: object | None = None,
        scale: float = SCALE,
        class_names: Sequence[str] | None = None,
        name: str = "arrays",
    ) -> FeatureCache:
        """A cache of anybody's features [M, F], of any float type, with labels [M], text or numbers.

        Classes are the sorted labels of `train` (class_names: other names for them, in this order). weights
        [N, F] and scale: a trained cosine classifier; without them one is learned on the training features.
        Without `val` it is made of training features, as `datasets.held_out` says. Raises InputError for
        labels that training lacks and for shapes that do not fit.
        """
        from lt_core.data.datasets import VAL_LEAST, held_out  # imports this package's data, which we do not
        from lt_core.estimator import learned_classifier

        given = {"train": train, "val": val, "test": test}
        arrays = {split: _labelled(split, *pair) for split, pair in given.items() if pair is not None}
        classes = np.unique(arrays["train"][1])
        splits: dict[str, Split] = {}
        for split, (features, labels) in arrays.items():
            if unknown_labels := np.setdiff1d(labels, classes).tolist():
                raise InputError(f"the {split} label {unknown_labels[0]!r} is none of the training labels")
            splits[split] = features, torch.from_numpy(np.searchsorted(classes, labels))
        if val is None:
            features, labels = splits["train"]
            taken = torch.from_numpy(held_out(labels.numpy()))
            if not taken.any():
                raise InputError(
                    f"there are no validation features, and no class has {VAL_LEAST} to make some of"
                )
            splits |= {"train": (features[~taken], labels[~taken]), "val": (features[taken], labels[taken])}
        features, labels = splits["train"]
        counts = torch.bincount(labels, minlength=len(classes))
        if weights is None:
            weights, scale = learned_classifier(features, labels, counts, "square_root", 20, seed=0)
        names = list(map(str, classes.tolist() if class_names is None else class_names))
        meta = {
            "class_names": names,
            "dataset": name,
            "backbone": "study",
            "seed": 0,
        }
        cache = cls(
            weights=check_matrix("weights", weights, len(classes), features.shape[1]).detach().float().cpu(),
            scale=check_positive("scale", scale),
            counts=counts,
            prototypes=prototypes(features, labels, len(classes)),
            splits={split: splits[split] for split in SPLITS if split in splits},
            meta=meta,
        )
        check_cache(cache)
        return cache

    def features(self, split: str) -> Tensor:
        """Features [M, F] of `train`, `val` or `test`; raises CacheError when they were not stored."""
        return self._stored(split)[0]

    def labels(self, split: str) -> Tensor:
        """Class indices [M]; raises CacheError when the split was not stored."""
        return self._stored(split)[1]

    def _stored(self, split: str) -> Split:
        if split not in self.splits:
            raise CacheError(
                f"the cache of {self.meta.get('backbone', 'this backbone')} has no {split} features, "
                f"only {', '.join(self.splits)}"
            )
        return self.splits[split]

    def to(self, device: torch.device) -> FeatureCache:
        """The same cache on a device of another kind, with all its splits; itself where it lies there."""
        if self.weights.device.type == device.type:
            return self
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        splits = {split: (x.to(device), y.to(device)) for split, (x, y) in self.splits.items()}
        return replace(self, splits=splits, **tensors)

    @property
    def class_names(self) -> list[str]:
        return self.meta["class_names"]

    @property
    def trained(self) -> Tensor:
        """Which classes have a learned classifier row [N] (all but in `continual`)."""
        return ~self.weights.isnan().any(dim=1)


def _labelled(split: str, features: object, labels: object) -> tuple[Tensor, np.ndarray]:
    """Features [M, F] as float32 on the CPU, labels [M] as they are; raises InputError for other shapes."""
    matrix = check_matrix(f"{split} features", features).detach().float().cpu()
    found = labels.numpy(force=True) if isinstance(labels, Tensor) else np.asarray(labels)
    if found.shape != (len(matrix),) or found.dtype.kind not in "biuOSUT":
        raise InputError(
            f"{split} labels must be {len(matrix)} whole numbers or texts, found {found.dtype} {found.shape}"
        )
    return matrix, found


def kind_of(cache: FeatureCache) -> str:
    """What the backbone was trained with: `cosine`, `dot_product` or `causal_norm`."""
    if cache.direction is not None:
        return "causal_norm"
    return "cosine" if cache.bias is None else "dot_product"


def own_classifier(cache: FeatureCache) -> nn.Module:
    """The classifier that the backbone was trained with: features [M, F] -> logits [M, N], without gradients.

    Logits of classes that were left out of training are NaN.
    """
    num_classes, num_features = cache.weights.shape
    with torch.random.fork_rng(devices=[]):  # its random start is replaced at once
        module = build_classifier(kind_of(cache), num_features, num_classes)
    stored = {"weight": cache.weights, "bias": cache.bias, "direction": cache.direction}
    stored["scale"] = torch.as_tensor(cache.scale, dtype=torch.float32)
    module.load_state_dict({name: stored[name] for name in module.state_dict()})
    return module.to(cache.weights.device).eval().requires_grad_(False)


# ---------------------------------------------------------------- compression


def quantise(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features [M, F] as int8 with one float32 step a row [M] (largest absolute value = 127 steps)."""
    values = torch.empty(features.shape, dtype=torch.int8)
    step = torch.empty(len(features))
    for start in range(0, len(features), ROWS):  # features may be a file that is mapped
        rows = slice(start, start + ROWS)
        block = features[rows].float()
        step[rows] = (block.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        values[rows] = (block / step[rows, None]).round().to(torch.int8)
    return values, step


def dequantise(values: Tensor, step: Tensor) -> Tensor:
    """The inverse of `quantise`, as float32."""
    return values.float() * step[:, None]


def principal_directions(features: Tensor, dims: int) -> Tensor:
    """The first `dims` principal directions [F, dims] of features [M, F], not centred, strongest first.

    Cosine similarities are kept as far as the features lie in their span. The sign of each is fixed.
    """
    second_moment = features.double().T @ features.double()
    directions = torch.linalg.eigh(second_moment).eigenvectors.flip(1)[:, :dims]
    largest = directions.abs().argmax(dim=0)
    return (directions * directions[largest, torch.arange(dims)].sign()).float()


# ---------------------------------------------------------------- writing


def save_cache(folder: Path, cache: FeatureCache, features_of: str | None = None) -> None:
    """Write a cache; it exists for readers only once complete (meta.json, with the hash, comes last).

    features_of: name of a cache in the same folder that holds these very features (the seeds of a frozen
    backbone differ in the classifier alone); they are then read from there and not stored again.
    Raises InputError, before anything is written, for shapes that do not fit and for NaN.
    """
    check_cache(cache)
    tensors = {
        "weights": cache.weights.float(),
        "scale": torch.tensor(cache.scale, dtype=torch.float32),
        "counts": cache.counts.long(),
        "prototypes": cache.prototypes.float(),
    }
    tensors |= {n: getattr(cache, n).float() for n in ("bias", "direction") if getattr(cache, n) is not None}
    # Copies, for the format takes no two tensors that share memory, as weights and prototypes may.
    tensors = {n: tensor.clone(memory_format=torch.contiguous_format) for n, tensor in tensors.items()}
    label_type = torch.int16 if len(cache.counts) <= 2**15 else torch.int32
    for split, (features, labels) in {} if features_of else cache.splits.items():
        values, step = quantise(features)
        tensors |= {
            f"{split}.features": values,
            f"{split}.step": step,
            f"{split}.labels": labels.to(label_type),
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / META).unlink(missing_ok=True)
    with paths.atomic(folder / TENSORS) as temporary:
        _save_tensors(tensors, temporary)
    meta = cache.meta | {"format_version": FORMAT_VERSION, "sha256": paths.file_digest(folder / TENSORS)}
    if features_of:
        meta[SHARED] = {"of": features_of, "sha256": read_meta(folder.parent / features_of)["sha256"]}
    meta[OWN_HASH] = meta_digest(json.loads(json.dumps(meta)))  # as it will be read
    with paths.atomic(folder / META) as temporary:
        temporary.write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """safetensors writes without a copy in memory, but a full disk stands in the text of its own error."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
        raise


def check_cache(cache: FeatureCache) -> None:
    """Raises InputError unless all shapes fit, all values are finite and all labels lie within the classes.

    NaN is allowed only in whole rows of `weights`: classes left out of training.
    """
    _check_classes(cache)
    if not cache.splits:
        raise InputError("there are no features")
    for split, (features, labels) in cache.splits.items():
        for start in range(0, max(1, len(features)), ROWS):  # features may be a file that is mapped
            name = f"{split} features" + (f" from row {start} on" if start else "")
            check_matrix(name, features[start : start + ROWS], columns=cache.prototypes.shape[1])
        _check_split_labels(split, labels, cache.counts, len(features))
    if "train" in cache.splits:
        found = prototypes(*cache.splits["train"], len(cache.counts)).to(cache.prototypes)
        pointing = found.norm(dim=1) > LEAST_NORM  # images that cancel out have no direction to compare
        if (cosine_similarity(found, cache.prototypes, dim=1)[pointing] < ALIKE).any():
            raise InputError("the prototypes are not those of the train features")


def _check_split_labels(split: str, labels: Tensor, counts: Tensor, length: int) -> None:
    """Labels lie within the classes; of train images there are as many of each class as the counts say."""
    labels = check_labels(f"{split} labels", labels, len(counts), length)
    if split == "train" and not torch.equal(torch.bincount(labels, minlength=len(counts)), counts.long()):
        raise InputError("the counts are not those of the train labels")


def _check_classes(cache: FeatureCache) -> None:
    """As `check_cache`, of all that is not features."""
    prototypes = check_matrix("prototypes", cache.prototypes)
    num_classes, num_features = prototypes.shape
    check_counts("counts", cache.counts, num_classes)
    check_positive("scale", cache.scale)
    missing = cache.weights.isnan()
    if cache.weights.shape != prototypes.shape or not torch.equal(missing.any(1), missing.all(1)):
        raise InputError("weights must be [N, F] like the prototypes, NaN only in whole rows")
    check_matrix("weights", cache.weights[~missing.any(1)], columns=num_features)
    for name, length in (("bias", num_classes), ("direction", num_features)):
        vector = getattr(cache, name)
        if vector is not None and (vector.shape != (length,) or not vector.isfinite().all()):
            raise InputError(f"{name} must be [{length}] and finite")
    if len(cache.meta.get("class_names", [])) != num_classes:
        raise InputError(f"meta must name {num_classes} classes")
    if len(cache.meta.get("wnids") or cache.class_names) != num_classes:
        raise InputError(f"meta must have {num_classes} wnids or none")
    for name in (*cache.class_names, *(cache.meta.get("wnids") or ())):
        check_label("a name of a class in meta", name)


# ---------------------------------------------------------------- reading


def load_cache(folder: str | Path) -> FeatureCache:
    """The cache in `folder`; raises CacheError saying what is wrong with a missing or damaged one.

    Features are read and expanded to float32 when a split is first asked for.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    path = folder / TENSORS
    try:
        if paths.file_digest(path) != meta.get("sha256"):
            raise CacheError(
                f"{path} does not have the hash that {META} states: it is damaged, fetch or make it again"
            )
        with safe_open(path, "pt") as file:
            stored = set(file.keys())
            tensors = {name: file.get_tensor(name) for name in stored if "." not in name}
        cache = FeatureCache(
            weights=tensors["weights"],
            scale=tensors["scale"].item(),
            counts=tensors["counts"],
            prototypes=tensors["prototypes"],
            bias=tensors.get("bias"),
            direction=tensors.get("direction"),
            splits=_shared_splits(folder, meta[SHARED]) if SHARED in meta else StoredSplits(path, stored),
            meta=meta,
        )
        _check_classes(cache)
        if isinstance(cache.splits, StoredSplits):
            cache.splits.check(cache.counts, cache.prototypes.shape[1])
    except (OSError, SafetensorError) as error:
        raise CacheError(f"{path} cannot be read ({error}): fetch or make it again") from None
    except (KeyError, TypeError, InputError, RuntimeError, ValueError) as error:
        raise CacheError(f"{path} does not hold a whole feature cache ({error})") from None
    return cache


def meta_digest(meta: dict[str, Any]) -> str:
    """sha256 of all that a description states, but for this hash itself."""
    content = {key: value for key, value in meta.items() if key != OWN_HASH}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_listed(path: Path, content: bytes) -> bool:
    """Whether the list of older caches (as `sha256sum` writes it) has this very meta.json."""
    folders = path.resolve().parents
    root = folders[min(3, len(folders) - 1)]
    named = paths.sums_of(root).get(path.resolve().relative_to(root).as_posix())
    return named == hashlib.sha256(content).hexdigest()


def read_meta(folder: Path) -> dict[str, Any]:
    """A cache's provenance; raises CacheError when it is missing, damaged or of another version."""
    path = Path(folder) / META
    try:
        content = path.read_bytes()
        meta = json.loads(content)
        version = meta["format_version"]
    except FileNotFoundError:
        raise CacheError(f"there is no feature cache in {folder}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheError(
            f"{path} is not the description of a feature cache ({error!r}): make it again"
        ) from None
    if version != FORMAT_VERSION:
        raise CacheError(
            f"{path} has format version {version}, this code reads {FORMAT_VERSION}: make it again"
        )
    if meta.get(OWN_HASH) != meta_digest(meta) and not _is_listed(path, content):
        raise CacheError(f"{path} does not have the hash that it states: fetch it or make it again")
    return meta


class StoredSplits(Mapping[str, Split]):
    """The splits of a cache file, each read and expanded to float32 when it is first asked for."""

    def __init__(self, path: Path, stored: set[str]) -> None:
        self.path = path
        self.names = [split for split in SPLITS if f"{split}.features" in stored]
        self._read: dict[str, Split] = {}

    def __getitem__(self, split: str) -> Split:
        if split not in self.names:
            raise KeyError(split)
        if split not in self._read:
            values, step, labels = self._tensors(split)
            self._read[split] = dequantise(values, step), labels.long()
        return self._read[split]

    def __contains__(self, split: object) -> bool:
        return split in self.names  # Mapping's own would read it

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def _tensors(self, split: str) -> list[Tensor]:
        try:
            with safe_open(self.path, "pt") as file:
                return [file.get_tensor(f"{split}.{part}") for part in ("features", "step", "labels")]
        except (OSError, SafetensorError) as error:  # as after loading, when the file has gone
            raise CacheError(f"{self.path} cannot be read ({error}): fetch or make it again") from None

    def check(self, counts: Tensor, num_features: int) -> None:
        """As `check_cache`, without expanding: int8 times a finite step is finite."""
        if not self.names:
            raise InputError("there are no features")
        for split in self.names:
            values, step, labels = self._tensors(split)
            if values.dtype != torch.int8 or values.ndim != 2 or values.shape[1] != num_features:
                raise InputError(f"{split} features must be int8 [M, {num_features}]")
            if step.shape != values.shape[:1] or not step.isfinite().all():
                raise InputError(f"{split} steps must be {len(values)} finite numbers")
            _check_split_labels(split, labels, counts, len(values))


def _shared_splits(folder: Path, shared: dict[str, Any]) -> Mapping[str, Split]:
    """Features that lie in the cache of another seed of the same frozen backbone, which must be as it was."""
    other = folder.parent / Path(shared["of"]).name  # a name, never a path to elsewhere
    meta = read_meta(other)
    if SHARED in meta or meta["sha256"] != shared["sha256"]:
        raise CacheError(f"{folder} needs the features of {other}, which are not those it was made with")
    return load_cache(other).splits
