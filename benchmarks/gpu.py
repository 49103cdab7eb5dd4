"""The paper's networks on a GPU: what the whole loop from JPEG files reaches, and what it costs.

    python benchmarks/gpu.py [--steps 40] [--workers N] [--compile] [--images DIR]

For each network of the paper, with its batch and 224 pixels:

train_vs_resident  images/s of `fit` (reading, decoding, augmentation, schedule, bookkeeping) over the bare
                   step of the same model on one resident batch; without checkpoints, which a run writes once
                   a minute and an epoch. Aim 0.95.
decode             images/s of the data pipeline alone
extract            images/s of feature extraction
peak_gib           largest GPU memory of `fit`
first_step         seconds from the start of `fit` to the end of its first step

Images are those below DIR, else generated JPEGs of 500 x 375 pixels. The last line is one JSON object, which
is also written to benchmarks/gpu-<date>-<device>.json. Without a GPU it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from lt_core import paths
from lt_core.data.datasets import Dataset, Split
from lt_core.data.image_files import ImageFiles, training_batches
from lt_core.data.profiles import Recipe, load_profile
from lt_core.losses import build_loss
from lt_core.models import Model, build_backbone, build_classifier
from lt_core.samplers import epoch_batches
from lt_core.train import Machine, build_optimiser, feature_batches, fit, this_machine

NETWORKS = {"resnext50_32x4d": "from_scratch", "resnet101": "fine_tuned", "resnet152": "fine_tuned_deep"}
CLASSES = 1000
REPEATS = 3
Result = dict[str, float]


def generated(folder: Path, number: int = 2048) -> None:
    """JPEG files of ImageNet's usual size, smooth with some noise: about 60 kB each."""
    generator = np.random.default_rng(0)
    for index in range(number):
        small = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = (pixels + generator.integers(-12, 13, (375, 500, 1))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:05}.jpg", quality=90)


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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40, help="training steps a measurement")
    parser.add_argument("--workers", type=int, help="processes that decode (default: all cores)")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of JPEG files to read")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: this measures a GPU, and torch finds none")
        return 0
    machine = this_machine(options.workers, compiles=options.compile)
    print(f"{machine.description}, {machine.workers} workers, {options.steps} steps, {REPEATS} repeats")
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if options.images is None:
            generated(Path(scratch))
        folder = options.images or Path(scratch)
        for network, recipe in NETWORKS.items():
            chosen = load_profile("paper").recipes[recipe]
            results[network] = measure(network, chosen, folder, options.steps, machine)
            print(
                f"{network:16}" + "  ".join(f"{k} {v:.2f}" for k, v in results[network].items()), flush=True
            )
    date = datetime.now(UTC).date().isoformat()
    device = re.sub(r"\W+", "-", torch.cuda.get_device_name(machine.device)).strip("-").lower()
    account = {"date": date, "device": machine.description, "torch": torch.__version__, **vars(options)}
    account |= {"images": str(options.images or "generated"), "networks": results}
    line = json.dumps(account)
    with paths.atomic(Path(__file__).with_name(f"gpu-{date}-{device}.json")) as temporary:
        temporary.write_text(line + "\n", encoding="utf-8")
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
