"""RSG: pairing, losses by hand, gradients, and the network without it at test."""

import pytest
import torch

from lt_core import rsg
from lt_core.models import Model, build_backbone, build_classifier
from lt_core.rsg import RSG, matched
from lt_core.train import extract_features, this_machine

COUNTS = torch.tensor([90, 80, 9, 8, 7, 6, 5, 5, 5, 5])  # the head: classes 0 and 1


def maps_of(batch: int) -> torch.Tensor:
    return torch.rand(batch, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()


def generating() -> RSG:
    torch.manual_seed(0)
    generator = RSG(3, COUNTS)
    generator.begin_epoch(0.8)
    return generator


@pytest.mark.parametrize(
    ("heads", "tails", "pairs"), [(6, 2, 6), (2, 5, 4), (3, 3, 3), (5, 3, 3), (4, 0, 0), (0, 4, 0)]
)
def test_how_many_samples_are_generated(heads, tails, pairs):
    is_head = torch.tensor([True] * heads + [False] * tails)
    head, tail = matched(is_head)
    assert len(head) == len(tail) == pairs
    assert is_head[head].all() and not is_head[tail].any()
    if pairs:  # the scarcer kind is used equally often, the other at most once
        uses = sorted([head.unique(return_counts=True)[1].max(), tail.unique(return_counts=True)[1].max()])
        assert uses[0] == 1 and uses[1] == max(heads, tails) // min(heads, tails)


def test_new_samples_carry_the_label_of_the_tail():
    generator, target = generating(), torch.tensor([0, 1, 0, 5, 1, 9])
    maps = maps_of(6)
    more, labels, _ = generator(maps, target)
    assert labels.tolist() == [0, 1, 0, 5, 1, 9, 5, 9, 5, 9]
    assert torch.equal(more[:6], maps) and not torch.equal(more[6], maps[3])


def test_without_transformation_the_tail_is_repeated():
    generator, target = generating(), torch.tensor([0, 1, 5, 9])
    torch.nn.init.zeros_(generator.transform.weight)
    torch.nn.init.zeros_(generator.transform.bias)
    maps = maps_of(4)
    more, _, _ = generator(maps, target)
    assert torch.equal(more[4:], maps[2:])


def test_nothing_is_generated_before_its_time_or_without_a_tail():
    maps, generator = maps_of(4), RSG(3, COUNTS)
    generator.begin_epoch(0.79)
    assert len(generator(maps, torch.tensor([0, 1, 5, 9]))[0]) == 4
    generator.begin_epoch(0.8)
    assert len(generator(maps, torch.tensor([0, 1, 5, 9]))[0]) == 6
    assert len(generator(maps, torch.tensor([0, 1, 1, 0]))[0]) == 4


def test_centre_loss_by_hand(monkeypatch):
    monkeypatch.setattr(rsg, "CENTRES", 2)
    generator = RSG(1, torch.tensor([5, 4]))
    with torch.no_grad():
        generator.centres[0] = torch.tensor([[1.0], [5.0]])
    found = generator._centre_loss(
        torch.full((1, 1, 1, 1), 3.0), torch.tensor([0]), torch.tensor([[0.5, 0.5]])
    )
    assert found.item() == pytest.approx(4)


def test_centre_loss_sums_over_channels_and_positions():
    generator, target = generating(), torch.tensor([0, 5, 9])
    with torch.no_grad():
        generator.centres.normal_()
    maps = maps_of(3).detach()
    gamma = generator._assignment(maps, target)
    torch.testing.assert_close(gamma.sum(1), torch.ones(3))
    apart = (maps[:, None] - generator.centres[target][..., None, None]).pow(2).sum((2, 3, 4))
    torch.testing.assert_close(generator._centre_loss(maps, target, gamma), (gamma * apart).sum(1).mean())


@pytest.mark.parametrize(("tail", "expected"), [([1.0, 0.0], 1.0), ([0.0, 2.0], 0.0)])
def test_vector_loss_by_hand(tail, expected):
    """|V| = |V'| = 5: besides the judge of pairs only the angle to the tail's deviation counts."""
    generator = RSG(2, COUNTS)

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values).view(1, 2, 1, 1)

    head, moved = column([1.0, 1.0]), column([0.0, 5.0])
    judged = generator.pairs(torch.cat([head, moved], 1))
    judge = torch.nn.functional.cross_entropy(judged, torch.tensor([rsg.DIFFERENT]))
    found = generator._vector_loss(head, column([3.0, 4.0]), moved, column(tail))
    assert (found - judge).item() == pytest.approx(expected, abs=1e-6)
    longer = generator._vector_loss(head, column([6.0, 8.0]), moved, column(tail))
    assert (longer - found).item() == pytest.approx(5, abs=1e-5)


@pytest.mark.parametrize("progress", [0.0, 0.9])
def test_the_own_loss_trains_the_generator_and_nothing_before_it(progress):
    generator, maps, target = generating(), maps_of(4), torch.tensor([0, 0, 5, 9])
    torch.nn.init.normal_(generator.centres)
    generator.begin_epoch(progress)
    _, _, loss = generator(maps, target)
    loss.backward()
    assert maps.grad is None
    moved = {name for name, part in generator.named_parameters() if part.grad.abs().sum() > 0}
    judge = {name for name in moved if name.startswith("pairs.")}
    assert {"centres", "assign", "assign_bias"} <= moved
    if progress < 0.8:
        assert judge and "transform.weight" not in moved
    else:  # the judge of pairs is frozen and the transformation learns
        assert {"transform.weight", "transform.bias"} <= moved and not judge


def test_a_generated_map_sends_its_gradient_to_the_transformation_only():
    generator, maps = generating(), maps_of(4)
    more, _, _ = generator(maps, torch.tensor([0, 0, 5, 9]))
    more[4:].sum().backward()
    assert maps.grad is None or maps.grad.abs().sum() == 0
    assert generator.transform.weight.grad.abs().sum() > 0 and generator.centres.grad is None


def test_a_model_with_rsg_is_the_plain_network_at_test():
    torch.manual_seed(0)
    backbone, classifier = build_backbone("digits_net"), build_classifier("cosine_fixed", 64, 10)
    model = Model(backbone, classifier, RSG(backbone.last_stage_channels, COUNTS))
    images = torch.randint(0, 256, (6, 8, 8, 1), dtype=torch.uint8)
    before = extract_features(backbone.eval(), images, 0, this_machine())
    model.begin_epoch(0.9)
    logits, target, further = model(images.permute(0, 3, 1, 2).float(), torch.tensor([0, 0, 0, 1, 5, 9]))
    assert len(logits) == len(target) == 10 and further > 0
    assert torch.equal(extract_features(backbone.eval(), images, 0, this_machine()), before)
