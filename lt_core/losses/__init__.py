"""Training losses, each called as `loss(logits [B, N], target [B]) -> scalar`.

loss = build_loss("balanced_softmax", counts)
"""

from torch import Tensor, nn

from lt_core.errors import InputError, check_counts, unknown
from lt_core.losses.balanced_softmax import BalancedSoftmax
from lt_core.losses.cross_entropy import CrossEntropy

LOSSES = {"cross_entropy": CrossEntropy, "balanced_softmax": BalancedSoftmax}

__all__ = ["LOSSES", "BalancedSoftmax", "CrossEntropy", "build_loss"]


def build_loss(name: str, counts: Tensor) -> nn.Module:
    """The loss of that name for training counts [N]; raises InputError listing the known names."""
    if name not in LOSSES:
        raise InputError(unknown("loss", name, list(LOSSES)))
    return LOSSES[name](check_counts("counts", counts))
