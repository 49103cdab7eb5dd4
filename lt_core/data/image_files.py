"""Images that stay in files: read, cropped and resampled by worker processes while the network computes,
or, without workers, by the threads of the network between its batches.

Every random choice is a function of (seed, epoch, position in the epoch), so what a network sees depends
neither on the number of workers nor on that of processes. Colours are changed on the device, a batch at once.

    for pixels in training_batches(files, epochs, recipe, seed, machine):   # [B, 3, S, S]
    for pixels in evaluation_batches(files, size, machine):
"""

from __future__ import annotations

import math
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Dataset as TorchDataset

from lt_core.checks import DataError, InputError, TrainingError
from lt_core.data.augmentation import apply_jitter, sent, to_pixels
from lt_core.data.profiles import Augmentation, Recipe

ASPECTS, TRIES = (3 / 4, 4 / 3), 10  # of random crops; boxes that are drawn until one fits
EVALUATION_BATCH = {"cuda": 256, "cpu": 64}  # images; larger ones leave a processor's caches
GAP = 3.0  # a JPEG that is decoded smaller stays so many times as large as what is made of it
PIECE = 32  # images that a worker makes at once, whatever the batch: 5 MB of shared memory
PREFETCH = 4  # pieces that each worker keeps ready
Key = tuple[int, ...]  # the seed of a crop's random choices
SHARED_MEMORY = Path("/dev/shm")  # where workers hand over what they made
Crop = tuple[int, Key | None]  # row of the image and its key; None: the central square, nothing changes


@dataclass(frozen=True)
class Square:
    """The central square that a test image is cut to, of which a network may have been made for another.

    part: its side, of the image's shorter side (224 of 256); resampling: to the network's size, as Pillow
    names it. Random crops of training are bilinear, as torchvision's.
    """

    part: float = 0.875
    resampling: str = "bilinear"

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Its top, left, height and width in an image of (width, height) pixels."""
        side = self.part * min(size)
        return (size[1] - side) / 2, (size[0] - side) / 2, side, side


SQUARE = Square()


class Machine(Protocol):
    """What is needed of a `train.Machine`: where batches go, and which share of them is this process's."""

    device: torch.device
    rank: int
    world_size: int
    workers: int


@dataclass(frozen=True)
class ImageFiles:
    """The images of a split [M] as names of files below a folder; rows are selected as those of a tensor."""

    folder: Path
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: Tensor | slice) -> ImageFiles:
        return ImageFiles(self.folder, self.names[rows if isinstance(rows, slice) else rows.numpy()])

    def pixels(self, row: int, size: int, square: Square = SQUARE) -> Tensor:
        """One image as evaluation sees it: uint8 [3, S, S], its central square. Raises DataError."""
        return Crops(self, size, square=square)[row, None][0].permute(2, 0, 1)

    def check(self, sample: int) -> None:
        """Decode `sample` images, evenly spaced; raises DataError naming one that cannot be read."""
        for row in np.unique(np.linspace(0, len(self) - 1, sample).astype(int)):
            self.pixels(row, 32)


