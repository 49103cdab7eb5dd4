"""Which training images a step sees (paper, Sec. 4.4): uniform, class-aware, square root.

A sampler is a function `(labels [M], length, generator) -> image indices [length]`.

    batches = epoch_batches("square_root", labels, batch_size=128, seed=0, epoch=3)   # [steps, 128]
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from lt_core.checks import InputError, unknown

IMAGES_PER_TURN = 4  # of a class in class-aware sampling: "common practice is 4 samples" (Sec. 4.4)


def uniform(labels: np.ndarray, length: int, generator: np.random.Generator) -> np.ndarray:
    """Every image once, in random order: the first `length` entries (of further permutations if longer)."""
    rounds = -(-length // len(labels))
    return np.concatenate([generator.permutation(len(labels)) for _ in range(rounds)])[:length]


def square_root(labels: np.ndarray, length: int, generator: np.random.Generator) -> np.ndarray:
    """With replacement: class j with probability sqrt(n_j) / sum_i sqrt(n_i), then any image of it."""
    counts = np.bincount(labels)
    class_mass = np.sqrt(counts) / np.sqrt(counts).sum()
    image_mass = class_mass[labels] / counts[labels]
    cumulative = np.cumsum(image_mass)
    return np.searchsorted(cumulative, generator.random(length) * cumulative[-1], side="right")


def class_aware(labels: np.ndarray, length: int, generator: np.random.Generator) -> np.ndarray:
    """Every class equally often ("class uniform" in the paper's text): classes in shuffled cycles.

    A turn takes 4 images in a row from the class's own shuffled cycle, so that any 4 N images aligned with a
    cycle hold each of the N classes exactly 4 times.
    """
    classes = np.unique(labels)
    cycles = -(-length // (IMAGES_PER_TURN * len(classes)))
    order = np.concatenate([generator.permutation(len(classes)) for _ in range(cycles)])
    drawn = np.empty((len(order), IMAGES_PER_TURN), dtype=np.int64)
    for position, label in enumerate(classes):
        images = np.flatnonzero(labels == label)
        rounds = -(-cycles * IMAGES_PER_TURN // len(images))
        stream = np.concatenate([generator.permutation(images) for _ in range(rounds)])
        drawn[order == position] = stream[: cycles * IMAGES_PER_TURN].reshape(cycles, IMAGES_PER_TURN)
    return drawn.reshape(-1)[:length]


SAMPLERS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "uniform": uniform,
    "class_aware": class_aware,
    "square_root": square_root,
}


def epoch_batches(
    sampler: str,
    labels: torch.Tensor,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
) -> torch.Tensor:
    """Image indices [steps, batch_size / world_size] of one epoch of floor(M / batch_size) steps.

    A pure function of its arguments: to resume at a step, start reading at that row. Process `rank` of
    `world_size` gets its share of each batch, so that all shares of a step together are the same batch
    for any number of processes. Raises InputError for an unknown sampler or a batch that does not fit.
    """
    if sampler not in SAMPLERS:
        raise InputError(unknown("sampler", sampler, list(SAMPLERS)))
    if not 1 <= batch_size <= len(labels):
        raise InputError(f"batch_size must lie in 1..{len(labels)} (the training images), found {batch_size}")
    if batch_size % world_size or not 0 <= rank < world_size:
        raise InputError(f"batch_size {batch_size} does not split over {world_size} processes (rank {rank})")
    steps = len(labels) // batch_size
    generator = np.random.default_rng([seed, epoch])
    indices = SAMPLERS[sampler](labels.cpu().numpy(), steps * batch_size, generator)
    return torch.from_numpy(indices.reshape(steps, batch_size)[:, rank::world_size].copy())
