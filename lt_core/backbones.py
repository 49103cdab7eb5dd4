"""A named backbone of a profile, end to end: data, network, training, extraction, feature cache.

cache = load("embedded", "sqrt")            # what notebooks call
seeds = seeds_shown("embedded", "sqrt")     # all of the profile, or the one that is asked for
ensure("digits", "continual", seed=0)       # trains first where that is needed
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lt_core import paths
from lt_core.cache import (
    META,
    FeatureCache,
    dequantise,
    load_cache,
    own_classifier,
    principal_directions,
    quantise,
    read_meta,
    save_cache,
)
from lt_core.checks import CacheError, TrainingError
from lt_core.data.datasets import SPLITS, Dataset, Split, load_dataset
from lt_core.data.distributed import shared_features
from lt_core.data.image_files import ImageFiles
from lt_core.data.profiles import FILES, Backbone, Pretraining, Profile, Recipe, load_profile
from lt_core.data.weights import load_simclr_weights, load_supervised_weights, load_weights_file
from lt_core.losses import build_loss
from lt_core.metrics import group_accuracy, group_of
from lt_core.models import ContrastiveHead, Model, build_backbone, build_classifier
from lt_core.rsg import RSG
from lt_core.train import (
    Machine,
    extract_features,
    feature_batches,
    fit,
    fit_head,
    load_checkpoint,
    read_history,
    save_checkpoint,
    this_machine,
)
from lt_core.transfer import SCALE, cosine_logits, prototypes

log = logging.getLogger(__name__)


# ---------------------------------------------------------------- finding caches


def cache_place(profile: Profile, backbone: str, seed: int) -> Path:
    """A cache's place among others: <dataset>/<backbone>/seed<N>; an alias has that of its backbone."""
    backbone = profile.trained_as(backbone)
    return Path(profile.dataset_of(backbone)) / backbone / f"seed{seed}"


def cache_folder(profile: str, backbone: str, seed: int) -> Path:
    """Where a cache lies: caches/<dataset>/<backbone>/seed<N> below the output root.

    A profile that trains nothing finds the repository's caches wherever the outputs go.
    """
    chosen = load_profile(profile)
    place = cache_place(chosen, backbone, seed)
    folder = paths.caches() / place
    return folder if chosen.trains or (folder / META).exists() else paths.SHIPPED_CACHES / place


def ensure(profile: str, backbone: str, seed: int, data_root: str | Path | None = None) -> Path:
    """The cache folder, after training the backbone where its cache is missing and the profile trains.

    Raises CacheError when the cache is missing and cannot be made here, saying what to do.
    """
    folder = cache_folder(profile, backbone, seed)
    chosen = load_profile(profile)
    if is_made(folder, chosen, backbone, seed):
        return folder
    if not chosen.trains:
        raise CacheError(
            f"profile {profile} has no cache of {backbone} with seed {seed} ({folder}): train it with "
            f"`python -m lt_core train --profile small --backbone {backbone} --seed {seed} --data-root DIR`"
        )
    train_backbone(chosen, backbone, seed, data_root)
    return folder


def if_made(profile: str, backbone: str, seed: int) -> FeatureCache | None:
    """The cache where it is there already, made here or shipped; nothing is trained for it.

    Raises CacheError as `load` does.
    """
    chosen = load_profile(profile)
    for root in (paths.caches(), paths.SHIPPED_CACHES):
        folder = root / cache_place(chosen, backbone, seed)
        if is_made(folder, chosen, backbone, seed):
            return load_cache(folder)
    return None


def load(profile: str, backbone: str, seed: int = 0, data_root: str | Path | None = None) -> FeatureCache:
    """The feature cache of one backbone and seed (trained first where the profile does that).

    Raises CacheError for a damaged one and for one that was made otherwise than the profile asks for.
    """
    cache = load_cache(ensure(profile, backbone, seed, data_root))
    older = [one.reason for one in load_profile(profile).older_caches if backbone in one.backbones]
    return replace(cache, meta=cache.meta | {"remarks": older})  # shown with where it comes from


