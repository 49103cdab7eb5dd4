"""A named backbone of a profile, end to end: data, network, training, extraction, feature cache.

cache = load("embedded", "sqrt")            # what notebooks call
ensure("digits", "continual", seed=0)       # trains first where that is needed
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lt_core import paths
from lt_core.datasets import Dataset, Split, load_dataset
from lt_core.errors import CacheError, DataError, InputError, TrainingError
from lt_core.features import (
    META,
    FeatureCache,
    dequantise,
    load_cache,
    principal_directions,
    quantise,
    read_meta,
    save_cache,
)
from lt_core.groups import group_of
from lt_core.image_files import ImageFiles
from lt_core.losses import build_loss
from lt_core.methods import learned, predict
from lt_core.metrics import group_accuracy
from lt_core.models import (
    START_SCALE,
    ContrastiveHead,
    Model,
    build_backbone,
    build_classifier,
)
from lt_core.profiles import Backbone, Profile, Recipe, load_profile
from lt_core.public_weights import load_simclr_weights, load_supervised_weights
from lt_core.rsg import RSG
from lt_core.shared_features import shared_features
from lt_core.train import Machine, extract_features, fit, load_checkpoint, save_checkpoint, this_machine
from lt_core.transfer import prototypes

Say = Callable[[str], None]
MachineOptions = dict[str, int | bool | None]  # of `train.this_machine`


# ---------------------------------------------------------------- finding caches


def _place(profile: Profile, backbone: str, seed: int) -> Path:
    """A cache's place among others: <dataset>/<backbone>/seed<N>; an alias has that of its backbone."""
    backbone = profile.trained_as(backbone)
    return Path(profile.dataset_of(backbone)) / backbone / f"seed{seed}"


def cache_folder(profile: str, backbone: str, seed: int) -> Path:
    """Where a cache lies: caches/<dataset>/<backbone>/seed<N> below the output root.

    A profile that trains nothing finds the repository's caches wherever the outputs go.
    """
    chosen = load_profile(profile)
    place = _place(chosen, backbone, seed)
    folder = paths.caches() / place
    return folder if chosen.trains or (folder / META).exists() else paths.SHIPPED_CACHES / place


def ensure(
    profile: str, backbone: str, seed: int, data_root: str | None = None, progress: Say = print
) -> Path:
    """The cache folder, after training the backbone where its cache is missing and the profile trains.

    Raises CacheError when the cache is missing and cannot be made here, saying what to do.
    """
    folder = cache_folder(profile, backbone, seed)
    if (folder / META).exists():
        return folder
    chosen = load_profile(profile)
    if not chosen.trains:
        raise CacheError(
            f"the cache {folder} is missing: fetch the repository's caches again, or train it with "
            f"`python -m lt_core train --profile small --backbone {backbone} --seed {seed} --data-root DIR`"
        )
    train_backbone(chosen, backbone, seed, data_root, say=progress)
    return folder


def load(profile: str, backbone: str, seed: int = 0, data_root: str | None = None) -> FeatureCache:
    """The feature cache of one backbone and seed (trained first where the profile does that).

    Raises CacheError for a damaged one and for one that was moved here from another place.
    """
    folder = ensure(profile, backbone, seed, data_root)
    cache = load_cache(folder)
    stated = {key: cache.meta.get(key) for key in ("dataset", "backbone", "seed")}
    chosen = load_profile(profile)
    own = {"dataset": chosen.dataset_of(backbone), "backbone": chosen.trained_as(backbone)}
    wanted = own | {"seed": seed}
    if stated != wanted:
        raise CacheError(
            f"{folder} holds the cache of {stated}: move it back, or delete it and make it again"
        )
    return cache


def seeds_shown(profile: str, backbone: str, seed: int) -> list[int]:
    """All the profile's seeds of a backbone if `seed` is one of them, else `seed` alone."""
    seeds = load_profile(profile).backbone(backbone).seeds
    return seeds if seed in seeds else [seed]


def load_seeds(
    profile: str, backbone: str, seed: int = 0, data_root: str | None = None
) -> list[FeatureCache]:
    """The caches of `seeds_shown`. Only the first is sure to hold training and validation features."""
    return [load(profile, backbone, s, data_root) for s in seeds_shown(profile, backbone, seed)]


# ---------------------------------------------------------------- training one


