"""NCM, the nearest class mean (Kang et al., ICLR 2020)."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lt_core.baselines.stage1 import Logits, Stage1
from lt_core.transfer import prototypes


def ncm(stage: Stage1) -> Logits:
    """Logits -|x - c|^2: features less the mean over all training images, normalised; c their class means.

    The centroids are not normalised again, so this is not a nearest cosine.
    """
    features, labels = stage.training
    mean = features.mean(0)
    centroids = prototypes(features - mean, labels, len(stage.counts))

    def logits(features: Tensor) -> Tensor:
        return -(torch.cdist(normalize(features - mean, dim=1), centroids) ** 2)

    return logits