def made_as(profile: Profile, name: str, seed: int) -> dict[str, Any]:
    """All of a profile that a cache depends on, as its `meta.json` states it."""
    name = profile.trained_as(name)
    backbone = profile.backbone(name)
    parts = {
        "dataset": profile.dataset_of(name),
        "backbone": name,
        "seed": seed,
        **backbone.model_dump(exclude={"role", "recipe", "seeds", "stored_splits"}),
        "recipe": profile.recipes[backbone.recipe].model_dump(),
        "pretraining": {},
    }
    if before := profile.pretraining.get(backbone.start):
        recipe = profile.recipes[before.recipe].model_dump()
        parts["pretraining"] = before.model_dump() | {"recipe": recipe}
    return parts


def is_made(folder: Path, profile: Profile, name: str, seed: int) -> bool:
    """Whether the cache is there. Raises CacheError, naming what differs, for one that was made otherwise.

    What the recipe of an older cache does not state has its default; what else it may state or lack, the
    profile lists (`older_caches`).
    """
    if not (folder / META).exists():
        return False
    meta, wanted = read_meta(folder), made_as(profile, name, seed)
    stated = {key: meta[key] for key in wanted if key in meta}
    for older in profile.older_caches:
        if name in older.backbones:
            stated |= {key: wanted[key] for key in older.lacks if key not in meta}
            stated |= {key: wanted[key] for key, value in older.states.items() if meta.get(key) == value}
    recipe = {"recipe": Recipe.model_construct().model_dump()}
    defaults = recipe | {"pretraining": recipe if wanted["pretraining"] else {}}
    found, asked = flat(defaults) | flat(stated), flat(wanted)
    differing = [key for key in sorted(found | asked) if found.get(key) != asked.get(key)]
    if differing:
        texts = [f"{key} {found.get(key)!r} and not {asked.get(key)!r}" for key in differing[:3]]
        raise CacheError(
            f"{folder} was made with {', '.join(texts)}, as profile {profile.name} asks for: move it away to "
            "train it again, write elsewhere (LT_OUTPUT_ROOT), or give the backbone another name"
        )
    return True


def flat(entries: dict[str, Any], place: str = "") -> dict[str, Any]:
    """`{"recipe": {"epochs": 1}}` as `{"recipe.epochs": 1}`."""
    parts: dict[str, Any] = {}
    for key, value in entries.items():
        parts |= flat(value, f"{place}{key}.") if isinstance(value, dict) else {place + key: value}
    return parts


def seeds_shown(profile: str, backbone: str, seed: int | None = None) -> list[int]:
    """The seeds that are shown of a backbone: all of the profile's, or the one that is asked for.

    A seed that the profile does not have is trained where the profile trains; else the first one is shown in
    its place, and a line says so.
    """
    chosen = load_profile(profile)
    seeds = chosen.backbone(backbone).seeds
    if seed is None:
        return seeds
    if chosen.trains or (cache_folder(profile, backbone, seed) / META).exists():
        return [seed]
    print(f"{backbone}: there is no seed {seed} here, seed {seeds[0]} is shown")
    return seeds[:1]


# ---------------------------------------------------------------- training one backbone


@dataclass(frozen=True)
class Job:
    """All that training and extraction of one backbone need, made by `prepare`."""

    profile: Profile
    name: str
    seed: int
    data: Dataset
    kept: Tensor  # classes that the classifier learns [K]
    model: Model
    machine: Machine
    code: str  # version when the run began
    pretraining_history: list[dict[str, float]]  # of our own pre-training, one entry an epoch; else empty

    @property
    def backbone(self) -> Backbone:
        return self.profile.backbone(self.name)

    @property
    def recipe(self) -> Recipe:
        return self.profile.recipes[self.backbone.recipe]


