"""Claims about prototypes, weights and their angles, about training curves, and about counts of cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.functional import normalize

from lt_core.features import FeatureCache
from lt_core.methods import classifiers, predict
from lt_core.metrics import cosine_matrix, per_class_accuracy
from lt_core.report.claims.decisions import Part, Test, part, parts, plain, together, with_interval
from lt_core.report.claims.study import Entry, Estimate, Study
from lt_core.report.claims.untestable import Untestable
from lt_core.report.prototype_figures import FIRST_RANKS
from lt_core.report.semantics import semantic_test
from lt_core.transfer import TEMPERATURE, attention
from lt_core.wordnet import class_synsets, lch_matrix

HIGH_COSINE = 0.8
FAR_APART = float(np.cos(np.pi / 4))  # 45 degrees
FAR_SHARE = 10.0  # percent of the classes
MOST = 90.0  # percent of the final accuracy (convergence); of the cells (almost all)
FEWEST_CLASSES = 10  # for a correlation over classes


# ---------------------------------------------------------------- angles


def _cosines(one: Tensor, other: Tensor) -> np.ndarray:
    """Cosine [N] of each row with the same row of another matrix."""
    return (normalize(one.double(), dim=1) * normalize(other.double(), dim=1)).sum(dim=1).cpu().numpy()


def _prototype_weight(cache: FeatureCache) -> np.ndarray:
    return _cosines(cache.prototypes, cache.weights)


def _hybrid_prototype(cache: FeatureCache) -> np.ndarray:
    return _cosines(classifiers(cache, "wh20")[0], cache.prototypes)


def _hybrid_weight(cache: FeatureCache) -> np.ndarray:
    return _cosines(classifiers(cache, "wh20")[0], cache.weights)


def _sum_prototype(cache: FeatureCache) -> np.ndarray:
    """The control: the sum of the directions of p and w, without transfer."""
    return _cosines(classifiers(cache, "prototypes+cosine")[0], cache.prototypes)


@part
def few_shot_towards_prototype(study: Study) -> Part:
    few = study.classes("sqrt", "few")
    hybrid, weight, control = (
        study.over_classes(study.per_class("sqrt", measure), few)
        for measure in (_hybrid_prototype, _prototype_weight, _sum_prototype)
    )
    moved = hybrid - weight
    text = (
        f"few, mean over classes: cos(w^h(20), p) {hybrid.value:.2f}, cos(w, p) {weight.value:.2f}, "
        f"difference {with_interval(moved, 2)}; control without transfer, cos(p + w, p) {control.value:.2f}, "
        f"so transfer itself changes it by {with_interval(hybrid - control, 2)}"
    )
    return Part(text, moved.low > 0, open=moved.open)


@part
def many_shot_stays_high(study: Study) -> Part:
    many = study.classes("sqrt", "many")
    near = study.over_classes(study.per_class("sqrt", _hybrid_weight), many)
    return Part(f"many, mean over classes: cos(w^h(20), w) {plain(near, 2)}", near.value >= HIGH_COSINE)


@part
def many_shot_nearer_to_weight(study: Study) -> Part:
    many = study.classes("sqrt", "many")
    values = study.per_class("sqrt", lambda cache: _hybrid_weight(cache) - _hybrid_prototype(cache))
    nearer = study.over_classes(values, many)
    return Part(
        f"many: cos(w^h(20), w) less cos(w^h(20), p) {with_interval(nearer, 2)}",
        nearer.low > 0,
        open=nearer.open,
    )


@part
def prototype_and_weight_differ(study: Study) -> Part:
    cosines = study.per_class("sqrt", _prototype_weight)
    share = 100 * float((cosines < FAR_APART).mean())
    means = ", ".join(
        f"{group} {cosines[study.classes('sqrt', group)].mean():.2f}" for group in ("many", "medium", "few")
    )
    text = f"cos(p, w) below {FAR_APART:.2f} for {share:.0f} % of the classes; mean: {means}"
    return Part(text, share >= FAR_SHARE)


# ---------------------------------------------------------------- what prototypes are near to


def _mismatched(cache: FeatureCache) -> np.ndarray:
    """Whether a class's prototype is nearest to another class's weight [N], as in `metrics.mismatches`."""
    cosines = cosine_matrix(cache.prototypes, cache.weights)
    return (cosines.argmax(axis=1) != np.arange(len(cosines))).astype(float)


def _gap(cache: FeatureCache) -> np.ndarray:
    """Similarity at rank 1 minus the mean over ranks 2 to 20 [N]."""
    ordered = np.sort(cosine_matrix(cache.prototypes, cache.weights), axis=1)[:, ::-1]
    return ordered[:, 0] - ordered[:, 1:FIRST_RANKS].mean(axis=1)


def _entropy(cache: FeatureCache) -> np.ndarray:
    """Entropy of softmax(10 cos) in nats [N]."""
    logits = TEMPERATURE * cosine_matrix(cache.prototypes, cache.weights)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return -(shares * np.log(shares)).sum(axis=1)


def _count(study: Study, backbone: str) -> Estimate:
    """Number of mismatched classes, averaged over seeds."""
    values = study.per_class(backbone, _mismatched)
    return study.over_classes(values).times(len(values))


def no_mismatch(backbone: str) -> Test:
    """No prototype of the backbone is nearest to another class's weight."""

    @part
    def test(study: Study) -> Part:
        count = _count(study, backbone).value
        return Part(
            f"`{backbone}`: {count:g} of {len(study.counts(backbone))} classes mismatched", count == 0
        )

    return test


