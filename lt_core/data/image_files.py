"""Images that stay in files: read, cropped and resampled by worker processes while the network computes.

Every random choice is a function of (seed, epoch, position in the epoch), so what a network sees depends
neither on the number of workers nor on that of processes. Colours are changed on the device, a batch at once.

    for pixels in training_batches(files, batches, recipe, seed, epoch, first_step, machine):   # [B, 3, S, S]
    for pixels in evaluation_batches(files, size, machine):
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from lt_core.checks import DataError, InputError
from lt_core.data.augmentation import apply_jitter, draw_jitter
from lt_core.data.profiles import Augmentation, Recipe

CENTRE = 0.875  # side of the central square that a test image is cut to, of its shorter side: 224 of 256
ASPECTS = (3 / 4, 4 / 3)  # of random crops
EVALUATION_BATCH = 256  # images
PREFETCH = 4  # batches that each worker keeps ready


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

    def check(self, sample: int) -> None:
        """Decode `sample` images, evenly spaced; raises DataError naming one that cannot be read."""
        crops = Crops(self, 32)
        for row in np.unique(np.linspace(0, len(self) - 1, sample).astype(int)):
            crops[row]


class Crops(TorchDataset):
    """One crop of each of `files` [M]: pixels uint8 [3, S, S] and its colour changes [4].

    keys: the seed of each crop's random choices; without keys it is the central square and nothing changes.
    """

    def __init__(
        self,
        files: ImageFiles,
        size: int,
        how: Augmentation | None = None,
        keys: list[tuple[int, ...]] | None = None,
    ) -> None:
        if not size:
            raise InputError("images in files need an input_size in the recipe")
        if how is not None and how.crop_padding:
            raise InputError("crop_padding is for images in memory: use random_resized_crop for files")
        self.files, self.size, self.how, self.keys = files, size, how, keys

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        name = self.files.names[row]
        try:
            with Image.open(self.files.folder / name) as image:
                box, mirrored, jitter = self._choices(image, row)
                top, left, height, width = box
                corners = (left, top, left + width, top + height)
                size = (self.size, self.size)
                cut = image.convert("RGB").resize(size, Image.Resampling.BILINEAR, box=corners)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{name} in {self.files.folder} is not a readable image: {error}") from None
        pixels = torch.from_numpy(np.array(cut)).permute(2, 0, 1)
        return (pixels.flip(2) if mirrored else pixels), jitter

    def _choices(self, image: Image.Image, row: int) -> tuple[tuple[float, ...], bool, Tensor]:
        """The box to cut (top, left, height, width), whether it is mirrored, and colour changes [4]."""
        from torchvision.transforms import RandomResizedCrop  # takes seconds to import

        box, mirrored, jitter = central_square(image.size), False, torch.tensor([1.0, 1.0, 1.0, 0.0])
        if self.keys is None:
            return box, mirrored, jitter
        # torchvision draws from the global generator: it is seeded for this image, and put back.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(*self.keys[row]))
            if self.how.random_resized_crop:
                scale = [self.how.random_resized_crop, 1.0]
                box = RandomResizedCrop.get_params(image, scale, list(ASPECTS))
            mirrored = self.how.flip and torch.rand(()).item() < 0.5
            if self.how.colour_jitter:
                (jitter,) = draw_jitter(1, self.how, torch.default_generator)
        return box, mirrored, jitter


def central_square(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The central square (top, left, height, width) of an image of (width, height) pixels."""
    side = CENTRE * min(size)
    return (size[1] - side) / 2, (size[0] - side) / 2, side, side


def seed_of(*key: int) -> int:
    """The seed of an independent random stream for each key, such as (seed, epoch, position)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def training_batches(
    files: ImageFiles,
    batches: Tensor,
    recipe: Recipe,
    seed: int,
    epoch: int,
    first_step: int,
    machine: Machine,
    views: int = 1,
) -> Iterator[Tensor]:
    """Augmented pixels [views * B, 3, S, S] (0..255, float, channels-last) of each step from `first_step` on.

    batches [steps, B]: this process's share of every global batch, as `samplers.epoch_batches` gives it.
    With several views, a batch holds the first view of all its images, then the second.
    """
    # The position of an image is that in the whole epoch, the same for any number of processes.
    positions = torch.arange(batches.numel()).view_as(batches) * machine.world_size + machine.rank
    rows, positions = (values[first_step:].repeat(1, views).flatten() for values in (batches, positions))
    view = torch.arange(views).repeat_interleave(batches.shape[1]).repeat(len(batches) - first_step)
    keys = [(seed, epoch, *key) for key in zip(positions.tolist(), view.tolist(), strict=True)]

    how = recipe.augmentation
    crops = Crops(files[rows], recipe.input_size, how, keys)
    for pixels, jitter in _loaded(crops, views * batches.shape[1], machine):
        yield apply_jitter(pixels, jitter, with_hue=how.hue > 0) if how.colour_jitter else pixels


def evaluation_batches(files: ImageFiles, size: int, machine: Machine) -> Iterator[Tensor]:
    """Pixels [B, 3, S, S] (0..255, float, channels-last) of all images in order, each its central square."""
    for pixels, _ in _loaded(Crops(files, size), EVALUATION_BATCH, machine):
        yield pixels


def _loaded(crops: Crops, batch_size: int, machine: Machine) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in order, pixels as float on the device. A worker's DataError arrives as its own sentence."""
    loader = DataLoader(
        crops,
        batch_size,
        num_workers=machine.workers,
        pin_memory=machine.device.type == "cuda",
        generator=torch.Generator(),  # so that it draws no seed from the global one
        prefetch_factor=PREFETCH if machine.workers else None,
    )
    try:
        for pixels, jitter in loader:
            pixels = pixels.to(machine.device, non_blocking=True)
            yield pixels.to(dtype=torch.float32, memory_format=torch.channels_last), jitter
    except DataError as error:
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None