def prepare(
    profile: Profile,
    name: str,
    seed: int,
    data_root: str | Path | None = None,
    options: dict[str, Any] | None = None,
) -> Job:
    """Load the data and build the network with the weights that it starts from; options of `this_machine`."""
    name = profile.trained_as(name)
    backbone = profile.backbone(name)
    machine = this_machine(**(options or {}), precision=profile.recipes[backbone.recipe].precision)
    log.info("%s/%s seed %d: %s", profile.name, name, seed, machine.description)
    data = load_dataset(profile.dataset_of(name), data_root, profile.images)
    kept = trained_classes(backbone, data)

    # The network and its start, then the classifier: this order of random numbers is part of a seed.
    torch.manual_seed(seed)
    network = build_backbone(backbone.network)
    before = start_weights(network, profile, backbone, seed, data_root)
    losses, rsg, scale = backbone.loss_options, None, {}
    if backbone.loss == "rsg":
        rsg = RSG(network.last_stage_channels, data.counts[kept], losses["deferred_until"])
    if backbone.classifier == "cosine_fixed":
        scale = {"scale": losses["scale"]}
    num_features = network.num_features
    if profile.recipes[backbone.recipe].frozen and backbone.feature_dims:
        num_features = min(num_features, backbone.feature_dims)  # its head is trained on what is stored
    classifier = build_classifier(backbone.classifier, num_features, len(kept), **scale)
    model = Model(network, classifier, rsg)
    return Job(profile, name, seed, data, kept, model, machine, code_version(), before)


def train_backbone(
    profile: Profile,
    name: str,
    seed: int,
    data_root: str | Path | None = None,
    out: Path | None = None,
    options: dict[str, Any] | None = None,
) -> Path:
    """Train one backbone and write its cache into the folder returned; resumes what a killed call left."""
    started = time.monotonic()
    folder = (out or paths.caches()) / cache_place(profile, name, seed)
    job = prepare(profile, name, seed, data_root, options)
    if job.recipe.frozen:
        train_frozen(job, folder, started)
    else:
        run = run_folder(profile, job.name, job.backbone, seed, job.data)
        loss = build_loss(job.backbone.loss, job.data.counts[job.kept], **job.backbone.loss_options)
        start = {} if job.backbone.start == "scratch" else {"start_accuracy": start_accuracy(job)}
        seconds = time.monotonic() - started
        data = only_classes(job.data, job.kept)
        history = fit(job.model, data, job.recipe, job.backbone.sampler, loss, seed, run, job.machine)
        seconds += load_checkpoint(run / "last.pt")["seconds"]  # of the calls that were killed, too
        write_cache(job, folder, run / "best.pt", history, **start, seconds=round(seconds, 1))
    log.info("%s/%s seed %d: %s; cache in %s", profile.name, name, seed, summary_line(folder), folder)
    return folder


def train_frozen(job: Job, folder: Path, started: float, features: dict[str, Tensor] | None = None) -> None:
    """A frozen backbone: features are extracted once (unless given), and a head is trained on them."""
    if features is None:
        network = job.model.backbone.to(job.machine.device, memory_format=torch.channels_last)
        sizes = ", ".join(f"{len(split)} {name}" for name, split in job.data.splits.items())
        log.info("extracting features of %s images", sizes)
        features = extract_splits(network, job)
    features, _ = project(features, job.backbone.feature_dims)
    head, recipe = job.model.classifier, job.recipe
    loss = build_loss(job.backbone.loss, job.data.counts, **job.backbone.loss_options)
    best: dict[str, Any] = {}
    history = fit_head(
        head,
        *(features["train"], job.data.splits["train"].labels),
        *(loss, job.backbone.sampler, recipe.classifier_learning_rate, recipe.epochs, recipe.batch_size),
        *(recipe.weight_decay, recipe.momentum, job.seed),
        val=(features["val"], job.data.splits["val"].labels),
        best=best,
    )
    last = as_cache(job, features)
    accuracies = {"last": cache_accuracies(last)}
    head.load_state_dict(best["state"])
    accuracies["best_on_validation"] = cache_accuracies(as_cache(job, features))
    seconds = round(time.monotonic() - started, 1)
    if job.machine.rank == 0:
        store(job, folder, last, accuracies, history, epoch_of_best=best["epoch"], seconds=seconds)