@dataclass(frozen=True)
class Job:
    """All that training and extraction of one backbone need, made by `prepare`."""

    profile: Profile
    name: str
    seed: int
    data: Dataset  # for a frozen backbone: its features in place of the images
    kept: Tensor  # classes that the classifier learns [K]
    model: Model
    machine: Machine
    code: str  # version when the run began

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
    data_root: str | None = None,
    say: Say = print,
    options: MachineOptions | None = None,
) -> Job:
    """Load the data and build the network with the weights that it starts from."""
    name = profile.trained_as(name)
    backbone = profile.backbone(name)
    recipe = profile.recipes[backbone.recipe]
    machine = this_machine(**(options or {}))
    say(f"{profile.name}/{name} seed {seed}: {machine.description}")
    data = load_dataset(profile.dataset_of(name), data_root)
    torch.manual_seed(seed)
    network = build_backbone(backbone.network)
    _start(network, profile, backbone, seed, data_root, say)
    num_features = network.num_features
    if recipe.frozen:
        network.to(machine.device, memory_format=torch.channels_last)
        say(f"extracting features of {', '.join(f'{len(s)} {n}' for n, s in data.splits.items())} images")
        data = _as_features(network, data, recipe.input_size, backbone.feature_dims, machine)
        num_features, network = data.splits["train"].images.shape[1], nn.Identity()
    kept = _trained_classes(backbone, data)
    counts = data.counts[kept]
    options, generator, fixed = backbone.loss_options, None, {}
    if backbone.loss == "rsg":
        generator = RSG(network.last_stage_channels, counts, options["deferred_until"])
    if backbone.classifier == "cosine_fixed":
        fixed = {"scale": options["scale"]}
    model = Model(network, build_classifier(backbone.classifier, num_features, len(kept), **fixed), generator)
    return Job(profile, name, seed, data, kept, model, machine, code_version())


def train_backbone(
    profile: Profile,
    name: str,
    seed: int,
    data_root: str | None = None,
    out: Path | None = None,
    say: Say = print,
    options: MachineOptions | None = None,
) -> Path:
    """Train one backbone and write its cache into the folder returned; resumes what a killed call left."""
    started = time.monotonic()
    folder = (out or paths.caches()) / _place(profile, name, seed)
    job = prepare(profile, name, seed, data_root, say, options)
    run = _run_folder(profile, job.name, job.backbone, seed, job.data)
    loss = build_loss(job.backbone.loss, job.data.counts[job.kept], **job.backbone.loss_options)
    shown = _only(job.data, job.kept)
    seconds = time.monotonic() - started
    history = fit(job.model, shown, job.recipe, job.backbone.sampler, loss, seed, run, job.machine, say)
    seconds += load_checkpoint(run / "last.pt")["seconds"]  # of the calls that were killed, too
    write_cache(job, folder, run / "best.pt", history, seconds=round(seconds, 1))
    say(f"{profile.name}/{name} seed {seed}: {_one_line(read_meta(folder))}; cache in {folder}")
    return folder


def write_cache(
    job: Job, folder: Path, best: Path | None = None, history: list | None = None, **more: object
) -> None:
    """Extract features of all splits with the model as it stands and write the cache with its provenance.

    With `best`, the accuracies of that checkpoint (best epoch on validation data) are stated beside the last.
    All processes extract, the first one writes. Raises TrainingError for a model at chance.
    """
    cache = extract(job)
    if best is not None:
        try:
            saved = load_checkpoint(best)
            job.model.load_state_dict(saved["model"])
            more["epoch_of_best"] = saved["epoch"]
        except (CacheError, KeyError, RuntimeError, TypeError):
            raise CacheError(
                f"{best} is not a whole checkpoint of this run: delete {best.parent} to train again"
            ) from None
        of_best = extract(job)
    if job.machine.rank == 0:
        accuracies = {"last": _accuracies(cache)}
        _refuse_chance(accuracies["last"]["val"]["classifier"]["many"], len(job.kept))
        if best is not None:
            accuracies["best_on_validation"] = _accuracies(of_best)
        _write(job, folder, cache, accuracies, history, more)
    if job.machine.world_size > 1:
        dist.barrier()


def _write(
    job: Job, folder: Path, cache: FeatureCache, accuracies: dict, history: list | None, more: dict
) -> None:
    meta = _provenance(job) | {"accuracies": accuracies, "history": history, **more}
    stored = {split: cache.splits[split] for split in job.backbone.stored_splits}
    save_cache(folder, replace(cache, meta=meta, splits=stored), _same_features(job, folder, stored))


def _same_features(job: Job, folder: Path, splits: dict[str, tuple[Tensor, Tensor]]) -> str | None:
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


