"""Images that stay in files: read, cropped and resampled by worker processes while the network computes.

Every random choice is a function of (seed, epoch, position in the epoch), so what a network sees depends
neither on the number of workers nor on that of processes. Colours are changed on the device, a batch at once.

    for pixels in training_batches(files, batches, recipe, seed, epoch, first_step, machine):   # [B, 3, S, S]
    for pixels in evaluation_batches(files, size, machine):
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from lt_core.augmentation import change_colours, draw_colours
from lt_core.errors import DataError, InputError
from lt_core.profiles import Augmentation, Recipe

CENTRE = 0.875  # side of the central square that a test image is cut to, of its shorter side: 224 of 256
ASPECTS = (3 / 4, 4 / 3)  # of random crops
EVALUATION_BATCH = 256  # images
PREFETCH = 4  # batches that each worker keeps ready


class Place(Protocol):
    """What decoding must know of a `train.Machine`."""

    device: torch.device
    rank: int
    world_size: int
    workers: int
    decodes_on_device: bool


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
        chosen = np.unique(np.linspace(0, len(self) - 1, sample).astype(int))
        decoder = Decoder(self[torch.from_numpy(chosen)], 32)
        for _ in _loaded(decoder, [[Key(row)] for row in range(len(chosen))], workers=0):
            pass


class Key(NamedTuple):
    """One image to decode, and the key of its random choices (none: its centre, as it is)."""

    row: int
    random: tuple[int, ...] = ()


class Decoded(NamedTuple):
    """Pixels uint8 [3, S, S], or a JPEG file's bytes with the box [4] (top, left, height, width) to cut."""

    pixels: Tensor
    box: Tensor
    mirrored: Tensor
    colours: Tensor


def seed_of(*key: int) -> int:
    """The seed of an independent random stream for each key, such as (seed, epoch, position)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


class Decoder(TorchDataset):
    """What the worker processes do: a `Key` -> a `Decoded`."""

    def __init__(
        self, files: ImageFiles, size: int, how: Augmentation | None = None, keep_jpeg: bool = False
    ) -> None:
        if not size:
            raise InputError("images in files need an input_size in the recipe")
        if how is not None and how.crop_padding:
            raise InputError("crop_padding is for images in memory: use random_resized_crop for files")
        self.files, self.size, self.how, self.keep_jpeg = files, size, how or Augmentation(), keep_jpeg

    def __getitem__(self, key: Key) -> Decoded:
        name = self.files.names[key.row]
        try:
            content = (self.files.folder / name).read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                box, mirrored, colours = self._choices(image, key.random)
                if self.keep_jpeg and image.format == "JPEG" and image.mode in ("RGB", "L"):
                    pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                else:
                    pixels = self._cut(image, box, mirrored)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{name} in {self.files.folder} is not a readable image: {error}") from None
        return Decoded(pixels, torch.tensor(box), torch.tensor(mirrored), colours)

    def _choices(self, image: Image.Image, key: tuple[int, ...]) -> tuple[tuple[float, ...], bool, Tensor]:
        """The box to cut, whether it is mirrored, and colour changes [1, 4]."""
        from torchvision.transforms import RandomResizedCrop

        if not key:
            return centre_box(image.size), False, torch.empty(1, 4)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(*key))
            box = centre_box(image.size)
            if self.how.random_resized_crop:
                scale = [self.how.random_resized_crop, 1.0]
                box = RandomResizedCrop.get_params(image, scale, list(ASPECTS))
            mirrored = self.how.flip and torch.rand(()).item() < 0.5
            colours = torch.empty(1, 4)
            if self.how.colour_jitter:
                colours = draw_colours(1, self.how, torch.default_generator)
        return tuple(map(float, box)), mirrored, colours

    def _cut(self, image: Image.Image, box: Sequence[float], mirrored: bool) -> Tensor:
        top, left, height, width = box
        corners = (left, top, left + width, top + height)
        cut = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR, box=corners)
        pixels = torch.from_numpy(np.array(cut)).permute(2, 0, 1)
        return pixels.flip(2) if mirrored else pixels


def centre_box(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The central square (top, left, height, width) of an image of (width, height) pixels."""
    side = CENTRE * min(size)
    return (size[1] - side) / 2, (size[0] - side) / 2, side, side


