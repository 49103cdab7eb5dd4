"""Batch norm over the images of all processes, so that training does not depend on how many there are.

synchronise_batch_norms(model, device)        # before the model is wrapped in DistributedDataParallel
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


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


def synchronise_batch_norms(model: nn.Module, device: torch.device) -> None:
    """Make every batch norm of the model one over all processes, its parameters and buffers unchanged.

    On the CPU those of timm's networks, which contain their activation, stay as they are.
    """
    if device.type == "cpu":
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = CPUSyncBatchNorm2d
        return
    from timm.layers import convert_sync_batchnorm

    for name, child in model.named_children():
        setattr(model, name, convert_sync_batchnorm(child))