def _start(
    network: nn.Module, profile: Profile, backbone: Backbone, seed: int, data_root: str | None, say: Say
) -> None:
    """Fill the network with the weights that the backbone starts from."""
    if backbone.start == "imagenet":
        load_supervised_weights(network, backbone.network, data_root)
    elif backbone.start == "simclr_imagenet":
        load_simclr_weights(network, backbone.network, data_root)
    elif backbone.start != "scratch":
        weights = pretrain(profile, backbone.start, seed, data_root, say)
        try:
            network.load_state_dict(load_checkpoint(weights)["backbone"])
        except (KeyError, RuntimeError, TypeError):
            raise CacheError(f"{weights} does not fit the network {backbone.network}: delete it") from None


def pretrain(profile: Profile, name: str, seed: int, data_root: str | None = None, say: Say = print) -> Path:
    """Train a pre-training network where that is not done yet; returns the file with its weights."""
    chosen = profile.pretraining[name]
    recipe = profile.recipes[chosen.recipe]
    data = load_dataset(chosen.dataset, data_root)
    run = _run_folder(profile, name, chosen, seed, data)
    weights = run / "backbone.pt"
    if not weights.exists():
        say(f"{profile.name}/{name} seed {seed}: pre-training on {data.name}; {run.name}")
        torch.manual_seed(seed)
        network = build_backbone(chosen.network)
        if chosen.objective == "simclr":
            head = ContrastiveHead(network.num_features)
        else:
            head = build_classifier("cosine", network.num_features, data.num_classes)
        loss = build_loss("cross_entropy", data.counts)
        history = fit(Model(network, head), data, recipe, "uniform", loss, seed, run, say=say)
        _refuse_chance(history[-1]["val_accuracy"], data.num_classes)
        save_checkpoint(weights, {"backbone": network.state_dict()})
    return weights


def _run_folder(profile: Profile, name: str, what: object, seed: int, data: Dataset) -> Path:
    """runs/<dataset>/<name>/seed<N>-<fingerprint>: another recipe, start or list is another run."""
    start = getattr(what, "start", "scratch")
    description = [
        what.model_dump(exclude={"seeds", "feature_dims", "stored_splits"}),
        profile.recipes[what.recipe].model_dump(),
        profile.pretraining[start].model_dump() if start in profile.pretraining else start,
        {
            split: hashlib.sha256(part.labels.numpy().tobytes()).hexdigest()
            for split, part in data.splits.items()
        },
    ]
    fingerprint = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:8]
    folder = paths.runs() / data.name / name / f"seed{seed}-{fingerprint}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _trained_classes(backbone: Backbone, data: Dataset) -> Tensor:
    """Classes that the classifier learns [K]: all, or those that are not few-shot (`continual`, Sec. 4.3)."""
    if backbone.leave_out == "nothing":
        return torch.arange(data.num_classes)
    return torch.from_numpy(np.flatnonzero(~group_of(data.counts)["few"]))


def _only(data: Dataset, kept: Tensor) -> Dataset:
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


# ---------------------------------------------------------------- extraction


def _features(network: nn.Module, data: Dataset, input_size: int, machine: Machine) -> dict[str, Tensor]:
    """Features [M, F] of each split, without augmentation: of files by all processes together."""
    return {
        name: shared_features(network, split.images, input_size, machine)
        if isinstance(split.images, ImageFiles)
        else extract_features(network, split.images, input_size, machine)
        for name, split in data.splits.items()
    }


def _as_features(network: nn.Module, data: Dataset, input_size: int, dims: int, machine: Machine) -> Dataset:
    """A data set of features [M, F] in place of images: what a frozen backbone's classifier is trained on.

    With `dims`, the features are projected to the principal directions of the training features first.
    """
    features = {n: f.float() for n, f in _features(network, data, input_size, machine).items()}
    if dims:
        directions = principal_directions(features["train"], dims)
        features = {name: values @ directions for name, values in features.items()}
    splits = {name: Split(features[name], split.labels) for name, split in data.splits.items()}
    return replace(data, splits=splits)


def extract(job: Job) -> FeatureCache:
    """Features of all splits without augmentation, classifier (NaN rows for classes left out), prototypes."""
    features = _features(job.model.backbone, job.data, job.recipe.input_size, job.machine)
    splits = {name: (features[name], split.labels) for name, split in job.data.splits.items()}
    classifier, dims = job.model.classifier, job.backbone.feature_dims
    rows = classifier.weight.detach().float().cpu()
    if dims and dims < rows.shape[1]:
        directions = principal_directions(splits["train"][0], dims)
        splits = {name: (features @ directions, labels) for name, (features, labels) in splits.items()}
        rows = rows @ directions
    weights = torch.full((job.data.num_classes, rows.shape[1]), torch.nan)
    weights[job.kept] = rows
    own = {
        name: getattr(classifier, name).detach().float().cpu()
        for name in ("bias", "direction")
        if hasattr(classifier, name)
    }
    return FeatureCache(
        weights=weights,
        scale=classifier.scale.item() if hasattr(classifier, "scale") else START_SCALE,
        **own,
        counts=job.data.counts,
        prototypes=prototypes(*splits["train"], job.data.num_classes),
        splits=splits,
        meta={"class_names": list(job.data.class_names)},
    )