def fewer_mismatches(fewer: str, more: str) -> Test:
    """Mismatched classes of one backbone less those of another: the interval below 0."""

    @part
    def test(study: Study) -> Part:
        one, other = _count(study, fewer), _count(study, more)
        difference = one - other
        text = f"mismatched classes, `{fewer}` {one.value:g}, `{more}` {other.value:g}: "
        return Part(text + with_interval(difference), difference.high < 0, open=difference.open)

    return test


def sharper(sharp: str, flat: str) -> Test:
    """Larger gap and smaller entropy of the similarities from prototypes to weights; intervals without 0."""

    def one(measure: Callable[[FeatureCache], np.ndarray], name: str, sign: int, study: Study) -> Part:
        values = study.per_class(sharp, measure) - study.per_class(flat, measure)
        difference = study.over_classes(values)
        text = f"{name}, `{sharp}` less `{flat}`: {with_interval(difference, 3)}"
        return Part(text, sign * difference.value > 0 and not difference.open, open=difference.open)

    return together([part(partial(one, _gap, "gap", 1)), part(partial(one, _entropy, "entropy", -1))])


def mismatches_foretell(backbones: Sequence[str], method: str) -> Test:
    """Of each two backbones, that with more mismatches has the lower total; the interval below 0."""

    @parts
    def test(study: Study) -> list[Part]:
        counts = {name: _count(study, name).value for name in backbones}
        pairs = [(a, b) for a in backbones for b in backbones if counts[a] > counts[b]]
        if not pairs:
            raise Untestable(
                f"backbones with different counts of mismatches, here all {max(counts.values()):g}"
            )
        return [one(study, counts, more, fewer) for more, fewer in pairs]

    def one(study: Study, counts: dict[str, float], more: str, fewer: str) -> Part:
        totals = [study.accuracy(Entry(name, method), "total") for name in (more, fewer)]
        difference = totals[0] - totals[1]
        text = f"total, `{more}` ({counts[more]:g} mismatched) less `{fewer}` ({counts[fewer]:g}): "
        return Part(text + with_interval(difference), difference.high < 0, open=difference.open)

    return test


# ---------------------------------------------------------------- meaning and similarity of classes


@part
def attention_follows_meaning(study: Study) -> Part:
    """Leacock-Chodorow similarity of the classes nearest by attention against random ones."""
    cache = study.caches("sqrt")[0]
    shares = attention(cache.prototypes, cache.weights, cache.counts, k=0).cpu().numpy()
    similarity = lch_matrix(class_synsets(cache.class_names, cache.meta["wnids"]))
    line = semantic_test(shares, similarity, cache.counts).table.set_index("group").loc["total"]
    if not np.isfinite(line["rank_correlation"]):
        raise Untestable("classes whose meanings are not all equally far apart in WordNet")
    text = (
        f"Leacock-Chodorow similarity of the {line['nearest']:.0f} classes of highest attention "
        f"{line['similarity_nearest']:.2f}, of random ones {line['similarity_random']:.2f}: "
        f"{line['difference']:+.2f} [{line['ci_low']:+.2f}, {line['ci_high']:+.2f}] over all classes; "
        f"rank correlation {line['rank_correlation']:.2f}"
    )
    return Part(text, bool(line["ci_low"] > 0))


@part
def gain_follows_similarity(study: Study) -> Part:
    """Rank correlation over few-shot classes of the gain of w^h(20) and the nearest source of transfer."""
    few = study.classes("sqrt", "few")
    if few.sum() < FEWEST_CLASSES:
        raise Untestable(f"at least {FEWEST_CLASSES} few-shot classes to correlate over, here {few.sum()}")
    gain = study.per_class("sqrt", _transfer_gain)[few]
    nearest = study.per_class("sqrt", _nearest_source)[few]
    correlation = spearman(gain, nearest)
    text = f"rank correlation over {few.sum()} few-shot classes {plain(correlation, 2)}"
    return Part(text, correlation.low > 0, open=correlation.open)


def _transfer_gain(cache: FeatureCache) -> np.ndarray:
    """Accuracy of w^h(20) less that of prototypes for each class [N], in points."""
    one, other = (
        per_class_accuracy(predict(cache, method), cache.labels("test"), len(cache.counts))
        for method in ("wh20", "prototypes")
    )
    return one - other


