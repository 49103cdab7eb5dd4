"""Eq. 1-9: by hand, by identity, and against a slow loop in float64 that shares no code with the package."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lt_core.checks import InputError
from lt_core.transfer import (
    attention,
    continual_classifier,
    continual_classifiers,
    cosine_logits,
    ensemble_probabilities,
    hybrid_classifier,
    hybrid_classifiers,
    knowledge_transfer,
    prototypes,
)

NAN = float("nan")
quick = settings(max_examples=25, deadline=None)


def random_case(seed: int, classes: int = 7, dims: int = 5):
    generator = np.random.default_rng(seed)
    counts = generator.integers(1, 300, classes)
    return generator.normal(size=(classes, dims)), generator.normal(size=(classes, dims)), counts


# ------------------------------------------------------------------ the independent implementation


def slow_norm(v):
    length = math.sqrt(sum(x * x for x in v))
    return [x / length for x in v]


def slow_transfer(queries, keys, counts, k, tau):
    result = []
    for q in queries:
        kept = [j for j in range(len(keys)) if counts[j] > k]
        dots = [sum(a * b for a, b in zip(slow_norm(q), slow_norm(keys[j]), strict=True)) for j in kept]
        powers = [math.exp(tau * (d - max(dots))) for d in dots]
        row = [0.0] * len(q)
        for power, j in zip(powers, kept, strict=True):
            row = [r + power / sum(powers) * x for r, x in zip(row, slow_norm(keys[j]), strict=True)]
        result.append(row)
    return result


def slow_sum(*matrices):
    return [
        [sum(values) for values in zip(*map(slow_norm, rows), strict=True)]
        for rows in zip(*matrices, strict=True)
    ]


def slow_probabilities(features, weights, scale):
    result = []
    for f in features:
        dots = [scale * sum(a * b for a, b in zip(slow_norm(f), slow_norm(w), strict=True)) for w in weights]
        powers = [math.exp(d) for d in dots]
        result.append([p / sum(powers) for p in powers])
    return result


@quick
@given(st.integers(0, 10**6), st.sampled_from([0, 20, 100]), st.sampled_from([0.1, 10.0, 50.0]))
def test_every_role_and_classifier_equals_the_slow_loop(seed, k, tau):
    p, w, counts = random_case(seed)
    counts[0] = 150
    for queries, keys in ((p, w), (w, p), (w, w), (p, p)):
        slow = slow_transfer(queries.tolist(), keys.tolist(), counts.tolist(), k, tau)
        np.testing.assert_allclose(knowledge_transfer(queries, keys, counts, k, tau), slow, atol=1e-12)
        hybrid = hybrid_classifier(p, w, counts, k, tau, transfer=torch.tensor(slow, dtype=torch.float64))
        np.testing.assert_allclose(hybrid, slow_sum(slow, p.tolist(), w.tolist()), atol=1e-12)
    slow = slow_transfer(p.tolist(), w.tolist(), counts.tolist(), k, tau)
    np.testing.assert_allclose(
        hybrid_classifier(p, w, counts, k, tau), slow_sum(slow, p.tolist(), w.tolist()), atol=1e-12
    )
    np.testing.assert_allclose(
        continual_classifier(p, w, counts, k, tau), slow_sum(slow, p.tolist()), atol=1e-12
    )


@quick
@given(st.integers(0, 10**6), st.sampled_from([1.0, 16.0, 30.0]))
def test_probabilities_equal_the_slow_loop(seed, scale):
    p, w, _ = random_case(seed)
    features = np.random.default_rng(seed + 1).normal(size=(4, 5))
    one = [np.array(slow_probabilities(features.tolist(), m.tolist(), scale)) for m in (p, w)]
    np.testing.assert_allclose(ensemble_probabilities(features, [p, w], scale), sum(one) / 2, atol=1e-12)
    np.testing.assert_allclose(cosine_logits(features, w, scale).softmax(dim=1), one[1], atol=1e-12)


# ------------------------------------------------------------------ by hand


def test_prototypes_by_hand():
    features = torch.tensor([[3.0, 4.0], [0.0, 2.0], [-5.0, 0.0]])
    found = prototypes(features, torch.tensor([0, 0, 1]), 2)
    torch.testing.assert_close(found, torch.tensor([[0.3, 0.9], [-1.0, 0.0]]))


def test_prototypes_of_more_rows_than_one_block(monkeypatch):
    features, labels = np.random.default_rng(0).normal(size=(50, 3)), np.arange(50) % 4
    whole = prototypes(features, labels, 4)
    monkeypatch.setattr("lt_core.transfer.FEATURE_BLOCK", 7)
    torch.testing.assert_close(prototypes(features, labels, 4), whole)


def test_attention_by_hand():
    """cos = (1, 0) for the two kept keys, tau = ln 3: attention 3/4 and 1/4."""
    queries = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    keys = torch.tensor([[5.0, 0.0], [0.0, 0.1], [1.0, 1.0]])
    found = attention(queries, keys, torch.tensor([30, 21, 20]), k=20, temperature=math.log(3))
    torch.testing.assert_close(found, torch.tensor([[0.75, 0.25, 0.0], [0.75, 0.25, 0.0], [0.25, 0.75, 0.0]]))


def test_hybrid_and_continual_by_hand():
    """One class above k gives its own direction: (0, 1) + p + w."""
    p, w = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[0.0, 7.0], [-4.0, 0.0]])
    counts = torch.tensor([50, 5])
    torch.testing.assert_close(continual_classifier(p, w, counts, 20), torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
    torch.testing.assert_close(hybrid_classifier(p, w, counts, 20), torch.tensor([[1.0, 2.0], [-1.0, 2.0]]))


def test_cosine_logits_by_hand():
    found = cosine_logits(torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0, 0.0], [0.0, -1.0]]), 10)
    torch.testing.assert_close(found, torch.tensor([[6.0, -8.0]]))


def test_prototypes_plus_classifier_is_the_continual_form_with_the_weights_as_transfer():
    p, w = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    torch.testing.assert_close(continual_classifier(p, w, [3], transfer=w), torch.tensor([[1.0, 1.0]]))


# ------------------------------------------------------------------ identities


@quick
@given(st.integers(0, 10**6))
def test_attention_rows_sum_to_one_and_skip_excluded_classes(seed):
    p, w, counts = random_case(seed)
    counts[0] = 21
    found = attention(p, w, counts, 20)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(7, dtype=torch.float64))
    assert ((found > 0) == torch.as_tensor(counts > 20)).all()
    keys = torch.as_tensor(w / np.linalg.norm(w, axis=1, keepdims=True))
    torch.testing.assert_close(found @ keys, knowledge_transfer(p, w, counts, 20))


def test_one_class_above_k_gives_back_its_own_direction():
    p, w, _ = random_case(3)
    found = knowledge_transfer(p, w, [5, 9, 20, 400, 1, 1, 1], 20)
    expected = torch.as_tensor(w[3] / np.linalg.norm(w[3]))
    torch.testing.assert_close(found, expected.expand(7, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [1e-300, 1e-30, 1e-9])
def test_tiny_temperature_gives_the_mean(dtype, tau):
    p, w, counts = random_case(4)
    keys = torch.as_tensor(w / np.linalg.norm(w, axis=1, keepdims=True)).to(dtype)
    found = knowledge_transfer(torch.as_tensor(p).to(dtype), keys, counts, 0, tau)
    torch.testing.assert_close(found, keys.mean(dim=0).expand(7, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [1e9, 1e38, 1e300])
def test_huge_temperature_gives_the_nearest(dtype, tau):
    p, w, counts = random_case(5)
    keys = torch.as_tensor(w / np.linalg.norm(w, axis=1, keepdims=True)).to(dtype)
    queries = torch.as_tensor(p).to(dtype)
    found = knowledge_transfer(queries, keys, counts, 0, tau)
    torch.testing.assert_close(found, keys[(queries @ keys.T).argmax(dim=1)])
    torch.testing.assert_close(
        attention(queries, keys, counts, 0, tau).sum(dim=1), torch.ones(7, dtype=dtype)
    )


@quick
@given(st.integers(0, 10**6), st.sampled_from([1e-18, 1e-3, 1e3, 1e18]))
def test_norms_of_rows_do_not_matter(seed, size):
    p, w, counts = random_case(seed)
    counts[0] = 50
    p, w = torch.as_tensor(p, dtype=torch.float32), torch.as_tensor(w, dtype=torch.float32)
    factors = torch.logspace(-1, 1, 7)[:, None] * size
    for k in (0, 20):
        expected = hybrid_classifier(p, w, counts, k)
        torch.testing.assert_close(hybrid_classifier(p * factors, w, counts, k), expected)
        torch.testing.assert_close(hybrid_classifier(p, w * factors, counts, k), expected)
    torch.testing.assert_close(
        ensemble_probabilities(p * factors, [w, p]), ensemble_probabilities(p, [w * factors, p])
    )


@pytest.mark.parametrize("bad", [NAN, float("inf"), 0.0])
def test_rows_of_excluded_classes_are_never_read(bad):
    p, w, _ = random_case(6)
    counts, k = np.array([300, 20, 21, 5, 100, 20, 1]), 20
    broken = w.copy()
    broken[counts <= k] = bad
    for function in (attention, knowledge_transfer, continual_classifier):
        torch.testing.assert_close(function(p, broken, counts, k), function(p, w, counts, k))
        assert torch.isfinite(function(p, broken, counts, k)).all()


def test_blocks_of_queries_do_not_change_the_result(monkeypatch):
    p, w, counts = random_case(7)
    whole = knowledge_transfer(p, w, counts)
    for queries in (1, 2, 3):
        monkeypatch.setattr("lt_core.transfer.QUERY_BLOCK", queries)
        torch.testing.assert_close(knowledge_transfer(p, w, counts), whole)


@quick
@given(
    st.integers(0, 10**6),
    st.lists(st.sampled_from([0, 20, 60, 100, 149]), min_size=1, max_size=5),
    st.sampled_from([1e-9, 0.1, 10.0, 1e4, 1e300]),
)
def test_building_several_at_once_is_building_each(seed, ks, tau):
    """In any order, twice the same k, and where no class lies between two of them."""
    p, w, counts = random_case(seed)
    counts[0] = 150
    hybrid, continual = (
        function(p, w, counts, ks, tau) for function in (hybrid_classifiers, continual_classifiers)
    )
    assert len(hybrid) == len(continual) == len(ks)
    for k, one, other in zip(ks, hybrid, continual, strict=True):
        slow = slow_transfer(p.tolist(), w.tolist(), counts.tolist(), k, tau)
        np.testing.assert_allclose(one, slow_sum(slow, p.tolist(), w.tolist()), atol=1e-10)
        np.testing.assert_allclose(other, slow_sum(slow, p.tolist()), atol=1e-10)


def test_no_temperature_empties_a_row_whose_nearest_class_is_read_last():
    """Each query's nearest key has one image: the classes read before it keep their sums for a larger k."""
    w = np.array([[1.0, 0.1, 0.0], [0.0, 1.0, 0.1], [0.1, 0.0, 1.0]])
    keys = w / np.linalg.norm(w, axis=1, keepdims=True)
    query, counts, ks = np.array([[-1.0, 0.1, 1.0]]), [400, 50, 1], (100, 20, 0)
    for tau in (1e6, 1e300):
        found = continual_classifiers(query.astype(np.float32), w.astype(np.float32), counts, ks, tau)
        for one, nearest in zip(found, keys, strict=True):
            np.testing.assert_allclose(one, [nearest + query[0] / np.linalg.norm(query)], atol=1e-6)


