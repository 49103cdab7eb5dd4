"""Losses against hand-computed values."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from lt_core.errors import InputError
from lt_core.losses import LADE, LDAMDRW, LOSSES, build_loss, class_balanced_weights


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


def test_class_balanced_weights_by_hand():
    torch.testing.assert_close(class_balanced_weights(torch.tensor([9, 2]), beta=0.0), torch.ones(2))
    found = class_balanced_weights(torch.tensor([2, 1]), beta=0.9)
    torch.testing.assert_close(found, torch.tensor([0.689655, 1.310345]), atol=1e-6, rtol=0)


def test_class_balanced_loss_divides_by_the_weights_of_the_batch():
    loss = build_loss("class_balanced", torch.tensor([100, 1]))
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    alike = loss(logits, torch.tensor([1, 1])).item()
    assert alike == pytest.approx(cross_entropy(logits[:1], torch.tensor([1])).item())
    mixed, plain = loss(logits, torch.tensor([0, 1])), cross_entropy(logits, torch.tensor([0, 1]))
    assert plain < mixed < alike  # the rare class's image counts more


def test_focal_by_hand():
    loss = build_loss("focal", torch.tensor([3, 3]))
    logits = torch.tensor([[0.8, 0.2]]).log().requires_grad_()
    value = loss(logits, torch.tensor([0]))
    assert value.item() == pytest.approx(0.00892574, abs=1e-7)
    value.backward()
    # d/dz_y = p(1-p) d/dp of -(1-p)^2 log p; with a detached factor it would be -0.008
    expected = 0.16 * (2 * 0.2 * torch.tensor(0.8).log().item() - 0.2**2 / 0.8)
    assert logits.grad[0, 0].item() == pytest.approx(expected, abs=1e-6)


LADE_CASES = [  # logits, lambda, value
    ([[0.0, 0.0], [0.0, 0.0]], 0.0, -0.130812),
    ([[0.0, 0.0], [0.0, 0.0]], 0.1, -0.106471),
    ([[math.log(3), 0.0], [0.0, math.log(3)]], 0.1, -0.482025),
]


@pytest.mark.parametrize(("logits", "penalty", "value"), LADE_CASES)
def test_lade_regulariser_by_hand(logits, penalty, value):
    loss = LADE(torch.tensor([3, 1]), penalty=penalty)
    found = loss.regulariser(torch.tensor(logits), torch.tensor([0, 1]))
    assert found.item() == pytest.approx(value, abs=1e-5)


def test_lade_counts_classes_that_are_absent_from_the_batch():
    counts, target = torch.tensor([50, 30, 20]), torch.tensor([0, 1, 1, 0])
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    loss = LADE(counts, penalty=0.0)
    before = loss.regulariser(logits, target).item()
    present = loss.regulariser(logits + torch.tensor([2.0, 0.0, 0.0]), target).item()
    absent = loss.regulariser(logits + torch.tensor([0.0, 0.0, 2.0]), target).item()
    assert present == pytest.approx(before, abs=1e-5) and absent == pytest.approx(before + 0.2 * 2, abs=1e-5)


def test_lade_limits():
    torch.manual_seed(0)
    logits, target, counts = torch.randn(8, 3), torch.randint(3, (8,)), torch.tensor([50, 30, 20])
    balanced = build_loss("balanced_softmax", counts)(logits, target).item()
    assert LADE(counts, strength=0.0)(logits, target).item() == pytest.approx(balanced, abs=1e-5)
    even = LADE(torch.tensor([4, 4, 4]))
    assert even.regulariser(torch.zeros(8, 3), target).item() == pytest.approx(0, abs=1e-6)


def test_ldam_by_hand():
    loss = LDAMDRW(torch.tensor([16, 1]), scale=2.0)
    torch.testing.assert_close(loss.margins / 2, torch.tensor([0.25, 0.5]))
    logits = 2 * torch.tensor([[0.5, 0.25]])
    assert loss(logits, torch.tensor([1])).item() == pytest.approx(1.701413, abs=1e-6)
    assert loss(logits, torch.tensor([0])).item() == pytest.approx(0.693147, abs=1e-6)


def test_ldam_weights_classes_only_in_the_last_fifth_of_training():
    torch.manual_seed(0)
    loss = LDAMDRW(torch.tensor([400, 40, 4]))
    logits, target = 30 * (2 * torch.rand(6, 3) - 1), torch.tensor([0, 0, 0, 1, 1, 2])
    values = []
    for progress in (0.0, 0.79, 0.8, 0.96, 0.0):  # the last: a second training with the same loss
        loss.begin_epoch(progress)
        values.append(loss(logits, target).item())
    assert values[0] == values[1] == values[4] and values[2] == values[3] != values[0]
    shifted = logits - loss.margins * torch.nn.functional.one_hot(target, 3)
    weights = class_balanced_weights(torch.tensor([400, 40, 4]))
    each = cross_entropy(shifted, target, reduction="none")
    assert values[2] == pytest.approx((each * weights[target]).sum().item() / weights[target].sum().item())
    assert values[0] == pytest.approx(each.mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_do_not_depend_on_how_classes_are_numbered(name):
    torch.manual_seed(0)
    counts, order = torch.tensor([90, 40, 9, 3]), torch.tensor([2, 0, 3, 1])
    logits, target = torch.randn(6, 4), torch.randint(4, (6,))
    one = build_loss(name, counts)(logits, target)
    two = build_loss(name, counts[order])(logits[:, order], order.argsort()[target])
    assert one.item() == pytest.approx(two.item(), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_gradients(name):
    logits = torch.randn(4, 3, requires_grad=True)
    build_loss(name, torch.tensor([10, 5, 2]))(logits, torch.tensor([0, 1, 2, 0])).backward()
    assert logits.grad.abs().sum() > 0


def test_bad_input_is_refused():
    with pytest.raises(
        InputError,
        match="unknown loss 'hinge': choose one of balanced_softmax, class_balanced, cross_entropy",
    ):
        build_loss("hinge", torch.tensor([1, 2]))
    with pytest.raises(InputError, match="class 1 has 0 samples"):
        build_loss("balanced_softmax", torch.tensor([3, 0]))