def training_batches(
    files: ImageFiles,
    batches: Tensor,
    recipe: Recipe,
    seed: int,
    epoch: int,
    first_step: int,
    machine: Place,
    views: int = 1,
) -> Iterator[Tensor]:
    """Augmented pixels [views * B, 3, S, S] (0..255, float, channels-last) of each step from `first_step` on.

    batches [steps, B]: this process's share of every global batch, as `samplers.epoch_batches` gives it. The
    position of an image is that in the whole epoch, the same for any number of processes.
    """
    how = recipe.augmentation
    steps, share = batches.shape
    positions = (
        torch.arange(steps)[:, None] * share + torch.arange(share)
    ) * machine.world_size + machine.rank
    keys = [
        [
            Key(row, (seed, epoch, position, view))
            for view, (row, position) in product(range(views), zip(rows, places, strict=True))
        ]
        for rows, places in zip(batches[first_step:].tolist(), positions[first_step:].tolist(), strict=True)
    ]
    decoder = Decoder(files, recipe.input_size, how, keep_jpeg=machine.decodes_on_device)
    for batch in _loaded(decoder, keys, machine.workers, pinned=machine.device.type == "cuda"):
        pixels = _on_device(batch, recipe.input_size, machine.device)
        yield change_colours(pixels, batch.colours, turn=how.hue > 0) if how.colour_jitter else pixels


def evaluation_batches(files: ImageFiles, size: int, machine: Place) -> Iterator[Tensor]:
    """Pixels [B, 3, S, S] of all images in order, each cut to its central square."""
    rows = [Key(row) for row in range(len(files))]
    keys = [rows[start : start + EVALUATION_BATCH] for start in range(0, len(rows), EVALUATION_BATCH)]
    decoder = Decoder(files, size, keep_jpeg=machine.decodes_on_device)
    for batch in _loaded(decoder, keys, machine.workers, pinned=machine.device.type == "cuda"):
        yield _on_device(batch, size, machine.device)


class Batch(NamedTuple):
    """Several `Decoded`: pixels [B, 3, S, S], or a list where some of them are still JPEG files."""

    pixels: Tensor | list[Tensor]
    boxes: Tensor
    mirrored: Tensor
    colours: Tensor


def _collate(images: list[Decoded]) -> Batch:
    pixels = [image.pixels for image in images]
    decoded = all(one.ndim == 3 for one in pixels)
    return Batch(
        torch.stack(pixels) if decoded else pixels,
        torch.stack([image.box for image in images]),
        torch.stack([image.mirrored for image in images]),
        torch.cat([image.colours for image in images]),
    )


def _loaded(decoder: Decoder, keys: list[list[Key]], workers: int, pinned: bool = False) -> Iterator[Batch]:
    """The batches of `keys`, in order. A worker's DataError arrives as its own one sentence."""
    options: dict[str, Any] = {"prefetch_factor": PREFETCH} if workers else {}
    loader = DataLoader(
        decoder,
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pinned,
        generator=torch.Generator(),  # so that it draws no seed from the global one
        **options,
    )
    try:
        yield from loader
    except DataError as error:
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None


def _on_device(batch: Batch, size: int, device: torch.device) -> Tensor:
    """Pixels [B, 3, S, S] as float in channels-last memory; what is still a JPEG file is decoded here."""
    pixels = batch.pixels
    if isinstance(pixels, list):
        pixels = decoded_on(device, batch, size)
    pixels = pixels.to(device, non_blocking=True)
    return pixels.to(dtype=torch.float32, memory_format=torch.channels_last)


def decoded_on(device: torch.device, batch: Batch, size: int) -> Tensor:
    """JPEG files decoded, cut and resampled on a device (GPUs have decoders): uint8 [B, 3, S, S]."""
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2.functional import resized_crop

    files = [row for row, one in enumerate(batch.pixels) if one.ndim == 1]
    made = [one if one.ndim == 3 else None for one in batch.pixels]
    contents = [batch.pixels[row] for row in files]
    with warnings.catch_warnings(action="ignore"):  # torchvision announces that torchcodec will replace it
        images = decode_jpeg(contents, mode=ImageReadMode.RGB, device=device) if files else []
    for row, image in zip(files, images, strict=True):
        top, left, height, width = (round(value) for value in batch.boxes[row].tolist())
        cut = resized_crop(image, top, left, height, width, [size, size], antialias=True)
        made[row] = cut.flip(2) if batch.mirrored[row] else cut
    return torch.stack([one.to(device) for one in made])
