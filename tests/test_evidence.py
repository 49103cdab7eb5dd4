"""Evidence of the training images against slow versions in float64, and the identities it rests on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from study import COUNTS, made_cache
from torch import Tensor

from lt_core import evidence
from lt_core.baselines import adjust
from lt_core.cache import FeatureCache, own_classifier
from lt_core.checks import CacheError, InputError
from lt_core.classifiers import CLASSIFIERS, build, fit, predict
from lt_core.evidence import Density, Evidence, Votes, WithDensity, image_density, image_evidence, inducing
from lt_core.transfer import normalize

SETTINGS = CLASSIFIERS["image_evidence"].settings


@pytest.fixture(scope="module")
def cache() -> FeatureCache:
    return made_cache("sqrt", 0)


@pytest.fixture(scope="module")
def prepared(cache) -> Evidence:
    return Evidence(cache)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


class Slow:
    """The formulas of the module's head, image by image and class by class, in float64."""

    def __init__(self, cache: FeatureCache) -> None:
        as_numpy = [cache.features("train"), cache.weights, cache.prototypes]
        self.x, self.w, p = (unit(one.double().numpy()) for one in as_numpy)
        self.y, self.n, self.scale = cache.labels("train").numpy(), cache.counts.numpy(), cache.scale
        self.common = [j for j in range(len(self.n)) if self.n[j] > 20]
        rows = []
        for i in range(len(self.n)):
            a = np.exp([10 * p[i] @ self.w[j] for j in self.common])
            t = sum(share * self.w[j] for share, j in zip(a / a.sum(), self.common, strict=True))
            rows.append(unit(self.w[i] + p[i] / 2 + unit(t) / 2))
        self.h = np.array(rows)
        means = np.array([self.x[self.y == i].mean(0) for i in range(len(self.n))])
        residuals = self.x - means[self.y]
        covariance = residuals.T @ residuals / (len(self.x) - len(self.n))
        size = len(covariance)
        covariance = 0.9 * covariance + 0.1 * np.trace(covariance) / size * np.eye(size)
        values, vectors = np.linalg.eigh(covariance)
        self.T, self.m = vectors / np.sqrt(values) @ vectors.T, means.mean(0)
        random = torch.randn(size, 1500, generator=torch.Generator().manual_seed(0))
        self.R = random.double().numpy()
        self.c = 1 / (len(self.n) * self.n[self.y])
        hidden = np.maximum(self.x @ self.R, 0)
        self.mean = self.c @ hidden
        self.hidden = hidden - self.mean
        self.ridge = 0.1 * np.trace(self.hidden.T * self.c @ self.hidden) / 1500

    def density(self, x: np.ndarray, skip: int | None = None) -> list[float]:
        z = unit(self.T @ (x - self.m))
        found = []
        for i in range(len(self.n)):
            members = [m for m in np.flatnonzero(self.y == i) if m != skip]
            kernel = [np.exp(20 * z @ unit(self.T @ (self.x[m] - self.m)) - 20) for m in members]
            found.append(np.log(np.mean(kernel)))
        return found

    def votes(self, x: np.ndarray, skip: int | None = None) -> np.ndarray:
        """The regression solved anew in its dual form, without one image."""
        keep = np.arange(len(self.x)) != skip
        hidden, c, hot = self.hidden[keep], self.c[keep], np.eye(len(self.n))[self.y[keep]]
        dual = np.linalg.solve(hidden @ hidden.T + self.ridge * np.diag(1 / c), hot)
        return (np.maximum(x @ self.R, 0) - self.mean) @ hidden.T @ dual

    def logits(self, x: np.ndarray, share: float, strength: float) -> np.ndarray:
        def before(one: np.ndarray, skip: int | None = None) -> np.ndarray:
            votes = 8 * self.votes(one, skip)
            return self.scale * self.h @ one + share * (np.array(self.density(one, skip)) + votes)

        pi = np.zeros(len(self.n))
        for m in range(len(self.x)):
            shares = np.exp(before(self.x[m], skip=m) / 3)
            pi += self.c[m] * shares / shares.sum()
        balance = -3 * np.log(len(self.n) * pi)
        prior = strength * np.log(self.n / self.n.sum())
        return np.array([before(one) for one in unit(x)]) + balance - prior


def test_the_classifier_is_its_formulas(cache, prepared):
    features = cache.features("test")[::9]
    slow = Slow(cache).logits(features.double().numpy(), 0.4, 0.25)
    found = image_evidence(prepared, 0.4, 0.25)(features).double().numpy()
    np.testing.assert_allclose(found, slow, rtol=1e-4, atol=1e-3)
    assert (found.argmax(1) == slow.argmax(1)).all()


