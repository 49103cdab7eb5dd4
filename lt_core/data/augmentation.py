"""Training batches from a uint8 image array: crop, flip and colour jitter of the whole batch at once.

Runs on the device that holds the images. Every random choice comes from the generator given.

    pixels = augment(images, indices, recipe.augmentation, generator)      # float [B, C, H, W]
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from lt_core.data.profiles import Augmentation

# Red, green, blue to luma (ITU-R BT.601) and the two colour axes of YIQ, in whose plane hue is an angle.
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


def augment(images: Tensor, indices: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Images [M, H, W, C] (uint8) at `indices` [B], augmented: pixels 0..255 as float [B, C, H, W].

    The result is channels-last in memory, which convolutions on CPU and GPU run fastest on.
    """
    indices = sent(indices, images.device)
    if how.random_resized_crop:
        pixels = to_pixels(images.index_select(0, indices))
        pixels = random_resized_crop(pixels, how.random_resized_crop, how.flip, generator)
    elif how.crop_padding or how.flip:
        pixels = to_pixels(crop_and_flip(images, indices, how.crop_padding, how.flip, generator))
    else:
        pixels = to_pixels(images.index_select(0, indices))
    if how.colour_jitter:
        pixels = apply_jitter(pixels, draw_jitter(len(pixels), how, generator), with_hue=how.hue > 0)
    return pixels


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values on the device, without waiting for it: the step runs ahead of a GPU."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def to_pixels(batch: Tensor) -> Tensor:
    """uint8 [B, H, W, C] as float [B, C, H, W] in channels-last memory (features [B, F] pass through)."""
    return batch.permute(0, 3, 1, 2).float() if batch.ndim == 4 else batch


def resize(pixels: Tensor, size: int) -> Tensor:
    """Bicubic resampling of pixels [B, C, H, W] to size x size, clipped to 0..255; size 0 keeps them."""
    if not size or pixels.ndim != 4 or pixels.shape[-1] == size:
        return pixels
    # The kernel for planes of one colour is faster than that for channels-last memory, and gives the same.
    resized = interpolate(pixels.contiguous(), size=(size, size), mode="bicubic", align_corners=False)
    return resized.clamp_(0, 255).contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- crops


