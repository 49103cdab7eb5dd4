"""tau-normalised classifier (Kang et al., ICLR 2020): frequent classes lose the lead of their larger norm."""

import torch
from torch import Tensor

from lt_core.baselines.stage1 import Logits, Stage1
from lt_core.errors import InputError


def tau_norm(stage: Stage1, tau: float) -> Logits:
    """Logits w_c . x / |w_c|^tau, without the bias: tau = 0 is the first stage's classifier less its bias.

    Raises InputError for a cosine classifier, whose rows have no norm that counts.
    """
    if stage.bias is None:
        raise InputError("tau-normalisation does nothing to a cosine classifier: use a dot-product backbone")
    rows = stage.rows / torch.linalg.vector_norm(stage.rows, dim=1, keepdim=True) ** tau

    def logits(features: Tensor) -> Tensor:
        return stage.inputs(features) @ rows.T

    return logits
