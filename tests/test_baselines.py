"""The compared systems on frozen features: hand computations, limit cases, one run of all on digits."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from lt_core.backbones import load
from lt_core.baselines import (
    BASELINES,
    BUDGET,
    Stage1,
    adjust,
    adjusted,
    balms,
    causal_norm,
    disalign,
    lws,
    ncm,
    retrained,
    tau_norm,
    transfer_ensemble,
    tune,
    tuning,
)
from lt_core.baselines.balms import images_of, sgd_step
from lt_core.baselines.disalign import Alignment, GeneralisedReweighting, reweighting
from lt_core.baselines.heads import MOMENTUM, WEIGHT_DECAY, new_head
from lt_core.baselines.lws import WeightScaling
from lt_core.causal_norm import causal_norm_logits
from lt_core.errors import InputError, TrainingError
from lt_core.methods import predict
from lt_core.metrics import group_accuracy
from lt_core.samplers import MetaSampler
from lt_core.transfer import prototypes

COUNTS = torch.tensor([300, 200, 60, 30, 12, 6])
TRAINED = {  # methods that learn something, at a rate that suits the images below
    "lws": lambda stage, seed: lws(stage, 0.3, seed),
    "crt": lambda stage, seed: retrained(stage, "cross_entropy", "class_aware", 0.3, seed),
    "balanced_softmax_head": lambda stage, seed: retrained(stage, "balanced_softmax", "uniform", 0.3, seed),
    "disalign": lambda stage, seed: disalign(stage, 1.2, 0.3, seed),
    "balms": lambda stage, seed: balms(stage, 0.3, 0.1, seed),
}


def images(counts: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [M, 8] around six close class centres."""
    centres = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) + torch.eye(6, 8)
    labels = torch.arange(6).repeat_interleave(counts)
    noise = torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(seed))
    return centres[labels] + 0.35 * noise, labels


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage1]:
    """A cosine and a dot-product classifier trained on the long tail, each with its features."""
    features, labels = images(COUNTS, 1)
    protos = prototypes(features, labels, 6)
    shared = {"counts": COUNTS, "prototypes": protos, "features": features, "labels": labels}
    plain = {
        "cosine": Stage1(weights=protos, **shared),
        "dot_product": Stage1(weights=protos, bias=torch.zeros(6), **shared),
    }
    found = {}
    for kind, stage in plain.items():
        head = new_head(stage, 0)
        optimiser = torch.optim.SGD(head.parameters(), 0.3, momentum=0.9)
        for _ in range(200):
            optimiser.zero_grad()
            cross_entropy(head(features), labels).backward()
            optimiser.step()
        scale = head.scale.item() if kind == "cosine" else 16.0
        bias = None if kind == "cosine" else head.bias.detach()
        found[kind] = Stage1(weights=head.weight.detach(), scale=scale, bias=bias, **shared)
    return found


@pytest.fixture(params=["cosine", "dot_product"])
def stage(stages, request) -> Stage1:
    return stages[request.param]


def by_hand(weights: list[list[float]], **more) -> Stage1:
    return Stage1(weights=torch.tensor(weights), counts=torch.tensor([9, 3]), **more)


# ---------------------------------------------------------------- the first stage


def test_the_first_stage_gives_the_logits_of_its_classifier(stage):
    x = stage.features[:5]
    if stage.bias is None:
        expected = stage.scale * normalize(x, dim=1) @ normalize(stage.weights, dim=1).T
    else:
        expected = x @ stage.weights.T + stage.bias
    torch.testing.assert_close(stage.logits(x), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": torch.tensor([300, 200, 60, 30, 12, 7])}, "counts must be those of the training labels"),
        ({"counts": torch.tensor([300, 200])}, "counts must have 6 entries"),
        ({"weights": torch.full((6, 8), float("nan"))}, "weights has NaN"),
        ({"bias": torch.zeros(5)}, "bias must have 6 columns"),
        ({"direction": torch.zeros(3)}, "direction must have 8 columns"),
        ({"prototypes": torch.zeros(6, 7)}, "prototypes must have 8 columns"),
        ({"scale": -1.0}, "scale must be a finite number above 0"),
        ({"features": torch.zeros(4, 8)}, "labels must have 4 entries"),
    ],
)
def test_wrong_arrays_are_refused(stages, changes, message):
    with pytest.raises(InputError, match=message):
        Stage1(**(vars(stages["cosine"]) | changes))