def test_single_precision_agrees_with_double():
    """At the size of ImageNet-LT's classifier: 1e-5 in each value of rows that are up to 3 long."""
    generator = np.random.default_rng(0)
    p, w = generator.normal(size=(1000, 256)) + 0.5, generator.normal(size=(1000, 256))
    counts = generator.integers(1, 300, 1000)
    for tau in (1.0, 10.0, 100.0):
        double = hybrid_classifiers(p, w, counts, temperature=tau)
        single = hybrid_classifiers(p.astype(np.float32), w.astype(np.float32), counts, temperature=tau)
        for exact, found in zip(double, single, strict=True):
            torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=0)
    scores = ensemble_probabilities(p[:50].astype(np.float32), single)
    torch.testing.assert_close(scores.double(), ensemble_probabilities(p[:50], double), atol=1e-5, rtol=0)


def test_new_classes_ask_the_known_ones():
    p, w, counts = random_case(12)
    whole = continual_classifiers(p, w, counts, (0, 20))
    part = continual_classifiers(p[2:4], w, counts, (0, 20))
    for one, other in zip(whole, part, strict=True):
        torch.testing.assert_close(other, one[2:4])


def test_blocks_of_images_do_not_change_the_probabilities(monkeypatch):
    p, w, _ = random_case(13)
    whole = ensemble_probabilities(p, [w, p])
    monkeypatch.setattr("lt_core.transfer.LEAST_IMAGES", 2)
    monkeypatch.setattr("lt_core.transfer.SCORES_BLOCK", 1)
    torch.testing.assert_close(ensemble_probabilities(p, [w, p]), whole)