def start_weights(
    network: nn.Module, profile: Profile, backbone: Backbone, seed: int, data_root: str | Path | None
) -> list[dict[str, float]]:
    """Fill the network with the weights that it starts from; returns the history of our own pre-training."""
    if backbone.start == "imagenet":
        load_supervised_weights(network, backbone.network, data_root)
    elif backbone.start == "simclr_imagenet":
        load_simclr_weights(network, backbone.network, data_root)
    elif backbone.start.endswith(FILES):
        load_weights_file(network, backbone.network, backbone.start, data_root)
    elif backbone.start != "scratch":
        with torch.random.fork_rng(devices=[]):  # the classifier is the same whether this trains or not
            weights = pretrain(profile, backbone.start, seed, data_root)
        try:
            network.load_state_dict(load_checkpoint(weights)["backbone"])
        except (KeyError, RuntimeError, TypeError):
            raise CacheError(f"{weights} does not fit the network {backbone.network}: delete it") from None
        return read_history(weights.parent)
    return []


def pretrain(profile: Profile, name: str, seed: int, data_root: str | Path | None = None) -> Path:
    """Train a pre-training network where that is not done yet; returns the file with its weights."""
    chosen = profile.pretraining[name]
    data = load_dataset(chosen.dataset, data_root)
    run = run_folder(profile, name, chosen, seed, data)
    weights = run / "backbone.pt"
    if not weights.exists():
        log.info("%s/%s seed %d: pre-training on %s; %s", profile.name, name, seed, data.name, run.name)
        torch.manual_seed(seed)
        network = build_backbone(chosen.network)
        if chosen.objective == "simclr":
            head = ContrastiveHead(network.num_features)
        else:
            head = build_classifier("cosine", network.num_features, data.num_classes)
        loss = build_loss("cross_entropy", data.counts)
        history = fit(Model(network, head), data, profile.recipes[chosen.recipe], "uniform", loss, seed, run)
        refuse_chance(history[-1]["val_accuracy"], data.num_classes)
        save_checkpoint(weights, {"backbone": network.state_dict()})
    return weights


def run_folder(profile: Profile, name: str, what: Backbone | Pretraining, seed: int, data: Dataset) -> Path:
    """runs/<dataset>/<name>/seed<N>-<fingerprint>: another recipe, start or list is another run."""
    start = getattr(what, "start", "scratch")
    lists = {
        split: hashlib.sha256(part.labels.numpy().tobytes()).hexdigest()
        for split, part in data.splits.items()
    }
    description = [
        what.model_dump(exclude={"seeds", "feature_dims", "stored_splits"}),
        profile.recipes[what.recipe].model_dump(),
        profile.pretraining[start].model_dump() if start in profile.pretraining else start,
        lists,
    ]
    fingerprint = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:8]
    folder = paths.runs() / data.name / name / f"seed{seed}-{fingerprint}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def trained_classes(backbone: Backbone, data: Dataset) -> Tensor:
    """Classes that the classifier learns [K]: all, or those that are not few-shot (`continual`, Sec. 4.3)."""
    if backbone.leave_out == "nothing":
        return torch.arange(data.num_classes)
    return torch.from_numpy(~group_of(data.counts)["few"]).nonzero().flatten()


def only_classes(data: Dataset, kept: Tensor) -> Dataset:
    """The data set restricted to the kept classes, with labels 0..K-1."""
    if len(kept) == data.num_classes:
        return data
    new_label = torch.full((data.num_classes,), -1)
    new_label[kept] = torch.arange(len(kept))
    splits = {}
    for name, split in data.splits.items():
        labels = new_label[split.labels]
        splits[name] = Split(split.images[labels >= 0], labels[labels >= 0])
    return Dataset(data.name, tuple(data.class_names[c] for c in kept), splits)


# ---------------------------------------------------------------- extraction and the cache


