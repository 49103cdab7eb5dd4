"""The registry of classifiers: the paper's equations, choosing on validation images, kept predictions."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from elsewhere import DEVICE, Elsewhere
from study import COUNTS, made_cache
from torch import Tensor

from lt_core import backbones, classifiers, results
from lt_core.baselines import adjust
from lt_core.cache import FeatureCache, own_classifier
from lt_core.checks import InputError, TrainingError
from lt_core.classifiers import BUDGET, CLASSIFIERS, Classifier, build, fit, predict, prediction, rows
from lt_core.metrics import group_accuracy, group_of
from lt_core.tables import published
from lt_core.transfer import continual_classifier, cosine_logits, hybrid_classifier, normalize, prototypes


@pytest.fixture(scope="module")
def cache() -> FeatureCache:
    return made_cache("sqrt", 0)


def suited(name: str) -> FeatureCache:
    """A cache that the classifier can be built on."""
    if name == "causal_norm":
        cache = made_cache("sqrt", 0)
        return replace(cache, direction=cache.features("train").mean(0))
    return made_cache("uniform_dot" if name in ("dot_product", "tau_norm") else "sqrt", 0)


# ---------------------------------------------------------------- where they run


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_is_made_and_applied_where_the_features_are(name):
    """With the draws of the CPU; nothing else comes from there."""
    cache, settings = suited(name), CLASSIFIERS[name].settings
    setting = settings[len(settings) // 2]
    expected = build(cache, name, **setting)(cache.features("test"))
    with Elsewhere():
        moved = cache.to(DEVICE)
        assert moved.to(DEVICE) is moved and cache.to(torch.device("cpu")) is cache
        found = build(moved, name, **setting)(moved.features("test"))
        assert found.device == DEVICE and torch.equal(found.cpu(), expected)
        with pytest.raises(RuntimeError, match="on the CPU and elsewhere"):
            moved.features("test") @ cache.prototypes.T


@pytest.mark.parametrize("how", [{}, {"within": "paper"}, {"images": "val"}])
def test_predictions_are_made_on_the_device_of_this_computer(cache, monkeypatch, how):
    expected = prediction(cache, "ensemble_tuned", **how)
    monkeypatch.setattr(classifiers, "device", lambda: DEVICE)
    with Elsewhere():
        found = prediction(cache, "ensemble_tuned", **how)
    assert np.array_equal(found.classes, expected.classes) and found.tried == expected.tried


# ---------------------------------------------------------------- what the names mean


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_is_better_than_chance_and_has_the_same_budget(name):
    cache, settings = suited(name), CLASSIFIERS[name].settings
    assert 1 <= len(settings) <= BUDGET and len({tuple(one.items()) for one in settings}) == len(settings)
    logits = build(cache, name, **settings[len(settings) // 2])(cache.features("test"))
    assert logits.shape == (180, 6) and logits.isfinite().all() and not logits.requires_grad
    assert (logits.argmax(1) == cache.labels("test")).double().mean() > 0.35  # chance: 0.17


def test_every_classifier_of_the_printed_tables_exists():
    names = {results.Subject.parse(text).name for text in published()["subject"] if text}
    assert "ensemble" in names and names <= {"own", *CLASSIFIERS, *results.MEASURES}


def test_the_paper_s_classifiers_are_the_equations(cache):
    p, w, scale = cache.prototypes, cache.weights, cache.scale
    wh = {k: hybrid_classifier(p, w, COUNTS, k) for k in (0, 20, 100)}
    whc = {k: continual_classifier(p, w, COUNTS, k) for k in (20, 100)}
    expected = {
        "cosine": [w],
        "prototypes": [p],
        "prototypes+cosine": [normalize("p", p) + normalize("w", w)],
        "wh20": [wh[20]],
        "wh100": [wh[100]],
        "ensemble": list(wh.values()),
        "whc20": [whc[20]],
        "whc100": [whc[100]],
        "ensemble_p_whc": [p, *whc.values()],
        "ensemble_whc": list(whc.values()),
    }
    features = cache.features("test")
    for name, matrices in expected.items():
        each = torch.stack([cosine_logits(features, one, scale).softmax(1) for one in matrices])
        torch.testing.assert_close(build(cache, name)(features).softmax(1), each.mean(0), msg=name)
        assert predict(cache, name).tolist() == each.mean(0).argmax(1).tolist()
    hot = build(cache, "ensemble_tuned", temperature=1)(features)
    assert not torch.allclose(hot, build(cache, "ensemble")(features))
    ensemble, tuned = (
        build(cache, "ensemble")(features),
        build(cache, "ensemble_tuned", temperature=10)(features),
    )
    torch.testing.assert_close(tuned, ensemble)
    adjusted = build(cache, "ensemble+logit_adjustment", strength=0.7)(features)
    torch.testing.assert_close(adjusted, adjust(ensemble, COUNTS, 0.7))
    assert (adjusted.argmax(1) >= 4).sum() > (ensemble.argmax(1) >= 4).sum()


def test_roles_of_table_6(cache):
    roles = {name: torch.stack(rows(cache, name)) for name in ("p2w", "w2p", "w2w", "p2p")}
    torch.testing.assert_close(roles["p2w"], torch.stack(rows(cache, "ensemble")))
    for one in roles:
        same = [other for other in roles if torch.allclose(roles[one], roles[other], atol=1e-3)]
        assert same == [one]
    # "X2Y": X asks, Y answers. With the same matrix for both, all roles are one.
    alike = replace(cache, weights=cache.prototypes)
    torch.testing.assert_close(rows(alike, "w2p"), rows(alike, "p2w"))
    torch.testing.assert_close(roles["w2p"][0], hybrid_by_hand(cache, cache.weights, cache.prototypes, 0))


def hybrid_by_hand(cache: FeatureCache, queries: Tensor, keys: Tensor, k: int) -> Tensor:
    """Eq. 4-7 with these queries and keys."""
    many = k < COUNTS
    q, a = normalize("q", queries), normalize("a", keys)[many]
    transfer = (10 * q @ a.T).softmax(1) @ a
    return sum(normalize("m", one) for one in (transfer, cache.prototypes, cache.weights))


def test_logit_adjustment_of_strength_0_changes_nothing(cache):
    features = cache.features("test")
    of_ensemble = build(cache, "ensemble+logit_adjustment", strength=0.0)(features)
    assert torch.equal(of_ensemble, build(cache, "ensemble")(features))
    assert {"strength": 0.0} in CLASSIFIERS["ensemble+logit_adjustment"].settings
    assert torch.equal(
        build(cache, "logit_adjustment", strength=0.0)(features), build(cache, "own")(features)
    )


def test_own_is_what_the_backbone_was_trained_with(cache):
    bias = torch.linspace(-3, 3, 6)
    dot, causal = replace(cache, bias=bias), suited("causal_norm")
    features = cache.features("test")
    torch.testing.assert_close(build(dot, "own")(features), features @ cache.weights.T + bias)
    assert torch.equal(build(cache, "own")(features), own_classifier(cache)(features))
    assert predict(causal, "own").tolist() == predict(causal, "causal_norm").tolist()
    with pytest.raises(InputError, match="was trained with a dot_product classifier, not with cosine"):
        predict(dot, "cosine")


def test_classes_left_out_of_training_are_no_candidates_of_the_learned_classifier(cache):
    left_out, few = made_cache("continual", 0), (COUNTS <= 20).nonzero().flatten().tolist()
    learned = build(left_out, "cosine")(left_out.features("test"))
    assert (learned[:, few] == -torch.inf).all() and learned[:, :4].isfinite().all()
    assert set(predict(left_out, "whc20")) & set(few)
    whole = replace(left_out, weights=left_out.weights.nan_to_num(1.0))  # whose few-shot rows are not read
    assert torch.equal(rows(left_out, "whc20")[0], rows(whole, "whc20")[0])
    for name in ("wh20", "prototypes+cosine"):
        with pytest.raises(InputError, match="weights"):
            predict(left_out, name)


def test_unknown_names_list_the_known_ones(cache):
    with pytest.raises(InputError, match="unknown classifier 'bbn': choose one of .*wh20"):
        predict(cache, "bbn")
    with pytest.raises(InputError, match="unknown classifier with rows of its own 'cosine': .*wh20"):
        rows(cache, "cosine")


# ---------------------------------------------------------------- choosing on validation images


def test_validation_chooses_the_best_and_the_first_of_equals(cache, monkeypatch):
    cache = replace(cache, meta=cache.meta | {"seed": 3})
    right = torch.eye(6)[cache.labels("val")]
    made = {"right": right, "wrong": right.roll(1, 1)}
    fitted = []

    def fake(cache: FeatureCache, kind: str, number: int, seed: int = 0) -> classifiers.Logits:
        if kind == "diverges":
            raise TrainingError("the loss is nan")
        fitted.append(seed)
        return lambda features: made[kind] + number / 100

    kinds = ("diverges", "wrong", "right", "right", "wrong")
    settings = [{"kind": kind, "number": number} for number, kind in enumerate(kinds)]
    monkeypatch.setitem(CLASSIFIERS, "fake", Classifier(fake, settings))
    found = fit(cache, "fake")
    assert found.setting == {"kind": "right", "number": 2} and fitted == [3] * 4  # the cache's seed
    assert np.isnan(found.tried[0][1]) and [score for _, score in found.tried[1:]] == [0, 100, 100, 0]
    assert torch.equal(found.logits(cache.features("val")), right + 0.02)
    monkeypatch.setitem(CLASSIFIERS, "fake", Classifier(fake, [settings[0]] * 2))
    with pytest.raises(TrainingError, match="fake: no setting could be trained"):
        fit(cache, "fake")


def test_the_test_images_play_no_part_in_the_choice(cache):
    features, labels = cache.splits["test"]
    other = replace(cache, splits={**cache.splits, "test": (features.flip(0), labels)})
    one, two = (prediction(each, "logit_adjustment") for each in (cache, other))
    assert (one.setting, one.tried) == (two.setting, two.tried) and len(one.tried) == 8
    assert one.classes.tolist() == two.classes[::-1].tolist()


# ---------------------------------------------------------------- predictions


def test_prediction_in_chunks(cache, monkeypatch):
    whole = predict(cache, "wh20")
    monkeypatch.setattr(classifiers, "CHUNK", 70)
    assert whole.dtype == np.int64 and predict(cache, "wh20").tolist() == whole.tolist()


def test_prototypes_may_be_those_of_another_split(cache):
    means = prototypes(*cache.splits["val"], 6)
    found = prediction(cache, "wh20", "train", prototypes="val").classes
    assert found.tolist() == predict(replace(cache, prototypes=means), "wh20", "train").tolist()
    assert found.tolist() != predict(cache, "wh20", "train").tolist()


@pytest.mark.parametrize("rule", ["paper", "common"])
def test_candidates_may_be_the_classes_of_an_image_s_group(cache, rule):
    found, free = prediction(cache, "wh20", within=rule).classes, predict(cache, "wh20")
    labels = cache.labels("test").numpy()
    inside = np.zeros(len(labels), bool)
    for mask in group_of(COUNTS, rule).values():
        inside |= mask[labels] & mask[free]
        assert mask[found[mask[labels]]].all()
    assert (found == free)[inside].all() and not inside.all()


@pytest.fixture
def stored(cache, tmp_path, monkeypatch) -> FeatureCache:
    """The cache as it is when it was read from a file, and an account of fits in tmp_path."""
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path))
    monkeypatch.setenv(classifiers.FIT_LOG, str(tmp_path / "account"))
    return replace(cache, meta=cache.meta | {"sha256": "one"})


def kept(folder: Path) -> list[Path]:
    return sorted((folder / ".cache" / "predictions").glob("*.npz"))


def test_a_prediction_is_made_once(stored, cache, tmp_path, monkeypatch):
    made = prediction(stored, "logit_adjustment")
    with monkeypatch.context() as patch:
        patch.setattr(classifiers, "fit", None)
        again = prediction(stored, "logit_adjustment")
    assert again.classes.dtype == np.int64 and again.classes.tolist() == made.classes.tolist()
    assert (again.setting, again.tried, again.seconds) == (made.setting, made.tried, made.seconds)
    predict(stored, "wh20")  # has nothing to choose: no line in the account
    lines = (tmp_path / "account").read_text().splitlines()
    assert lines == [f"{what} logit_adjustment sqrt 0" for what in ("fitted", "read")]
    assert len(kept(tmp_path)) == 2
    predict(cache, "wh100")  # of arrays in memory: nothing to know it by
    assert len(kept(tmp_path)) == 2


def test_what_a_prediction_depends_on_makes_another(stored, tmp_path, monkeypatch):
    predict(stored, "wh20")
    for meta in ({"sha256": "two"}, {"seed": 1}, {"shared_features": {"sha256": "other"}}):
        predict(replace(stored, meta=stored.meta | meta), "wh20")
    prediction(stored, "wh20", "val")
    prediction(stored, "wh20", prototypes="val")
    prediction(stored, "wh20", within="paper")
    predict(stored, "wh100")
    monkeypatch.setattr(classifiers, "_code", lambda: "changed")
    predict(stored, "wh20")
    assert len(kept(tmp_path)) == 9


def test_a_prediction_depends_on_its_settings(stored, tmp_path, monkeypatch):
    predict(stored, "logit_adjustment")
    settings = CLASSIFIERS["logit_adjustment"].settings[:3]
    changed = replace(CLASSIFIERS["logit_adjustment"], settings=settings)
    monkeypatch.setitem(CLASSIFIERS, "logit_adjustment", changed)
    assert len(prediction(stored, "logit_adjustment").tried) == 3 and len(kept(tmp_path)) == 2


def archive(path: Path, classes: np.ndarray, **record: object) -> bytes:
    np.savez(path, classes=classes, record=np.array(json.dumps(record)))
    return path.read_bytes()


def test_a_damaged_prediction_is_made_again(stored, tmp_path):
    made = predict(stored, "wh20")
    (path,) = kept(tmp_path)
    whole, other = path.read_bytes(), tmp_path / "other.npz"
    record = {"setting": {}, "tried": [], "seconds": 1.0}
    for damaged in (
        b"",
        whole[: len(whole) // 2],
        b"\x80\x04K\x01.",  # a pickle
        archive(other, np.array([0, 6]), **record),  # six classes
        archive(other, np.array([0.5]), **record),
        archive(other, np.array([0, 1])),  # no record
    ):
        path.write_bytes(damaged)
        assert predict(stored, "wh20").tolist() == made.tolist()
        assert classifiers._read(path, 6) is not None


# ---------------------------------------------------------------- on a trained backbone


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["uniform", "uniform_dot", "causal_norm"])
def test_every_classifier_on_a_digits_backbone(backbone, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path_factory.getbasetemp() / "trained"))
    cache = backbones.load("digits", backbone)

    def groups(name: str) -> dict[str, float]:
        return group_accuracy(predict(cache, name), cache.labels("test"), cache.counts)

    # What is adjusted or fitted to is the trained classifier: of causal norm before its strength is chosen.
    features, labels = cache.features("test"), cache.labels("test")
    trained = build(cache, "logit_adjustment", strength=0.0)(features).argmax(dim=1)
    start = group_accuracy(trained, labels, cache.counts)
    base, refused = groups("own"), set()
    for name in CLASSIFIERS:
        try:
            found = groups(name)
        except InputError:
            refused.add(name)
            continue
        assert found["total"] > base["total"] - 8, (name, found, base)
        if name in {"crt", "lws", "tau_norm", "logit_adjustment", "balms", "disalign"}:
            assert found["few"] >= start["few"], (name, found, start)
    second = {"lws", "balms", "disalign", "crt", *(name for name in CLASSIFIERS if name.endswith("_head"))}
    assert (
        refused
        == {
            "uniform": {"dot_product", "causal_norm", "tau_norm"},
            "uniform_dot": {"cosine", "causal_norm"},
            "causal_norm": {"cosine", "dot_product", "tau_norm", *second},
        }[backbone]
    )