def crop_and_flip(
    images: Tensor, indices: Tensor, padding: int, flip: bool, generator: torch.Generator
) -> Tensor:
    """Random crops of images with a reflected border, half of them mirrored: uint8 [B, H, W, C].

    One gather does padding, crop and flip: the reflected border exists only as index arithmetic.
    """
    batch, (height, width, channels) = len(indices), images.shape[1:]
    top = torch.randint(2 * padding + 1, (batch, 1), generator=generator) - padding
    left = torch.randint(2 * padding + 1, (batch, 1), generator=generator) - padding
    rows = _reflect(top + torch.arange(height), height)
    columns = _reflect(left + torch.arange(width), width)
    if flip:
        mirrored = torch.rand((batch, 1), generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = sent(rows, images.device), sent(columns, images.device)
    flat = rows[:, :, None] * width + columns[:, None, :] + indices[:, None, None] * (height * width)
    return images.reshape(-1, channels)[flat.reshape(-1)].reshape(batch, height, width, channels)


def _reflect(positions: Tensor, size: int) -> Tensor:
    """-1 -> 1, size -> size - 2: a border mirrored without repeating the edge."""
    positions = positions.abs()
    return torch.where(positions >= size, 2 * (size - 1) - positions, positions)


def random_resized_crop(pixels: Tensor, smallest: float, flip: bool, generator: torch.Generator) -> Tensor:
    """Crops of `smallest`..1 of the area, aspect 3/4..4/3, resampled to full size (bilinear), half mirrored.

    As torchvision's RandomResizedCrop, but a box that does not fit is clipped instead of drawn again.
    """

    def uniform(*shape: int, low: float = -1.0) -> Tensor:
        return torch.empty(shape).uniform_(low, 1, generator=generator)

    # Boxes: width and height as fractions of the image, and where their centres lie, -1..1.
    batch = len(pixels)
    area = uniform(batch, low=smallest)
    aspect = torch.exp(uniform(batch) * torch.log(torch.tensor(4 / 3)))
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    shift = uniform(2, batch)
    mirror = torch.ones(batch)
    if flip:
        mirror = torch.where(torch.rand(batch, generator=generator) < 0.5, -1.0, 1.0)

    # Where the crops' pixels are taken from; a negative width mirrors.
    across = sent(_positions(width * mirror, shift[0] * (1 - width), pixels.shape[3]), pixels.device)
    down = sent(_positions(height, shift[1] * (1 - height), pixels.shape[2]), pixels.device)
    grid = torch.stack(torch.broadcast_tensors(across[:, None, :], down[:, :, None]), dim=3)
    cropped = grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return cropped.contiguous(memory_format=torch.channels_last)


def _positions(scale: Tensor, shift: Tensor, size: int) -> Tensor:
    """Where to sample along one axis [B, size], -1..1 from border to border (affine_grid, no rotation)."""
    centres = (2 * torch.arange(size) + 1) / size - 1
    return scale[:, None] * centres + shift[:, None]


# ---------------------------------------------------------------- colours


def draw_jitter(batch: int, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Random colour changes [B, 4]: factors of brightness, contrast and saturation, turn of the hue.

    `jitter_share` of the images change, the rest gets 1, 1, 1, 0; `grey` of all lose their colours.
    """
    strength = how.colour_jitter
    changed = torch.rand(batch, generator=generator) < how.jitter_share

    def factors() -> Tensor:
        values = torch.empty(batch).uniform_(1 - strength, 1 + strength, generator=generator)
        return torch.where(changed, values, 1.0)

    brightness, contrast, saturation, turns = factors(), factors(), factors(), torch.zeros(batch)
    if how.grey:
        saturation[torch.rand(batch, generator=generator) < how.grey] = 0
    if how.hue:
        turns = torch.empty(batch).uniform_(-how.hue, how.hue, generator=generator)
        turns = torch.where(changed, turns, 0.0)
    return torch.stack([brightness, contrast, saturation, turns], dim=1)


def apply_jitter(pixels: Tensor, jitter: Tensor, with_hue: bool) -> Tensor:
    """Pixels [B, C, H, W] after the colour changes `jitter` [B, 4], clipped to 0..255; hue only `with_hue`.

    As torchvision's ColorJitter in the order brightness, contrast, saturation, hue, but hue turns in YIQ.
    """
    changes = sent(jitter, pixels.device)
    brightness, contrast, saturation = changes[:, :3].T[..., None, None, None]  # [B, 1, 1, 1] each
    luma = sent(YIQ[0], pixels.device)
    pixels = (pixels * brightness).clamp_(0, 255)
    mean = (pixels.mean((2, 3)) @ luma)[:, None, None, None]
    pixels.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 255)
    grey = (pixels.permute(0, 2, 3, 1) @ luma)[:, None]
    pixels.mul_(saturation).add_(grey * (1 - saturation)).clamp_(0, 255)
    return adjust_hue(pixels, jitter[:, 3]) if with_hue else pixels


def adjust_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """The colours of each image turned by `turns` [B] of the colour circle; luma stays (but for clipping)."""
    cosine, sine = torch.cos(2 * torch.pi * turns), torch.sin(2 * torch.pi * turns)
    rotation = torch.zeros(len(turns), 3, 3)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = cosine
    rotation[:, 1, 2], rotation[:, 2, 1] = -sine, sine
    matrices = sent(torch.linalg.inv(YIQ) @ rotation @ YIQ, pixels.device)
    turned = pixels.permute(0, 2, 3, 1).flatten(1, 2) @ matrices.transpose(1, 2)
    return turned.unflatten(1, pixels.shape[2:]).permute(0, 3, 1, 2).clamp_(0, 255)
