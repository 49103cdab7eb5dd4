"""DisAlign (Zhang et al., CVPR 2021): frozen logits, calibrated where the input asks for it."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from lt_core.baselines.heads import fit_head
from lt_core.baselines.stage1 import Logits, Stage1
from lt_core.losses import Loss


class Alignment(nn.Module):
    """z + k (s z + o) with the confidence k = sigmoid(v . norm(x) + v0), from the authors' s = 1, o = 0.

    The paper's k (a z + o) + (1 - k) z is the same with a = 1 + s. The confidence reads the direction of the
    feature as the authors' cosine version does; raw features after a ReLU would hold it at 1.
    """

    def __init__(self, stage: Stage1) -> None:
        super().__init__()
        self.stage = stage
        num_classes, num_features = stage.rows.shape
        self.scales = nn.Parameter(torch.ones(num_classes))
        self.offsets = nn.Parameter(torch.zeros(num_classes))
        self.confidence = nn.utils.skip_init(nn.Linear, num_features, 1)
        nn.init.constant_(self.confidence.weight, 0.1)
        nn.init.zeros_(self.confidence.bias)

    def forward(self, features: Tensor) -> Tensor:
        z = self.stage.logits(features)
        k = self.confidence(normalize(features, dim=1)).sigmoid()
        return z + k * (self.scales * z + self.offsets)


def reweighting(counts: Tensor, rho: float) -> Tensor:
    """Class weights [N] of generalised re-weighting (Eq. 9): N p_c^-rho / sum_j p_j^-rho."""
    weights = (counts.double() / counts.sum()) ** -rho
    return (len(counts) * weights / weights.sum()).float()


class GeneralisedReweighting(Loss):
    """Weighted cross-entropy, divided by the sum of the batch's weights."""

    def __init__(self, counts: Tensor, rho: float) -> None:
        super().__init__(counts)
        self.register_buffer("weights", reweighting(counts, rho))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits, target, weight=self.weights)


def disalign(stage: Stage1, rho: float, learning_rate: float, seed: int = 0) -> Logits:
    """Learn the calibration (2 N + F + 1 numbers) with instance-uniform sampling; all else is frozen."""
    loss = GeneralisedReweighting(stage.counts, rho)
    return fit_head(Alignment(stage), stage, loss, "uniform", learning_rate, seed)
