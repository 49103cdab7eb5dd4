"""Training speed and memory as ratios from one run: the committed loop, the bare step and a peer's loop.

    python benchmarks/training.py [--steps 20] [--repeats 5]

train_vs_bare         images/s of `fit` (sampling, augmentation, schedule, bookkeeping) over the bare forward,
                      backward and optimiser step on one resident batch; same model and threads. Aim 0.95.
train_vs_imagefolder  images/s of `fit` over the loop that the field's repositories use: torchvision's
                      ImageFolder, DataLoader with two workers, per-image random resized crop, flip and colour
                      jitter, contiguous layout. `fit` augments in the same ways. Aim 1.5. The peer has a
                      process of its own, as its users run it: in ours, freed memory is kept (`this_machine`).
bfloat16_vs_imagefolder  the same with `precision = "bfloat16"` in the recipe. Aim 2 on a processor that has
                      instructions for it (avx512_bf16, amx_bf16); on a GPU it is the same precision.
extract_vs_bare       images/s of feature extraction over the bare forward pass of the network as it is built.
                      Extraction folds batch norms into convolutions, which pays for its other work. Aim 0.95.
study_vs_bare NAME    the same for JPEG files, as `study` reads them, and that network at 224 pixels: reading,
                      decoding and cropping are 1.8 ms of a core an image. Aim 0.95.
study_vs_bare 96 px   EfficientNet-Lite0 on images in memory, resampled to 96 pixels, as in README's studies
loader_vs_decode      photographs/s that one worker hands over, cropped at random for training, over decoding
                      and cropping alone: what the loader costs. Aim 0.9.
peak_gib              largest resident memory of a whole training process (data set included), 2 epochs
peak_growth           the same with 6 epochs over 2 epochs: 1.0 when memory does not grow with epochs

The two of a pair are interleaved and their medians compared. Uses Tiny-ImageNet-LT where LT_DATA_ROOT names
a data root, and the 200 photographs of its imagenet-sample-200.tar for `study_vs_bare`; else generated images
of the same shape. The last line is one JSON object with the ratios.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from gpu import data_of, photographs
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from lt_core.checks import DataError
from lt_core.data.augmentation import augment
from lt_core.data.datasets import Dataset, Split, load_dataset
from lt_core.data.image_files import Crops, ImageFiles, training_batches
from lt_core.data.profiles import Augmentation, Recipe, load_profile
from lt_core.losses import build_loss
from lt_core.models import Model, build_backbone, build_classifier
from lt_core.train import (
    Machine,
    build_optimiser,
    evaluation_pixels,
    extract_features,
    fit,
    step_generator,
    this_machine,
)

EXTRACTED, LOADED, PHOTOGRAPHS = 3840, 1000, 600
STUDIED = ("efficientnet_lite0", "timm:resnet50")
FIELD = Augmentation(random_resized_crop=0.08, flip=True, colour_jitter=0.4)


def images() -> Dataset:
    """Tiny-ImageNet-LT, or random images of its shape."""
    try:
        return load_dataset("tiny_imagenet_lt")
    except DataError:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (4000, 64, 64, 3), dtype=torch.uint8, generator=generator)
        split = Split(pixels, torch.arange(4000) % 200)
        return Dataset("generated", tuple(map(str, range(200))), {"train": split, "val": split})


def part_of(data: Dataset, number: int) -> Dataset:
    """`number` training images (some twice if there are fewer), and one for validation."""
    train = data.splits["train"]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    rows = torch.cat([order] * (1 + number // len(order)))[:number]
    splits = {
        "train": Split(train.images[rows], train.labels[rows]),
        "val": Split(train.images[:1], train.labels[:1]),
    }
    return Dataset(data.name, data.class_names, splits)


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


def small_model(num_classes: int) -> Model:
    network = build_backbone("small_resnet")
    return Model(network, build_classifier("cosine", network.num_features, num_classes))


def train(model: Model, data: Dataset, recipe: Recipe, machine: Machine) -> None:
    """The committed loop."""
    loss = build_loss("cross_entropy", torch.ones(data.num_classes, dtype=torch.int64))
    with tempfile.TemporaryDirectory() as folder:
        fit(model, data, recipe, "uniform", loss, 0, Path(folder), machine)


def bare_steps(model: Model, data: Dataset, recipe: Recipe, machine: Machine) -> Callable[[], None]:
    """Forward, backward and step on one resident batch, as often as an epoch of `data` has steps."""
    split, batch = data.splits["train"], recipe.batch_size
    resident = augment(split.images, torch.arange(batch), recipe.augmentation, step_generator(0))
    resident, target = resident.to(machine.device), split.labels[:batch].to(machine.device)
    model.to(machine.device, memory_format=torch.channels_last)
    optimiser = build_optimiser(model, recipe)

    def steps() -> None:
        model.train()
        for _ in range(len(split) // batch):
            with machine.autocast():
                logits, _, _ = model(resident, target)
            nn.functional.cross_entropy(logits.float(), target).backward()
            optimiser.step()
            optimiser.zero_grad()

    return steps


def extraction(
    network: str, images: torch.Tensor | ImageFiles, size: int | None, machine: Machine
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Extraction by a network at `size` (None: its own), and its bare forward pass on the same pixels."""
    backbone = build_backbone(network).to(machine.device, memory_format=torch.channels_last).eval()
    size = size or backbone.input_size
    resident = list(evaluation_pixels(images, size, machine, square=backbone.square))

    def forward() -> None:
        with torch.inference_mode(), machine.autocast():
            for pixels in resident:
                backbone(pixels)

    return lambda: extract_features(backbone, images, size, machine), forward


