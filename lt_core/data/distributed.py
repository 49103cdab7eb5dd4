"""What several processes share: batch norms and losses over the whole batch, and one array of features.

synchronise_batch_norms(model, device)        # before the model is wrapped in DistributedDataParallel
logits = whole_batch(logits)                  # [B, N] of each process -> [W B, N] in the order of one process
features = shared_features(len(files), 2048, blocks_of, rank, world_size)     # [M, F] float32, mapped
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lt_core import paths

# ---------------------------------------------------------------- batch norm


def synchronise_batch_norms(model: nn.Module, device: torch.device) -> None:
    """Make every batch norm of the model one over all processes, its parameters and buffers unchanged.

    Training then does not depend on how many processes there are. On the CPU the batch norms of timm's
    networks, which contain their activation, stay as they are.
    """
    if device.type == "cpu":
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = CPUSyncBatchNorm2d
        return
    from timm.layers import convert_sync_batchnorm

    for name, child in model.named_children():
        setattr(model, name, convert_sync_batchnorm(child))


class CPUSyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.SyncBatchNorm` for the CPU, which it does not support: mean and variance are summed by gloo."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [B, C, H, W]; every process takes part in each training step, with as many images or not."""
        if not self.training:
            return super().forward(inputs)
        number = torch.tensor([inputs.numel() / inputs.shape[1]], dtype=torch.float64)
        dist.all_reduce(number)
        mean = _Sum.apply(inputs.sum((0, 2, 3))) / number.to(inputs)
        centred = inputs - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / number.to(inputs)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (number / (number - 1)).to(inputs), self.momentum)
        factor = self.weight * (variance + self.eps).rsqrt()
        return centred * factor[:, None, None] + self.bias[:, None, None]


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient.contiguous())


# ---------------------------------------------------------------- the whole batch


def world() -> tuple[int, int]:
    """(rank, number of processes) of the group that torchrun made; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share_of_batch(rows: Tensor) -> Tensor:
    """This process's share of rows [M, ...] that all of them hold: what `whole_batch` puts together again."""
    rank, world_size = world()
    return rows[rank::world_size]


def whole_batch(rows: Tensor, number: int | None = None) -> Tensor:
    """The rows of all processes [M, ...], in the order that they have in one process.

    rows [B, ...]: this process's share. number: M where shares differ in length, else W B. A gradient reaches
    the process's own rows alone. All processes compute the same from the result, so that the gradient of W
    times its loss, averaged over processes, is that of the loss.
    """
    rank, world_size = world()
    number = world_size * len(rows) if number is None else number
    if world_size == 1 or number == 0:
        return rows
    length = -(-number // world_size)
    padded = rows.new_zeros(length, *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded)
    parts[rank] = torch.cat([rows, padded[len(rows) :]])
    return torch.stack(parts, dim=1).flatten(0, 1)[:number]


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of a tensor over all processes, without gradient."""
    _, world_size = world()
    if world_size == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / world_size


# ---------------------------------------------------------------- features


def shared_features(
    num_images: int,
    num_features: int,
    blocks_of: Callable[[slice], Iterator[Tensor]],
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    """Features [M, F] of all images as a memory-mapped float32 tensor, of which each process makes a share.

    blocks_of(rows): the features [b, F] of the images `rows`, in order and a block at a time, so that they
    are never held in memory as a whole. Every process of the group must call it, and all of them must see the
    folder `.cache/features`. Nothing stays there: the file goes with the tensor.
    """
    # The first process makes an empty array; the others are told where.
    place: list[str] = [""]
    if rank == 0:
        folder = paths.decoded() / "features"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(suffix=".npy", dir=folder, delete=False) as file:
            place = [file.name]
        np.lib.format.open_memmap(place[0], "w+", np.float32, (num_images, num_features))
    if world_size > 1:
        dist.broadcast_object_list(place)
    path = Path(place[0])

    # Each process writes its rows, not through the map: over a network, maps overwrite what lies beside them.
    first, last = (num_images * part // world_size for part in (rank, rank + 1))
    with open(path, "r+b") as file:
        file.seek(np.load(path, mmap_mode="r").offset + first * num_features * np.float32().itemsize)
        for block in blocks_of(slice(first, last)):
            file.write(block.float().numpy().tobytes())

    # All map the whole array; what is mapped stays until it is let go, also without a name.
    _wait(world_size)
    features = torch.from_numpy(np.load(path, mmap_mode="c"))
    _wait(world_size)
    if rank == 0:
        path.unlink()
    return features


def _wait(world_size: int) -> None:
    if world_size > 1:
        dist.barrier()
