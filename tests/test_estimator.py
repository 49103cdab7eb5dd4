"""The scikit-learn estimator: its contract, what it computes, new classes, storage, unusual input."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from lt_core import EXPECTED_FAILED_CHECKS, CompositionalTransferClassifier
from lt_core.cache import FeatureCache
from lt_core.checks import CacheError, InputError
from lt_core.classifiers import CLASSIFIERS
from lt_core.estimator import TENSORS, _sha256, own_settings
from lt_core.transfer import continual_classifiers, ensemble_probabilities, hybrid_classifiers, prototypes

COUNTS = np.array([120, 60, 25, 8, 4])
NAMES = np.array(["whale", "ant", "lynx", "owl", "bee"])  # not in alphabetical order
CENTRES = np.random.default_rng(7).normal(size=(5, 6)) * 3


def long_tail(seed: int = 0, counts: np.ndarray = COUNTS) -> tuple[np.ndarray, np.ndarray]:
    """Features around one centre a class, and labels 0..4."""
    labels = np.repeat(np.arange(len(counts)), counts)
    return CENTRES[labels] + np.random.default_rng(seed).normal(size=(len(labels), 6)), labels


def quick(**parameters) -> CompositionalTransferClassifier:
    return CompositionalTransferClassifier(**{"epochs": 2} | parameters)


X, Y = long_tail()
TEST, TEST_LABELS = long_tail(1, np.full(5, 40))
WEIGHTS = np.random.default_rng(3).normal(size=(5, 6))


# ---------------------------------------------------------------- scikit-learn's contract


@pytest.mark.filterwarnings("ignore")  # the checks provoke warnings on purpose
def test_check_estimator():
    results = check_estimator(
        CompositionalTransferClassifier(), expected_failed_checks=EXPECTED_FAILED_CHECKS, on_skip=None
    )
    failed = {result["check_name"] for result in results if result["status"] == "xfail"}
    assert failed == set(EXPECTED_FAILED_CHECKS) and len(failed) <= 3  # no exception outlives its reason
    assert sum(result["status"] == "passed" for result in results) > 40


def test_pipeline_search_and_clone():
    search = GridSearchCV(
        make_pipeline(StandardScaler(), quick()),
        {
            "compositionaltransferclassifier__ensemble_k": [(0,), (0, 20, 100)],
            "compositionaltransferclassifier__sampler": ["uniform", "square_root"],
        },
        cv=2,
    )
    search.fit(X, NAMES[Y])
    assert search.best_score_ > 0.8
    assert (search.predict(TEST) == NAMES[TEST_LABELS]).mean() > 0.8
    copy = clone(search.best_estimator_[-1])
    assert not hasattr(copy, "classes_") and copy.get_params() == search.best_estimator_[-1].get_params()


# ---------------------------------------------------------------- what it computes


def test_given_weights_are_the_functions_of_the_paper():
    model = quick(temperature=5.0, scale=20.0).fit(X, NAMES[Y], WEIGHTS)
    order = NAMES.argsort()  # the labels are sorted, and the rows of the weights go with them
    assert model.classes_.tolist() == sorted(NAMES) and model.counts_.tolist() == COUNTS[order].tolist()
    rank = order.argsort()[Y]
    means = prototypes(X, rank, 5)
    built = hybrid_classifiers(means, WEIGHTS, COUNTS[order], (0, 20, 100), temperature=5.0)
    expected = ensemble_probabilities(TEST, built, 20.0)
    np.testing.assert_allclose(model.predict_proba(TEST), expected, rtol=1e-12)
    assert (model.predict(TEST) == model.classes_[expected.argmax(1)]).all()
    assert quick().fit(X, Y, WEIGHTS).scale_ == 16.0


@pytest.mark.parametrize("sampler", ["uniform", "class_aware", "square_root"])
def test_a_learned_classifier_recognises_the_classes(sampler):
    model = CompositionalTransferClassifier(sampler=sampler).fit(X, NAMES[Y])
    assert model.score(TEST, NAMES[TEST_LABELS]) > 0.9
    cosines = TEST @ (model.weights_ / np.linalg.norm(model.weights_, axis=1, keepdims=True)).T
    assert (model.classes_[cosines.argmax(1)] == NAMES[TEST_LABELS]).mean() > 0.8  # learned, not only built


def test_samplers_and_seeds_matter_and_repeat():
    one, same = quick().fit(X, Y), quick().fit(X, Y)
    np.testing.assert_array_equal(one.weights_, same.weights_)
    for other in (quick(random_state=1), quick(sampler="uniform"), quick(epochs=3)):
        assert not np.array_equal(other.fit(X, Y).weights_, one.weights_)


def test_fitting_leaves_the_global_generator_and_the_output_folder_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path))
    before = torch.random.get_rng_state()
    quick().fit(X, Y)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_ks_that_no_class_exceeds_are_left_out():
    assert quick().fit(X, Y).ensemble_k_ == (0, 20, 100)
    assert quick(ensemble_k=[130, 60, 0]).fit(X, Y).ensemble_k_ == (60, 0)
    few = quick().fit(X[Y > 1], Y[Y > 1])
    assert few.ensemble_k_ == (0, 20) and few.classifiers_.shape == (2, 3, 6)
    with pytest.raises(InputError, match=r"ensemble_k=\(120,\).*120 samples"):
        quick(ensemble_k=(120,)).fit(X, Y)


def test_the_learned_scale_stays_above_zero():
    """Labels that have nothing to do with the features draw the scale to 0."""
    noise = np.random.default_rng(0).uniform(size=(40, 3))
    model = CompositionalTransferClassifier(epochs=300).fit(noise, np.arange(40) % 2)
    assert model.scale_ == 1.0


def test_prediction_in_blocks(monkeypatch):
    model = quick().fit(X, Y)
    whole = model.predict(TEST)
    monkeypatch.setattr("lt_core.estimator.IMAGES", 7)
    np.testing.assert_array_equal(model.predict(TEST), whole)


# ---------------------------------------------------------------- classifiers that read the training samples


@pytest.mark.parametrize("name", ["image_evidence", "image_density"])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_readers_are_the_classifiers_of_the_registry(name, kind, tmp_path):
    model = quick(classifier=name, share=0.8, strength=0.5, scale=12.0).fit(X.astype(kind), NAMES[Y], WEIGHTS)
    rank = NAMES.argsort().argsort()[Y]
    cache = FeatureCache(
        weights=torch.from_numpy(WEIGHTS).float(),
        scale=12.0,
        counts=torch.from_numpy(COUNTS[NAMES.argsort()]),
        prototypes=prototypes(X, rank, 5).float(),
        splits={"train": (torch.from_numpy(X).float(), torch.from_numpy(rank))},
        meta={},
    )
    expected = CLASSIFIERS[name].of(cache)(share=0.8, strength=0.5)(torch.from_numpy(TEST).float()).softmax(1)
    np.testing.assert_allclose(model.predict_proba(TEST.astype(kind)), expected, atol=2e-5)

    # Pickled, copied and stored they say the same.
    model.save(tmp_path / "model")
    loaded = CompositionalTransferClassifier.load(tmp_path / "model")
    for again in (pickle.loads(pickle.dumps(model)), loaded):
        np.testing.assert_array_equal(again.predict_proba(TEST), model.predict_proba(TEST))
    with pytest.raises(InputError, match=f"{name} takes no new classes"):
        model.add_classes(-X[:3], ["fox"] * 3)


@pytest.mark.parametrize(("name", "usual"), [("image_evidence", 0.25), ("image_density", 1.0)])
def test_readers_have_a_usual_strength(name, usual):
    found = quick(classifier=name).fit(X, Y, CENTRES).predict_proba(TEST)
    expected = quick(classifier=name, strength=usual).fit(X, Y, CENTRES).predict_proba(TEST)
    np.testing.assert_array_equal(found, expected)
    other = quick(classifier=name, strength=0.5).fit(X, Y, CENTRES).predict_proba(TEST)
    assert not np.allclose(found, other, atol=1e-3)


def test_readers_work_in_a_search_and_refuse_bad_settings():
    settings = {"share": [0.4, 0.8], "strength": [0, 1.0]}
    search = GridSearchCV(quick(classifier="image_density"), settings, cv=2)
    assert search.fit(X, NAMES[Y]).best_score_ > 0.8
    for parameters, message in (
        ({"classifier": "images"}, "unknown classifier 'images': choose one of ensemble, image_"),
        ({"classifier": "image_density", "share": -1.0}, "share must be"),
        (
            {"classifier": "image_density", "strength": float("nan")},
            "strength must be a finite number or None",
        ),
    ):
        with pytest.raises(InputError, match=message):
            quick(**parameters).fit(X, Y)


@pytest.mark.parametrize("first", ["ensemble", "image_density"])
def test_set_params_changes_the_next_fit(first, tmp_path):
    """As everywhere in scikit-learn: what is fitted stays as it is, also pickled and stored."""
    model = quick(classifier=first, strength=0.5).fit(X, Y, CENTRES)
    expected = model.predict_proba(TEST)
    model.set_params(classifier="image_evidence", strength=1.0, share=0.8)
    model.save(tmp_path / "model")
    for one in (
        model,
        pickle.loads(pickle.dumps(model)),
        CompositionalTransferClassifier.load(tmp_path / "model"),
    ):
        np.testing.assert_array_equal(one.predict_proba(TEST), expected)
    assert not np.allclose(model.fit(X, Y, CENTRES).predict_proba(TEST), expected, atol=1e-3)
    back = model.set_params(classifier="ensemble").fit(X, Y, CENTRES)
    np.testing.assert_array_equal(back.predict_proba(TEST), quick().fit(X, Y, CENTRES).predict_proba(TEST))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["image_evidence", "image_density"])
def test_check_estimator_of_a_reader(name):
    reader = CompositionalTransferClassifier(classifier=name, epochs=5)
    expected = EXPECTED_FAILED_CHECKS | {
        "check_fit2d_1feature": "directions of one feature are all alike, which a density refuses by name"
    }
    results = check_estimator(reader, expected_failed_checks=expected, on_skip=None)
    assert sum(result["status"] == "passed" for result in results) > 40


# ---------------------------------------------------------------- new classes


def split_off(*new: int) -> tuple[np.ndarray, CompositionalTransferClassifier]:
    """Rows of the new classes, and a model that knows the others."""
    rows = np.isin(Y, new)
    known = np.setdiff1d(np.arange(5), new)
    weights = WEIGHTS[known][NAMES[known].argsort()]
    return rows, quick().fit(X[~rows], NAMES[Y[~rows]], weights)


def test_new_classes_get_rows_by_equation_9_and_known_ones_keep_theirs():
    rows, model = split_off(3, 4)
    before = {str(name): model.classifiers_[:, i] for i, name in enumerate(model.classes_)}
    learned, counts = model.weights_, model.counts_
    assert model.add_classes(X[rows], NAMES[Y[rows]]) is model
    assert model.classes_.tolist() == sorted(NAMES)
    means = prototypes(X[rows], (Y[rows] == 3).astype(int), 2)  # "bee" before "owl"
    built = torch.stack(continual_classifiers(means, learned, counts, (0, 20, 100))).numpy()
    for i, name in enumerate(model.classes_):
        expected = before[name] if name in before else built[:, ["bee", "owl"].index(name)]
        np.testing.assert_allclose(model.classifiers_[:, i], expected, rtol=1e-12)
    assert model.counts_.tolist() == [60, 4, 25, 8, 120]
    assert np.isnan(model.weights_).all(axis=1).tolist() == [False, True, False, True, False]
    recognised = model.predict(TEST) == NAMES[TEST_LABELS]
    assert recognised[TEST_LABELS >= 3].mean() > 0.7 and recognised.mean() > 0.7
    np.testing.assert_allclose(model.predict_proba(TEST).sum(axis=1), 1)


def test_classes_added_one_after_another_or_together_are_the_same():
    rows, together = split_off(3, 4)
    together.add_classes(X[rows], NAMES[Y[rows]])
    _, in_turn = split_off(3, 4)
    for label in (4, 3):
        rows = np.flatnonzero(label == Y)
        in_turn.add_classes(X[rows], NAMES[Y[rows]])
    np.testing.assert_allclose(in_turn.predict_proba(TEST), together.predict_proba(TEST), rtol=1e-12)


def test_one_example_of_a_longer_name_is_enough():
    _, model = split_off(4)
    model.add_classes(CENTRES[[4]], ["bumblebee, the garden kind"])
    assert (model.predict(TEST[TEST_LABELS == 4]) == "bumblebee, the garden kind").mean() > 0.7


def test_known_labels_and_labels_of_another_kind_are_refused():
    rows, model = split_off(4)
    before = model.predict_proba(TEST)
    for labels, message in (
        (np.full(4, "ant"), "the class 'ant' is known already"),
        (np.arange(4) // 2, "labels such as 0, the known ones are such as 'ant'"),
    ):
        with pytest.raises(InputError, match=message):
            model.add_classes(X[rows], labels)
    with pytest.raises(ValueError, match="5 features, but .* is expecting 6"):
        model.add_classes(X[rows][:, :5], np.full(4, "bee"))
    np.testing.assert_array_equal(model.predict_proba(TEST), before)
    with pytest.raises(NotFittedError):
        quick().add_classes(X, Y)


def test_new_labels_take_the_kind_of_the_known_ones():
    for known, new, expected in ((np.int64, 9.0, 9), (np.float64, 9, 9.0), (np.uint8, 9, 9)):
        model = quick().fit(X, Y.astype(known)).add_classes(-X[:3], [new] * 3)
        assert model.classes_.dtype == known and model.classes_[-1] == expected
    for known, new in ((Y > 2, 2), (Y.astype(np.uint8), 300)):
        with pytest.raises(InputError, match=f"y_new: {new} is no label of the known kind"):
            quick().fit(X, known).add_classes(-X[:3], [new] * 3)


def test_partial_fit_is_fit_and_then_add_classes():
    rows, _ = split_off(4)
    known = ~rows
    found = quick().partial_fit(X[known], NAMES[Y[known]]).partial_fit(X[rows], NAMES[Y[rows]])
    expected = quick().fit(X[known], NAMES[Y[known]]).add_classes(X[rows], NAMES[Y[rows]])
    np.testing.assert_array_equal(found.predict_proba(TEST), expected.predict_proba(TEST))
    with pytest.raises(InputError, match="is known already"):
        found.partial_fit(X, NAMES[Y])


# ---------------------------------------------------------------- weights of samples


def test_weights_of_samples_count_in_prototypes_and_in_training():
    weight = np.where(np.arange(len(Y)) % 2, 3.0, 1.0)
    given = quick().fit(X, Y, WEIGHTS, sample_weight=weight)
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    for label in range(5):
        of = label == Y
        np.testing.assert_allclose(given.prototypes_[label], np.average(unit[of], axis=0, weights=weight[of]))
    plain = quick().fit(X, Y)
    np.testing.assert_allclose(
        quick().fit(X, Y, sample_weight=5 * np.ones(len(Y))).weights_, plain.weights_, atol=1e-5
    )
    assert not np.allclose(quick().fit(X, Y, sample_weight=weight).weights_, plain.weights_, atol=1e-3)


def test_a_sample_of_weight_0_is_left_out():
    weight = np.r_[np.zeros(20), np.ones(len(Y) - 20)]
    found, expected = quick().fit(X, Y, sample_weight=weight), quick().fit(X[20:], Y[20:])
    assert found.counts_.tolist() == expected.counts_.tolist()
    np.testing.assert_allclose(found.predict_proba(TEST), expected.predict_proba(TEST), atol=1e-5)
    with pytest.raises(ValueError, match="at least one non-zero"):
        quick().fit(X, Y, sample_weight=np.zeros(len(Y)))


# ---------------------------------------------------------------- PyTorch's settings, and tensors


@pytest.fixture(params=["no_grad", "inference_mode", "float64", "meta", "autocast"])
def setting(request):
    """A process-wide setting of PyTorch that somebody else has made."""
    if request.param == "float64":
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)
        return
    contexts = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "meta": lambda: torch.device("meta"),
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    with contexts[request.param]():
        yield


EXPECTED = {}


def test_results_depend_on_no_setting_of_pytorch(setting):
    if not EXPECTED:
        with own_settings():
            EXPECTED["all"] = quick().fit(X, Y).predict_proba(TEST)
    model = quick().fit(X, Y)
    np.testing.assert_array_equal(model.predict_proba(TEST), EXPECTED["all"])
    assert model.predict(TEST).shape == (len(TEST),)
    quick().fit(torch.tensor(X, device="cpu"), Y).add_classes(torch.tensor(-X[:3], device="cpu"), [9] * 3)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_tensors_of_any_float_type_with_gradients(kind):
    features = torch.tensor(X, dtype=kind, requires_grad=True)
    found = quick().fit(features, torch.tensor(Y)).predict_proba(torch.tensor(TEST, dtype=kind))
    np.testing.assert_allclose(found, quick().fit(X, Y).predict_proba(TEST), atol=0.1)
    assert features.requires_grad and features.grad is None


# ---------------------------------------------------------------- kinds of arrays


def test_number_types_and_memory_layouts():
    expected = quick().fit(X, Y, WEIGHTS).predict_proba(TEST)
    frozen = X.copy()
    frozen.setflags(write=False)
    wide = np.repeat(X, 2, axis=1)
    for same in (
        frozen,
        np.asfortranarray(X),
        wide[:, ::2],
        X[::-1].copy()[::-1],
        X.astype(">f8"),
        X.tolist(),
    ):
        np.testing.assert_allclose(quick().fit(same, Y, WEIGHTS).predict_proba(TEST), expected, rtol=1e-9)
        learned = quick().fit(same, Y)
        np.testing.assert_allclose(learned.weights_, quick().fit(X, Y).weights_, rtol=1e-4, atol=1e-6)
    single = quick().fit(X.astype(np.float32), Y, WEIGHTS.astype(np.float32))
    assert single.predict_proba(TEST.astype(np.float32)).dtype == np.float32
    np.testing.assert_allclose(single.predict_proba(TEST), expected, atol=1e-5)
    half = quick().fit(X.astype(np.float16), Y, WEIGHTS)
    np.testing.assert_allclose(half.predict_proba(TEST.astype(np.float16)), expected, atol=0.02)
    whole = quick().fit(np.rint(X * 100).astype(np.int32), Y, WEIGHTS)
    np.testing.assert_allclose(whole.predict_proba(np.rint(TEST * 100).astype(np.int16)), expected, atol=0.02)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_size_of_features_does_not_matter(size):
    expected = quick().fit(X, Y)
    found = quick().fit(X * size, Y)
    np.testing.assert_allclose(found.weights_, expected.weights_, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.predict_proba(TEST * size), expected.predict_proba(TEST), atol=1e-5)


@pytest.mark.parametrize(
    "labels", [Y * 1000 - 7, Y / 2 + 0.25 > 0.3, NAMES[Y].astype(object), Y.astype(np.uint8)]
)
def test_labels_of_any_kind_come_back_as_they_were(labels):
    model = quick().fit(X, labels)
    predicted = model.predict(X)
    assert predicted.dtype == labels.dtype and set(predicted) <= set(labels)
    assert (predicted == labels).mean() > 0.8


def test_one_class():
    with pytest.raises(InputError, match="y has one class.*needs two"):
        quick().fit(X, np.zeros(len(X)))
    model = quick().fit(X, np.full(len(X), 3), WEIGHTS[:1])
    assert set(model.predict(TEST)) == {3} and (model.predict_proba(TEST) == 1).all()
    model.add_classes(X[Y == 4], np.full(4, 9))
    assert set(model.predict(TEST)) == {3, 9}


def test_one_sample_a_class_and_samples_given_twice():
    model = quick().fit(CENTRES, np.arange(5))
    assert model.ensemble_k_ == (0,) and (model.predict(CENTRES) == np.arange(5)).all()
    twice = quick().fit(np.repeat(CENTRES, 2, axis=0), np.repeat(np.arange(5), 2), WEIGHTS)
    once = quick().fit(CENTRES, np.arange(5), WEIGHTS)
    np.testing.assert_allclose(twice.predict_proba(TEST), once.predict_proba(TEST), rtol=1e-12)
    with pytest.raises(InputError, match="y has one class"):
        quick().fit(X[:1], Y[:1])


def with_value(value: float) -> np.ndarray:
    broken = X.copy()
    broken[3, 2] = value
    return broken


ZERO = X.copy()
ZERO[5] = 0
BAD = {
    "NaN": (lambda: quick().fit(with_value(np.nan), Y), "NaN"),
    "infinity": (lambda: quick().fit(with_value(np.inf), Y), "infinity"),
    "zero vector, learned": (lambda: quick().fit(ZERO, Y), "X: row 5 is a zero vector"),
    "zero vector, given weights": (lambda: quick().fit(ZERO, Y, WEIGHTS), "row 5 is a zero vector"),
    "zero vector to predict": (lambda: quick().fit(X, Y, WEIGHTS).predict(ZERO), "row 5 is a zero vector"),
    "NaN to predict": (lambda: quick().fit(X, Y, WEIGHTS).predict(with_value(np.nan)), "NaN"),
    "weights of other classes": (
        lambda: quick().fit(X, Y, WEIGHTS[:4]),
        "classifier_weights must have 5 rows",
    ),
    "weights of other features": (
        lambda: quick().fit(X, Y, WEIGHTS[:, :4]),
        "classifier_weights must have 6 col",
    ),
    "NaN weights": (lambda: quick().fit(X, Y, WEIGHTS * np.nan), "classifier_weights has NaN"),
    "zero weights": (lambda: quick().fit(X, Y, WEIGHTS * 0), "weights: row 0 is a zero vector"),
    "sampler": (lambda: quick(sampler="sqrt").fit(X, Y), "unknown sampler 'sqrt'"),
    "temperature": (lambda: quick(temperature=0).fit(X, Y), "temperature must be"),
    "scale": (lambda: quick(scale=-1.0).fit(X, Y), "scale must be"),
    "epochs": (lambda: quick(epochs=0).fit(X, Y), "epochs must be a whole number above 0, found 0"),
    "one k": (lambda: quick(ensemble_k=20).fit(X, Y), "ensemble_k must be a sequence"),
    "no k": (lambda: quick(ensemble_k=()).fit(X, Y), "ensemble_k"),
    "negative k": (lambda: quick(ensemble_k=(-1,)).fit(X, Y, WEIGHTS), "k must be a number .* 0 or more"),
    "k NaN": (lambda: quick(ensemble_k=(0, np.nan)).fit(X, Y, WEIGHTS), "k must be a number .* 0 or more"),
    "k of text": (lambda: quick(ensemble_k=("20",)).fit(X, Y), "ensemble_k must be a sequence of numbers"),
    "continuous labels": (lambda: quick().fit(X, Y + 0.5), "Unknown label type"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_clear_error(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- storage


@pytest.mark.parametrize("labels", [Y, NAMES[Y], NAMES[Y].astype(object), Y > 1, Y * 1.0])
def test_a_stored_classifier_predicts_bit_for_bit_the_same(tmp_path, labels):
    model = quick(ensemble_k=(0, np.int64(20)), random_state=5).fit(X, labels)
    model.save(tmp_path / "model.safetensors")
    loaded = CompositionalTransferClassifier.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(loaded.predict_proba(TEST), model.predict_proba(TEST))
    np.testing.assert_array_equal(loaded.predict(TEST), model.predict(TEST))
    assert loaded.predict(TEST).dtype == model.predict(TEST).dtype
    assert loaded.get_params() == model.get_params() and loaded.ensemble_k_ == model.ensemble_k_
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(ValueError, match="is expecting 6 features"):
        loaded.predict(TEST[:, :5])


def test_added_classes_and_feature_names_are_stored(tmp_path):
    import pandas as pd

    names = [f"feature {i}" for i in range(6)]
    known = Y < 3
    model = quick().fit(pd.DataFrame(X[known], columns=names), NAMES[Y[known]])
    model.add_classes(pd.DataFrame(X[~known], columns=names), NAMES[Y[~known]])
    model.save(tmp_path / "model")
    loaded = CompositionalTransferClassifier.load(tmp_path / "model")
    table = pd.DataFrame(TEST, columns=names)
    np.testing.assert_array_equal(loaded.predict_proba(table), model.predict_proba(table))
    loaded.add_classes(table[:3], ["a", "b", "b"])
    assert loaded.classes_.tolist() == ["a", "ant", "b", "bee", "lynx", "owl", "whale"]
    with pytest.raises(ValueError, match="feature names"):
        loaded.predict(table[names[::-1]])


def test_what_cannot_be_stored_is_refused_and_replaces_nothing(tmp_path):
    path = tmp_path / "model"
    quick().fit(X, Y, WEIGHTS).save(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="cannot be stored: RandomState"):
        quick(random_state=np.random.RandomState(0)).fit(X, Y).save(path)
    with pytest.raises(NotFittedError):
        quick().save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def rewritten(path, change) -> None:
    """The file with a changed description and a hash that fits: not damaged, but wrong."""
    tensors = load_file(path)
    with safe_open(path, framework="numpy") as file:
        description = json.loads(file.metadata()["json"])
    change(description, tensors)
    text = json.dumps(description)
    save_file(tensors, path, {"json": text, "sha256": _sha256(tensors, text)})


WRONG = {
    "version": (lambda d, t: d.update(format_version=2), "format version 2, this code reads 1"),
    "unknown parameter": (lambda d, t: d["parameters"].update(shell="rm"), "unexpected keyword"),
    "no parameters": (lambda d, t: d.update(parameters=[]), "does not hold a stored classifier"),
    "no samples to read": (lambda d, t: d["parameters"].update(classifier="image_density"), "features"),
    "missing entry": (lambda d, t: d.pop("scale"), "scale"),
    "other classes": (lambda d, t: d["classes"].pop(), "prototypes must have 4 rows"),
    "absurd type of labels": (lambda d, t: d.update(classes_type="U100000000"), "cannot be of the type"),
    "scale": (lambda d, t: d.update(scale=-1), "scale must be"),
    "shape": (lambda d, t: t.update(classifiers=t["classifiers"][:1].copy()), "do not fit"),
    "counts": (lambda d, t: t.update(counts=t["counts"] * 0), "each class needs one"),
    "NaN": (lambda d, t: t.update(classifiers=t["classifiers"] * np.nan), "NaN"),
    "NaN prototypes": (lambda d, t: t.update(prototypes=t["prototypes"] * np.nan), "NaN"),
    "dimensions": (lambda d, t: t.update(prototypes=t["prototypes"].ravel()), "stored classifier"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused(tmp_path, case):
    change, message = WRONG[case]
    path = tmp_path / "model"
    quick().fit(X, Y, WEIGHTS).save(path)
    rewritten(path, change)
    with pytest.raises(CacheError, match=message):
        CompositionalTransferClassifier.load(path)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "model"
    quick().fit(X, Y, WEIGHTS).save(path)
    content = path.read_bytes()
    for position in (3, len(content) // 2, len(content) - 5):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CacheError):
            CompositionalTransferClassifier.load(path)
    for damaged in (content[:-9], b"", pickle.dumps(quick())):
        path.write_bytes(damaged)
        with pytest.raises(CacheError, match="does not hold a stored classifier"):
            CompositionalTransferClassifier.load(path)
    save_file({"prototypes": X}, path)
    with pytest.raises(CacheError, match="does not hold a stored classifier"):
        CompositionalTransferClassifier.load(path)
    tensors, nested = {name: X for name in TENSORS}, "[" * 10**5
    save_file(tensors, path, {"json": nested, "sha256": _sha256(tensors, nested)})
    with pytest.raises(CacheError, match="does not hold a stored classifier"):
        CompositionalTransferClassifier.load(path)
    with pytest.raises(CacheError, match="there is no stored classifier"):
        CompositionalTransferClassifier.load(tmp_path / "none")
    with pytest.raises(CacheError):
        CompositionalTransferClassifier.load(tmp_path)
