"""Losses against hand-computed values."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from lt_core.checks import InputError
from lt_core.losses import (
    LADE,
    LDAMDRW,
    LOSSES,
    WeightedCrossEntropy,
    build_loss,
    class_balanced_weights,
    reweighting,
)


def close(value: float, digits: float = 1e-6):
    return pytest.approx(value, abs=digits)


@pytest.mark.parametrize(
    ("name", "logits", "counts", "target", "value"),
    [
        ("cross_entropy", [1.0, 2.0], [30, 10], 1, 0.313262),
        ("balanced_softmax", [0.0, 0.0], [90, 10], 0, 0.105361),
        ("balanced_softmax", [0.0, 0.0], [90, 10], 1, 2.302585),
        ("balanced_softmax", [1.0, 2.0], [30, 10], 1, 0.743668),
    ],
)
def test_softmax_losses_by_hand(name, logits, counts, target, value):
    loss = build_loss(name, torch.tensor(counts))
    assert loss(torch.tensor([logits]), torch.tensor([target])).item() == close(value)


def test_balanced_softmax_limits():
    torch.manual_seed(0)
    logits, target, counts = torch.randn(8, 5), torch.randint(5, (8,)), torch.tensor([100, 50, 20, 10, 5])
    even = build_loss("balanced_softmax", torch.full((5,), 7))(logits, target).item()
    assert even == close(cross_entropy(logits, target).item())
    one, scaled = (build_loss("balanced_softmax", n)(logits, target).item() for n in (counts, 1000 * counts))
    assert one == close(scaled, 1e-5)


def test_class_balanced_weights_by_hand():
    torch.testing.assert_close(class_balanced_weights(torch.tensor([9, 2]), beta=0.0), torch.ones(2))
    found = class_balanced_weights(torch.tensor([2, 1]), beta=0.9)
    torch.testing.assert_close(found, torch.tensor([0.689655, 1.310345]), atol=1e-6, rtol=0)


def test_class_balanced_loss_divides_by_the_weights_of_the_batch():
    loss, logits = build_loss("class_balanced", torch.tensor([100, 1])), torch.tensor([[1.0, 0.0]] * 2)
    alike = loss(logits, torch.tensor([1, 1])).item()
    assert alike == pytest.approx(cross_entropy(logits[:1], torch.tensor([1])).item())
    mixed, plain = loss(logits, torch.tensor([0, 1])), cross_entropy(logits, torch.tensor([0, 1]))
    assert plain < mixed < alike  # the rare class's image counts more


@pytest.mark.parametrize(
    ("rho", "weights"),
    [(0, [1.0, 1.0]), (0.5, [0.6667, 1.3333]), (1, [0.4, 1.6]), (1.2, [0.318571, 1.681429])],
)
def test_generalised_reweighting_by_hand(rho, weights):
    counts, expected = torch.tensor([8, 2]), torch.tensor(weights)
    torch.testing.assert_close(reweighting(counts, rho), expected, atol=1e-4, rtol=0)
    logits, target = torch.tensor([[1.0, 0.0]] * 2), torch.tensor([0, 1])
    each = cross_entropy(logits, target, reduction="none")
    found = WeightedCrossEntropy(counts, reweighting(counts, rho))(logits, target).item()
    assert found == close(((each * expected).sum() / 2).item(), 1e-4)


def test_focal_by_hand():
    logits = torch.tensor([[0.8, 0.2]]).log().requires_grad_()
    value = build_loss("focal", torch.tensor([3, 3]))(logits, torch.tensor([0]))
    assert value.item() == close(0.00892574, 1e-7)
    value.backward()
    # d/dz_y = p(1-p) d/dp of -(1-p)^2 log p; with a detached factor it would be -0.008
    assert logits.grad[0, 0].item() == close(0.16 * (2 * 0.2 * math.log(0.8) - 0.2**2 / 0.8))


LADE_CASES = [  # logits, lambda, value
    ([[0.0, 0.0], [0.0, 0.0]], 0.0, -0.130812),
    ([[0.0, 0.0], [0.0, 0.0]], 0.1, -0.106471),
    ([[math.log(3), 0.0], [0.0, math.log(3)]], 0.1, -0.482025),
]


@pytest.mark.parametrize(("logits", "penalty", "value"), LADE_CASES)
def test_lade_regulariser_by_hand(logits, penalty, value):
    loss = LADE(torch.tensor([3, 1]), penalty=penalty)
    assert loss.regulariser(torch.tensor(logits), torch.tensor([0, 1])).item() == close(value, 1e-5)


def test_lade_counts_classes_that_are_absent_from_the_batch():
    logits, target = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0])
    loss = LADE(torch.tensor([50, 30, 20]), penalty=0.0)
    before, present, absent = (
        loss.regulariser(logits + torch.tensor(more), target).item()
        for more in ([0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 2.0])
    )
    assert present == close(before, 1e-5) and absent == close(before + 0.2 * 2, 1e-5)


def test_lade_limits():
    torch.manual_seed(0)
    logits, target, counts = torch.randn(8, 3), torch.randint(3, (8,)), torch.tensor([50, 30, 20])
    balanced = build_loss("balanced_softmax", counts)(logits, target).item()
    assert LADE(counts, strength=0.0)(logits, target).item() == close(balanced, 1e-5)
    regulariser = LADE(counts).regulariser(logits, target).item()
    assert LADE(counts, strength=2.0)(logits, target).item() == close(balanced + 2 * regulariser, 1e-5)
    assert LADE(torch.tensor([4, 4, 4])).regulariser(torch.zeros(8, 3), target).item() == close(0)


def test_ldam_by_hand():
    loss = LDAMDRW(torch.tensor([16, 1]), scale=2.0)
    torch.testing.assert_close(loss.margins / 2, torch.tensor([0.25, 0.5]))
    logits = 2 * torch.tensor([[0.5, 0.25]])
    assert loss(logits, torch.tensor([1])).item() == close(1.701413)
    assert loss(logits, torch.tensor([0])).item() == close(0.693147)
    wider = LDAMDRW(torch.tensor([16, 1]), max_margin=0.8, scale=2.0)
    torch.testing.assert_close(wider.margins, torch.tensor([0.8, 1.6]))


@pytest.mark.parametrize(("options", "start"), [({}, 0.8), ({"deferred_until": 0.5}, 0.5)])
def test_ldam_weights_classes_only_late_in_training(options, start):
    torch.manual_seed(0)
    counts = torch.tensor([400, 40, 4])
    loss = LDAMDRW(counts, **options)
    logits, target = 30 * (2 * torch.rand(6, 3) - 1), torch.tensor([0, 0, 0, 1, 1, 2])
    values = []
    for progress in (0.0, start - 0.01, start, 0.96, 0.0):  # the last: a second training with the same loss
        loss.begin_epoch(progress)
        values.append(loss(logits, target).item())
    assert values[0] == values[1] == values[4] and values[2] == values[3] != values[0]
    each = cross_entropy(logits - loss.margins * one_hot(target, 3), target, reduction="none")
    weights = class_balanced_weights(counts)[target]
    assert values[2] == pytest.approx(((each * weights).sum() / weights.sum()).item())
    assert values[0] == pytest.approx(each.mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_gradients_and_do_not_depend_on_how_classes_are_numbered(name):
    torch.manual_seed(0)
    counts, order = torch.tensor([90, 40, 9, 3]), torch.tensor([2, 0, 3, 1])
    logits, target = torch.randn(6, 4, requires_grad=True), torch.randint(4, (6,))
    one = build_loss(name, counts)(logits, target)
    two = build_loss(name, counts[order])(logits[:, order], order.argsort()[target])
    assert one.item() == pytest.approx(two.item(), rel=1e-5)
    one.backward()
    assert logits.grad.abs().sum() > 0


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="unknown loss 'hinge': choose one of balanced_softmax, class_balan"):
        build_loss("hinge", torch.tensor([1, 2]))
    with pytest.raises(InputError, match="class 1 has 0 samples"):
        build_loss("balanced_softmax", torch.tensor([3, 0]))
