"""The paper's work on a GPU: what the whole loop from JPEG files reaches, and what it costs.

    python benchmarks/gpu.py [--steps 40] [--workers N] [--compile] [--images DIR] [--data-root DATA]

For each network of the paper, with its batch and 224 pixels:

train_vs_resident  images/s of `fit` (reading, decoding, augmentation, schedule, bookkeeping) over the bare
                   step of the same model on one resident batch; without checkpoints, which a run writes once
                   a minute and at the end. Aim 0.9.
decode             images/s of the data pipeline alone, from the same files
extract            images/s of feature extraction
peak_gib           largest GPU memory of `fit`
first_step         seconds from the start of `fit` to the end of its first step

Once each:

rsg_peak_gib       GPU memory of a step in which RSG generates, with ResNeXt50 and its batch of 512, for some
                   --micro-batch (0: the whole batch at once); null where there is not enough
second_stages      seconds of one fit at ImageNet-LT's size (115,846 x 2,048 features)
transfer           for some numbers of classes: seconds to build the hybrid classifiers of the ensemble (2,048
                   dimensions; 512 for 100,000 classes), and over the two products that cannot be avoided

Images are those below DIR, else the 200 photographs of DATA/imagenet-sample-200.tar (DATA: LT_DATA_ROOT by
default), else, as it then says, generated JPEGs of 500 x 375 pixels. The last line is one JSON object, which
is also written to benchmarks/gpu-<date>-<device>.json. Without a GPU it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from lt_core import baselines, paths
from lt_core.cache import FeatureCache
from lt_core.checks import DataError
from lt_core.data.datasets import Dataset, Split
from lt_core.data.image_files import ImageFiles, training_batches
from lt_core.data.official import official_counts
from lt_core.data.profiles import Recipe, load_profile
from lt_core.losses import build_loss
from lt_core.models import Model, build_backbone, build_classifier
from lt_core.rsg import RSG
from lt_core.samplers import epoch_batches
from lt_core.train import Machine, build_optimiser, feature_batches, fit, this_machine
from lt_core.transfer import QUERY_BLOCK, hybrid_classifiers

NETWORKS = {"resnext50_32x4d": "from_scratch", "resnet101": "fine_tuned", "resnet152": "fine_tuned_deep"}
CLASSES = 1000
REPEATS = 3
SAMPLE = "imagenet-sample-200.tar"
MICRO_BATCHES = (0, 256, 128)
SECOND_STAGES = {"lws": baselines.lws, "balms": baselines.balms}
TRANSFERS = ((1000, 2048), (8142, 2048), (100_000, 512))  # classes and dimensions
Result = dict[str, float]


def generated(folder: Path, number: int = 2048) -> None:
    """JPEG files of ImageNet's usual size, smooth with some noise: about 60 kB each."""
    generator = np.random.default_rng(0)
    for index in range(number):
        small = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = (pixels + generator.integers(-12, 13, (375, 500, 1))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:05}.jpg", quality=90)


def photographs(folder: Path, data_root: str | None) -> str:
    """Put images into the folder, real ones if they are to be had; says which."""
    try:
        sample = paths.data_root(data_root) / SAMPLE
    except DataError:  # no folder is named
        sample = Path(SAMPLE)
    if sample.is_file():
        with tarfile.open(sample) as archive:
            for name in archive.getnames():
                if name.endswith(".JPEG"):
                    (folder / Path(name).name).write_bytes(archive.extractfile(name).read())
        return SAMPLE
    print(f"decoding of photographs is not measured: there is no {sample} (--data-root, --images)")
    generated(folder)
    return "generated"


def data_of(folder: Path, number: int) -> Dataset:
    """`number` training images (some more than once) of CLASSES classes, and one for validation."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    split = Split(ImageFiles(folder, np.resize(np.array(names), number)), torch.arange(number) % CLASSES)
    splits = {"train": split, "val": Split(split.images[:1], split.labels[:1])}
    return Dataset("generated", tuple(map(str, range(CLASSES))), splits)


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of an action, the GPU's part included."""
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def trainer(model: Model, data: Dataset, recipe: Recipe, machine: Machine) -> Callable[[], None]:
    """A whole training, from its beginning each time, without checkpoints."""
    loss = build_loss("cross_entropy", torch.ones(CLASSES, dtype=torch.int64))

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder, mock.patch("lt_core.train.save_checkpoint"):
            fit(model, data, recipe, "uniform", loss, 0, Path(folder), machine)

    return run


def resident_steps(model: Model, recipe: Recipe, machine: Machine, steps: int) -> Callable[[], None]:
    """Forward, backward and optimiser step on one batch that lies on the device."""
    size, batch = recipe.input_size, recipe.batch_size
    pixels = torch.rand(batch, 3, size, size, device=machine.device).mul_(255)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    target = torch.arange(batch, device=machine.device) % CLASSES
    optimiser = build_optimiser(model, recipe)
    network = torch.compile(model) if machine.compiles else model

    def run() -> None:
        model.train()
        for _ in range(steps):
            with machine.autocast():
                logits, wanted, _ = network(pixels, target)
            torch.nn.functional.cross_entropy(logits.float(), wanted).backward()
            optimiser.step()
            optimiser.zero_grad()

    return run


