"""The public functions with every kind of awkward array: a finite result or one clear error."""

import numpy as np
import pytest
import torch

import lt_core
from lt_core.checks import InputError

generator = np.random.default_rng(0)
LABELS = np.repeat(np.arange(4), [30, 25, 6, 3])
FEATURES = np.eye(6)[LABELS] + 0.3 * generator.normal(size=(64, 6))
COUNTS = np.bincount(LABELS)
WEIGHTS = np.eye(6)[:4] + 0.1 * generator.normal(size=(4, 6))


def transferred(features=FEATURES, labels=LABELS, weights=WEIGHTS, counts=COUNTS) -> np.ndarray:
    """Probabilities by the plain functions: prototypes, hybrid classifiers, ensemble."""
    means = lt_core.prototypes(features, labels, len(counts))
    built = lt_core.hybrid_classifiers(means, weights, counts, (0, 20))
    continual = lt_core.continual_classifiers(means, weights, counts, (0,))
    assert torch.isfinite(continual[0]).all()
    return lt_core.ensemble_probabilities(features, built).numpy()


def estimated(features=FEATURES, labels=LABELS, weights=WEIGHTS, counts=COUNTS) -> np.ndarray:
    """Probabilities by the estimator."""
    model = lt_core.CompositionalTransferClassifier(ensemble_k=(0, 20)).fit(features, labels, weights)
    return model.predict_proba(features)


def frozen(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.setflags(write=False)
    return array


def with_value(value: object, row: int = 2) -> np.ndarray:
    broken = FEATURES.copy()
    broken[row] = value
    return broken


# The same numbers in another form: the result is that of the plain arrays, within the given tolerance.
SAME = {
    "read-only": (frozen, 1e-12),
    "Fortran order": (np.asfortranarray, 1e-12),
    "every second column": (lambda a: np.repeat(a, 2, axis=a.ndim - 1)[..., ::2], 1e-12),
    "negative strides": (lambda a: a[::-1].copy()[::-1], 1e-12),
    "big-endian": (lambda a: a.astype(a.dtype.newbyteorder(">")), 1e-12),
    "list": (lambda a: a.tolist(), 1e-5),  # plain lists are single precision
    "tensor": (lambda a: torch.from_numpy(a.copy()), 1e-12),
    "float16": (lambda a: a.astype(np.float16) if a.dtype.kind == "f" else a, 0.02),
    "float32": (lambda a: a.astype(np.float32) if a.dtype.kind == "f" else a, 1e-5),
    "integers": (lambda a: np.rint(a * 1000).astype(np.int32) if a.dtype.kind == "f" else a, 0.02),
    "small labels": (lambda a: a if a.dtype.kind == "f" else a.astype(np.uint8), 1e-12),
}


@pytest.mark.parametrize("compute", [transferred, estimated])
@pytest.mark.parametrize("form", SAME)
def test_the_same_numbers_in_another_form(compute, form, tried):
    change, tolerance = SAME[form]
    expected = compute()
    found = compute(change(FEATURES), change(LABELS), change(WEIGHTS), COUNTS)
    np.testing.assert_allclose(found, expected, atol=tolerance)
    tried(f"arrays: {form}")


REFUSED = {
    "NaN": {"features": with_value(np.nan)},
    "infinity": {"features": with_value(np.inf)},
    "zero vector": {"features": with_value(0)},
    "NaN weights": {"weights": WEIGHTS * np.nan},
    "zero weights": {"weights": WEIGHTS * 0},
    "complex": {"features": FEATURES * 1j},
    "text": {"features": np.full((64, 6), "x")},
    "one dimension": {"features": FEATURES[:, 0]},
    "three dimensions": {"features": FEATURES[None]},
    "no samples": {"features": FEATURES[:0], "labels": LABELS[:0]},
    "no features": {"features": FEATURES[:, :0]},
    "labels for other samples": {"labels": LABELS[:-1]},
    "fractions as labels": {"labels": LABELS + 0.5},
    "two labels a sample": {"labels": np.stack([LABELS, LABELS], axis=1)},
    "weights for other classes": {"weights": WEIGHTS[:3]},
    "weights of other features": {"weights": WEIGHTS[:, :3]},
}


@pytest.mark.parametrize("compute", [transferred, estimated])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_set_of_features_is_refused(compute, case, tried):
    with pytest.raises(ValueError) as error:
        compute(**REFUSED[case])
    assert str(error.value)
    tried(f"arrays: {case}")


def test_labels_with_gaps_and_one_class_and_one_sample(tried):
    """The functions take 0..N-1 and say so; the estimator takes any labels."""
    with pytest.raises(InputError, match="labels must lie in 0..3"):
        transferred(labels=LABELS * 10)
    with pytest.raises(InputError, match="class 1 has"):
        lt_core.prototypes(FEATURES, LABELS * 2, 7)
    np.testing.assert_array_equal(estimated(labels=LABELS * 10), estimated())
    one = transferred(FEATURES[:30], LABELS[:30], WEIGHTS[:1], COUNTS[:1])
    assert (one == 1).all() and (estimated(FEATURES[:30], LABELS[:30], WEIGHTS[:1]) == 1).all()
    single = lt_core.prototypes(FEATURES[:1], LABELS[:1], 1)
    built = lt_core.hybrid_classifiers(single, WEIGHTS[:1], [1], (0,))
    assert (lt_core.ensemble_probabilities(FEATURES[:1], built) == 1).all()
    tried("arrays: labels with gaps", 3)
    tried("arrays: one class", 2)
    tried("arrays: one sample")


def test_samples_given_twice(tried):
    twice = transferred(np.repeat(FEATURES, 2, axis=0), np.repeat(LABELS, 2))
    np.testing.assert_allclose(twice[::2], transferred(), rtol=1e-10)
    tried("arrays: samples given twice")