def test_what_a_method_lacks_is_said(stages):
    bare = Stage1(weights=stages["cosine"].weights, counts=COUNTS)
    for fit in (*(lambda s, f=f: f(s, 0) for f in TRAINED.values()), ncm):
        with pytest.raises(InputError, match="fitted to training features, and there are none"):
            fit(bare)
    with pytest.raises(InputError, match="built from prototypes, and there are none"):
        transfer_ensemble(bare)
    with pytest.raises(InputError, match="there is no direction"):
        causal_norm(bare, 1.0)
    followed = Stage1(**(vars(stages["cosine"]) | {"direction": torch.ones(8)}))
    with pytest.raises(InputError, match="not causal norm"):
        retrained(followed, "cross_entropy", "class_aware", 0.1)
    with pytest.raises(InputError, match="features must have 8 columns"):
        bare.logits(torch.zeros(2, 7))


# ---------------------------------------------------------------- what all of them must do


@pytest.mark.parametrize("name", TRAINED)
def test_a_seed_decides_everything_and_nothing_outside_changes(stage, name):
    before = {key: value.clone() for key, value in vars(stage).items() if isinstance(value, torch.Tensor)}
    torch.manual_seed(5)
    one = TRAINED[name](stage, 0)(stage.features)
    drawn = torch.rand(1)
    two = TRAINED[name](stage, 0)(stage.features)
    assert torch.equal(one, two) and not one.requires_grad
    assert not torch.equal(one, TRAINED[name](stage, 1)(stage.features))
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    for key, value in before.items():
        assert torch.equal(getattr(stage, key), value), key


@pytest.mark.parametrize("name", TRAINED)
def test_second_stages_help_the_rare_classes(stage, name):
    features, labels = images(torch.full((6,), 200), 2)

    def rare(logits: torch.Tensor) -> float:
        return (logits.argmax(1) == labels)[labels >= 4].double().mean().item()

    assert rare(TRAINED[name](stage, 0)(features)) > rare(stage.logits(features)) + 0.02


ORDER = torch.tensor([3, 0, 5, 1, 4, 2])


