"""Groups at their borders, accuracies by hand, intervals against the binomial formula."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lt_core.checks import InputError
from lt_core.metrics import (
    GROUPS,
    RULES,
    bootstrap_accuracies,
    bootstrap_means,
    cosine_matrix,
    group_accuracy,
    group_names,
    group_of,
    interval,
    mismatches,
    per_class_accuracy,
    resample_seeds,
    within_group_predictions,
)

COUNTS = np.array([200, 150, 60, 30, 10])  # two many, two medium, one few
NAN = math.nan


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("paper", ["few", "few", "medium", "medium", "many", "many"]),
        ("common", ["few", "medium", "medium", "medium", "medium", "many"]),
    ],
)
def test_groups_at_their_borders(rule, expected):
    assert group_names([19, 20, 21, 99, 100, 101], rule).tolist() == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=30), st.sampled_from(list(RULES)))
def test_every_class_is_in_exactly_one_group(counts, rule):
    assert (sum(mask.astype(int) for mask in group_of(counts, rule).values()) == 1).all()


# ------------------------------------------------------------------ accuracies


def test_group_accuracy_by_hand():
    labels = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    predictions = np.array([0, 0, 1, 0, 2, 0, 0, 0, 4, 4])
    assert group_accuracy(predictions, labels, COUNTS) == {"many": 75, "medium": 25, "few": 100, "total": 60}
    np.testing.assert_array_equal(per_class_accuracy(predictions, labels, 5), [100, 50, 50, 0, 100])


def test_the_two_rules_differ_on_the_border():
    paper, common = (group_accuracy([0, 0, 0], [0, 1, 2], [100, 50, 20], rule) for rule in RULES)
    third = 100 / 3
    assert list(paper.values()) == pytest.approx([100, 0, 0, third])
    assert list(common.values()) == pytest.approx([NAN, third, NAN, third], nan_ok=True)


def test_an_empty_group_and_a_class_without_images_are_not_zero():
    found = group_accuracy([0, 1], [0, 1], [300, 200])
    assert list(found.values()) == pytest.approx([100, NAN, NAN, 100], nan_ok=True)
    assert np.isnan(per_class_accuracy([0], [0], 2)).tolist() == [False, True]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(list(RULES)))
def test_total_is_the_mean_of_the_groups_weighted_by_their_share(seed, rule):
    generator = np.random.default_rng(seed)
    counts = generator.choice([5, 20, 50, 100, 300], 30)
    labels = np.repeat(np.arange(30), 4)
    found = group_accuracy(generator.integers(0, 30, 120), labels, counts, rule)
    shares = {group: mask.mean() for group, mask in group_of(counts, rule).items()}
    mean = sum(shares[group] * found[group] for group in GROUPS if shares[group])
    assert found["total"] == pytest.approx(mean)


def test_within_group_restricts_the_candidates():
    scores = [[0.1, 0.2, 0.9, 0, 0], [0.3, 0.2, 0.9, 0, 0], [0.9, 0, 0.1, 0.2, 0], [9, 9, 9, 9, -1.0]]
    assert within_group_predictions(scores, [1, 1, 2, 4], COUNTS).tolist() == [1, 0, 3, 4]
    border = [[0.1, 0.2, 0.9]], [0], [100, 50, 20]  # class 0 is alone among many, or with all in medium
    assert [within_group_predictions(*border, rule).tolist() for rule in RULES] == [[0], [2]]
    assert within_group_predictions(np.eye(2), [0, 1], [300, 5]).tolist() == [0, 1]  # no medium at all


def test_cosines_and_mismatches_by_hand():
    queries, keys = [[3.0, 4.0], [0.0, 5.0]], [[10.0, 0.0], [0.0, 0.1]]
    np.testing.assert_allclose(cosine_matrix(queries, keys), [[0.6, 0.8], [0, 1]], atol=1e-12)
    weights = torch.eye(3)
    assert mismatches(weights, weights) == 0
    assert mismatches(torch.tensor([[1.0, 0, 0], [0.9, 0.8, 0], [0, 2, 1]]), weights) == 2


# ------------------------------------------------------------------ bootstrap


def balanced(images: int = 200, rows: int = 2, p: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """correct [R, M] and labels [M] of five classes."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), images)
    return generator.random((rows, len(labels))) < p, generator.permutation(labels)


