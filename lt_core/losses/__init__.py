"""Training losses, each called as `loss(logits [B, N], target [B]) -> scalar`.

loss = build_loss("balanced_softmax", counts)
"""

from collections.abc import Callable

from torch import Tensor

from lt_core.errors import InputError, check_counts, unknown
from lt_core.losses.balanced_softmax import BalancedSoftmax
from lt_core.losses.base import Loss
from lt_core.losses.class_balanced import ClassBalanced, class_balanced_weights
from lt_core.losses.cross_entropy import CrossEntropy
from lt_core.losses.focal import Focal
from lt_core.losses.lade import LADE
from lt_core.losses.ldam_drw import LDAMDRW

LOSSES: dict[str, Callable[..., Loss]] = {
    "cross_entropy": CrossEntropy,
    "balanced_softmax": BalancedSoftmax,
    "class_balanced": ClassBalanced,
    "focal": Focal,
    "lade": LADE,
    "ldam_drw": LDAMDRW,
    "rsg": LDAMDRW,  # published as LDAM-DRW-RSG; the model holds the generator (`lt_core.rsg`)
}

__all__ = [
    "LADE",
    "LDAMDRW",
    "LOSSES",
    "BalancedSoftmax",
    "ClassBalanced",
    "CrossEntropy",
    "Focal",
    "Loss",
    "build_loss",
    "class_balanced_weights",
]


def build_loss(name: str, counts: Tensor, **options: float) -> Loss:
    """The loss of that name for training counts [N]; options are those of its class.

    Raises InputError listing the known names.
    """
    if name not in LOSSES:
        raise InputError(unknown("loss", name, list(LOSSES)))
    return LOSSES[name](check_counts("counts", counts), **options)
