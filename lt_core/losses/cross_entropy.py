"""Cross-entropy, the paper's loss (Sec. 3.1)."""

from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class CrossEntropy(nn.Module):
    """Mean cross-entropy; the counts are not used (every loss is built from them)."""

    def __init__(self, counts: Tensor) -> None:
        super().__init__()

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits, target)
