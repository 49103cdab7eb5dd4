"""Groups at their borders, accuracies by hand, intervals against the binomial formula."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lt_core.errors import InputError
from lt_core.groups import GROUPS, group_of
from lt_core.metrics import (
    bootstrap_accuracies,
    group_accuracy,
    interval,
    per_class_accuracy,
    within_group_accuracy,
    within_group_predictions,
)

COUNTS = np.array([200, 150, 60, 30, 10])  # two many, two medium, one few


@pytest.mark.parametrize(
    "rule, expected",
    [
        ("paper", ["few", "few", "medium", "medium", "many", "many"]),
        ("common", ["few", "medium", "medium", "medium", "medium", "many"]),
    ],
)
def test_groups_at_their_borders(rule, expected):
    masks = group_of([19, 20, 21, 99, 100, 101], rule)
    assert [next(group for group in GROUPS if masks[group][c]) for c in range(6)] == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=30), st.sampled_from(["paper", "common"]))
def test_every_class_is_in_exactly_one_group(counts, rule):
    assert (sum(mask.astype(int) for mask in group_of(counts, rule).values()) == 1).all()


def test_an_unknown_rule_lists_the_known_ones():
    with pytest.raises(InputError, match=r"'other'.*common, paper"):
        group_of([1], "other")


def test_group_accuracy_by_hand():
    labels = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    predictions = np.array([0, 0, 1, 0, 2, 0, 0, 0, 4, 4])
    assert group_accuracy(predictions, labels, COUNTS) == {"many": 75, "medium": 25, "few": 100, "total": 60}
    np.testing.assert_array_equal(per_class_accuracy(predictions, labels, 5), [100, 50, 50, 0, 100])


def test_the_two_rules_differ_on_the_border():
    labels = np.array([0, 1, 2])
    predictions = np.array([0, 0, 0])
    paper, common = (group_accuracy(predictions, labels, [100, 50, 20], r) for r in ("paper", "common"))
    assert (paper["many"], paper["medium"], paper["few"]) == (100, 0, 0)
    assert (
        math.isnan(common["many"])
        and math.isnan(common["few"])
        and common["medium"] == pytest.approx(100 / 3)
    )
    assert paper["total"] == common["total"] == pytest.approx(100 / 3)


def test_an_empty_group_and_a_class_without_images_are_not_zero():
    found = group_accuracy([0, 1], [0, 1], [300, 200])
    assert found["many"] == 100 and math.isnan(found["medium"]) and math.isnan(found["few"])
    assert np.isnan(per_class_accuracy([0], [0], 2)).tolist() == [False, True]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["paper", "common"]))
def test_total_is_the_mean_of_the_groups_weighted_by_their_share(seed, rule):
    generator = np.random.default_rng(seed)
    counts = generator.choice([5, 20, 50, 100, 300], 30)
    labels = np.repeat(np.arange(30), 4)
    found = group_accuracy(generator.integers(0, 30, 120), labels, counts, rule)
    shares = {group: mask.mean() for group, mask in group_of(counts, rule).items()}
    mean = sum(shares[group] * found[group] for group in GROUPS if shares[group])
    assert found["total"] == pytest.approx(mean)


def test_within_group_restricts_images_and_candidates():
    scores = np.array(
        [[0.1, 0.2, 0.9, 0.0, 0.0], [0.3, 0.2, 0.9, 0.0, 0.0], [0.9, 0.0, 0.1, 0.2, 0.0], [9, 9, 9, 9, -1.0]]
    )
    labels = np.array([1, 1, 2, 4])
    np.testing.assert_array_equal(within_group_predictions(scores, labels, COUNTS), [1, 0, 3, 4])
    assert within_group_accuracy(scores, labels, COUNTS) == {"many": 50, "medium": 0, "few": 100}


def test_within_group_of_an_empty_group():
    found = within_group_accuracy(np.eye(2), [0, 1], [300, 5])
    assert found["many"] == found["few"] == 100 and math.isnan(found["medium"])


# ------------------------------------------------------------------ bootstrap


def balanced(
    images: int = 200, classes: int = 5, methods: int = 2, seeds: int = 1, p: float = 0.6, key: int = 0
):
    generator = np.random.default_rng(key)
    labels = np.repeat(np.arange(classes), images)
    return generator.random((seeds, methods, len(labels))) < p, generator.permutation(labels)


def test_the_interval_is_the_binomial_one():
    """Stratified: the variance within classes, sum p_c (1 - p_c) / m, over classes^2."""
    correct, labels = balanced()
    samples = bootstrap_accuracies(correct, labels, COUNTS, replicates=4000)
    assert samples.shape == (4000, 2, 4)
    for method in range(2):
        p = per_class_accuracy(np.where(correct[0, method], labels, (labels + 1) % 5), labels, 5) / 100
        groups = [p[:2], p[2:4], p[4:], p]
        error = [100 * math.sqrt((g * (1 - g) / 200).sum()) / len(g) for g in groups]
        np.testing.assert_allclose(
            samples[:, method].mean(axis=0), [100 * g.mean() for g in groups], atol=0.3
        )
        low, high = interval(samples[:, method])
        np.testing.assert_allclose((high - low) / 2, 1.96 * np.array(error), rtol=0.08)


def test_resampling_stays_within_classes():
    """Classes that are all right or all wrong leave nothing to chance."""
    labels = np.repeat(np.arange(5), [3, 50, 7, 20, 11])
    samples = bootstrap_accuracies((labels % 2 == 0)[None, None], labels, COUNTS, replicates=50)
    np.testing.assert_allclose(samples.std(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(samples[0, 0], [100 * 3 / 53, 100 * 7 / 27, 100, 100 * 21 / 91])


def test_a_paired_effect_is_narrower_than_an_unpaired_one():
    correct, labels = balanced(methods=1)
    flipped = correct[:, 0].copy()
    flipped[:, ::20] = True
    pair = np.stack([correct[:, 0], flipped], axis=1)
    samples = bootstrap_accuracies(pair, labels, COUNTS)
    other = bootstrap_accuracies(pair, labels, COUNTS, seed=1)
    paired = np.subtract(*interval(samples[:, 1] - samples[:, 0])[::-1])
    unpaired = np.subtract(*interval(samples[:, 1] - other[:, 0])[::-1])
    assert (paired < 0.6 * unpaired).all()


def test_separate_calls_see_the_same_images():
    correct, labels = balanced(methods=3)
    together = bootstrap_accuracies(correct, labels, COUNTS, replicates=60)
    apart = [bootstrap_accuracies(correct[:, [r]], labels, COUNTS, replicates=60) for r in range(3)]
    np.testing.assert_array_equal(together, np.concatenate(apart, axis=1))


def test_seeds_are_resampled_too():
    """Three seeds, always right, always wrong, always right: the images add nothing, the seeds all."""
    labels = np.repeat(np.arange(5), 10)
    correct = np.array([True, False, True])[:, None, None] & np.ones((3, 1, 50), bool)
    totals = bootstrap_accuracies(correct, labels, COUNTS, replicates=3000)[:, 0, 3]
    assert set(np.round(totals, 2)) == {0, 33.33, 66.67, 100}
    assert totals.std() == pytest.approx(100 * math.sqrt(2 / 9 / 3), rel=0.05)


def test_the_same_seed_gives_the_same_samples_whatever_the_chunk(monkeypatch):
    correct, labels = balanced(images=20)
    np.random.seed(1)
    first = bootstrap_accuracies(correct, labels, COUNTS, "common", 100, 0)
    monkeypatch.setattr("lt_core.metrics.CHUNK", 700)
    np.random.seed(2)
    np.testing.assert_array_equal(bootstrap_accuracies(correct, labels, COUNTS, "common", 100, 0), first)
    assert (bootstrap_accuracies(correct, labels, COUNTS, "common", 100, 1) != first).any()


def test_an_empty_group_stays_empty():
    samples = bootstrap_accuracies(np.ones((1, 1, 4), bool), [0, 0, 1, 1], [300, 5], replicates=20)
    low, high = interval(samples[:, 0])
    np.testing.assert_array_equal(low, [100, np.nan, 100, 100])
    np.testing.assert_array_equal(high, low)


def test_ten_thousand_images_take_seconds_at_most():
    correct, labels = balanced(images=2000, methods=12)
    start = time.perf_counter()
    bootstrap_accuracies(correct, labels, COUNTS)
    assert time.perf_counter() - start < 8  # alone about 0.4 s


ONE = np.ones((1, 1, 2), bool)
BAD = {
    "predictions outside": (lambda: group_accuracy([0, 2], [0, 1], [5, 5]), "predictions"),
    "labels outside": (lambda: group_accuracy([0, 1], [0, 5], [5, 5]), "labels"),
    "lengths": (lambda: group_accuracy([0], [0, 1], [5, 5]), "predictions"),
    "fractions": (lambda: group_accuracy([0.5, 1], [0, 1], [5, 5]), "predictions"),
    "count 0": (lambda: group_accuracy([0, 1], [0, 1], [5, 0]), "counts: class 1"),
    "rule": (lambda: group_accuracy([0, 1], [0, 1], [5, 5], "none"), "grouping rule"),
    "NaN scores": (lambda: within_group_accuracy([[math.nan, 1.0]], [0], [5, 5]), "scores"),
    "shape of scores": (lambda: within_group_accuracy([[1.0]], [0], [5, 5]), "scores"),
    "shape of correct": (lambda: bootstrap_accuracies(ONE[0], [0, 1], [5, 5]), "correct"),
    "images of correct": (lambda: bootstrap_accuracies(ONE, [0, 1, 1], [5, 5]), "correct"),
    "kind of correct": (lambda: bootstrap_accuracies(ONE * 0.5, [0, 1], [5, 5]), "correct"),
    "replicates": (lambda: bootstrap_accuracies(ONE, [0, 1], [5, 5], replicates=0), "replicates"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case):
    call, message = BAD[case]
    with pytest.raises(InputError, match=message):
        call()
