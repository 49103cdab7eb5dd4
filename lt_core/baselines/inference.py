"""Classifiers with one number to choose at inference: the paper's ensemble and causal norm."""

import torch
from torch import Tensor

from lt_core.baselines.stage1 import Logits, Stage1
from lt_core.causal_norm import causal_norm_logits
from lt_core.errors import InputError
from lt_core.transfer import TEMPERATURE, ensemble_probabilities, hybrid_classifiers


def transfer_ensemble(stage: Stage1, temperature: float = TEMPERATURE) -> Logits:
    """Log probabilities of the paper's ensemble (Eq. 8) with a temperature of the attention (Eq. 5)."""
    if stage.prototypes is None:
        raise InputError("the ensemble is built from prototypes, and there are none")
    p, w, counts = stage.prototypes, stage.weights, stage.counts
    classifiers = hybrid_classifiers(p, w, counts, temperature=temperature)

    def logits(features: Tensor) -> Tensor:
        probabilities = ensemble_probabilities(features, classifiers, stage.scale)
        return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()

    return logits


def causal_norm(stage: Stage1, strength: float) -> Logits:
    """Logits of a backbone's causal norm classifier with a strength (alpha) of the total direct effect."""
    if stage.direction is None:
        raise InputError("causal norm needs a backbone that was trained with it: there is no direction")

    def logits(features: Tensor) -> Tensor:
        return causal_norm_logits(features, stage.weights, stage.direction, strength)

    return logits
