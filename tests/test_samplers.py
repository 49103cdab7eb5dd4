"""Samplers, tested by what they draw. What holds for any long tail stands in test_properties.py."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from lt_core.checks import InputError
from lt_core.samplers import SAMPLERS, class_aware, epoch_batches, square_root, uniform

COUNTS = np.array([400, 150, 60, 21, 9, 5])
LABELS = np.repeat(np.arange(6), COUNTS)


def test_uniform_epoch_is_a_permutation():
    drawn = uniform(LABELS, len(LABELS), np.random.default_rng(0))
    assert sorted(drawn) == list(range(len(LABELS)))
    assert not np.array_equal(drawn, np.arange(len(LABELS)))


def test_square_root_draws_classes_by_the_square_root_of_their_counts_and_images_uniformly():
    drawn = square_root(LABELS, 60_000, np.random.default_rng(0))
    share = np.sqrt(COUNTS) / np.sqrt(COUNTS).sum()
    observed = np.bincount(LABELS[drawn], minlength=6)
    assert chisquare(observed, share * 60_000).pvalue > 1e-3
    # ... and would notice instance-uniform or class-uniform draws
    assert chisquare(observed, COUNTS / COUNTS.sum() * 60_000).pvalue < 1e-9
    assert chisquare(observed, np.full(6, 10_000)).pvalue < 1e-9
    assert chisquare(np.bincount(drawn)[:400]).pvalue > 1e-3


def test_class_aware_gives_each_class_four_images_a_cycle():
    drawn = class_aware(LABELS, 10 * 24, np.random.default_rng(0))
    for cycle in LABELS[drawn].reshape(10, 24):
        assert (np.bincount(cycle, minlength=6) == 4).all()
    assert (LABELS[drawn].reshape(-1, 4) == LABELS[drawn][::4, None]).all()  # four in a row


def test_class_aware_uses_up_a_class_before_repeating():
    drawn = class_aware(LABELS, 5 * 24, np.random.default_rng(0))
    assert (np.bincount(drawn[LABELS[drawn] == 5])[-5:] == 4).all()  # 20 draws from a class of 5
    assert len(set(drawn[LABELS[drawn] == 0])) == 20  # ... and of 400


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_batches_are_a_function_of_seed_and_epoch(sampler):
    labels = torch.from_numpy(LABELS)
    one = epoch_batches(sampler, labels, 64, seed=0, epoch=3)
    assert one.shape == (len(LABELS) // 64, 64)
    assert torch.equal(one, epoch_batches(sampler, labels, 64, seed=0, epoch=3))
    assert not torch.equal(one, epoch_batches(sampler, labels, 64, seed=0, epoch=4))
    assert not torch.equal(one, epoch_batches(sampler, labels, 64, seed=1, epoch=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "sqrt"}, "unknown sampler 'sqrt': choose one of class_aware, square_root, uniform"),
        ({"batch_size": 10_000}, r"batch_size must lie in 1\.\.645"),
        ({"batch_size": 0}, "batch_size must lie in"),
        ({"world_size": 3}, "does not split over 3 processes"),
        ({"world_size": 2, "rank": 2}, r"does not split over 2 processes \(rank 2\)"),
    ],
)
def test_bad_input_is_refused(changes, message):
    good = {"sampler": "uniform", "labels": torch.from_numpy(LABELS), "batch_size": 64, "seed": 0, "epoch": 0}
    with pytest.raises(InputError, match=message):
        epoch_batches(**good | changes)
