"""Cross-entropy, the paper's loss (Sec. 3.1)."""

from torch import Tensor
from torch.nn.functional import cross_entropy

from lt_core.losses.base import Loss


class CrossEntropy(Loss):
    """Mean cross-entropy; the counts are not used."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits, target)
