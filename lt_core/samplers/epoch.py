"""The batches of one epoch, the same on every process and after every restart."""

from collections.abc import Callable

import numpy as np
import torch

from lt_core.errors import InputError, unknown
from lt_core.samplers.class_aware import class_aware
from lt_core.samplers.square_root import square_root
from lt_core.samplers.uniform import uniform

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
    indices = SAMPLERS[sampler](labels.numpy(), steps * batch_size, generator)
    return torch.from_numpy(indices.reshape(steps, batch_size)[:, rank::world_size].copy())
