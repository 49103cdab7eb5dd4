"""Classifiers retrained on frozen features: cRT and, with other losses, its relatives.

cRT (Kang et al., ICLR 2020) starts a new classifier of the same kind and trains it with class-aware sampling.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lt_core.baselines.stage1 import Logits, Stage1
from lt_core.errors import TrainingError
from lt_core.losses import Loss, build_loss
from lt_core.models import build_classifier
from lt_core.samplers import epoch_batches
from lt_core.train import lr_at

EPOCHS = 10  # of every second stage; the authors take 5 (LWS) to 20 (BALMS)
BATCH, STEPS = 256, 20  # images a step, fewer where an epoch would have fewer steps than this
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4


def retrained(stage: Stage1, loss: str, sampler: str, learning_rate: float, seed: int = 0) -> Logits:
    """A new classifier on the frozen features, trained with a named loss and sampler.

    `cross_entropy` with `class_aware` is cRT, `balanced_softmax` with `uniform` the second stage of Ren et
    al. without their sampler; `focal`, `class_balanced` and `lade` are heads of losses that their authors
    train end to end.
    """
    built = build_loss(loss, stage.counts)
    return fit_head(new_head(stage, seed), stage, built, sampler, learning_rate, seed)


def new_head(stage: Stage1, seed: int) -> nn.Module:
    """A fresh classifier of the first stage's kind; the global random state stays as it is."""
    num_classes, num_features = stage.rows.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = "cosine" if stage.bias is None else "dot_product"
        return build_classifier(kind, num_features, num_classes)


def fit_head(
    head: nn.Module, stage: Stage1, loss: Loss, sampler: str, learning_rate: float, seed: int
) -> Logits:
    """Train a head (features [B, F] -> logits [B, N]) on the training features: SGD, cosine decay to 0.

    Deterministic in its arguments. Raises TrainingError when the loss is not finite.
    """
    features, labels = stage.training
    batch = batch_size(len(labels))
    total = len(labels) // batch * EPOCHS
    weights = [weight for weight in head.parameters() if weight.requires_grad]
    optimiser = torch.optim.SGD(weights, learning_rate, MOMENTUM, weight_decay=WEIGHT_DECAY)
    step = 0
    for epoch in range(EPOCHS):
        loss.begin_epoch(epoch / EPOCHS)
        for rows in epoch_batches(sampler, labels, batch, seed, epoch):
            optimiser.param_groups[0]["lr"] = learning_rate * lr_at(step, total)
            value = loss(head(features[rows]), labels[rows])
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            step += 1
        if not math.isfinite(value.item()):
            raise TrainingError(f"the loss is {value.item()} at learning rate {learning_rate}: lower it")
    return frozen(head)


def batch_size(images: int) -> int:
    """Images a step of a second stage on so many training images."""
    return max(1, min(BATCH, images // STEPS))


def frozen(head: nn.Module) -> Logits:
    """A trained head as a function without gradients."""
    head.requires_grad_(False)

    def logits(features: Tensor) -> Tensor:
        return head(features)

    return logits