def extract_splits(network: nn.Module, job: Job, splits: Sequence[str] = SPLITS) -> dict[str, Tensor]:
    """Features [M, F] of each split, without augmentation: of files by all processes together."""
    size, machine = job.recipe.input_size, job.machine
    features = {}
    for name in (name for name in splits if name in job.data.splits):
        split = job.data.splits[name]
        if isinstance(split.images, ImageFiles):

            def blocks(rows: slice, images: ImageFiles = split.images) -> Any:
                return feature_batches(network, images[rows], size, machine)

            place = (machine.rank, machine.world_size)
            features[name] = shared_features(len(split), network.num_features, blocks, *place)
        else:
            features[name] = extract_features(network, split.images, size, machine)
    return features


def start_accuracy(job: Job) -> float:
    """Total accuracy (percent) of prototypes on validation images with the weights that training starts from.

    Claims about kinds of pre-training are tested where this is about the same for both.
    """
    network = job.model.backbone.to(job.machine.device, memory_format=torch.channels_last)
    with torch.random.fork_rng(devices=[]):  # training draws the same numbers whether this runs or not
        features = extract_splits(network, job, ("train", "val"))
    return cache_accuracies(as_cache(job, features))["val"]["prototypes"]["total"]


def project(features: dict[str, Tensor], dims: int) -> tuple[dict[str, Tensor], Tensor | None]:
    """Features on the first principal directions of the training features, and these [F, dims]; None: all."""
    if not dims or dims >= features["train"].shape[1]:
        return {name: values.float() for name, values in features.items()}, None
    directions = principal_directions(features["train"], dims)
    return {name: values.float() @ directions for name, values in features.items()}, directions


def as_cache(job: Job, features: dict[str, Tensor], directions: Tensor | None = None) -> FeatureCache:
    """The model as it stands as a feature cache: rows of classes that were left out are NaN."""
    classifier = job.model.classifier
    rows = classifier.weight.detach().float().cpu()
    if directions is not None:
        rows = rows @ directions
    weights = torch.full((job.data.num_classes, rows.shape[1]), torch.nan)
    weights[job.kept] = rows
    own = {
        name: getattr(classifier, name).detach().float().cpu()
        for name in ("bias", "direction")
        if hasattr(classifier, name)
    }
    labels = {name: split.labels for name, split in job.data.splits.items()}
    return FeatureCache(
        weights=weights,
        scale=classifier.scale.item() if hasattr(classifier, "scale") else SCALE,
        counts=job.data.counts,
        prototypes=prototypes(features["train"], labels["train"], job.data.num_classes),
        splits={name: (features[name], labels[name]) for name in features},
        meta={"class_names": list(job.data.class_names)},
        **own,
    )


def extract(job: Job) -> FeatureCache:
    """Features of all splits without augmentation, classifier and prototypes of the model as it stands."""
    features = extract_splits(job.model.backbone, job)
    if dims := job.backbone.feature_dims:
        features, directions = project(features, dims)
        return as_cache(job, features, None if job.recipe.frozen else directions)
    return as_cache(job, features)


def write_cache(
    job: Job, folder: Path, best: Path | None = None, history: list | None = None, **more: object
) -> None:
    """Extract features of all splits with the model as it stands and write the cache with its provenance.

    With `best`, the accuracies of that checkpoint (best epoch on validation data) are stated beside the last.
    All processes extract, the first one writes. Raises TrainingError for a model at chance.
    """
    cache = extract(job)
    accuracies = {"last": cache_accuracies(cache)}
    if best is not None:
        try:
            saved = load_checkpoint(best)
            job.model.load_state_dict(saved["model"])
            more["epoch_of_best"] = saved["epoch"]
        except (CacheError, KeyError, RuntimeError, TypeError):
            raise CacheError(
                f"{best} is not a whole checkpoint of this run: delete {best.parent} to train again"
            ) from None
        accuracies["best_on_validation"] = cache_accuracies(extract(job))
    if job.machine.rank == 0:
        store(job, folder, cache, accuracies, history, **more)
    if job.machine.world_size > 1:
        dist.barrier()


