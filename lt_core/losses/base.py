"""What every loss has in common."""

from torch import Tensor, nn


class Loss(nn.Module):
    """A loss made from the training counts [N], called as `loss(logits [B, N], target [B]) -> scalar`."""

    def __init__(self, counts: Tensor) -> None:
        super().__init__()

    def begin_epoch(self, progress: float) -> None:
        """Told before every epoch which share of the epochs is done, 0 <= progress < 1."""
