"""LDAM with deferred re-weighting (Cao et al., NeurIPS 2019): larger margins for rarer classes."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lt_core.losses.base import Loss
from lt_core.losses.class_balanced import class_balanced_weights
from lt_core.models import FIXED_SCALE

MAX_MARGIN = 0.5  # of a cosine, for the rarest class
DEFERRED_UNTIL = 0.8  # share of training before the weights come in: epoch 160 of 200


class LDAMDRW(Loss):
    """CE(logits - s m_y on the true class), m_c proportional to n_c^-1/4; at the end with class weights.

    The logits are s * cosine with the fixed s of `cosine_fixed`, so the margin is taken off the cosine. The
    class-balanced weights of the last phase divide by their sum over the batch, as in the authors' code.
    """

    def __init__(self, counts: Tensor) -> None:
        super().__init__(counts)
        rarity = counts.double() ** -0.25
        self.register_buffer("margins", (FIXED_SCALE * MAX_MARGIN * rarity / rarity.max()).float())
        self.register_buffer("late_weights", class_balanced_weights(counts))
        self.weighted = False

    def begin_epoch(self, progress: float) -> None:
        self.weighted = progress >= DEFERRED_UNTIL

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        margins = torch.zeros_like(logits).scatter(1, target[:, None], self.margins[target][:, None])
        weights = self.late_weights if self.weighted else None
        return cross_entropy(logits - margins, target, weight=weights)
