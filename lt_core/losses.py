"""Training losses, each called as `loss(logits [B, N], target [B]) -> scalar`.

loss = build_loss("balanced_softmax", counts)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lt_core.checks import InputError, check_counts, unknown


class Loss(nn.Module):
    """A loss made from the training counts [N]."""

    def __init__(self, counts: Tensor) -> None:
        super().__init__()

    def begin_epoch(self, progress: float) -> None:
        """Told before every epoch which share of the epochs is done, 0 <= progress < 1."""


class CrossEntropy(Loss):
    """Mean cross-entropy, the paper's loss (Sec. 3.1); the counts are not used."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits, target)


class BalancedSoftmax(Loss):
    """CE(logits + log n, target) (Ren et al., NeurIPS 2020).

    n counts the training set, whatever the sampler; the test uses the plain logits.
    """

    def __init__(self, counts: Tensor) -> None:
        super().__init__(counts)
        self.register_buffer("log_counts", counts.double().log().float())

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits + self.log_counts, target)


class Focal(Loss):
    """Mean of -(1 - p_y)^2 log p_y (Lin et al., ICCV 2017): easy examples count less; no class weights.

    The gradient goes through both factors.
    """

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p = logits.log_softmax(dim=1).gather(1, target[:, None])
        return -((1 - log_p.exp()) ** 2 * log_p).mean()


class WeightedCrossEntropy(Loss):
    """Cross-entropy with class weights [N], divided by the sum of the batch's weights."""

    def __init__(self, counts: Tensor, weights: Tensor) -> None:
        super().__init__(counts)
        self.register_buffer("weights", weights)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits, target, weight=self.weights)


def class_balanced_weights(counts: Tensor, beta: float = 0.9999) -> Tensor:
    """Weights [N] proportional to (1 - beta) / (1 - beta^n), with sum N (Cui et al., CVPR 2019, Eq. 3)."""
    weights = (1 - beta) / (1 - beta ** counts.double())
    return (weights * len(counts) / weights.sum()).float()


class ClassBalanced(WeightedCrossEntropy):
    """Class-balanced loss (Cui et al., CVPR 2019): weights by the effective number of images.

    Divided by the batch's weights, as in the LDAM-DRW code (Cui et al. divide by B).
    """

    def __init__(self, counts: Tensor) -> None:
        super().__init__(counts, class_balanced_weights(counts))


def reweighting(counts: Tensor, rho: float) -> Tensor:
    """Class weights [N] of generalised re-weighting (DisAlign, Eq. 9): N p_c^-rho / sum_j p_j^-rho."""
    weights = (counts.double() / counts.sum()) ** -rho
    return (len(counts) * weights / weights.sum()).float()


class LADE(Loss):
    """CE(logits + log p, y) + strength * R (Hong et al., CVPR 2021); the test uses the plain logits.

    R (Eq. 9) pulls each logit to the log density ratio that it has under a uniform prior. Its log-mean-exp
    term follows the authors' code, which shifts a logit by the prior of the logit's class; the printed
    equation weights by the prior of each sample's class instead.
    strength (alpha in print), penalty (lambda): by default the authors' values for ImageNet-LT.
    """

    EPSILON = 1e-9

    def __init__(self, counts: Tensor, strength: float = 0.05, penalty: float = 0.5) -> None:
        super().__init__(counts)
        prior = counts.double() / counts.sum()
        self.register_buffer("prior", prior.float())
        self.register_buffer("log_prior", (prior + self.EPSILON).log().float())
        self.strength, self.penalty = strength, penalty

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        balanced = cross_entropy(logits + self.log_prior, target)
        return balanced + self.strength * self.regulariser(logits, target)

    def regulariser(self, logits: Tensor, target: Tensor) -> Tensor:
        """-sum_c p_c (T1_c - T2_c - lambda T2_c^2): classes absent from the batch count too, with T1 = 0."""
        batch, num_classes = logits.shape
        own = torch.zeros_like(logits).scatter(1, target[:, None], 1.0)
        mean_own = (logits * own).sum(0) / (own.sum(0) + 1e-8)
        shifted = logits - self.log_prior + math.log(1 / num_classes + self.EPSILON)
        log_mean = shifted.logsumexp(0) - math.log(batch)
        return -(self.prior * (mean_own - log_mean - self.penalty * log_mean**2)).sum()


class LDAMDRW(Loss):
    """CE(logits - s m_y on the true class), m_c ~ n_c^-1/4; late, class weights (Cao et al., NeurIPS 2019).

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


LOSSES: dict[str, type[Loss]] = {
    "cross_entropy": CrossEntropy,
    "balanced_softmax": BalancedSoftmax,
    "class_balanced": ClassBalanced,
    "focal": Focal,
    "lade": LADE,
    "ldam_drw": LDAMDRW,
    "rsg": LDAMDRW,  # published as LDAM-DRW-RSG; the model holds the generator (`lt_core.rsg`)
}


def build_loss(name: str, counts: Tensor, **options: float) -> Loss:
    """The loss of that name for training counts [N]; options are those of its class.

    Raises InputError listing the known names.
    """
    if name not in LOSSES:
        raise InputError(unknown("loss", name, list(LOSSES)))
    return LOSSES[name](check_counts("counts", counts), **options)
