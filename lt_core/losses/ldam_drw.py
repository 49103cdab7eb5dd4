"""LDAM with deferred re-weighting (Cao et al., NeurIPS 2019): larger margins for rarer classes."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lt_core.losses.base import Loss
from lt_core.losses.class_balanced import class_balanced_weights


class LDAMDRW(Loss):
    """CE(logits - s m_y on the true class), m_c proportional to n_c^-1/4; at the end with class weights.

    max_margin: m of the rarest class, taken off a cosine.
    scale: the fixed s of the `cosine_fixed` classifier, whose logits are s * cosine.
    deferred_until: share of training after which the class-balanced weights come in; they divide by their sum
        over the batch, as in the authors' code.
    Defaults: the authors' for CIFAR (epoch 160 of 200).
    """

    def __init__(
        self, counts: Tensor, max_margin: float = 0.5, scale: float = 30.0, deferred_until: float = 0.8
    ) -> None:
        super().__init__(counts)
        rarity = counts.double() ** -0.25
        self.register_buffer("margins", (scale * max_margin * rarity / rarity.max()).float())
        self.register_buffer("late_weights", class_balanced_weights(counts))
        self.deferred_until = deferred_until
        self.weighted = False

    def begin_epoch(self, progress: float) -> None:
        self.weighted = progress >= self.deferred_until

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        margins = torch.zeros_like(logits).scatter(1, target[:, None], self.margins[target][:, None])
        weights = self.late_weights if self.weighted else None
        return cross_entropy(logits - margins, target, weight=weights)
