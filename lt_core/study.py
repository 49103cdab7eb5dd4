"""A study of one's own images or features: `python -m lt_core study DIR --network NAME`.

A study is a profile with one backbone, `study`: written as a file that can be changed and trained again,
trained into a feature cache, and shown by notebook 15. Everything lies in one folder:

    study-NAME.toml     the profile
    caches/, reports/, figures/    as of any profile: reports/study-NAME/15_your_images.html is the report
    model/              network and the classifier that validation chose (`lt_core.export`)

    study_images("photos", "timm:resnet50.a1_in1k", Options(out=Path("photos-study")))
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lt_core import backbones, classifiers, paths, runner
from lt_core.cache import FeatureCache, load_cache, save_cache
from lt_core.checks import DataError, InputError, first_line
from lt_core.data.datasets import (
    BUILT_IN,
    FROM_ARCHIVE,
    FROM_IMAGES,
    Listing,
    Split,
    check_listing,
    listing_of,
    load_dataset,
    read_array,
    same_content,
    write_array,
)
from lt_core.data.image_files import ImageFiles
from lt_core.data.profiles import OwnImages, load_profile
from lt_core.data.weights import TORCHVISION
from lt_core.export import NOT_ROWS, save_model, trained_job
from lt_core.models import TIMM, build_backbone
from lt_core.train import evaluation_pixels, feature_batches

NOTEBOOK, BACKBONE = "15_your_images", "study"
EPOCHS, BATCH, LEAST_STEPS = 20, 128, 20  # of the classifier's training; smaller batches on small data sets
SHARD = 2**12  # images whose features are written at once
ARRAYS = ("features", "labels")
MADE_VAL = "; without a validation split, it is made of a fifth of the training images of a class, 20 at most"
log = logging.getLogger(__name__)

# The classifiers of the report: the paper's, those it is compared with, and logit adjustment.
COSINE = "Cosine classifier"
ROWS = {
    COSINE: "cosine",
    "Prototypes": "prototypes",
    "w^h(20)": "wh20",
    "w^h(100)": "wh100",
    "Ensemble (the paper's method)": "ensemble",
    "Logit adjustment, strength chosen": "logit_adjustment",
    "Ensemble with logit adjustment, strength chosen": "ensemble+logit_adjustment",
    "LWS": "lws",
    "BALMS": "balms",
    "DisAlign": "disalign",
    "cRT": "crt",
    "NCM": "ncm",
}


def rows_for(cache: FeatureCache) -> dict[str, str]:
    """Label -> classifier of those that this cache can have: w^h(k) needs a class with more than k images."""
    needs = {"wh20": 20, "wh100": 100}
    return {label: name for label, name in ROWS.items() if needs.get(name, 0) < cache.counts.max()}


def shown_split(cache: FeatureCache) -> str:
    """The split that accuracies are of: without test images the validation images, which choose, too."""
    return "test" if "test" in cache.splits else "val"


def validation_accuracies(cache: FeatureCache) -> dict[str, float]:
    """Accuracy on validation images, percent, for each label of `rows_for`: what chooses among them."""
    found = {}
    for label, name in rows_for(cache).items():
        one = classifiers.prediction(cache, name, shown_split(cache))
        if one.tried:  # the setting was chosen by this very number
            found[label] = next(accuracy for setting, accuracy in one.tried if setting == one.setting)
        else:
            correct = classifiers.predict(cache, name, "val") == cache.labels("val").numpy()
            found[label] = 100 * float(correct.mean())
    return found


def chosen(accuracies: dict[str, float]) -> str:
    """Label of the best classifier that can be stored as a file, the first of equals."""
    return max((label for label in accuracies if ROWS[label] not in NOT_ROWS), key=accuracies.get)


# ---------------------------------------------------------------- what a user can ask for


@dataclass(frozen=True)
class Options:
    """What the command line was asked for beside data and network."""

    out: Path | None = None  # None: studies/<name> below the output root
    weights: str | None = None  # file, "none" or "imagenet"; None: what is usual for the network
    size: int | None = None  # pixels; None: what the network was made for
    fine_tune: int = 0  # epochs that the network is trained, too; 0: it stays frozen
    data_root: Path | None = None
    workers: int | None = None


def study_images(folder: str, network: str, options: Options, lists: dict[str, Path] | None = None) -> int:
    """The whole study of a folder of images, or of a data set that this package knows by name.

    Returns the exit status of the notebook's run. Raises LTError for bad input, before anything is trained.
    """
    # Data: a known name, or a folder; then what is in it.
    known = not Path(folder).exists() and folder in {*BUILT_IN, *FROM_ARCHIVE, *FROM_IMAGES}
    name = folder if known else _plain(Path(folder).resolve().name)
    images: dict[str, OwnImages] = {}
    if not known:
        place = Path(folder).expanduser().resolve()
        if not place.is_dir():
            raise DataError(f"there is no folder {place}, nor a data set of that name")
        named = {split: str(path.resolve()) for split, path in (lists or {}).items()}
        images = {name: OwnImages(folder=str(place), lists=named)}
    out = _output_folder(options.out, name)
    about, splits = f"A study of {name} with {network}", ["train", "val", "test"]
    if name in {*BUILT_IN, *FROM_ARCHIVE}:
        num_images = len(load_dataset(name, options.data_root).splits["train"])
        about += MADE_VAL if name in FROM_ARCHIVE else ""
    else:
        listing = listing_of(name, options.data_root, images)
        check_images(listing)
        splits, num_images = list(listing.lists), len(listing.lists["train"])
        if images and not (named.get("val") or (not named and (place / "val").is_dir())):
            about += MADE_VAL
            log.info("%s", about)

    # Network, profile, features, classifier.
    profile = out / f"study-{name}.toml"
    _write_profile(profile, about, name, images, network, options, splits, num_images)
    load_profile.cache_clear()
    chosen_profile = load_profile(str(profile))
    target = out / "caches"
    if options.fine_tune:
        backbones.train_backbone(
            chosen_profile, BACKBONE, 0, options.data_root, target, {"workers": options.workers}
        )
        job = None
    else:
        started = time.monotonic()
        job = backbones.prepare(chosen_profile, BACKBONE, 0, options.data_root, {"workers": options.workers})
        features = kept_features(job)
        folder_of_cache = target / backbones.cache_place(chosen_profile, BACKBONE, 0)
        backbones.train_frozen(job, folder_of_cache, started, features)
        log.info("%s", backbones.summary_line(folder_of_cache))
    return _report(profile, options, job)


def study_features(file: Path, options: Options) -> int:
    """The same report from arrays in an .npz file: `train_features` [M, F], `train_labels` [M], val_, test_.

    Also `weights` [N, F] and `scale` of a trained cosine classifier, and `class_names` [N]. Labels are
    numbers or texts.
    """
    return _report(_written_as_cache(file, options), options, None)


def _written_as_cache(file: Path, options: Options) -> Path:
    """The arrays as the cache of a study, whose profile is returned: the report reads them from there."""
    arrays = _read_arrays(file)
    name = _plain(file.stem)
    splits = {
        split: (arrays[f"{split}_features"], arrays[f"{split}_labels"])
        for split in ("train", "val", "test")
        if f"{split}_features" in arrays
    }
    own = {key: arrays[key] for key in ("weights", "class_names") if key in arrays}
    scale = {"scale": float(arrays["scale"])} if "scale" in arrays else {}
    cache = FeatureCache.from_arrays(**splits, **own, **scale, name=name)
    out = _output_folder(options.out, name)
    profile = out / f"study-{name}.toml"
    about = f"A study of {name}, given as features" + ("" if "val" in splits else MADE_VAL)
    num_images = len(cache.labels("train"))
    _write_profile(profile, about, name, {}, "features", options, list(cache.splits), num_images)
    load_profile.cache_clear()
    chosen_profile = load_profile(str(profile))
    cache.meta.update(
        backbones.made_as(chosen_profile, BACKBONE, 0)
        | {"profile": chosen_profile.name, "checkpoint": "last", "code_version": backbones.code_version()}
        | {"hardware": f"the features of {file.name}"}
    )
    save_cache(out / "caches" / backbones.cache_place(chosen_profile, BACKBONE, 0), cache)
    return profile


def _plain(name: str) -> str:
    """A name that can be that of a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "images"