def test_leave_one_out_is_a_fit_without_the_image(cache, prepared):
    slow = Slow(cache)
    for m in (0, 150, 371, len(slow.x) - 1):  # of large and of small classes
        np.testing.assert_allclose(prepared.own["density"][m], slow.density(slow.x[m], m), atol=1e-4)
        np.testing.assert_allclose(prepared.own["votes"][m] / 8, slow.votes(slow.x[m], m), atol=1e-4)
        with_it = prepared.of(cache.features("train"))
        assert prepared.own["density"][m, slow.y[m]] < with_it["density"][m, slow.y[m]]
        assert prepared.own["votes"][m, slow.y[m]] < with_it["votes"][m, slow.y[m]]


def test_the_balance_evens_out_what_classes_get(cache, prepared):
    """Adding it moves the shares of the class-balanced training images towards 1 / N."""
    weight = 1 / (6 * COUNTS[prepared.labels].double())

    def shares(bias: Tensor | float) -> Tensor:
        logits = prepared.logits({"x": prepared.x, **prepared.own}, 0.4) + bias
        return weight @ (logits.double() / 3).softmax(1)

    before, after = (torch.log(6 * shares(bias)).abs().max() for bias in (0.0, prepared.balance(0.4)))
    assert after < before / 2


def test_parts_can_be_taken_away(cache, prepared):
    features = cache.features("test")
    parts = prepared.of(features)
    bare = image_evidence(prepared, 0.4, 0.5, without=evidence.PARTS)(features)
    cosine = cache.scale * normalize("x", features) @ normalize("w", cache.weights).T
    torch.testing.assert_close(bare, adjust(cosine, COUNTS, 0.5))
    for name in ("density", "votes"):
        rest = [one for one in evidence.PARTS if one != name]
        found = image_evidence(prepared, 0.4, 0.5, without=rest)(features)
        torch.testing.assert_close(found, adjust(cosine + 0.4 * parts[name], COUNTS, 0.5))
    with_rows = image_evidence(prepared, 0.4, 0.5, without=("density", "votes", "balance"))(features)
    rows = cache.scale * normalize("x", features) @ prepared.rows.T
    torch.testing.assert_close(with_rows, adjust(rows, COUNTS, 0.5))
    whole = image_evidence(prepared, 0.4, 0.5)(features)
    without = image_evidence(prepared, 0.4, 0.5, without=("balance",))(features)
    torch.testing.assert_close(whole - without, prepared.balance(0.4).expand_as(whole), rtol=0, atol=1e-4)


def test_the_simple_form_is_own_logits_density_and_log_prior(cache):
    features = cache.features("test")
    for one in (cache, replace(cache, bias=torch.linspace(-1, 1, 6))):
        found = build(one, "image_density", share=0.4, strength=0.75)(features)
        density = np.array([Slow(one).density(x) for x in unit(features[:9].double().numpy())])
        expected = own_classifier(one)(features[:9]).double().numpy() + 0.4 * density
        expected -= 0.75 * np.log(COUNTS.numpy() / COUNTS.sum().item())
        np.testing.assert_allclose(found[:9], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["image_density", "image_evidence"])
def test_lengths_of_features_do_not_matter(cache, name):
    def longer(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        factors = torch.logspace(-3, 3, len(features))[torch.randperm(len(features))]
        return features * factors[:, None], labels

    stretched = replace(cache, splits={split: longer(*cache.splits[split]) for split in cache.splits})
    assert predict(stretched, name).tolist() == predict(cache, name).tolist()
    one, two = (fit(each, name) for each in (stretched, cache))
    assert one.setting == two.setting


def test_both_know_more_than_the_learned_classifier(cache):
    def right(name: str) -> float:
        return (predict(cache, name) == cache.labels("test").numpy()).mean()

    assert min(right("image_density"), right("image_evidence")) > right("cosine") + 0.01


def test_all_settings_share_what_is_prepared(cache):
    made = []

    def prepare(cache: FeatureCache) -> Evidence:
        made.append(Evidence(cache))
        return made[-1]

    found = fit(cache, replace(CLASSIFIERS["image_evidence"], prepare=prepare))
    assert len(made) == 1 and len(found.tried) == 8
    named = fit(cache, "image_evidence")
    assert (found.setting, found.tried) == (named.setting, named.tried)
    assert torch.equal(found.logits(cache.features("test")), named.logits(cache.features("test")))


def test_what_was_seen_last_is_kept_for_other_settings(cache, prepared, monkeypatch):
    features = cache.features("val").clone()
    first = [image_evidence(prepared, **setting)(features) for setting in SETTINGS]
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "density", None)  # not asked again
        patch.setattr(prepared, "balance", Evidence.balance.__get__(Evidence(cache)))
        again = [image_evidence(prepared, **setting)(features) for setting in SETTINGS]
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    other = image_evidence(prepared, **SETTINGS[0])(features[:5].clone())
    torch.testing.assert_close(other, first[0][:5])