def decode_smaller(image: Image.Image, scale: float) -> float:
    """Have a large JPEG that will be resampled by `scale` decoded at 1/2, 1/4 or 1/8; returns which, or 1.

    It stays GAP times as large as needed: a photograph of 12 megapixels for a crop of 224 pixels takes half
    the time, and its pixels change by 0.2 of 255.
    """
    before = image.width
    found = image.draft(None, tuple(math.ceil(side * scale * GAP) for side in image.size))
    return found[1][2] / before if found else 1.0


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any kind in 8 bits a colour: 16 bits are scaled, where Pillow clips them to white.

    Raises ValueError for pixels of 32 bits, whose range is not known.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # as Pillow reads grey
        grey = np.asarray(image).astype(np.float64) / 257  # 65,535 becomes 255
        image = Image.fromarray(grey.round().astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, of no known range: store it with 8 or 16 bits")
    return image if image.mode == "RGB" else image.convert("RGB")


class Crops(TorchDataset):
    """Crops of `files` [M]: crops[row, key] gives pixels uint8 [S, S, 3] and colour changes [4]."""

    def __init__(
        self, files: ImageFiles, size: int, how: Augmentation | None = None, square: Square = SQUARE
    ) -> None:
        if not size:
            raise InputError("images in files need an input_size in the recipe")
        if how is not None and how.crop_padding:
            raise InputError("crop_padding is for images in memory: use random_resized_crop for files")
        self.files, self.size, self.how, self.square = files, size, how, square

    def __getitem__(self, crop: Crop) -> tuple[Tensor, Tensor]:
        row, key = crop
        name = self.files.names[row]
        try:
            with Image.open(self.files.folder / name) as image:
                box, mirrored, jitter = self._choices(image, key)
                top, left, height, width = box
                smaller = decode_smaller(image, self.size / min(height, width))
                corners = tuple(smaller * edge for edge in (left, top, left + width, top + height))
                resampling = Image.Resampling[(self.square.resampling if key is None else "bilinear").upper()]
                cut = as_rgb(image).resize((self.size, self.size), resampling, box=corners)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{name} in {self.files.folder} is not a readable image: {error}") from None
        cut = ImageOps.mirror(cut) if mirrored else cut
        return torch.from_numpy(np.array(cut)), jitter

    def __getitems__(self, crops: list[Crop]) -> list[tuple[Tensor, Tensor]]:
        """Several crops, by as many threads as the network has, for Pillow works outside the GIL."""
        if torch.get_num_threads() == 1:  # as in a worker process
            return [self[crop] for crop in crops]
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            return list(threads.map(self.__getitem__, crops))

    def _choices(self, image: Image.Image, key: Key | None) -> tuple[tuple[float, ...], bool, Tensor]:
        """The box to cut (top, left, height, width), whether it is mirrored, and colour changes [4]."""
        box, mirrored, jitter = self.square.box(image.size), False, (1.0, 1.0, 1.0, 0.0)
        if key is not None:
            generator = np.random.default_rng(key)
            if self.how.random_resized_crop:
                box = random_box(image.size, self.how.random_resized_crop, generator)
            mirrored = self.how.flip and generator.random() < 0.5
            if self.how.colour_jitter:
                jitter = random_jitter(self.how, generator)
        return box, mirrored, torch.tensor(jitter, dtype=torch.float32)


def random_box(size: tuple[int, int], smallest: float, generator: np.random.Generator) -> tuple[int, ...]:
    """A box (top, left, height, width) in an image of (width, height) pixels, `smallest` of its area to all.

    As torchvision's RandomResizedCrop, whose draws through torch cost a tenth of the decoding.
    """
    width, height = size
    low, high = ASPECTS
    for _ in range(TRIES):
        area = width * height * generator.uniform(smallest, 1)
        aspect = low * (high / low) ** generator.random()
        across, down = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < across <= width and 0 < down <= height:
            top, left = generator.integers(height - down + 1), generator.integers(width - across + 1)
            return int(top), int(left), down, across
    # An image so narrow or so low: the middle of it, as much as the aspects allow.
    across, down = min(width, round(height * high)), min(height, round(width / low))
    return (height - down) // 2, (width - across) // 2, down, across


def random_jitter(how: Augmentation, generator: np.random.Generator) -> tuple[float, ...]:
    """The colour changes [4] of one image, as `draw_jitter` draws those of a batch."""
    changed = generator.random() < how.jitter_share
    factors = generator.uniform(1 - how.colour_jitter, 1 + how.colour_jitter, 3) if changed else np.ones(3)
    if generator.random() < how.grey:
        factors[2] = 0
    return *factors, generator.uniform(-how.hue, how.hue) if changed else 0.0


def training_batches(
    files: ImageFiles,
    epochs: Iterable[tuple[int, int, Tensor]],
    recipe: Recipe,
    seed: int,
    machine: Machine,
    views: int = 1,
) -> Iterator[Tensor]:
    """Augmented pixels [views * B, 3, S, S] (0..255, float, channels-last) of each step of some epochs.

    epochs: (epoch, first step, batches [steps, B]), with this process's share of every global batch, as
    `samplers.epoch_batches` gives it. With several views, a batch holds the first view of all its images,
    then the second. Workers go on with the next epoch while the network is evaluated.
    """
    how = recipe.augmentation
    crops = Crops(files, recipe.input_size, how)
    for pixels, jitter in _loaded(crops, _training_crops(epochs, seed, machine, views), machine):
        yield apply_jitter(pixels, jitter, with_hue=how.hue > 0) if how.colour_jitter else pixels


def _training_crops(
    epochs: Iterable[tuple[int, int, Tensor]], seed: int, machine: Machine, views: int
) -> Iterator[list[Crop]]:
    """The crops of each step; the position in a key is that in the epoch, for any number of processes."""
    for epoch, first_step, batches in epochs:
        for step, rows in enumerate(batches[first_step:].tolist(), start=first_step):
            positions = range(step * len(rows), (step + 1) * len(rows))
            places = [position * machine.world_size + machine.rank for position in positions]
            yield [
                (row, (seed, epoch, place, view))
                for view in range(views)
                for row, place in zip(rows, places, strict=True)
            ]


def evaluation_batches(
    files: ImageFiles, size: int, machine: Machine, times: int = 1, square: Square = SQUARE
) -> Iterator[Tensor]:
    """Pixels [B, 3, S, S] (0..255, float, channels-last) of all images in order, each its central square.

    times: over again so often, by the same workers.
    """
    batches = (
        [(row, None) for row in rows]
        for _ in range(times)
        for rows in _split(range(len(files)), EVALUATION_BATCH[machine.device.type])
    )
    for pixels, _ in _loaded(Crops(files, size, square=square), batches, machine):
        yield pixels


def _loaded(crops: Crops, batches: Iterable[list[Crop]], machine: Machine) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in order: pixels as float on the device, and their colour changes. Raises DataError."""
    if machine.workers:
        made = _from_workers(crops, batches, machine)
    else:
        whole = (default_collate(crops.__getitems__(batch)) for batch in batches)
        made = ((sent(pixels, machine.device), jitter) for pixels, jitter in whole)
    for pixels, jitter in made:
        yield to_pixels(pixels), jitter


def _from_workers(
    crops: Crops, batches: Iterable[list[Crop]], machine: Machine
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in order, uint8 [B, S, S, 3] on the device, which worker processes make in pieces.

    Raises DataError in the words of a worker's, TrainingError where one is ended from outside.
    """
    _check_shared_memory(crops.size, machine)
    sizes: deque[int] = deque()

    def pieces() -> Iterator[list[Crop]]:
        for batch in batches:
            sizes.append(len(batch))
            yield from _split(batch, PIECE)

    loader = DataLoader(
        crops,
        batch_sampler=pieces(),
        num_workers=machine.workers,
        pin_memory=machine.device.type == "cuda",
        generator=torch.Generator(),  # so that it draws no seed from the global one
        prefetch_factor=PREFETCH,
    )
    parts: list[tuple[Tensor, Tensor]] = []
    try:
        for pixels, jitter in loader:
            # A copy also on the CPU, which gives the worker's shared memory back.
            parts.append((pixels.to(machine.device, non_blocking=True, copy=True), jitter))
            if sum(len(part) for _, part in parts) < sizes[0]:
                continue
            sizes.popleft()
            pixels, jitter = (torch.cat(of) for of in zip(*parts, strict=True))
            parts.clear()
            yield pixels, jitter
    except DataError as error:
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError(
            "a process that decodes images was ended from outside, often for want of memory: "
            "the same command resumes; --workers N takes fewer"
        ) from None


def _split(values: Sequence, size: int) -> Iterator[Sequence]:
    """The values, so many at a time."""
    return (values[first : first + size] for first in range(0, len(values), size))


def _check_shared_memory(size: int, machine: Machine) -> None:
    """Raises TrainingError where /dev/shm cannot hold what the workers keep ready; a full one kills them."""
    if not SHARED_MEMORY.is_dir():
        return
    needed = machine.workers * (PREFETCH + 1) * PIECE * 3 * size**2
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise TrainingError(
            f"{machine.workers} workers need {needed / 1e6:.0f} MB in {SHARED_MEMORY}, where "
            f"{free / 1e6:.0f} MB are free: start a container with --shm-size, or take fewer with --workers N"
        )
