"""The de-confounded classifier of Tang, Huang and Zhang (NeurIPS 2020), "causal norm" in tables.

Features and weights are split into heads and normalised head by head. Training also follows the direction
of the mean feature, blamed on the momentum of SGD; at test the part of a feature along it is taken away
(total direct effect, TDE).

    logits = causal_norm_logits(features, weights, direction)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

HEADS = 2  # K
SCALE = 16.0  # tau
DAMPING = 1 / 32  # gamma: small rows of W, those of rare classes, give small logits
# alpha. The authors take 3 on ImageNet-LT, which turns features that are much alike upside down; 1 takes the
# component along the direction away. Validation data choose (`lt_core.baselines`).
STRENGTH = 1.0
MOMENTUM = 0.9  # of the mean feature; the authors' code brings it to 1 as the learning rate falls


def causal_norm_logits(
    features: Tensor, weights: Tensor, direction: Tensor, strength: float = STRENGTH, heads: int = HEADS
) -> Tensor:
    """Logits [M, N] of TDE (Eq. 10): tau / K sum_k w_k / (|w_k| + gamma) . (x_k - alpha cos(x_k, d_k) d_k).

    features [M, F], weights [N, F], direction [F]; x_k and d_k normalised in each of the K heads. With
    strength (alpha) 0 these are the logits of training (Eq. 8).
    """
    x = normalize(features.unflatten(1, (heads, -1)), dim=2)
    w = weights.unflatten(1, (heads, -1))
    w = w / (torch.linalg.vector_norm(w, dim=2, keepdim=True) + DAMPING)
    d = normalize(direction.unflatten(0, (heads, -1)), dim=1)
    x = x - strength * (x * d).sum(2, keepdim=True) * d
    return SCALE / heads * x.flatten(1) @ w.flatten(1).T


class CausalNormClassifier(nn.Module):
    """Plain multi-head normalised logits while training, TDE in evaluation; no bias.

    `direction` [F] is the mean feature, d <- 0.9 d + batch mean: only its direction in each head matters.
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, num_features))
        self.register_buffer("direction", torch.zeros(num_features))
        self.register_buffer("scale", torch.tensor(SCALE))
        nn.init.uniform_(self.weight, -(num_features**-0.5), num_features**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        if self.training:
            self.direction.mul_(MOMENTUM).add_(features.detach().float().mean(0))
        strength = 0.0 if self.training else STRENGTH
        return causal_norm_logits(features, self.weight, self.direction, strength)
