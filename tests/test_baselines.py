"""The compared systems on frozen features: hand computations and limit cases."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from lt_core import baselines
from lt_core.baselines import (
    MOMENTUM,
    WEIGHT_DECAY,
    Alignment,
    MetaSampler,
    WeightScaling,
    adjust,
    balms,
    causal_norm,
    disalign,
    images_of,
    logit_adjustment,
    lws,
    ncm,
    new_head,
    retrained,
    sgd_step,
    tau_norm,
)
from lt_core.cache import FeatureCache, own_classifier
from lt_core.checks import CacheError, InputError
from lt_core.losses import CrossEntropy
from lt_core.train import fit_head
from lt_core.transfer import prototypes

COUNTS = torch.tensor([300, 200, 60, 30, 12, 6])
SECOND_STAGES = {  # at rates that suit the images below
    "lws": lambda cache, seed: lws(cache, 0.3, seed),
    "crt": lambda cache, seed: retrained(cache, "cross_entropy", "class_aware", 0.3, seed),
    "balanced_softmax": lambda cache, seed: retrained(cache, "balanced_softmax", "uniform", 0.3, seed),
    "disalign": lambda cache, seed: disalign(cache, 1.2, 0.3, seed),
    "balms": lambda cache, seed: balms(cache, 0.3, 0.1, seed),
}


def images(counts: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Features [M, 8] around six close class centres."""
    centres = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) + torch.eye(6, 8)
    labels = torch.arange(6).repeat_interleave(counts)
    noise = torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(seed))
    return centres[labels] + 0.35 * noise, labels


@pytest.fixture(scope="module")
def caches() -> dict[str, FeatureCache]:
    """A cosine and a dot-product classifier trained on the long tail, with its features."""
    features, labels = images(COUNTS, 1)
    rows, found = prototypes(features, labels, 6), {}
    for kind, bias in (("cosine", None), ("dot_product", torch.zeros(6))):
        plain = FeatureCache(rows, 16.0, COUNTS, rows, {"train": (features, labels)}, {}, bias)
        head = new_head(plain, 0)
        fit_head(head, features, labels, CrossEntropy(COUNTS), "uniform", 0.3, 200, len(labels))
        own = {name: value.detach() for name, value in head.named_parameters() if name == "bias"}
        scale = head.scale.item() if kind == "cosine" else 16.0
        found[kind] = replace(plain, weights=head.weight.detach(), scale=scale, **own)
    return found


@pytest.fixture(params=["cosine", "dot_product"])
def cache(caches, request) -> FeatureCache:
    return caches[request.param]


def some(cache: FeatureCache) -> tuple[Tensor, Tensor]:
    """Every 30th training image and its label."""
    return cache.features("train")[::30], cache.labels("train")[::30]


def by_hand(weights: list[list[float]], bias: list[float]) -> FeatureCache:
    rows = torch.tensor(weights)
    return FeatureCache(rows, 16.0, torch.tensor([9, 3]), rows, {}, {}, torch.tensor(bias))


# ---------------------------------------------------------------- what all second stages must do


@pytest.mark.parametrize("name", SECOND_STAGES)
def test_a_seed_decides_everything_and_nothing_outside_changes(cache, name):
    features, before = cache.features("train"), {}
    kept = {"weights": cache.weights, "prototypes": cache.prototypes, "features": features}
    before = {key: value.clone() for key, value in kept.items()}
    state = torch.random.get_rng_state()
    one = SECOND_STAGES[name](cache, 0)(features)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(1)
    assert torch.equal(one, SECOND_STAGES[name](cache, 0)(features)) and not one.requires_grad
    assert not torch.equal(one, SECOND_STAGES[name](cache, 1)(features))
    for key, value in kept.items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", SECOND_STAGES)
def test_second_stages_help_the_rare_classes(cache, name):
    features, labels = images(torch.full((6,), 200), 2)

    def rare(logits: Tensor) -> float:
        return (logits.argmax(1) == labels)[labels >= 4].double().mean().item()

    assert rare(SECOND_STAGES[name](cache, 0)(features)) > rare(own_classifier(cache)(features)) + 0.02


