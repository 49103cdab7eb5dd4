"""Balanced softmax (Ren et al., NeurIPS 2020): cross-entropy of the logits plus the log class counts."""

from torch import Tensor
from torch.nn.functional import cross_entropy

from lt_core.losses.base import Loss


class BalancedSoftmax(Loss):
    """CE(logits + log n, target). n counts the training set, whatever the sampler; test uses plain logits."""

    def __init__(self, counts: Tensor) -> None:
        super().__init__(counts)
        self.register_buffer("log_counts", counts.double().log().float())

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits + self.log_counts, target)
