"""LWS, learnable weight scaling (Kang et al., ICLR 2020): one factor a class on the frozen logits."""

import torch
from torch import Tensor, nn

from lt_core.baselines.heads import fit_head
from lt_core.baselines.stage1 import Logits, Stage1
from lt_core.losses import CrossEntropy


class WeightScaling(nn.Module):
    """s_c (w_c . x + b_c), s = 1 at the start: the authors' code scales the bias too, unlike their text."""

    def __init__(self, stage: Stage1) -> None:
        super().__init__()
        self.stage = stage
        self.scales = nn.Parameter(torch.ones(len(stage.rows)))

    def forward(self, features: Tensor) -> Tensor:
        return self.scales * self.stage.logits(features)


def lws(stage: Stage1, learning_rate: float, seed: int = 0) -> Logits:
    """Learn the N factors with cross-entropy and class-aware sampling; all else is frozen."""
    loss = CrossEntropy(stage.counts)
    return fit_head(WeightScaling(stage), stage, loss, "class_aware", learning_rate, seed)