def loading(files: ImageFiles, machine: Machine) -> tuple[Callable[[], object], Callable[[], object]]:
    """Training batches of files from one worker, and the same crops made one after the other."""
    recipe = load_profile("paper").recipes["from_scratch"]
    how = recipe.augmentation.model_copy(update={"colour_jitter": 0.0})  # colours are the device's work
    recipe, machine = recipe.model_copy(update={"augmentation": how}), replace(machine, workers=1)
    batches = torch.arange(len(files)).split(50)
    crops = Crops(files, recipe.input_size, how)

    def load() -> None:
        for _ in training_batches(files, [(0, 0, torch.stack(batches))], recipe, 0, machine):
            pass

    def decode() -> None:
        for row in range(len(files)):
            crops[row, (0, 0, row, 0)]

    return load, decode


def peer_epoch(folder: Path, num_classes: int, recipe: Recipe, device: torch.device) -> Callable[[], None]:
    """An epoch over an image folder the way the field's repositories train."""
    steps = [
        transforms.RandomResizedCrop(64),
        transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(0.4, 0.4, 0.4),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    loader = DataLoader(
        ImageFolder(str(folder), transforms.Compose(steps)),
        batch_size=recipe.batch_size,
        shuffle=True,
        num_workers=2,
        drop_last=True,
        persistent_workers=True,  # started in the uncounted round
        pin_memory=device.type == "cuda",
    )
    model = small_model(num_classes).to(device)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    def epoch() -> None:
        model.train()
        right = 0
        for pixels, target in loader:
            pixels, target = pixels.to(device), target.to(device)
            logits, _, _ = model(pixels, target)
            loss = nn.functional.cross_entropy(logits, target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            right += (logits.argmax(1) == target).sum().item()

    return epoch


def start_peer(*settings: object) -> None:
    """In the process of the peer: make its epoch."""
    global peer
    peer = peer_epoch(*settings)


def run_peer() -> None:
    """In the process of the peer: its epoch."""
    peer()


def write_folder(split: Split, folder: Path) -> None:
    """The images as JPEG files, one folder a class."""
    for number, (image, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
        place = folder / f"{label:03}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(place / f"{number:06}.JPEG", quality=90)


def peak_memory(epochs: int) -> float:
    """Largest resident memory of a process that trains so many epochs, in GiB."""

    def count() -> float:
        scale = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale

    data = images()
    recipe = load_profile("small").recipes["from_scratch"]
    few = part_of(data, 8 * recipe.batch_size)
    train(small_model(data.num_classes), few, recipe.model_copy(update={"epochs": epochs}), this_machine())
    return count()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="training steps a measurement")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each")
    options = parser.parse_args()

    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, maxtasksperchild=1) as pool:
        short, long = pool.map(peak_memory, [2, 6], chunksize=1)

    machine, data = this_machine(), images()
    recipe = load_profile("small").recipes["from_scratch"].model_copy(update={"epochs": 1})
    number = options.steps * recipe.batch_size
    part, model = part_of(data, number), small_model(data.num_classes)
    print(
        f"{machine.description}; {data.name}, batch {recipe.batch_size}, {options.steps} steps, "
        f"{options.repeats} repeats"
    )

    loop_s, bare_s = interleaved(
        lambda: train(model, part, recipe, machine),
        bare_steps(model, part, recipe, machine),
        options.repeats,
    )

    some = data.splits["train"].images[:EXTRACTED]
    extract_s, forward_s = interleaved(*extraction("small_resnet", some, None, machine), options.repeats)

    studies = {}  # images, seconds of the extraction, seconds of the bare pass
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder), None)
        files = data_of(Path(folder), PHOTOGRAPHS).splits["train"].images
        for name in STUDIED:
            times = interleaved(*extraction(name, files, None, machine), options.repeats)
            studies[name] = (len(files), *times)
        many = data_of(Path(folder), LOADED).splits["train"].images
        load_s, decode_s = interleaved(*loading(many, machine), options.repeats)

    studies["96 px"] = (len(some), *interleaved(*extraction(STUDIED[0], some, 96, machine), options.repeats))

    jittered = recipe.model_copy(update={"augmentation": FIELD})
    with tempfile.TemporaryDirectory() as folder:
        write_folder(part.splits["train"], Path(folder))
        settings = Path(folder), data.num_classes, recipe, machine.device
        with ProcessPoolExecutor(1, spawn, initializer=start_peer, initargs=settings) as process:
            same_s, peer_s = interleaved(
                lambda: train(model, part, jittered, machine),
                lambda: process.submit(run_peer).result(),
                options.repeats,
            )
            narrow = this_machine(precision="bfloat16")
            narrow_s, slow_s = interleaved(
                lambda: train(model, part, jittered, narrow),
                lambda: process.submit(run_peer).result(),
                options.repeats,
            )

    print(f"{'images/s':28}{'ours':>10}{'other':>10}{'ratio':>8}")
    for name, count, ours, other in (
        ("training, bare step", number, loop_s, bare_s),
        ("training, ImageFolder", number, same_s, peer_s),
        ("bfloat16, ImageFolder", number, narrow_s, slow_s),
        ("extraction, bare", len(some), extract_s, forward_s),
        ("loading, decoding", LOADED, load_s, decode_s),
        *((f"study, {name}", *numbers) for name, numbers in studies.items()),
    ):
        print(f"{name:28}{count / ours:10.0f}{count / other:10.0f}{other / ours:8.3f}")
    print(f"peak memory {short:.2f} GiB with 2 epochs, {long:.2f} GiB with 6")
    ratios = {
        "train_vs_bare": bare_s / loop_s,
        "train_vs_imagefolder": peer_s / same_s,
        "bfloat16_vs_imagefolder": slow_s / narrow_s,
        "extract_vs_bare": forward_s / extract_s,
        "loader_vs_decode": decode_s / load_s,
        **{f"study_vs_bare {name}": bare / whole for name, (_, whole, bare) in studies.items()},
        "peak_gib": short,
        "peak_growth": long / short,
    }
    print(json.dumps({name: round(value, 3) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
