"""A device for tests without a GPU: what lies there cannot meet what lies on the CPU, but for copies.

with Elsewhere():
    features.to(DEVICE) @ weights         # raises, as on a GPU
    (features.to(DEVICE) @ weights.to(DEVICE)).cpu()
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("meta")  # no values lie on torch's own meta device: each is kept beside, on the CPU
CPU = torch.device("cpu")
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class There(Tensor):
    """A tensor on DEVICE."""

    @staticmethod
    def __new__(cls, values: Tensor) -> There:
        return Tensor._make_wrapper_subclass(
            cls, values.shape, values.stride(), values.storage_offset(), dtype=values.dtype, device=DEVICE
        )

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __repr__(self, **_: object) -> str:
        return f"There({self.values})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        there = [isinstance(tensor, There) for tensor in tensors]
        if function not in COPIES and not all(t or not x.ndim for t, x in zip(there, tensors, strict=True)):
            raise RuntimeError(f"{function}: tensors on the CPU and elsewhere")
        goes = kwargs.get("device", DEVICE if any(there) else CPU)
        inner = tree_map_only(There, lambda tensor: tensor.values, (args, kwargs))
        inner = tree_map_only(torch.device, lambda _: CPU, inner)
        result = function(*inner[0], **inner[1])
        for before, now in zip(tree_flatten((args, kwargs))[0], tree_flatten(inner)[0], strict=True):
            if before is not now and result is now:  # in place: the tensor that was given
                return before
        return result if goes == CPU else tree_map_only(Tensor, There, result)


class Elsewhere(TorchDispatchMode):
    """Within it, what is made on DEVICE lies there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (kwargs or {}).get("device") == DEVICE:
            return There.__torch_dispatch__(function, types, args, kwargs)
        return function(*args, **(kwargs or {}))
