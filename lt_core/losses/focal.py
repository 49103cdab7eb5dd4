"""Focal loss (Lin et al., ICCV 2017): cross-entropy that forgets what is already right."""

from torch import Tensor

from lt_core.losses.base import Loss

GAMMA = 2.0


class Focal(Loss):
    """Mean of -(1 - p_y)^2 log p_y, without class weights; the gradient goes through both factors."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p = logits.log_softmax(dim=1).gather(1, target[:, None])
        return -((1 - log_p.exp()) ** GAMMA * log_p).mean()
