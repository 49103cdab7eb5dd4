"""The meta sampler of BALMS (Ren et al., NeurIPS 2020): how often each class is drawn is learned."""

import torch
from torch import Tensor, nn


class MetaSampler(nn.Module):
    """Draws class c with probability proportional to n_c q_c, q_c = sigmoid(v_c), v [N] learned.

    A class is drawn and then any image of it, which gives the same images as the paper's draw among all
    images but another straight-through estimate of the gradient (the relaxation is over classes).
    """

    def __init__(self, counts: Tensor, init_power: float) -> None:
        """counts [N]; q starts proportional to p^-init_power: at 0 all images are alike, at 1 all classes."""
        super().__init__()
        counts = counts.double()
        wanted = (counts / counts.sum()) ** -init_power
        start = wanted / (wanted.min() + wanted.max())
        self.register_buffer("log_counts", counts.log().float())
        self.v = nn.Parameter(start.logit().float())

    @property
    def log_rates(self) -> Tensor:
        """Log probability of each class [N]."""
        return (self.log_counts + nn.functional.logsigmoid(self.v)).log_softmax(0)

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Classes [B] by straight-through Gumbel-softmax; weights [B], all 1, carry the draw's gradient."""
        gumbel = -torch.empty(batch, len(self.v)).exponential_(generator=generator).log()
        relaxed = (self.log_rates + gumbel).softmax(1)
        classes = relaxed.argmax(1)
        chosen = relaxed.gather(1, classes[:, None]).flatten()
        return classes, 1 + (chosen - chosen.detach())