@pytest.mark.parametrize("name", [*SECOND_STAGES, "ncm"])
def test_what_cannot_be_fitted_is_refused(caches, name):
    fit = (lambda cache, seed: ncm(cache)) if name == "ncm" else SECOND_STAGES[name]
    with pytest.raises(CacheError, match="has no train features"):
        fit(replace(caches["cosine"], splits={}), 0)
    with pytest.raises(InputError, match="counts must be those of the training labels"):
        fit(replace(caches["cosine"], counts=COUNTS.flip(0)), 0)
    if name != "ncm":
        with pytest.raises(InputError, match="cosine or dot-product classifier, not causal norm"):
            fit(replace(caches["cosine"], direction=torch.ones(8)), 0)
    if name in ("lws", "disalign"):
        weights = caches["cosine"].weights.clone()
        weights[5] = torch.nan
        with pytest.raises(InputError, match="weights has NaN .*row 5"):
            fit(replace(caches["cosine"], weights=weights), 0)


def test_numbering_the_classes_differently_only_permutes_the_logits(caches):
    cache, order = caches["dot_product"], torch.tensor([3, 0, 5, 1, 4, 2])
    features, labels = cache.splits["train"]
    changed = {name: getattr(cache, name)[order] for name in ("weights", "counts", "prototypes", "bias")}
    permuted = replace(cache, splits={"train": (features, order.argsort()[labels])}, **changed)
    for build in (lambda c: tau_norm(c, 2.0), ncm, lambda c: logit_adjustment(c, 2.0)):
        one, two = build(cache)(features[::20])[:, order], build(permuted)(features[::20])
        torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- nothing is trained


def test_logit_adjustment_by_hand_and_limits():
    logits, counts = torch.tensor([[1.0, 2.0]]), torch.tensor([30, 10])
    prior = torch.tensor([0.75, 0.25]).log()
    assert torch.equal(adjust(logits, counts, 0.0), logits)
    torch.testing.assert_close(adjust(logits, counts, 1.0), logits - prior)
    torch.testing.assert_close(adjust(logits, counts, 0.5), logits - prior / 2)
    probabilities = adjust(logits.softmax(1).log(), counts, 0.5).softmax(1)  # log probabilities are logits
    torch.testing.assert_close(probabilities, adjust(logits, counts, 0.5).softmax(1))
    with pytest.raises(InputError, match="logits must have 2 columns"):
        adjust(torch.zeros(1, 3), counts, 1.0)


def test_logit_adjustment_of_the_own_classifier(cache):
    features, own = cache.features("train"), own_classifier(cache)(cache.features("train"))
    assert torch.equal(logit_adjustment(cache, 0.0)(features), own)
    adjusted = logit_adjustment(cache, 1.0)(features)
    torch.testing.assert_close(adjusted, adjust(own, COUNTS, 1.0))
    assert (adjusted.argmax(1) >= 4).sum() > (own.argmax(1) >= 4).sum()


@pytest.mark.parametrize(
    ("tau", "expected"), [(0, [7.0, 2.0]), (0.5, [3.1305, 1.4142]), (1, [1.4, 1.0]), (2, [0.28, 0.5])]
)
def test_tau_norm_by_hand(tau, expected):
    cache = by_hand([[3.0, 4.0], [0.0, 2.0]], [100.0, -100.0])  # the bias plays no part
    found = tau_norm(cache, tau)(torch.ones(1, 2))
    torch.testing.assert_close(found, torch.tensor([expected]), atol=1e-4, rtol=0)


def test_tau_norm_refuses_cosine_classifiers_and_missing_rows(caches):
    with pytest.raises(InputError, match="does nothing to a cosine classifier"):
        tau_norm(caches["cosine"], 1.0)
    with pytest.raises(InputError, match="weights has NaN"):
        tau_norm(by_hand([[1.0], [torch.nan]], [0.0, 0.0]), 1.0)


def test_ncm_does_not_see_position_and_size_of_the_features(caches):
    cache, (x, _) = caches["dot_product"], some(caches["dot_product"])
    features, labels = cache.splits["train"]
    moved = replace(cache, splits={"train": (3 * features + 7, labels)})
    torch.testing.assert_close(ncm(moved)(3 * x + 7), ncm(cache)(x), atol=1e-3, rtol=1e-3)