def measure(network: str, recipe: Recipe, folder: Path, steps: int, machine: Machine) -> Result:
    """All numbers of one network; the two of the ratio are interleaved and their medians compared."""
    device, batch = machine.device, recipe.batch_size
    recipe = recipe.model_copy(update={"epochs": 1})
    backbone = build_backbone(network)
    model = Model(backbone, build_classifier("cosine", backbone.num_features, CLASSES))
    first_step = seconds(trainer(model, data_of(folder, batch), recipe, machine), device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    data = data_of(folder, steps * batch)
    train, resident = trainer(model, data, recipe, machine), resident_steps(model, recipe, machine, steps)
    train()
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    resident()
    times = [(seconds(train, device), seconds(resident, device)) for _ in range(REPEATS)]
    trained, bare = (steps * batch / statistics.median(column) for column in zip(*times, strict=True))

    images = data.splits["train"].images
    batches = epoch_batches("uniform", data.splits["train"].labels, batch, 0, 0)

    def decode() -> None:
        for _ in training_batches(images, [(0, 0, batches)], recipe, 0, machine):
            pass

    def extract() -> None:
        for _ in feature_batches(model.backbone, images, recipe.input_size, machine):
            pass

    return {
        "train": trained,
        "resident": bare,
        "train_vs_resident": trained / bare,
        "decode": len(images) / seconds(decode, device),
        "extract": len(images) / seconds(extract, device),
        "peak_gib": peak,
        "first_step": first_step,
    }


def rsg_peak(network: str, recipe: Recipe, folder: Path, machine: Machine) -> float | None:
    """GiB of GPU memory of a training step in which RSG generates; None where it does not fit."""
    backbone = build_backbone(network)
    rsg = RSG(backbone.last_stage_channels, torch.arange(CLASSES, 0, -1), generate_from=0.0)
    model = Model(backbone, build_classifier("cosine_fixed", backbone.num_features, CLASSES), rsg)
    data, recipe = data_of(folder, recipe.batch_size), recipe.model_copy(update={"epochs": 1})
    cuda = machine.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(machine.device)
    try:
        trainer(model, data, recipe, machine)()
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated(machine.device) / 2**30 if cuda else 0.0


def made_up_cache(counts: torch.Tensor, dims: int) -> FeatureCache:
    """As many features around each class's centre as the counts [N] say; centres are the weights too."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(len(counts), dims, generator=generator)
    labels = torch.arange(len(counts)).repeat_interleave(counts)
    features = torch.randn(len(labels), dims, generator=generator).add_(centres[labels])
    return FeatureCache(centres, 16.0, counts, centres, {"train": (features, labels)}, meta={})


def second_stages(counts: torch.Tensor, dims: int, device: torch.device) -> Result:
    """Seconds of one fit of each, which has ten epochs."""
    cache = made_up_cache(counts, dims).to(device)
    return {name: seconds(partial(fitted, cache, 0.1), device) for name, fitted in SECOND_STAGES.items()}


def transfer(classes: int, dims: int, device: torch.device) -> Result:
    """Seconds to build the hybrid classifiers of the ensemble, and over its two products."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, classes, dims, generator=generator).to(device)
    counts = 1 + 1000 * torch.arange(classes, device=device) // classes

    def products() -> None:  # in blocks, for the similarities of all classes at once need 40 GB
        for block in queries.split(QUERY_BLOCK):
            (block @ keys.T) @ keys

    build = partial(hybrid_classifiers, queries, keys, counts)
    times = [(seconds(build, device), seconds(products, device)) for _ in range(REPEATS + 1)][1:]
    ours, bare = (statistics.median(column) for column in zip(*times, strict=True))
    return {"seconds": ours, "build_vs_gemm": ours / bare}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40, help="training steps a measurement")
    parser.add_argument("--workers", type=int, help="processes that decode (default: all cores)")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of JPEG files to read")
    parser.add_argument("--data-root", metavar="DATA", help=f"folder of {SAMPLE} (default: LT_DATA_ROOT)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: this measures a GPU, and torch finds none")
        return 0
    machine = this_machine(options.workers, compiles=options.compile)
    print(f"{machine.description}, {machine.workers} workers, {options.steps} steps, {REPEATS} repeats")
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as scratch:
        images = str(options.images or photographs(Path(scratch), options.data_root))
        folder = options.images or Path(scratch)
        for network, recipe in NETWORKS.items():
            chosen = load_profile("paper").recipes[recipe]
            results[network] = measure(network, chosen, folder, options.steps, machine)
            print(
                f"{network:16}" + "  ".join(f"{k} {v:.2f}" for k, v in results[network].items()), flush=True
            )
        recipe = load_profile("paper").recipes["from_scratch"]
        peaks = {
            size: rsg_peak("resnext50_32x4d", recipe, folder, replace(machine, micro_batch=size))
            for size in MICRO_BATCHES
        }
    counts = torch.tensor(official_counts("imagenet_lt"))
    once = {"rsg_peak_gib": peaks, "second_stages": second_stages(counts, 2048, machine.device)}
    once["transfer"] = {classes: transfer(classes, dims, machine.device) for classes, dims in TRANSFERS}
    print("\n".join(f"{name:16}{found}" for name, found in once.items()))
    date = datetime.now(UTC).date().isoformat()
    device = re.sub(r"\W+", "-", torch.cuda.get_device_name(machine.device)).strip("-").lower()
    account = {"date": date, "device": machine.description, "torch": torch.__version__}
    account |= {"steps": options.steps, "workers": machine.workers, "compile": options.compile}
    account |= {"images": images, "networks": results, **once}
    line = json.dumps(account)
    with paths.atomic(Path(__file__).with_name(f"gpu-{date}-{device}.json")) as temporary:
        temporary.write_text(line + "\n", encoding="utf-8")
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