# ---------------------------------------------------------------- many training images


def test_inducing_images_are_as_many_of_every_class_as_fit():
    labels = torch.arange(6).repeat_interleave(COUNTS)[torch.randperm(int(COUNTS.sum()))]
    for most in (6, 40, 200, 377):
        kept = inducing(labels, COUNTS, most)
        found = torch.bincount(labels[kept], minlength=6)
        assert len(set(kept.tolist())) == len(kept) <= most
        assert torch.equal(found, COUNTS.clamp(max=int(found.max())))
        assert COUNTS.clamp(max=int(found.max()) + 1).sum() > most  # one more each would not fit
        assert torch.equal(kept, inducing(labels, COUNTS, most))
    assert torch.equal(inducing(labels, COUNTS, 378), torch.arange(378))
    assert len(inducing(labels, COUNTS, 2)) == 6  # never a class without any


def test_with_inducing_images_the_density_is_that_of_them_alone(cache, monkeypatch):
    x, labels = normalize("x", cache.features("train")), cache.labels("train")
    whole = Density(x, labels, COUNTS)
    monkeypatch.setattr(evidence, "inducing", lambda labels, counts: inducing(labels, counts, 100))
    monkeypatch.setattr(evidence, "BLOCK", 7)
    some = Density(x, labels, COUNTS)
    torch.testing.assert_close(some.whitening, whole.whitening)
    asked, kept = x[:20], some.kept
    for i in range(6):
        members = kept[labels[kept] == i]
        kernel = (20 * (whole.whitened(asked) @ whole.images[members].T - 1)).exp().mean(1).log()
        torch.testing.assert_close(some(asked)[:, i], kernel, rtol=1e-4, atol=1e-4)
    assert predict(cache, "image_evidence").shape == (180,)


def test_blocks_change_nothing(cache, prepared, monkeypatch):
    features = cache.features("test")
    whole = image_evidence(prepared, **SETTINGS[1])(features)
    monkeypatch.setattr(evidence, "BLOCK", 13)
    torch.testing.assert_close(
        image_evidence(Evidence(cache), **SETTINGS[1])(features), whole, rtol=1e-4, atol=1e-3
    )


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("prepare", [Evidence, WithDensity])
def test_bad_input_is_one_clear_error(cache, prepare):
    features, labels = cache.splits["train"]

    def with_train(features: Tensor, labels: Tensor = labels) -> FeatureCache:
        return replace(cache, splits={**cache.splits, "train": (features, labels)})

    zero, nan = features.clone(), features.clone()
    zero[3], nan[5, 2] = 0, torch.nan
    alike = made_cache("sqrt", 0).prototypes[labels]
    for broken, error, message in (
        (made_cache("sqrt", 0, ("val", "test")), CacheError, "has no train features"),
        (made_cache("continual", 0), InputError, "weights has NaN"),
        (with_train(zero), InputError, "train features: row 3 is a zero vector"),
        (with_train(nan), InputError, r"train features has NaN or infinite values \(first in row 5\)"),
        (with_train(alike), InputError, "the images of a class are all alike"),
        (
            with_train(features, labels.clamp(max=4)),
            InputError,
            "counts must be those of the training labels",
        ),
    ):
        with pytest.raises(error, match=message):
            prepare(broken)


def test_bad_features_are_refused_too(cache, prepared):
    classify = image_evidence(prepared, **SETTINGS[0])
    simple = image_density(WithDensity(cache), share=0.4, strength=1.0)
    zero = cache.features("test")[:4].clone()
    zero[2] = 0
    for logits in (classify, simple):
        with pytest.raises(InputError, match="features: row 2 is a zero vector"):
            logits(zero)
        with pytest.raises(InputError, match="8 columns"):
            logits(torch.ones(3, 7))


def test_votes_of_a_class_with_one_image_stay_finite():
    x = normalize("x", torch.randn(31, 5, generator=torch.Generator().manual_seed(0)))
    labels = torch.tensor([0] * 30 + [1])
    counts = torch.tensor([30, 1])
    density, votes = Density(x, labels, counts), Votes(x, labels, counts)
    assert density.leave_one_out().isfinite().all() and votes.leave_one_out(x, labels).isfinite().all()