@pytest.mark.parametrize("name", ["tau_norm", "ncm", "logit_adjustment", "ensemble"])
def test_numbering_the_classes_differently_only_permutes_the_logits(stages, name):
    stage = stages["dot_product"]
    permuted = Stage1(
        weights=stage.weights[ORDER],
        counts=stage.counts[ORDER],
        bias=stage.bias[ORDER],
        prototypes=stage.prototypes[ORDER],
        features=stage.features,
        labels=ORDER.argsort()[stage.labels],
    )
    baseline, x = BASELINES[name], stage.features[::20]
    setting = baseline.settings[-1]
    expected = baseline.fit(stage, **setting)(x)[:, ORDER]
    torch.testing.assert_close(baseline.fit(permuted, **setting)(x), expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- method by method


def test_lws_starts_at_the_base_and_scales_the_bias_too(stage):
    assert torch.equal(WeightScaling(stage)(stage.features), stage.logits(stage.features))
    head = WeightScaling(by_hand([[1.0, 0.0], [0.0, 1.0]], bias=torch.tensor([1.0, -2.0])))
    with torch.no_grad():
        head.scales.copy_(torch.tensor([1.5, 0.5]))
    torch.testing.assert_close(head(torch.tensor([[1.0, 1.0]])), torch.tensor([[3.0, -0.5]]))


def test_lws_learns_the_factors_alone(stage):
    head, x, y = WeightScaling(stage), stage.features[::30], stage.labels[::30]
    assert [name for name, _ in head.named_parameters()] == ["scales"]
    cross_entropy(head(x), y).backward()
    z = stage.logits(x)
    expected = ((z.softmax(1) - torch.nn.functional.one_hot(y, 6)) * z).mean(0)
    torch.testing.assert_close(head.scales.grad, expected)


@pytest.mark.parametrize(
    ("tau", "expected"), [(0, [7.0, 2.0]), (0.5, [3.1305, 1.4142]), (1, [1.4, 1.0]), (2, [0.28, 0.5])]
)
def test_tau_norm_by_hand(tau, expected):
    stage = by_hand([[3.0, 4.0], [0.0, 2.0]], bias=torch.tensor([100.0, -100.0]))  # which plays no part
    found = tau_norm(stage, tau)(torch.ones(1, 2))
    torch.testing.assert_close(found, torch.tensor([expected]), atol=1e-4, rtol=0)


def test_tau_norm_refuses_cosine_classifiers(stages):
    with pytest.raises(InputError, match="does nothing to a cosine classifier"):
        tau_norm(stages["cosine"], 1.0)


def test_ncm_does_not_see_position_and_size_of_the_features(stages):
    stage = stages["dot_product"]
    moved = Stage1(**(vars(stage) | {"features": 3 * stage.features + 7}))
    x = stage.features[::30]
    torch.testing.assert_close(ncm(moved)(3 * x + 7), ncm(stage)(x), atol=1e-3, rtol=1e-3)


def test_ncm_is_a_distance_to_centroids_that_are_not_normalised():
    def pair(x: float, y: float) -> list[tuple[float, float]]:
        """Two unit vectors with the mean (x, y)."""
        across = np.sqrt(1 - x**2 - y**2) / np.hypot(x, y)
        return [(x - y * across, y + x * across), (x + y * across, y - x * across)]

    # The third class brings the mean of all features to 0.
    features = torch.tensor([*pair(0.2, 0.0), *pair(0.8, 0.5), (-1.0, -0.5), (-1.0, -0.5)])
    stage = Stage1(
        weights=torch.ones(3, 2),
        counts=torch.tensor([2, 2, 2]),
        features=features.float(),
        labels=torch.tensor([0, 0, 1, 1, 2, 2]),
    )
    logits = ncm(stage)(torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(logits[0, :2], torch.tensor([-0.64, -0.29]), atol=1e-5, rtol=0)


def test_crt_forgets_the_first_classifier_and_keeps_its_kind(stage):
    other = Stage1(**(vars(stage) | {"weights": stage.weights.flip(0)}))
    x = stage.features[::30]
    logits = retrained(stage, "cross_entropy", "class_aware", 0.3)(x)
    assert torch.equal(logits, retrained(other, "cross_entropy", "class_aware", 0.3)(x))
    longer = retrained(stage, "cross_entropy", "class_aware", 0.3)(2 * x)
    assert torch.allclose(longer, logits, atol=1e-4) == (stage.bias is None)


def test_disalign_by_hand():
    head = Alignment(by_hand([[2.0], [-1.0]], bias=torch.zeros(2)))
    with torch.no_grad():
        head.scales.copy_(torch.tensor([0.5, -0.5]))
        head.offsets.copy_(torch.tensor([0.2, 0.4]))
        head.confidence.weight.zero_()  # confidence 0.5
    torch.testing.assert_close(head(torch.ones(1, 1)), torch.tensor([[2.6, -0.55]]))


def test_disalign_limits(stage):
    head, x = Alignment(stage), stage.features
    z = stage.logits(x)
    ratio = head(x) / z
    assert (ratio > 1).all() and (ratio < 2).all()  # (1 + k) z
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert ratio.max() < 1.95  # the confidence is not saturated
    torch.nn.init.zeros_(head.scales)
    assert torch.equal(head(x), z)
    head(x).sum().backward()
    learned = {name for name, part in head.named_parameters() if part.requires_grad}
    assert learned == {"scales", "offsets", "confidence.weight", "confidence.bias"}


@pytest.mark.parametrize(
    ("rho", "expected"),
    [(0, [1.0, 1.0]), (0.5, [0.6667, 1.3333]), (1, [0.4, 1.6]), (1.2, [0.318571, 1.681429])],
)
def test_generalised_reweighting_by_hand(rho, expected):
    counts = torch.tensor([8, 2])
    torch.testing.assert_close(reweighting(counts, rho), torch.tensor(expected), atol=1e-4, rtol=0)
    logits, target = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])
    each = cross_entropy(logits, target, reduction="none")
    weighted = (each * torch.tensor(expected)).sum() / 2
    found = GeneralisedReweighting(counts, rho)(logits, target)
    assert found.item() == pytest.approx(weighted.item(), abs=1e-4)


