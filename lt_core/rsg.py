"""RSG, the rare-class sample generator (Wang et al., CVPR 2021): a module between the backbone's stages.

Late in training, rare classes receive feature maps that are made of their own and of what sets a frequent
image apart from the centre of its class. Only training sees it; a test image passes the plain network.

    maps, target, loss = RSG(channels=128, counts=counts)(maps, target)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cosine_similarity, cross_entropy

from lt_core.data.distributed import share_of_batch, whole_batch

CENTRES = 15  # J, centres of each class
HEAD_SHARE = 0.2  # of the classes, the most frequent, give what rare ones receive
CENTRE_WEIGHT, VECTOR_WEIGHT = 0.1, 0.01  # of the two losses
JUDGE_CHANNELS = 256
DIFFERENT, SAME = 0, 1


class RSG(nn.Module):
    """Centres of each class, a transformation of deviations from them, and a judge of pairs of maps.

    channels: those of the maps. counts [N]: training images a class. generate_from: share of training after
    which samples are generated (the authors: epoch 80 of 100 on ImageNet-LT, 10 of 30 on Places-LT).
    """

    def __init__(self, channels: int, counts: Tensor, generate_from: float = 0.8) -> None:
        super().__init__()
        self.generate_from = generate_from
        num_classes = len(counts)
        head = counts.argsort(descending=True, stable=True)[: int(HEAD_SHARE * num_classes)]
        self.register_buffer("is_head", torch.zeros(num_classes, dtype=torch.bool))
        self.is_head[head] = True
        self.centres = nn.Parameter(torch.zeros(num_classes, CENTRES, channels))
        self.assign = nn.Parameter(torch.randn(num_classes, CENTRES, channels))
        self.assign_bias = nn.Parameter(torch.ones(num_classes, CENTRES))
        self.transform = nn.Conv2d(channels, channels, 3, padding=1)
        self.pairs = nn.Sequential(  # same class or not, from two maps one upon the other
            nn.Conv2d(2 * channels, JUDGE_CHANNELS, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(JUDGE_CHANNELS, JUDGE_CHANNELS, 3, padding=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(JUDGE_CHANNELS, 2),
        )
        self.generating = False

    def begin_epoch(self, progress: float) -> None:
        """Told before every epoch which share of the epochs is done."""
        self.generating = progress >= self.generate_from

    @contextmanager
    def before(self, stage: nn.Module, target: Tensor) -> Iterator[SimpleNamespace]:
        """Stand before a stage of a network for one forward pass, whose `target` and `loss` it then gives."""
        made = SimpleNamespace()

        def generate(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            with torch.autocast(target.device.type, enabled=False):  # sums of thousands of squares
                maps, made.target, made.loss = self(inputs[0], target)
            return (maps,)

        handle = stage.register_forward_pre_hook(generate)
        try:
            yield made
        finally:
            handle.remove()

    def forward(self, maps: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps [B', D, H, W] and labels [B'] with the generated ones at the end, and RSG's own loss.

        maps [B, D, H, W], target [B]. The loss sends no gradient into the maps; a generated map sends one
        to what comes after and to the transformation. With several processes, loss and labels are those of
        the whole batch, and each process goes on with its share of the generated maps.
        """
        fixed, target = whole_batch(maps.detach()).to(self.centres.dtype), whole_batch(target)
        gamma = self._assignment(fixed, target)
        # Parts that take no part in this step get a zero gradient: the optimiser and processes expect one.
        loss = 0.0 * sum(part.sum() for part in self.parameters())
        loss = loss + CENTRE_WEIGHT * self._centre_loss(fixed, target, gamma)
        if not self.generating:
            return maps, target, loss + CENTRE_WEIGHT * self._pair_loss(fixed, target)
        head, tail = matched(self.is_head[target])
        if len(head) == 0:
            return maps, target, loss
        nearest = self.centres.detach()[target, gamma.argmax(1)][:, :, None, None]
        deviation = fixed[head] - nearest[head]
        moved = self.transform(deviation)
        loss = loss + VECTOR_WEIGHT * self._vector_loss(
            fixed[head], deviation, moved, fixed[tail] - nearest[tail]
        )
        generated = share_of_batch(fixed[tail] + moved).to(maps.dtype)
        return torch.cat([maps, generated]), torch.cat([target, target[tail]]), loss

    def _assignment(self, maps: Tensor, target: Tensor) -> Tensor:
        """gamma [B, J]: how much each map belongs to each centre of its class."""
        pooled = maps.mean((2, 3))
        scores = torch.einsum("bjd,bd->bj", self.assign[target], pooled) + self.assign_bias[target]
        return scores.softmax(1)

    def _centre_loss(self, maps: Tensor, target: Tensor, gamma: Tensor) -> Tensor:
        """Mean over images of sum_j gamma_j |x - M_j|^2, summed over channels and positions."""
        centres = self.centres[target]
        positions = maps.shape[2] * maps.shape[3]
        cross = torch.einsum("bjd,bd->bj", centres, maps.sum((2, 3)))
        distances = maps.pow(2).sum((1, 2, 3))[:, None] - 2 * cross + positions * centres.pow(2).sum(2)
        return (gamma * distances).sum(1).mean()

    def _pair_loss(self, maps: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of telling pairs of one class from others; a half of the batch meets the other."""
        half = len(maps) // 2
        one, two = slice(0, half), slice(half, 2 * half)
        same = torch.where(target[one] == target[two], SAME, DIFFERENT)
        return cross_entropy(self.pairs(torch.cat([maps[one], maps[two]], 1)), same)

    def _vector_loss(self, head: Tensor, deviation: Tensor, moved: Tensor, tail_deviation: Tensor) -> Tensor:
        """L_mv: a moved deviation keeps its length, points where the tail's does and leaves the head class.

        The vectors are those of the channels at each position, as printed; the authors' code reshapes without
        moving the channels last and so mixes positions.
        """
        frozen = {name: weight.detach() for name, weight in self.pairs.named_parameters()}
        judged = functional_call(self.pairs, frozen, (torch.cat([head, moved], 1),))
        different = torch.full((len(head),), DIFFERENT, device=head.device)
        lengths = torch.linalg.vector_norm(moved, dim=1) - torch.linalg.vector_norm(deviation, dim=1)
        turned = 1 - cosine_similarity(tail_deviation, moved, dim=1)
        return cross_entropy(judged, different) + (lengths.abs() + turned).sum() / len(head)


def matched(is_head: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the batch [G] of the head and of the tail image of each pair; none if one kind is missing.

    is_head [B]. With h head and t tail images, the scarcer kind is used floor(max / min) times.
    """
    head, tail = is_head.nonzero().flatten(), (~is_head).nonzero().flatten()
    fewer = min(len(head), len(tail))
    if fewer == 0:
        return head[:0], tail[:0]
    times = max(len(head), len(tail)) // fewer

    def rows(kind: Tensor) -> Tensor:
        return kind[: times * fewer] if len(kind) > fewer else kind.repeat(times)

    return rows(head), rows(tail)