def test_the_interval_is_the_binomial_one():
    """Stratified: the variance within classes, sum p_c (1 - p_c) / m, over classes^2."""
    correct, labels = balanced()
    samples = bootstrap_accuracies(correct, labels, COUNTS, replicates=4000)
    assert samples.shape == (4000, 2, 4)
    for row, found in zip(correct, samples.swapaxes(0, 1), strict=True):
        p = per_class_accuracy(np.where(row, labels, (labels + 1) % 5), labels, 5) / 100
        groups = [p[:2], p[2:4], p[4:], p]
        error = [100 * math.sqrt((g * (1 - g) / 200).sum()) / len(g) for g in groups]
        np.testing.assert_allclose(found.mean(axis=0), [100 * g.mean() for g in groups], atol=0.3)
        low, high = interval(found)
        np.testing.assert_allclose((high - low) / 2, 1.96 * np.array(error), rtol=0.08)


def test_resampling_stays_within_classes():
    """Classes that are all right or all wrong leave nothing to chance."""
    labels = np.repeat(np.arange(5), [3, 50, 7, 20, 11])
    samples = bootstrap_accuracies((labels % 2 == 0)[None], labels, COUNTS, replicates=50)
    np.testing.assert_allclose(samples.std(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(samples[0, 0], [100 * 3 / 53, 100 * 7 / 27, 100, 100 * 21 / 91])


def test_a_paired_effect_is_narrower_than_an_unpaired_one():
    correct, labels = balanced(rows=1)
    better = correct.copy()
    better[:, ::20] = True
    pair = np.concatenate([correct, better])
    samples, other = (bootstrap_accuracies(pair, labels, COUNTS, seed=seed) for seed in (0, 1))
    paired = np.subtract(*interval(samples[:, 1] - samples[:, 0])[::-1])
    unpaired = np.subtract(*interval(samples[:, 1] - other[:, 0])[::-1])
    assert (paired < 0.6 * unpaired).all()


def test_separate_calls_see_the_same_images():
    correct, labels = balanced(rows=3)
    together = bootstrap_accuracies(correct, labels, COUNTS, replicates=60)
    apart = [bootstrap_accuracies(row[None], labels, COUNTS, replicates=60) for row in correct]
    np.testing.assert_array_equal(together, np.concatenate(apart, axis=1))


def test_the_same_seed_gives_the_same_samples_whatever_the_chunk(monkeypatch):
    correct, labels = balanced(images=20)
    np.random.seed(1)
    first = bootstrap_accuracies(correct, labels, COUNTS, "common", 100, 0)
    monkeypatch.setattr("lt_core.metrics.CHUNK", 700)
    np.random.seed(2)
    np.testing.assert_array_equal(bootstrap_accuracies(correct, labels, COUNTS, "common", 100, 0), first)
    assert (bootstrap_accuracies(correct, labels, COUNTS, "common", 100, 1) != first).any()


def test_an_empty_group_stays_empty():
    samples = bootstrap_accuracies(np.ones((1, 4), bool), [0, 0, 1, 1], [300, 5], replicates=20)
    low, high = interval(samples[:, 0])
    np.testing.assert_array_equal(low, [100, np.nan, 100, 100])
    np.testing.assert_array_equal(high, low)


def test_ten_thousand_images_take_seconds_at_most():
    correct, labels = balanced(images=2000, rows=12)
    start = time.perf_counter()
    bootstrap_accuracies(correct, labels, COUNTS)
    assert time.perf_counter() - start < 8  # alone about 0.4 s


def test_seeds_are_resampled():
    """Three seeds at 100, 0 and 100: the mean of three draws, which all rows and calls share."""
    draws = np.array([100.0, 0.0, 100.0])[:, None, None] * np.ones((3, 2, 3000))
    found = resample_seeds(draws)
    assert found.shape == (2, 3000) and set(np.round(found[0], 2)) == {0, 33.33, 66.67, 100}
    assert found[0].std() == pytest.approx(100 * math.sqrt(2 / 9 / 3), rel=0.05)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(resample_seeds(draws[:, 0]), found[0])
    assert (resample_seeds(draws, seed=1) != found).any()
    np.testing.assert_allclose(resample_seeds(draws[:1]), draws[0])  # one seed leaves no choice


def test_bootstrap_means_are_as_wide_as_the_standard_error():
    values = np.random.default_rng(0).normal(5, 2, 400)
    found = bootstrap_means(values, 4000)
    assert found.mean() == pytest.approx(values.mean(), abs=0.02)
    assert found.std() == pytest.approx(values.std() / 20, rel=0.05)
    np.testing.assert_allclose(bootstrap_means(2 * values, 4000), 2 * found)  # the same draw
    assert np.isnan(bootstrap_means(values[:0], 3)).tolist() == [True] * 3


ONE = np.ones((1, 2), bool)
BAD = {
    "predictions outside": (lambda: group_accuracy([0, 2], [0, 1], [5, 5]), "predictions"),
    "labels outside": (lambda: group_accuracy([0, 1], [0, 5], [5, 5]), "labels"),
    "lengths": (lambda: group_accuracy([0], [0, 1], [5, 5]), "predictions"),
    "fractions": (lambda: group_accuracy([0.5, 1], [0, 1], [5, 5]), "predictions"),
    "count 0": (lambda: group_of([5, 0]), "counts: class 1"),
    "negative count": (lambda: group_accuracy([0, 1], [0, 1], [5, -1]), "counts: class 1"),
    "rule": (lambda: group_of([1], "other"), r"unknown grouping rule 'other'.*common, paper"),
    "NaN scores": (lambda: within_group_predictions([[NAN, 1.0]], [0], [5, 5]), "scores"),
    "shape of scores": (lambda: within_group_predictions([[1.0]], [0], [5, 5]), "scores"),
    "other classes": (lambda: mismatches(torch.eye(3), torch.eye(4)[:, :3]), "keys must have 3 rows"),
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


def test_groups_of_labels_of_any_kind():
    counts = {"whale": 500, "ant": 100, "bee": 3, "yeti": 0}
    labels = np.array(["whale"] * 4 + ["ant"] * 2 + ["bee", "yeti"])
    predictions = np.array(["whale"] * 6 + ["bee", "ant"])
    found = group_accuracy(predictions, labels, counts)
    numbers = {name: index for index, name in enumerate(counts)}
    as_numbers = ([numbers[name] for name in names] for names in (predictions, labels))
    assert found == group_accuracy(*as_numbers, [500, 100, 3, 0])
    assert found["few"] == 50  # a class that training never saw is few-shot
    with pytest.raises(InputError, match="counts has no class 'owl'"):
        group_accuracy(["owl"], ["bee"], counts)


def test_the_mean_over_classes_is_the_fields_where_test_sets_are_not_balanced():
    labels = np.repeat(np.arange(2), (500, 100))
    wrong = np.zeros(600, int)  # always the larger class
    assert group_accuracy(wrong, labels, [500, 100])["many"] == pytest.approx(100 * 5 / 6)
    assert group_accuracy(wrong, labels, [500, 100], mean_over="classes")["many"] == 50
    assert np.isnan(group_accuracy(wrong, labels, [500, 100], mean_over="classes")["few"])
    with pytest.raises(InputError, match="unknown mean 'groups'"):
        group_accuracy(wrong, labels, [500, 100], mean_over="groups")