def _accuracies(cache: FeatureCache) -> dict[str, dict[str, dict[str, float | None]]]:
    """Percent per group of the learned classifier and the prototypes on validation and test images.

    None for a group without classes, and for few-shot and total where few-shot classes were not trained on.
    """
    result: dict[str, dict[str, dict[str, float | None]]] = {}
    for split in ("val", "test"):
        result[split] = {}
        for name, method in (("classifier", learned(cache)), ("prototypes", "prototypes")):
            groups = group_accuracy(predict(cache, method, split), cache.labels(split), cache.counts)
            if name == "classifier" and not cache.trained.all():
                groups |= {"few": math.nan, "total": math.nan}
            result[split][name] = {g: None if math.isnan(v) else round(v, 2) for g, v in groups.items()}
    return result


def _refuse_chance(accuracy: float, num_classes: int) -> None:
    """Raises TrainingError when nothing was learned (validation accuracy in percent within twice chance)."""
    if accuracy <= 200 / num_classes:
        raise TrainingError(
            f"validation accuracy {accuracy:.2f} % (of many-shot classes, where there are groups) is "
            f"chance among {num_classes}: nothing was learned, so nothing is kept; check the learning rate"
        )


def _one_line(meta: dict) -> str:
    parts = []
    for name, groups in meta["accuracies"]["last"]["test"].items():
        parts.append(f"{name} " + " / ".join("-" if v is None else f"{v:.1f}" for v in groups.values()))
    return "test, many / medium / few / total: " + ", ".join(parts)


def _provenance(job: Job) -> dict[str, object]:
    """What `meta.json` says of where a cache comes from."""
    return {
        "profile": job.profile.name,
        "dataset": job.data.name,
        "backbone": job.name,
        **job.backbone.model_dump(exclude={"role", "recipe", "seeds", "stored_splits"}),
        "recipe": job.recipe.model_dump(),
        "checkpoint": "last",
        "seed": job.seed,
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


# ---------------------------------------------------------------- commands


def train_command(
    profile: str,
    backbone: str,
    seed: int | None = None,
    data_root: str | None = None,
    out: str | None = None,
    options: MachineOptions | None = None,
) -> None:
    """`python -m lt_core train`: one backbone, or `all` of the profile, skipping what is done."""
    chosen = load_profile(profile)
    if not chosen.trains:
        raise DataError(
            f"profile {profile} ships its caches and trains nothing; `small` trains what it ships"
        )
    if seed is not None and seed < 0:
        raise InputError(f"--seed must be 0 or above, found {seed}")
    every = [name for name in chosen.backbones if name not in chosen.aliases]
    names = every if backbone == "all" else [backbone]
    seeds = {name: [seed] if seed is not None else chosen.backbone(name).seeds for name in names}
    jobs = sorted(((s, name) for name in names for s in seeds[name]), key=lambda job: job[0])
    started, done = time.monotonic(), 0
    target = Path(out).resolve() if out else paths.caches()
    for number, (one_seed, name) in enumerate(jobs, start=1):
        folder = target / _place(chosen, name, one_seed)
        if (folder / META).exists():
            _say(f"[{number}/{len(jobs)}] {name} seed {one_seed}: done already, {folder}")
            continue
        _say(f"[{number}/{len(jobs)}] {name} seed {one_seed}")
        train_backbone(chosen, name, one_seed, data_root, target, _say, options)
        done += 1
        minutes = (time.monotonic() - started) / 60
        _say(f"{minutes:.1f} min so far, about {minutes / done * (len(jobs) - number):.0f} min left")


def _say(line: str) -> None:
    """Progress at once, from the first of torchrun's processes alone."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def extract_command(
    profile: str,
    backbone: str,
    checkpoint: str,
    out: str,
    data_root: str | None = None,
    options: MachineOptions | None = None,
) -> None:
    """`python -m lt_core extract`: a feature cache in `out` from a run's last.pt or best.pt."""
    saved = load_checkpoint(Path(checkpoint))
    job = prepare(load_profile(profile), backbone, saved.get("seed", 0), data_root, _say, options)
    try:
        job.model.load_state_dict(saved["model"])
    except (KeyError, RuntimeError, TypeError):
        raise CacheError(f"{checkpoint} is not a checkpoint of {profile}/{backbone}") from None
    write_cache(job, Path(out), history=saved.get("history"))
    _say(f"{_one_line(read_meta(Path(out)))}; cache in {out}")