def test_ncm_is_a_distance_to_centroids_that_are_not_normalised():
    def pair(x: float, y: float) -> list[tuple[float, float]]:
        """Two unit vectors with the mean (x, y)."""
        across = np.sqrt(1 - x**2 - y**2) / np.hypot(x, y)
        return [(x - y * across, y + x * across), (x + y * across, y - x * across)]

    # The third class brings the mean of all features to 0.
    features = torch.tensor([*pair(0.2, 0.0), *pair(0.8, 0.5), (-1.0, -0.5), (-1.0, -0.5)]).float()
    rows, splits = torch.ones(3, 2), {"train": (features, torch.tensor([0, 0, 1, 1, 2, 2]))}
    logits = ncm(FeatureCache(rows, 16.0, torch.tensor([2, 2, 2]), rows, splits, {}))(torch.eye(2)[:1])
    torch.testing.assert_close(logits[0, :2], torch.tensor([-0.64, -0.29]), atol=1e-5, rtol=0)


def test_the_strength_of_causal_norm_is_that_of_its_classifier(caches):
    (x, _), direction = some(caches["cosine"]), caches["cosine"].features("train").mean(0)
    cache = replace(caches["cosine"], direction=direction)
    own = own_classifier(cache)
    assert torch.equal(causal_norm(cache, 1.0)(x), own(x))
    own.strength = 2.0
    assert torch.equal(causal_norm(cache, 2.0)(x), own(x))
    assert not torch.allclose(causal_norm(cache, 1.0)(x), own(x))
    with pytest.raises(InputError, match="there is no direction"):
        causal_norm(caches["cosine"], 1.0)


# ---------------------------------------------------------------- LWS, cRT, DisAlign


def test_lws_starts_at_the_base_and_scales_the_bias_too(cache):
    x, _ = some(cache)
    assert torch.equal(WeightScaling(cache)(x), own_classifier(cache)(x))
    head = WeightScaling(by_hand([[1.0, 0.0], [0.0, 1.0]], [1.0, -2.0]))
    head.scales.data.copy_(torch.tensor([1.5, 0.5]))
    torch.testing.assert_close(head(torch.tensor([[1.0, 1.0]])), torch.tensor([[3.0, -0.5]]))


def test_lws_learns_the_factors_alone(cache):
    head, (x, y) = WeightScaling(cache), some(cache)
    assert [name for name, part in head.named_parameters() if part.requires_grad] == ["scales"]
    cross_entropy(head(x), y).backward()
    z = own_classifier(cache)(x)
    torch.testing.assert_close(head.scales.grad, ((z.softmax(1) - one_hot(y, 6)) * z).mean(0))


def test_crt_forgets_the_first_classifier_and_keeps_its_kind(cache):
    def crt(cache: FeatureCache) -> baselines.Logits:
        return retrained(cache, "cross_entropy", "class_aware", 0.3)

    (x, _), other = some(cache), replace(cache, weights=cache.weights.flip(0))
    logits = crt(cache)(x)
    assert torch.equal(logits, crt(other)(x))
    assert torch.allclose(crt(cache)(2 * x), logits, atol=1e-4) == (cache.bias is None)


def test_disalign_by_hand():
    head = Alignment(by_hand([[2.0], [-1.0]], [0.0, 0.0]))
    head.scales.data.copy_(torch.tensor([0.5, -0.5]))
    head.offsets.data.copy_(torch.tensor([0.2, 0.4]))
    torch.nn.init.zeros_(head.confidence.weight)  # confidence 0.5
    torch.testing.assert_close(head(torch.ones(1, 1)), torch.tensor([[2.6, -0.55]]))


def test_disalign_limits(cache):
    head, x = Alignment(cache), cache.features("train")
    z = own_classifier(cache)(x)
    ratio = head(x) / z  # (1 + k) z, where the confidence k is not saturated
    assert (ratio > 1).all() and ratio.max() < 1.95
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    torch.nn.init.zeros_(head.scales)
    assert torch.equal(head(x), z)
    learned = {name for name, part in head.named_parameters() if part.requires_grad}
    assert learned == {"scales", "offsets", "confidence.weight", "confidence.bias"}