def test_the_step_that_balms_tries_is_a_step_of_sgd(stage):
    head, twin = new_head(stage, 0), new_head(stage, 0)
    velocity = {name: torch.full_like(weight, 0.1) for name, weight in head.named_parameters()}
    optimiser = torch.optim.SGD(twin.parameters(), 0.2, MOMENTUM, weight_decay=WEIGHT_DECAY)
    for name, weight in twin.named_parameters():
        optimiser.state[weight]["momentum_buffer"] = velocity[name].clone()
    x, y = stage.features[::30], stage.labels[::30]
    before = {name: weight.clone() for name, weight in head.named_parameters()}
    importance = torch.ones(len(y), requires_grad=True)
    loss = (cross_entropy(head(x), y, reduction="none") * importance).mean()
    stepped, _ = sgd_step(head, velocity, loss, 0.2)
    cross_entropy(twin(x), y).backward()
    optimiser.step()
    for name, weight in twin.named_parameters():
        torch.testing.assert_close(stepped[name], weight)
        assert torch.equal(dict(head.named_parameters())[name], before[name])  # only tried
    stepped["weight"].sum().backward(inputs=[importance])
    assert importance.grad.abs().sum() > 0


def test_balms_draws_images_of_the_drawn_classes():
    labels = torch.tensor([2, 0, 1, 0, 2, 0, 0])
    counts, by_class = torch.bincount(labels), labels.argsort(stable=True)
    classes = torch.arange(3).repeat(400)
    drawn = images_of(classes, by_class, counts, torch.Generator().manual_seed(0))
    assert torch.equal(labels[drawn], classes)
    times = torch.bincount(drawn, minlength=7)
    assert (
        (times > 0).all() and times[2] == 400 and times[[0, 4]].min() > 150 and times[[1, 3, 5, 6]].min() > 60
    )


def test_balms_learns_to_draw_rare_classes_more_often(stages, monkeypatch):
    kept = []

    class Kept(MetaSampler):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            kept.append((self, self.log_rates.detach().exp()))

    module = sys.modules["lt_core.baselines.balms"]  # the package has the function under this name
    monkeypatch.setattr(module, "MetaSampler", Kept)
    monkeypatch.setattr(module, "META_LEARNING_RATE", 0.05)
    balms(stages["cosine"], 0.3, 0.0)
    sampler, start = kept[0]
    gain = sampler.log_rates.detach().exp() / start
    torch.testing.assert_close(start, COUNTS / COUNTS.sum())
    assert gain[4:].min() > gain[:2].max()


def test_logit_adjustment_by_hand_and_limits():
    logits, counts = torch.tensor([[1.0, 2.0]]), torch.tensor([30, 10])
    assert torch.equal(adjust(logits, counts, 0.0), logits)
    expected = logits - torch.tensor([0.75, 0.25]).log()
    torch.testing.assert_close(adjust(logits, counts, 1.0), expected)
    torch.testing.assert_close(adjust(logits + torch.tensor([0.75, 0.25]).log(), counts, 1.0), logits)
    torch.testing.assert_close(
        adjust(logits.softmax(1).log(), counts, 0.5).softmax(1), adjust(logits, counts, 0.5).softmax(1)
    )
    with pytest.raises(InputError, match="logits must have 2 columns"):
        adjust(torch.zeros(1, 3), counts, 1.0)


def test_logit_adjustment_goes_on_top_of_anything(stages):
    stage, x = stages["cosine"], stages["cosine"].features
    for base in (stage.logits, transfer_ensemble(stage)):
        torch.testing.assert_close(adjusted(base, COUNTS, 0.0)(x), base(x))
        more = torch.bincount(adjusted(base, COUNTS, 1.0)(x).argmax(1), minlength=6)
        assert more[4:].sum() > torch.bincount(base(x).argmax(1), minlength=6)[4:].sum()


def test_the_ensemble_is_the_papers(stages):
    stage = stages["cosine"]
    stage = Stage1(**(vars(stage) | {"counts": COUNTS * 1, "scale": 20.0}))
    cache = SimpleNamespace(**vars(stage) | {"features": lambda split: stage.features})
    found = transfer_ensemble(stage)(stage.features).argmax(1).tolist()
    assert found == predict(cache, "ensemble_wh_0_20_100").tolist()
    hot = transfer_ensemble(stage, temperature=1.0)(stage.features)
    assert not torch.allclose(hot, transfer_ensemble(stage)(stage.features))


