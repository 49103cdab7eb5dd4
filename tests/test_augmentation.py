"""Batch augmentation against the same thing done image by image."""

import hashlib

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from lt_core.data.augmentation import (
    adjust_hue,
    apply_jitter,
    augment,
    crop_and_flip,
    draw_jitter,
    random_resized_crop,
    resize,
    to_pixels,
)
from lt_core.data.profiles import Augmentation

IMAGES = torch.randint(0, 256, (10, 16, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def jittered(pixels: torch.Tensor, how: Augmentation) -> torch.Tensor:
    return apply_jitter(pixels, draw_jitter(len(pixels), how, generator()), with_hue=how.hue > 0)


def test_crops_are_windows_of_the_reflect_padded_images():
    indices = torch.tensor([3, 3, 7, 0])
    crops = crop_and_flip(IMAGES, indices, 4, True, generator())
    padded = pad(IMAGES.permute(0, 3, 1, 2).float(), (4, 4, 4, 4), mode="reflect").byte().permute(0, 2, 3, 1)
    for index, crop in zip(indices, crops, strict=True):
        windows = [padded[index, y : y + 16, x : x + 12] for y in range(9) for x in range(9)]
        assert any(torch.equal(crop, window) or torch.equal(crop, window.flip(1)) for window in windows)


def test_about_half_of_the_crops_are_mirrored():
    indices = torch.zeros(400, dtype=torch.long)
    crops = crop_and_flip(IMAGES, indices, 0, True, generator())
    mirrored = sum(torch.equal(crop, IMAGES[0].flip(1)) for crop in crops)
    assert 160 < mirrored < 240
    assert sum(torch.equal(crop, IMAGES[0]) for crop in crops) == 400 - mirrored


def test_no_augmentation_gives_the_images_themselves():
    pixels = augment(IMAGES, torch.tensor([1, 2]), Augmentation(), generator())
    assert torch.equal(pixels, IMAGES[1:3].permute(0, 3, 1, 2).float())
    assert pixels.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "how",
    [
        Augmentation(crop_padding=3, flip=True),
        Augmentation(random_resized_crop=0.3, flip=True),
        Augmentation(crop_padding=2, colour_jitter=0.4, hue=0.1, jitter_share=0.8, grey=0.2),
    ],
)
def test_augmentation_is_a_function_of_the_generator(how):
    indices = torch.arange(10)
    one = augment(IMAGES, indices, how, generator(5))
    assert one.shape == (10, 3, 16, 12) and one.min() >= 0 and one.max() <= 255
    assert torch.equal(one, augment(IMAGES, indices, how, generator(5)))
    assert not torch.equal(one, augment(IMAGES, indices, how, generator(6)))


def test_images_in_memory_are_augmented_as_ever():
    """Numbers of an earlier version: trainings that began with it go on and are repeated with this one."""
    pixels = augment(IMAGES, torch.arange(10), Augmentation(crop_padding=3, flip=True), generator())
    content = pixels.byte().contiguous().numpy().tobytes()
    assert hashlib.sha256(content).hexdigest().startswith("b4ebb093efb36f25")
    how = Augmentation(random_resized_crop=0.2, colour_jitter=0.4, hue=0.1, jitter_share=0.8, grey=0.2)
    jitter = [[0.7056, 0.9921, 0.0, 0.0037], [0.8459, 1.3172, 0.0, 0.0395], [1.1073, 0.9645, 0.9214, 0.06]]
    torch.testing.assert_close(draw_jitter(3, how, generator()), torch.tensor(jitter), atol=6e-5, rtol=0)
    means = random_resized_crop(to_pixels(IMAGES), 0.2, True, generator()).mean((1, 2, 3))
    assert means.tolist()[:4] == pytest.approx([120.0008, 128.8602, 122.6894, 127.4631], abs=1e-3)


def test_full_size_crop_is_the_identity():
    pixels = to_pixels(IMAGES)
    cropped = random_resized_crop(pixels, smallest=0.999999, flip=False, generator=generator())
    # area about 1, but the aspect varies: squares stay within the frame, so compare mean brightness only
    assert cropped.mean().item() == pytest.approx(pixels.mean().item(), rel=0.02)


def test_smaller_crops_show_less_of_a_gradient():
    ramp = torch.arange(64, dtype=torch.float32).view(1, 1, 1, 64).expand(200, 3, 64, 64).contiguous()
    cropped = random_resized_crop(ramp, smallest=0.25, flip=False, generator=generator())
    extent = cropped.amax((1, 2, 3)) - cropped.amin((1, 2, 3))
    assert extent.min() < 36 and extent.max() > 56


def test_colour_jitter_keeps_grey_grey_and_stays_in_range():
    grey = torch.full((50, 3, 4, 4), 100.0)
    changed = jittered(grey, Augmentation(colour_jitter=0.4, hue=0.5))
    assert torch.allclose(changed[:, 0], changed[:, 1]) and torch.allclose(changed[:, 1], changed[:, 2])
    means = changed.mean((1, 2, 3))
    assert means.min() >= 59.9 and means.max() <= 140.1 and means.std() > 10


def test_colour_jitter_leaves_the_other_share_alone_and_makes_some_grey():
    coloured = torch.rand(2000, 3, 4, 4, generator=generator()) * 100 + 60
    how = Augmentation(colour_jitter=0.1, hue=0.1, jitter_share=0.5, grey=0.2)
    changed = jittered(coloured, how)
    same = (changed - coloured).abs().amax((1, 2, 3)) < 1e-3
    without_colour = (changed.amax(1) - changed.amin(1)).amax((1, 2)) < 1e-2
    assert same.float().mean().item() == pytest.approx(0.5 * 0.8, abs=0.04)
    assert without_colour.float().mean().item() == pytest.approx(0.2, abs=0.04)


def test_turning_the_hue():
    colours = torch.tensor([[160.0, 100, 90], [90, 150, 120]]).view(2, 3, 1, 1)
    turned = adjust_hue(colours, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(turned, colours, atol=0.1, rtol=0)  # no turn and a whole one
    half = adjust_hue(colours, torch.tensor([0.5, 0.5]))
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    torch.testing.assert_close((half * luma).sum(1), (colours * luma).sum(1), atol=0.1, rtol=0)
    mean = (colours * luma).sum(1, keepdim=True)
    torch.testing.assert_close(half - mean, mean - colours, atol=0.5, rtol=0)  # the opposite colour


def test_resize_and_pass_through():
    pixels = to_pixels(IMAGES[:, :12])
    assert resize(pixels, 24).shape == (10, 3, 24, 24)
    assert resize(pixels, 0) is pixels
    features = torch.rand(4, 8)
    assert resize(to_pixels(features), 24) is features
    assert resize(pixels, 24).min() >= 0 and resize(pixels, 24).max() <= 255
    assert resize(pixels, 24).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("padding", [1, 5])
def test_reflection_matches_numpy(padding):
    images = torch.arange(8, dtype=torch.uint8)[None, None, :, None].expand(1, 8, 8, 3).contiguous()
    expected = np.pad(np.arange(8), padding, mode="reflect")
    crops = [crop_and_flip(images, torch.tensor([0]), padding, False, generator(seed)) for seed in range(40)]
    seen = {tuple(crop[0, 0, :, 0].tolist()) for crop in crops}
    assert seen <= {tuple(expected[s : s + 8].tolist()) for s in range(2 * padding + 1)}
    assert len(seen) > padding