def test_parameters_of_a_model_give_plain_tensors():
    p, w, counts = random_case(14)
    weights = torch.nn.Parameter(torch.as_tensor(w))
    for built in (knowledge_transfer(p, weights, counts), *hybrid_classifiers(p, weights, counts, (0,))):
        assert not built.requires_grad


def test_an_ensemble_of_one_is_the_classifier_and_order_does_not_matter():
    p, w, _ = random_case(8)
    torch.testing.assert_close(ensemble_probabilities(p, [w]), cosine_logits(p, w).softmax(dim=1))
    torch.testing.assert_close(ensemble_probabilities(p, [w, p]), ensemble_probabilities(p, [p, w]))


def test_permuting_classes_permutes_the_classifier():
    p, w, counts = random_case(9)
    order = np.random.default_rng(0).permutation(7)
    permuted = hybrid_classifier(p[order], w[order], counts[order], 0)
    torch.testing.assert_close(permuted, hybrid_classifier(p, w, counts, 0)[torch.as_tensor(order)])


def test_a_single_class():
    one = [[3.0, 4.0]]
    assert attention(one, one, [1]).tolist() == [[1.0]]
    torch.testing.assert_close(hybrid_classifier(one, one, [1]), torch.tensor([[1.8, 2.4]]))


# ------------------------------------------------------------------ kinds of arrays


