"""Features of image files, extracted by all processes together and never held in memory as a whole.

Each process writes its share of the images as one shard; the first one copies the shards, block by block,
into one float16 array on disk, which all of them then map. A folder that all computers see is needed.

    features = shared_features(backbone, files, 224, machine)     # [M, F] float16, mapped
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lt_core import paths
from lt_core.image_files import ImageFiles
from lt_core.train import Machine, feature_batches

ROWS = 2**13  # copied at once: 32 MB of 2048 features


def shared_features(backbone: nn.Module, files: ImageFiles, input_size: int, machine: Machine) -> Tensor:
    """Features [M, F] of all images, without augmentation, as a memory-mapped float16 tensor.

    Every process of the group must call it. Nothing is left on disk: the array goes with the tensor.
    """
    folder = _common_folder(machine)
    bounds = np.linspace(0, len(files), machine.world_size + 1).astype(int)
    shards = [folder / f"{rank}-of-{machine.world_size}.npy" for rank in range(machine.world_size)]
    share = files[slice(bounds[machine.rank], bounds[machine.rank + 1])]
    _write_shard(shards[machine.rank], backbone, share, input_size, machine)
    _wait(machine)
    merged = folder / "all.npy"
    if machine.rank == 0:
        _merge(shards, merged, len(files))
    _wait(machine)
    features = torch.from_numpy(np.load(merged, mmap_mode="c"))
    _wait(machine)
    if machine.rank == 0:
        shutil.rmtree(folder)  # what is mapped stays until it is let go
    return features


def _common_folder(machine: Machine) -> Path:
    """A new folder, which the first process makes and the others are told of."""
    place = [""]
    if machine.rank == 0:
        parent = paths.decoded() / "features"
        parent.mkdir(parents=True, exist_ok=True)
        place = [tempfile.mkdtemp(dir=parent)]
    if machine.world_size > 1:
        dist.broadcast_object_list(place)
    return Path(place[0])


def _write_shard(
    shard: Path, backbone: nn.Module, files: ImageFiles, input_size: int, machine: Machine
) -> None:
    """One process's rows [m, F] as float16, a batch at a time."""
    array = np.lib.format.open_memmap(shard, "w+", np.float16, (len(files), backbone.num_features))
    row = 0
    for features in feature_batches(backbone, files, input_size, machine):
        array[row : row + len(features)] = features.numpy()
        row += len(features)
    array.flush()


def _merge(shards: list[Path], merged: Path, length: int) -> None:
    """The shards, in order, as one array; they are deleted."""
    parts = [np.load(shard, mmap_mode="r") for shard in shards]
    array = np.lib.format.open_memmap(merged, "w+", np.float16, (length, parts[0].shape[1]))
    row = 0
    for part, shard in zip(parts, shards, strict=True):
        for start in range(0, len(part), ROWS):
            block = part[start : start + ROWS]
            array[row : row + len(block)] = block
            row += len(block)
        shard.unlink()
    array.flush()


def _wait(machine: Machine) -> None:
    if machine.world_size > 1:
        dist.barrier()