def _nearest_source(cache: FeatureCache) -> np.ndarray:
    """Highest cosine [N] of a prototype with the weight of another class that w^h(20) takes from."""
    cosines = cosine_matrix(cache.prototypes, cache.weights)
    np.fill_diagonal(cosines, -np.inf)
    return cosines[:, (cache.counts > 20).cpu().numpy()].max(axis=1)


def spearman(one: np.ndarray, other: np.ndarray, replicates: int = 1000) -> Estimate:
    """Spearman's rank correlation of two [K]; samples: the K pairs drawn again."""

    def correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x, y = (rankdata(values, axis=1) for values in (x, y))
        x, y = (values - values.mean(axis=1, keepdims=True) for values in (x, y))
        scale = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
        return np.divide((x * y).sum(axis=1), scale, out=np.zeros(len(x)), where=scale > 0)

    drawn = np.random.default_rng(0).integers(len(one), size=(replicates, len(one)))
    return Estimate(float(correlations(one[None], other[None])[0]), correlations(one[drawn], other[drawn]))


# ---------------------------------------------------------------- training curves


def _history(study: Study, backbone: str, key: str) -> np.ndarray:
    """Accuracy in percent after each epoch [epochs], averaged over seeds."""
    return np.mean(
        [[epoch[key] for epoch in cache.meta["history"]] for cache in study.caches(backbone)], axis=0
    )


def converges_faster(fast: str, slow: str) -> Test:
    """Fewer epochs to 90 % of the lower of the two final accuracies, in training and in validation."""

    def one(key: str, name: str, study: Study) -> Part:
        curves = [_history(study, backbone, key) for backbone in (fast, slow)]
        goal = MOST / 100 * min(curve[-1] for curve in curves)
        epochs = [1 + int((curve >= goal).argmax()) for curve in curves]
        text = f"epochs to {goal:.1f} % {name} accuracy: `{fast}` {epochs[0]}, `{slow}` {epochs[1]}"
        return Part(text, epochs[0] < epochs[1])

    return together(
        [
            part(partial(one, f"{split}_accuracy", name))
            for split, name in (("train", "training"), ("val", "validation"))
        ]
    )


@part
def deeper_overfits(study: Study) -> Part:
    """Training accuracy of the last epoch minus test accuracy, of the deeper network against the other."""
    gaps = []
    for backbone in ("imagenet_deep_sqrt", "imagenet_sqrt"):
        test = study.accuracy(Entry(backbone, "cosine"), "total")
        last = _history(study, backbone, "train_accuracy")[-1]
        gaps.append(Estimate(last - test.value, last - test.samples))
    difference = gaps[0] - gaps[1]
    text = (
        f"training less test accuracy, `imagenet_deep_sqrt` {gaps[0].value:.1f}, `imagenet_sqrt` "
        f"{gaps[1].value:.1f}: {with_interval(difference)} points"
    )
    return Part(text, difference.low > 0, open=difference.open)


@part
def square_root_overfits(study: Study) -> Part:
    """Class-balanced training accuracy minus test accuracy of the deeper network, by sampler."""
    gaps = []
    for backbone in ("imagenet_deep_sqrt", "imagenet_deep_uniform"):
        seen = np.mean([_balanced_training_accuracy(cache) for cache in study.caches(backbone, "train")])
        test = study.accuracy(Entry(backbone, "cosine"), "total")
        gaps.append(Estimate(seen - test.value, seen - test.samples))
    difference = gaps[0] - gaps[1]
    text = "training less test accuracy of the deeper network, square root less uniform: "
    return Part(text + f"{with_interval(difference)} points", difference.low > 0, open=difference.open)


def _balanced_training_accuracy(cache: FeatureCache) -> float:
    """Mean over classes of the learned classifier's accuracy on training images, in percent."""
    predictions = predict(cache, "cosine", "train")
    return float(per_class_accuracy(predictions, cache.labels("train"), len(cache.counts)).mean())


# ---------------------------------------------------------------- counting cells of a table


def weakest_in_most(backbone: str, others: Sequence[str], methods: Sequence[str]) -> Test:
    """Lowest of all backbones in 90 % of the cells (methods x groups and total)."""

    @part
    def test(study: Study) -> Part:
        values, samples = [], []
        for method in methods:
            for group in ("many", "medium", "few", "total"):
                own = study.accuracy(Entry(backbone, method), group)
                rivals = [study.accuracy(Entry(other, method), group) for other in others]
                values.append(own.value < min(r.value for r in rivals))
                samples.append(own.samples < np.min([r.samples for r in rivals], axis=0))
        cells = Estimate(float(np.sum(values)), np.sum(samples, axis=0).astype(float))
        text = f"`{backbone}` is the lowest in {plain(cells, 0)} of {len(values)} cells"
        return Part(text, cells.value >= MOST / 100 * len(values))

    return test
