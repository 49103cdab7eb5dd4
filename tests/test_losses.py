"""Losses against hand-computed values."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from lt_core.errors import InputError
from lt_core.losses import LOSSES, build_loss


def test_cross_entropy_by_hand():
    loss = build_loss("cross_entropy", torch.tensor([30, 10]))
    assert loss(torch.tensor([[1.0, 2.0]]), torch.tensor([1])).item() == pytest.approx(0.313262, abs=1e-6)


@pytest.mark.parametrize(
    ("logits", "counts", "target", "value"),
    [
        ([0.0, 0.0], [90, 10], 0, 0.105361),
        ([0.0, 0.0], [90, 10], 1, 2.302585),
        ([1.0, 2.0], [30, 10], 1, 0.743668),
    ],
)
def test_balanced_softmax_by_hand(logits, counts, target, value):
    loss = build_loss("balanced_softmax", torch.tensor(counts))
    assert loss(torch.tensor([logits]), torch.tensor([target])).item() == pytest.approx(value, abs=1e-6)


def test_balanced_softmax_limits():
    torch.manual_seed(0)
    logits, target = torch.randn(8, 5), torch.randint(5, (8,))
    even = build_loss("balanced_softmax", torch.full((5,), 7))
    assert even(logits, target).item() == pytest.approx(cross_entropy(logits, target).item(), abs=1e-6)
    counts = torch.tensor([100, 50, 20, 10, 5])
    scaled = build_loss("balanced_softmax", counts * 1000)(logits, target)
    assert build_loss("balanced_softmax", counts)(logits, target).item() == pytest.approx(
        scaled.item(), abs=1e-5
    )


@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_gradients(name):
    logits = torch.randn(4, 3, requires_grad=True)
    build_loss(name, torch.tensor([10, 5, 2]))(logits, torch.tensor([0, 1, 2, 0])).backward()
    assert logits.grad.abs().sum() > 0


def test_bad_input_is_refused():
    with pytest.raises(
        InputError, match="unknown loss 'hinge': choose one of balanced_softmax, cross_entropy"
    ):
        build_loss("hinge", torch.tensor([1, 2]))
    with pytest.raises(InputError, match="class 1 has 0 samples"):
        build_loss("balanced_softmax", torch.tensor([3, 0]))