def _output_folder(out: Path | None, name: str) -> Path:
    """The study's folder, which everything is written to from here on."""
    folder = (out or paths.output_root() / "studies" / name).expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["LT_OUTPUT_ROOT"] = str(folder)
    return folder


def _read_arrays(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as an .npz of plain arrays ({first_line(error)})") from None
    known = {f"{split}_{kind}" for split in ("train", "val", "test") for kind in ARRAYS}
    for name in arrays.keys() - known - {"weights", "scale", "class_names"}:
        raise InputError(f"{file}: unknown array {name!r}, there may be {', '.join(sorted(known))}")
    for split in ("train", "val", "test"):
        having = [f"{split}_{kind}" in arrays for kind in ARRAYS]
        if any(having) != all(having) or (split == "train" and not all(having)):
            raise InputError(f"{file} needs both {split}_features and {split}_labels")
    return arrays


# ---------------------------------------------------------------- data


def check_images(listing: Listing) -> None:
    """Says what is there; raises DataError for the first file that is missing or no image."""
    check_listing(listing)
    for split, records in listing.lists.items():
        labels = np.bincount([label for _, label in records], minlength=len(listing.class_names))
        log.info(
            "%s: %d images of %d classes, %d to %d a class", split, len(records), (labels > 0).sum(),
            labels[labels > 0].min(), labels.max(),
        )  # fmt: skip
    if "test" not in listing.lists:
        log.info("there is no test split: the report shows validation images, which also choose the settings")
    if listing.size:  # archives: they are decoded whole, and say what cannot be read
        return
    for records in listing.lists.values():
        for path, _ in records:
            _check_header(listing.source.path / path)
    if pairs := same_content(listing):
        log.warning(
            "%d images are in two splits under two names, first %s and %s: accuracies on them are too high",
            len(pairs), *pairs[0],
        )  # fmt: skip


def _check_header(path: Path) -> None:
    try:
        with Image.open(path) as image:
            image.size  # noqa: B018
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is not a readable image: {first_line(error)}") from None


def thumbnail(split: Split, row: int, side: int = 96) -> Image.Image:
    """One image of a split as a small picture of `side` pixels."""
    if isinstance(split.images, ImageFiles):
        pixels = split.images.pixels(row, side).permute(1, 2, 0).numpy()
    else:
        pixels = split.images[row].numpy()
    picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    return picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST)