def test_types_are_kept_and_others_become_float32():
    p, w, counts = random_case(10)
    for given_type, expected in ((np.float32, torch.float32), (np.float64, torch.float64)):
        assert hybrid_classifier(p.astype(given_type), w.astype(given_type), counts).dtype == expected
    assert hybrid_classifier(p.astype(np.float16), w.astype(np.float16), counts).dtype == torch.float32
    assert hybrid_classifier(p.astype(np.float32), w, counts).dtype == torch.float64
    integers = prototypes(np.array([[3, 4], [0, 2]]), np.array([0, 1], np.uint8), 2)
    torch.testing.assert_close(integers, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))


def test_unusual_memory_layouts_and_no_change_to_the_input():
    p, w, counts = random_case(11)
    expected = hybrid_classifier(p, w, counts)
    frozen = w.copy()
    frozen.setflags(write=False)
    reversed_twice = np.asfortranarray(p)[::-1].copy()[::-1]
    torch.testing.assert_close(hybrid_classifier(reversed_twice, frozen, counts), expected)
    torch.testing.assert_close(hybrid_classifier(p, torch.as_tensor(w.T.copy()).T, counts.tolist()), expected)
    np.testing.assert_array_equal(frozen, w)


# ------------------------------------------------------------------ bad input


P, W, N = np.eye(3), np.eye(3) + 0.5, np.array([120, 50, 5])
BROKEN, ZERO = np.eye(3), np.eye(3)
BROKEN[1, 1], ZERO[1, 1] = NAN, 0.0
BAD = {
    "a k that no class exceeds": (lambda: knowledge_transfer(P, W, N, 120), r"k=120.*no class.*120"),
    "attention, too large a k": (lambda: attention(P, W, N, 500), "k=500.*no class"),
    "negative k": (lambda: knowledge_transfer(P, W, N, -1), "k must"),
    "k not a number": (lambda: hybrid_classifier(P, W, N, "many"), "k must"),
    "k NaN": (lambda: attention(P, W, N, NAN), "k must"),
    "temperature 0": (lambda: attention(P, W, N, 0, 0.0), "temperature"),
    "negative temperature": (lambda: hybrid_classifier(P, W, N, 0, -1), "temperature"),
    "temperature NaN": (lambda: knowledge_transfer(P, W, N, 0, NAN), "temperature"),
    "scale 0": (lambda: cosine_logits(P, W, 0), "scale"),
    "scale of the ensemble": (lambda: ensemble_probabilities(P, [W], -1), "scale"),
    "NaN queries": (lambda: attention(BROKEN, W, N), r"queries.*row 1"),
    "NaN keys": (lambda: attention(P, BROKEN, N), r"keys.*row 1"),
    "NaN key of a kept class": (
        lambda: continual_classifier(P, BROKEN[[0, 2, 1]], [90, 5, 90], 20),
        "weights.*2",
    ),
    "NaN weight in Eq. 7": (lambda: hybrid_classifier(P, BROKEN, [120, 5, 50], 20), r"weights.*row 1"),
    "NaN prototype": (lambda: continual_classifier(BROKEN, W, N), "prototypes.*row 1"),
    "NaN transfer": (lambda: hybrid_classifier(P, W, N, transfer=BROKEN), "transfer.*row 1"),
    "infinite features": (lambda: cosine_logits(np.full((3, 3), np.inf), W), "features"),
    "zero query": (lambda: attention(ZERO, W, N), "queries: row 1"),
    "zero key": (lambda: knowledge_transfer(P, ZERO, [5, 90, 90], 20), "keys: row 1"),
    "zero weight": (lambda: hybrid_classifier(P, ZERO, N), "weights: row 1"),
    "zero feature": (lambda: cosine_logits(ZERO, W), "features: row 1"),
    "zero feature of a prototype": (lambda: prototypes(ZERO, [0, 1, 2], 3), "features: row 1"),
    "zero transfer": (lambda: continual_classifier(P, W, N, transfer=ZERO), "transfer: row 1"),
    "class without samples": (lambda: prototypes(P, [0, 0, 2], 3), "class 1 has no samples"),
    "count 0": (lambda: attention(P, W, [3, 0, 3]), "counts: class 1"),
    "labels outside": (lambda: prototypes(P, [0, 1, 3], 3), "labels"),
    "negative labels": (lambda: prototypes(P, [0, 1, -1], 3), "labels"),
    "fractional labels": (lambda: prototypes(P, [0.0, 1.0, 2.0], 3), "labels"),
    "too few labels": (lambda: prototypes(P, [0, 1], 2), "labels"),
    "no classes": (lambda: prototypes(P, [0, 0, 0], 0), "num_classes"),
    "vector features": (lambda: cosine_logits(P[0], W), "features"),
    "empty features": (lambda: cosine_logits(P[:0], W), "features"),
    "other dimension": (lambda: cosine_logits(P, W[:, :2]), "weights"),
    "keys of other classes": (lambda: attention(P, W[:2], N), "keys"),
    "counts of other classes": (lambda: attention(P, W, N[:2]), "counts"),
    "weights of other classes": (lambda: hybrid_classifier(P, W[:2], N), "weights"),
    "transfer of other classes": (lambda: hybrid_classifier(P, W, N, transfer=W[:2]), "transfer"),
    "counts beside a transfer": (lambda: hybrid_classifier(P, W, N[:2], transfer=W), "counts"),
    "no k": (lambda: hybrid_classifiers(P, W, N, ()), "ks must be a sequence"),
    "one k in place of several": (lambda: hybrid_classifiers(P, W, N, 20), "ks must be a sequence"),
    "one k too large": (lambda: continual_classifiers(P, W, N, (0, 120)), r"k=120.*no class"),
    "zero prototype in a later block": (
        lambda: hybrid_classifiers(
            np.vstack([np.ones((300, 1)), [[0.0]]]), np.ones((301, 1)), [1] * 301, (0,)
        ),
        "prototypes: row 300",
    ),
    "zero feature in a later block": (
        lambda: ensemble_probabilities(np.vstack([np.ones((2**20, 1)), [[0.0]]]), [[[1.0]]]),
        "features: row 1048576",
    ),
    "new classes with other features": (lambda: continual_classifiers(P[:1, :2], W, N), "weights"),
    "opposite keys": (
        lambda: hybrid_classifier([[0.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [-1.0, 0.0]], [3, 3]),
        "transfer: row 0 is a zero vector",
    ),
    "empty ensemble": (lambda: ensemble_probabilities(P, []), "classifiers"),
    "one matrix as an ensemble": (lambda: ensemble_probabilities(P, W), r"classifiers\[0\]"),
    "ensemble of different classes": (lambda: ensemble_probabilities(P, [W, W[:2]]), r"classifiers\[1\]"),
    "text": (lambda: cosine_logits([["a", "b"]], W), "features"),
    "complex": (lambda: cosine_logits(P * 1j, W), "features"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case):
    call, message = BAD[case]
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert isinstance(caught.value, ValueError)
