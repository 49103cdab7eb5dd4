"""LADE (Hong et al., CVPR 2021): balanced softmax and a regulariser that disentangles the training prior.

The regulariser (Eq. 9) pulls each logit to the log density ratio that it has under a uniform prior. Its
log-mean-exp term follows the authors' code, which shifts a logit by the prior of the logit's class; the
printed equation weights by the prior of each sample's class instead.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lt_core.losses.base import Loss

EPSILON = 1e-9


class LADE(Loss):
    """CE(logits + log p, y) + strength * R, with R of the same logits; test uses plain logits.

    `strength` (alpha in print) and `penalty` (lambda): by default the authors' values for ImageNet-LT.
    """

    def __init__(self, counts: Tensor, strength: float = 0.05, penalty: float = 0.5) -> None:
        super().__init__(counts)
        prior = counts.double() / counts.sum()
        self.register_buffer("prior", prior.float())
        self.register_buffer("log_prior", (prior + EPSILON).log().float())
        self.strength, self.penalty = strength, penalty

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        balanced = cross_entropy(logits + self.log_prior, target)
        return balanced + self.strength * self.regulariser(logits, target)

    def regulariser(self, logits: Tensor, target: Tensor) -> Tensor:
        """-sum_c p_c (T1_c - T2_c - lambda T2_c^2): classes absent from the batch count too, with T1 = 0."""
        batch, num_classes = logits.shape
        own = torch.zeros_like(logits).scatter(1, target[:, None], 1.0)
        mean_own = (logits * own).sum(0) / (own.sum(0) + 1e-8)
        shifted = logits - self.log_prior + math.log(1 / num_classes + EPSILON)
        log_mean = shifted.logsumexp(0) - math.log(batch)
        return -(self.prior * (mean_own - log_mean - self.penalty * log_mean**2)).sum()
