"""Class-balanced loss (Cui et al., CVPR 2019): cross-entropy weighted by the effective number of images."""

from torch import Tensor
from torch.nn.functional import cross_entropy

from lt_core.losses.base import Loss

BETA = 0.9999


def class_balanced_weights(counts: Tensor, beta: float = BETA) -> Tensor:
    """Weights [N] proportional to (1 - beta) / (1 - beta^n), with sum N (Eq. 3); beta = 0 gives ones."""
    weights = (1 - beta) / (1 - beta ** counts.double())
    return (weights * len(counts) / weights.sum()).float()


class ClassBalanced(Loss):
    """Weighted CE over the sum of the batch's weights, as in the LDAM-DRW code (Cui et al. divide by B)."""

    def __init__(self, counts: Tensor) -> None:
        super().__init__(counts)
        self.register_buffer("weights", class_balanced_weights(counts))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits, target, weight=self.weights)