# ---------------------------------------------------------------- profile


def usual_start(network: str) -> str:
    """What a network starts from unless it is told: public weights where it has some."""
    public = network.startswith((TIMM, "efficientnet_lite")) or network in TORCHVISION
    return "imagenet" if public else ("letters" if network == "digits_net" else "scratch")


def _write_profile(
    target: Path,
    about: str,
    name: str,
    images: dict[str, OwnImages],
    network: str,
    options: Options,
    splits: list[str],
    num_images: int,
) -> None:
    """The study as a profile that `train` and `notebooks` take, too."""
    given = network == "features"
    start = usual_start(network) if options.weights is None else options.weights
    start = "scratch" if start == "none" or given else start
    if start not in ("scratch", "imagenet", "letters"):
        start = str(Path(start).expanduser().resolve())
    size = 0
    if not given:
        size = options.size if options.size is not None else build_backbone(network).input_size
    recipe: dict[str, Any] = {
        "epochs": options.fine_tune or EPOCHS,
        "batch_size": max(2, min(BATCH, num_images // LEAST_STEPS)),
        "learning_rate": 0.0,
        "classifier_learning_rate": 0.1,
        "input_size": size,
    }
    name_of_recipe = "fine_tuned" if options.fine_tune else "head_only"
    if options.fine_tune:
        recipe |= {"learning_rate": 0.1 if start == "scratch" else 0.001}
    tables: dict[str, dict[str, Any]] = {"datasets": {"imagenet_lt": name, "places_lt": name}}
    for own, of in images.items():
        tables[f"images.{json.dumps(own)}"] = of.model_dump(exclude_defaults=True)
    tables[f"recipes.{name_of_recipe}"] = recipe
    if options.fine_tune:
        crop = {"random_resized_crop": 0.25, "flip": True} if images else {"crop_padding": 1}
        tables[f"recipes.{name_of_recipe}.augmentation"] = crop
    if start == "letters":  # what the profile `digits` starts its Places-LT role from
        digits = load_profile("digits")
        tables["recipes.letters"] = digits.recipes["supervised"].model_dump(exclude_defaults=True)
        tables["pretraining.letters"] = digits.pretraining["supervised"].model_dump() | {"recipe": "letters"}
    tables[f"backbones.{BACKBONE}"] = {
        "role": "places_lt",
        "network": network,
        "start": start,
        "recipe": name_of_recipe,
        "stored_splits": splits,
    }
    head = {"description": about, "trains": not given}
    lines = [f"{key} = {_toml(value)}" for key, value in head.items()]
    for table, content in tables.items():
        lines += ["", f"[{table}]", *(f"{key} = {_toml(value)}" for key, value in content.items())]
    with paths.atomic(target) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _toml(value: object) -> str:
    """Plain values, lists and dictionaries of them as TOML spells them."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)


# ---------------------------------------------------------------- features, extracted once


def kept_features(job: backbones.Job) -> dict[str, Tensor]:
    """Features [M, F] (float32) of each split, kept in .cache: a killed extraction goes on where it stopped.

    Those of unchanged images and an unchanged network are read.
    """
    network = job.model.backbone.to(job.machine.device, memory_format=torch.channels_last)
    _probe(network, job)
    features = {}
    for name, split in job.data.splits.items():
        folder = paths.decoded() / "features" / f"{name}-{_fingerprint(job, split)}"
        whole = takewhile(lambda shard: shard is not None, map(read_array, sorted(folder.glob("*.npy"))))
        done, started = sum(map(len, whole)), time.monotonic()
        first = done
        if done:
            log.info("%s: features of %d of %d images are there", name, done, len(split))
        while done < len(split):
            for block in _blocks(network, split, done, job):
                write_array(folder / f"{done:09d}.npy", block)
                done += len(block)
                rate = (done - first) / (time.monotonic() - started)
                log.info(
                    "%s: %d of %d images, %.0f a second, %.0f min left",
                    name, done, len(split), rate, (len(split) - done) / rate / 60,
                )  # fmt: skip
        values = np.empty((len(split), network.num_features), np.float32)
        for path in sorted(folder.glob("*.npy")):
            block = read_array(path)
            values[int(path.stem) : int(path.stem) + len(block)] = block
        features[name] = torch.from_numpy(values)
    return features


def _blocks(network: torch.nn.Module, split: Split, start: int, job: backbones.Job) -> Any:
    """Features [SHARD, F] of the images from `start` on, in order."""
    batches, held = [], 0
    for batch in feature_batches(network, split.images[start:], job.recipe.input_size, job.machine):
        batches.append(batch.numpy())
        held += len(batch)
        if held >= SHARD:
            yield np.concatenate(batches)
            batches, held = [], 0
    if batches:
        yield np.concatenate(batches)


def _probe(network: torch.nn.Module, job: backbones.Job) -> None:
    """Raises InputError where the network does not take these images, before an hour is spent on them."""
    first, alone = job.data.splits["train"].images[:1], replace(job.machine, workers=0)
    pixels = next(evaluation_pixels(first, job.recipe.input_size, alone))
    try:
        with torch.inference_mode():
            found = network.eval()(pixels).shape[1:]
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(
            f"{job.backbone.network} does not take images of {list(pixels.shape[1:])} ({first_line(error)}): "
            "choose another --size or --network"
        ) from None
    if found != (network.num_features,):
        raise InputError(f"{job.backbone.network} gives {list(found)}, not one vector of features an image")


def _fingerprint(job: backbones.Job, split: Split) -> str:
    """What features depend on: the network and its weights, the size, the images, the code that reads."""
    digest = hashlib.sha256()
    for name, tensor in job.model.backbone.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    if isinstance(split.images, ImageFiles):
        for name in split.images.names:
            state = (split.images.folder / name).stat()
            digest.update(f"{name} {state.st_size} {state.st_mtime_ns}\n".encode())
    else:
        digest.update(split.images.numpy().tobytes())
    for module in ("models", "data/image_files", "data/augmentation"):
        digest.update((paths.PACKAGE / f"{module}.py").read_bytes())
    digest.update(f"{job.backbone.network} {job.recipe.input_size}".encode())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- report


def _report(profile: Path, options: Options, job: backbones.Job | None) -> int:
    """Notebook 15 on the study's cache, then the classifier that validation chose, as a file."""
    asked = runner.Options(profile=str(profile), only=NOTEBOOK, force=True, data_root=options.data_root)
    status = runner.run(asked)
    if status:
        return status
    study = load_profile(str(profile))
    folder = backbones.cache_folder(str(profile), BACKBONE, 0)
    cache = load_cache(folder)
    network = study.backbone(BACKBONE).network
    backbone, size = None, study.recipes[study.backbone(BACKBONE).recipe].input_size
    if network != "features":
        backbone = (job or trained_job(str(profile), BACKBONE, 0, options.data_root)).model.backbone
    label = chosen(validation_accuracies(cache))
    setting = classifiers.prediction(cache, ROWS[label], shown_split(cache)).setting
    out = paths.output_root()
    save_model(out / "model", cache, backbone, network, size or 0, ROWS[label], setting)
    print(f"validation chooses   {label}, {out / 'model'}")
    print(f"report               {asked.reports / f'{NOTEBOOK}.html'}")
    return status
