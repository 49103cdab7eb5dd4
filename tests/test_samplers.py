"""Samplers, tested by what they draw."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from lt_core.errors import InputError
from lt_core.samplers import SAMPLERS, MetaSampler, class_aware, epoch_batches, square_root, uniform

COUNTS = np.array([400, 150, 60, 21, 9, 5])
LABELS = np.repeat(np.arange(len(COUNTS)), COUNTS)


def test_uniform_epoch_is_a_permutation():
    drawn = uniform(LABELS, len(LABELS), np.random.default_rng(0))
    assert sorted(drawn) == list(range(len(LABELS)))
    assert not np.array_equal(drawn, np.arange(len(LABELS)))


def test_square_root_draws_classes_by_the_square_root_of_their_counts():
    drawn = square_root(LABELS, 60_000, np.random.default_rng(0))
    share = np.sqrt(COUNTS) / np.sqrt(COUNTS).sum()
    observed = np.bincount(LABELS[drawn], minlength=len(COUNTS))
    assert chisquare(observed, share * 60_000).pvalue > 1e-3
    # ... and would notice instance-uniform or class-uniform draws
    assert chisquare(observed, COUNTS / COUNTS.sum() * 60_000).pvalue < 1e-9
    assert chisquare(observed, np.full(len(COUNTS), 10_000)).pvalue < 1e-9


def test_square_root_draws_images_of_a_class_uniformly():
    drawn = square_root(LABELS, 60_000, np.random.default_rng(1))
    within = np.bincount(drawn, minlength=len(LABELS))[:400]
    assert chisquare(within).pvalue > 1e-3


def test_class_aware_gives_each_class_four_images_a_cycle():
    num_classes = len(COUNTS)
    drawn = class_aware(LABELS, 10 * 4 * num_classes, np.random.default_rng(0))
    for cycle in LABELS[drawn].reshape(10, 4 * num_classes):
        assert (np.bincount(cycle, minlength=num_classes) == 4).all()
    assert (LABELS[drawn].reshape(-1, 4) == LABELS[drawn][::4, None]).all()  # four in a row


def test_class_aware_uses_up_a_class_before_repeating():
    drawn = class_aware(LABELS, 5 * 4 * len(COUNTS), np.random.default_rng(0))
    five_images = drawn[LABELS[drawn] == 5]  # 20 draws from a class of 5
    assert (np.bincount(five_images)[-5:] == 4).all()
    large = drawn[LABELS[drawn] == 0]  # 20 draws from a class of 400
    assert len(set(large)) == 20


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_batches_are_a_function_of_seed_and_epoch(sampler):
    labels = torch.from_numpy(LABELS)
    one = epoch_batches(sampler, labels, 64, seed=0, epoch=3)
    assert one.shape == (len(LABELS) // 64, 64)
    assert torch.equal(one, epoch_batches(sampler, labels, 64, seed=0, epoch=3))
    assert not torch.equal(one, epoch_batches(sampler, labels, 64, seed=0, epoch=4))
    assert not torch.equal(one, epoch_batches(sampler, labels, 64, seed=1, epoch=3))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_same_global_batches(sampler, world_size):
    labels = torch.from_numpy(LABELS)
    whole = epoch_batches(sampler, labels, 64, seed=0, epoch=0)
    shares = [epoch_batches(sampler, labels, 64, 0, 0, rank, world_size) for rank in range(world_size)]
    together = torch.cat(shares, dim=1)
    assert torch.equal(together.sort(dim=1).values, whole.sort(dim=1).values)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 200), st.integers(0, 9))
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_long_tail_gives_valid_indices(sampler, counts, length, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    drawn = SAMPLERS[sampler](labels, length, np.random.default_rng(seed))
    assert drawn.shape == (length,) and drawn.min() >= 0 and drawn.max() < len(labels)


@pytest.mark.parametrize(
    ("power", "q", "rates"),
    [(0, [0.5, 0.5], [0.9, 0.1]), (0.5, [0.25, 0.75], [0.75, 0.25]), (1, [0.1, 0.9], [0.5, 0.5])],
)
def test_meta_sampler_starts_between_images_and_classes(power, q, rates):
    sampler = MetaSampler(torch.tensor([90, 10]), init_power=power)
    torch.testing.assert_close(sampler.v.sigmoid(), torch.tensor(q))
    torch.testing.assert_close(sampler.log_rates.exp(), torch.tensor(rates))


def test_meta_sampler_draws_its_rates_with_weights_of_one():
    sampler = MetaSampler(torch.from_numpy(COUNTS), init_power=0.3)
    classes, weights = sampler.draw(60_000, torch.Generator().manual_seed(0))
    rates = sampler.log_rates.detach().exp().double()
    observed = np.bincount(classes.numpy(), minlength=len(COUNTS))
    assert chisquare(observed, (rates / rates.sum() * 60_000).numpy()).pvalue > 1e-3
    assert (weights == 1).all()


def test_meta_sampler_learns_to_avoid_what_its_draws_cost():
    sampler = MetaSampler(torch.tensor([50, 50, 50]), init_power=0.0)
    classes, weights = sampler.draw(4000, torch.Generator().manual_seed(0))
    cost = torch.tensor([0.0, 0.0, 1.0])
    (weights * cost[classes]).mean().backward()  # descending draws the third class less often
    assert sampler.v.grad[2] > 0 > sampler.v.grad[:2].max()


def test_bad_input_is_refused():
    labels = torch.from_numpy(LABELS)
    with pytest.raises(InputError, match="unknown sampler 'sqrt': choose one of class_aware, square_root"):
        epoch_batches("sqrt", labels, 8, 0, 0)
    with pytest.raises(InputError, match="batch_size must lie in"):
        epoch_batches("uniform", labels, 10_000, 0, 0)
    with pytest.raises(InputError, match="does not split over 3 processes"):
        epoch_batches("uniform", labels, 64, 0, 0, rank=0, world_size=3)