# ---------------------------------------------------------------- BALMS


@pytest.mark.parametrize(
    ("power", "q", "rates"),
    [(0, [0.5, 0.5], [0.9, 0.1]), (0.5, [0.25, 0.75], [0.75, 0.25]), (1, [0.1, 0.9], [0.5, 0.5])],
)
def test_the_meta_sampler_starts_between_images_and_classes(power, q, rates):
    sampler = MetaSampler(torch.tensor([90, 10]), init_power=power)
    torch.testing.assert_close(sampler.v.sigmoid(), torch.tensor(q))
    torch.testing.assert_close(sampler.log_rates.exp(), torch.tensor(rates))


def test_the_meta_sampler_draws_its_rates_with_weights_of_one():
    sampler = MetaSampler(COUNTS, init_power=0.3)
    classes, weights = sampler.draw(60_000, torch.Generator().manual_seed(0))
    rates = sampler.log_rates.detach().exp().double()
    expected = (rates / rates.sum() * 60_000).numpy()
    assert chisquare(np.bincount(classes.numpy(), minlength=6), expected).pvalue > 1e-3
    assert (weights == 1).all()


def test_the_meta_sampler_learns_to_avoid_what_its_draws_cost():
    sampler = MetaSampler(torch.tensor([50, 50, 50]), init_power=0.0)
    classes, weights = sampler.draw(4000, torch.Generator().manual_seed(0))
    cost = torch.tensor([0.0, 0.0, 1.0])
    (weights * cost[classes]).mean().backward()  # descending draws the third class less often
    assert sampler.v.grad[2] > 0 > sampler.v.grad[:2].max()


def test_the_step_that_balms_tries_is_a_step_of_sgd(cache):
    head, twin, (x, y) = new_head(cache, 0), new_head(cache, 0), some(cache)
    velocity = {name: torch.full_like(weight, 0.1) for name, weight in head.named_parameters()}
    optimiser = torch.optim.SGD(twin.parameters(), 0.2, MOMENTUM, weight_decay=WEIGHT_DECAY)
    for name, weight in twin.named_parameters():
        optimiser.state[weight]["momentum_buffer"] = velocity[name].clone()
    before = {name: weight.clone() for name, weight in head.named_parameters()}
    importance = torch.ones(len(y), requires_grad=True)
    loss = (cross_entropy(head(x), y, reduction="none") * importance).mean()
    stepped, _ = sgd_step(head, velocity, loss, 0.2)
    cross_entropy(twin(x), y).backward()
    optimiser.step()
    for name, weight in twin.named_parameters():
        torch.testing.assert_close(stepped[name], weight)
        assert torch.equal(head.get_parameter(name), before[name])  # only tried
    stepped["weight"].sum().backward(inputs=[importance])
    assert importance.grad.abs().sum() > 0


def test_balms_draws_images_of_the_drawn_classes():
    labels = torch.tensor([2, 0, 1, 0, 2, 0, 0])
    classes = torch.arange(3).repeat(400)
    generator = torch.Generator().manual_seed(0)
    drawn = images_of(classes, labels.argsort(stable=True), torch.bincount(labels), generator)
    assert torch.equal(labels[drawn], classes)
    times = torch.bincount(drawn, minlength=7)
    assert times[2] == 400 and times[[0, 4]].min() > 150 and times[[1, 3, 5, 6]].min() > 60


def test_balms_learns_to_draw_rare_classes_more_often(caches, monkeypatch):
    kept = []

    class Kept(MetaSampler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            kept.append((self, self.log_rates.detach().exp()))

    monkeypatch.setattr(baselines, "MetaSampler", Kept)
    monkeypatch.setattr(baselines, "META_LEARNING_RATE", 0.05)
    balms(caches["cosine"], 0.3, 0.0)
    sampler, start = kept[0]
    gain = sampler.log_rates.detach().exp() / start
    torch.testing.assert_close(start, COUNTS / COUNTS.sum())
    assert gain[4:].min() > gain[:2].max()