def store(
    job: Job, folder: Path, cache: FeatureCache, accuracies: dict, history: list | None, **more: object
) -> None:
    """Write the cache with where it comes from; raises TrainingError for a model at chance."""
    refuse_chance(accuracies["last"]["val"]["classifier"]["many"], len(job.kept))
    meta = provenance(job) | {"accuracies": accuracies, "history": history, **more}
    stored = {split: cache.splits[split] for split in job.backbone.stored_splits}
    save_cache(folder, replace(cache, meta=meta, splits=stored), same_features(job, folder, stored))


def same_features(job: Job, folder: Path, splits: dict[str, tuple[Tensor, Tensor]]) -> str | None:
    """Name of the first seed's cache beside `folder` if it holds these features, as of a frozen backbone."""
    first = f"seed{job.backbone.seeds[0]}"
    if not job.recipe.frozen or folder.name == first or not (folder.parent / first / META).exists():
        return None
    stored = load_cache(folder.parent / first).splits
    same = all(
        split in stored and torch.equal(dequantise(*quantise(features)), stored[split][0])
        for split, (features, _) in splits.items()
    )
    return first if same else None


def cache_accuracies(cache: FeatureCache) -> dict[str, dict[str, dict[str, float | None]]]:
    """Percent per group of the learned classifier and the prototypes on validation and test images.

    None for a group without classes, and for few-shot and total where few-shot classes were not trained on.
    """
    own, left_out = own_classifier(cache), ~cache.trained
    splits = [split for split in ("val", "test") if split in cache.splits]  # own data may lack test images
    result: dict[str, dict[str, dict[str, float | None]]] = {split: {} for split in splits}
    for split, found in result.items():
        features, labels = cache.splits[split]
        logits = {
            "classifier": own(features.float()).masked_fill(left_out, -torch.inf),
            "prototypes": cosine_logits(features, cache.prototypes),
        }
        for name, values in logits.items():
            groups = group_accuracy(values.argmax(1), labels, cache.counts)
            if name == "classifier" and left_out.any():
                groups |= {"few": math.nan, "total": math.nan}
            found[name] = {g: None if math.isnan(v) else round(v, 2) for g, v in groups.items()}
    return result


def refuse_chance(accuracy: float | None, num_classes: int) -> None:
    """Raises TrainingError when nothing was learned: validation accuracy (percent) within twice chance.

    Of fewer than 20 classes, within 5 points of it.
    """
    if accuracy is not None and accuracy <= min(200 / num_classes, 100 / num_classes + 5):
        raise TrainingError(
            f"validation accuracy {accuracy:.2f} % (of many-shot classes, where there are groups) is "
            f"chance among {num_classes}: nothing was learned, so nothing is kept; check the learning rate"
        )


def summary_line(folder: Path) -> str:
    """Test accuracies of a cache in one line (of a data set without test images, validation accuracies)."""
    split, found = list(read_meta(folder)["accuracies"]["last"].items())[-1]
    parts = []
    for name, groups in found.items():
        parts.append(f"{name} " + " / ".join("-" if v is None else f"{v:.1f}" for v in groups.values()))
    return f"{split}, many / medium / few / total: " + ", ".join(parts)


def provenance(job: Job) -> dict[str, object]:
    """What `meta.json` says of where a cache comes from."""
    return {
        "profile": job.profile.name,
        **made_as(job.profile, job.name, job.seed),
        "pretraining_history": job.pretraining_history,
        "checkpoint": "last",
        "class_names": list(job.data.class_names),
        "wnids": list(job.data.wnids) if job.data.wnids else None,
        "code_version": job.code,
        "torch": torch.__version__,
        "hardware": job.machine.description,
        "date": datetime.now(UTC).date().isoformat(),
    }


def code_version() -> str:
    """The checkout's commit, with `+changes` where files differ from it; `unknown` outside git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=paths.ROOT, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "lt_core")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
