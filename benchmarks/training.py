"""Training speed as ratios from one run: the committed loop against the bare hardware limit.

    python benchmarks/training.py [--steps 20] [--repeats 5]

train_vs_bare    images/s of `fit` (sampling, augmentation, schedule, bookkeeping) over the bare forward +
                 backward + optimiser step on one resident batch; same model, batch and threads. Aim 0.95.
extract_vs_bare  images/s of feature extraction over the bare forward pass. Aim 0.95.

The two of a pair are interleaved and their medians compared. Uses Tiny-ImageNet-LT where LT_DATA_ROOT names
a data root, else generated images of the same shape. The last line is one JSON object with the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lt_core.augmentation import augment, to_pixels
from lt_core.datasets import Dataset, Split, load_dataset
from lt_core.errors import DataError
from lt_core.losses import build_loss
from lt_core.models import Model, build_backbone, build_classifier
from lt_core.profiles import load_profile
from lt_core.train import apply, build_optimiser, fit, step_generator, this_machine


def images() -> Dataset:
    """Tiny-ImageNet-LT, or random images of its shape."""
    try:
        return load_dataset("tiny_imagenet_lt")
    except DataError:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (4000, 64, 64, 3), dtype=torch.uint8, generator=generator)
        split = Split(pixels, torch.arange(4000) % 200)
        return Dataset("generated", tuple(map(str, range(200))), {"train": split, "val": split})


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def interleaved(one: Callable[[], object], two: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of each, measured in turn after one uncounted round."""
    times = [(seconds(one), seconds(two)) for _ in range(repeats + 1)][1:]
    return statistics.median(t for t, _ in times), statistics.median(t for _, t in times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="training steps a measurement")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each")
    options = parser.parse_args()

    machine, data = this_machine(), images()
    recipe = load_profile("small").recipes["from_scratch"]
    batch, used = recipe.batch_size, options.steps * recipe.batch_size
    train = data.splits["train"]
    rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:used]
    rows = torch.cat([rows] * (1 + used // len(rows)))[:used]
    part = Dataset(
        data.name,
        data.class_names,
        {
            "train": Split(train.images[rows], train.labels[rows]),
            "val": Split(train.images[:1], train.labels[:1]),
        },
    )
    network = build_backbone("small_resnet")
    model = Model(network, build_classifier("cosine", network.num_features, data.num_classes))
    loss = build_loss("cross_entropy", torch.ones(data.num_classes, dtype=torch.int64))
    short = recipe.model_copy(update={"epochs": 1})

    def loop() -> None:
        with tempfile.TemporaryDirectory() as folder:
            fit(model, part, short, "uniform", loss, 0, Path(folder), machine, say=lambda line: None)

    model.to(machine.device, memory_format=torch.channels_last)
    resident = augment(train.images, rows[:batch], recipe.augmentation, step_generator(0)).to(machine.device)
    target = train.labels[rows[:batch]].to(machine.device)
    optimiser = build_optimiser(model, recipe)

    def bare() -> None:
        model.train()
        for _ in range(options.steps):
            with machine.autocast():
                _, logits = model(resident)
            loss(logits.float(), target).backward()
            optimiser.step()
            optimiser.zero_grad()

    chunk = to_pixels(train.images[:256]).to(machine.device)

    def bare_forward() -> None:
        model.eval()
        with torch.inference_mode(), machine.autocast():
            for _ in range(4):
                model(chunk)

    loop_s, bare_s = interleaved(loop, bare, options.repeats)
    extract_s, forward_s = interleaved(
        lambda: apply(model, train.images[:1024], 0, machine), bare_forward, options.repeats
    )
    print(
        f"{machine.description}; {data.name}, batch {batch}, {options.steps} steps, {options.repeats} repeats"
    )
    print(f"{'':24}{'images/s':>10}{'bare':>10}{'ratio':>8}")
    for name, number, ours, bare_one in (
        ("training loop", used, loop_s, bare_s),
        ("feature extraction", 1024, extract_s, forward_s),
    ):
        print(f"{name:24}{number / ours:10.0f}{number / bare_one:10.0f}{bare_one / ours:8.3f}")
    print(
        json.dumps(
            {"train_vs_bare": round(bare_s / loop_s, 3), "extract_vs_bare": round(forward_s / extract_s, 3)}
        )
    )


if __name__ == "__main__":
    main()