def test_causal_norm_strength(stages):
    stage = stages["cosine"]
    stage = Stage1(**(vars(stage) | {"direction": stage.features.mean(0)}))
    x, arguments = stage.features, (stage.features, stage.weights, stage.direction)
    assert torch.equal(causal_norm(stage, 2.0)(x), causal_norm_logits(*arguments, 2.0))
    assert torch.equal(stage.logits(x), causal_norm_logits(*arguments))


# ---------------------------------------------------------------- choosing on validation data


def test_every_method_has_the_same_budget():
    for name, baseline in BASELINES.items():
        assert 1 <= len(baseline.settings) <= BUDGET, name
        assert len({tuple(setting.items()) for setting in baseline.settings}) == len(baseline.settings), name


def test_tuning_keeps_the_best_on_validation_and_the_first_of_equals(stages, monkeypatch):
    features, labels = images(torch.full((6,), 20), 3)
    perfect = {"right": torch.eye(6)[labels], "wrong": torch.eye(6)[(labels + 1) % 6]}
    fitted = []

    def fit(stage: Stage1, kind: str, number: int, seed: int):
        if kind == "diverges":
            raise TrainingError("the loss is nan")
        fitted.append(seed)
        return lambda x: perfect[kind] + number / 100

    kinds = ("diverges", "wrong", "right", "right", "wrong")
    settings = [{"kind": kind, "number": number} for number, kind in enumerate(kinds)]
    monkeypatch.setitem(tuning.BASELINES, "fake", tuning.Baseline(fit, settings, seeded=True))
    tuned = tune("fake", stages["cosine"], features, labels, seed=3)
    assert tuned.setting == {"kind": "right", "number": 2} and fitted == [3] * 4
    assert np.isnan(tuned.tried[0][1]) and [score for _, score in tuned.tried[1:]] == [0, 100, 100, 0]
    assert torch.equal(tuned.logits(features), perfect["right"] + 0.02)
    monkeypatch.setitem(tuning.BASELINES, "fake", tuning.Baseline(fit, settings[:1], seeded=True))
    with pytest.raises(TrainingError, match="fake: no setting could be trained"):
        tune("fake", stages["cosine"], features, labels)


def test_tuning_refuses_unknown_names_and_labels_that_do_not_fit(stages):
    stage = stages["cosine"]
    with pytest.raises(
        InputError, match="unknown baseline 'bbn': choose one of balanced_softmax_head, balms"
    ):
        tune("bbn", stage, stage.features, stage.labels)
    with pytest.raises(InputError, match="labels must have 608 entries, found 5"):
        tune("crt", stage, stage.features, stage.labels[:5])


def test_a_head_that_diverges_says_so(stages):
    with pytest.raises(TrainingError, match="the loss is (nan|inf) at learning rate 1e\\+30: lower it"):
        retrained(stages["dot_product"], "cross_entropy", "uniform", 1e30)


# ---------------------------------------------------------------- on a trained backbone


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["uniform", "uniform_dot", "causal_norm"])
def test_every_method_on_a_digits_backbone(backbone, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path_factory.mktemp("outputs")))
    cache = load("digits", backbone)
    stage, val = Stage1.of(cache), (cache.features("val"), cache.labels("val"))

    def groups(logits: torch.Tensor) -> dict[str, float]:
        return group_accuracy(logits.argmax(1), cache.labels("test"), cache.counts)

    base = groups(stage.logits(cache.features("test")))
    learned = {"uniform": "cosine", "uniform_dot": "dot_product", "causal_norm": "causal_norm"}[backbone]
    assert base == group_accuracy(predict(cache, learned), cache.labels("test"), cache.counts)
    without = {"uniform": {"tau_norm", "causal_norm"}, "uniform_dot": {"causal_norm"}}
    possible = set(BASELINES) - without.get(backbone, set())
    if backbone == "causal_norm":  # its own classifier, and what does not start from a linear one
        possible = {"causal_norm", "logit_adjustment", "ncm", "ensemble"}
    for name in possible:
        found = groups(tune(name, stage, *val).logits(cache.features("test")))
        assert found["total"] > base["total"] - 8, (name, found, base)
        if name in {"crt", "lws", "tau_norm", "logit_adjustment", "balms", "disalign"}:
            assert found["few"] >= base["few"], (name, found, base)
