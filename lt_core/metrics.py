"""Accuracy per group and per class, and how sure we can be of it.

Classes are many-, medium- and few-shot by their number of training images (Sec. 4.1). Two rules are in use:
the paper's own rows follow `paper`; the systems that it quotes were published under `common`. The two are
never compared group by group. Accuracies are top-1 in percent; a group without test images is NaN, not 0.

    group_accuracy(predictions, labels, counts)  # {"many": ..., "medium": ..., "few": ..., "total": ...}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch.nn.functional import normalize

from lt_core.checks import InputError, as_tensor, check_counts, check_labels, check_matrix, unknown

GROUPS = ("many", "medium", "few")
COLUMNS = (*GROUPS, "total")
RULES = {
    "paper": "many n >= 100, medium 20 < n < 100, few n <= 20",
    "common": "many n > 100, medium 20 <= n <= 100, few n < 20",
}
CHUNK = 2**21  # resampled images held at once, about 60 MB


def group_of(counts: object, rule: str = "paper") -> dict[str, np.ndarray]:
    """Which classes are many-, medium- and few-shot: a boolean mask [N] a group.

    counts [N]: training images of each class. Every class is in exactly one group; a group may be empty.
    """
    if rule not in RULES:
        raise InputError(unknown("grouping rule", rule, list(RULES)))
    n = check_counts("counts", counts).cpu().numpy()
    many, few = (n >= 100, n <= 20) if rule == "paper" else (n > 100, n < 20)
    return {"many": many, "medium": ~many & ~few, "few": few}


def group_names(counts: object, rule: str = "paper") -> np.ndarray:
    """many, medium or few for each class [N]."""
    return np.array(GROUPS)[np.argmax(list(group_of(counts, rule).values()), axis=0)]


# ---------------------------------------------------------------- accuracies


def group_accuracy(
    predictions: object, labels: object, counts: object, rule: str = "paper", mean_over: str = "images"
) -> dict[str, float]:
    """Accuracy in percent of each group and in total; NaN for an empty group.

    predictions [M], labels [M]: class indices; counts [N]: training images of each class, of which 0 is
    few-shot; rule: of `RULES`. With labels of another kind, counts is a mapping: {"ant": 120, "bee": 5}.
    mean_over: `images`, or `classes`, as the field's groups are on test sets where classes differ in size (on
    balanced ones they are the same).
    """
    if isinstance(counts, Mapping):
        number = {label: index for index, label in enumerate(counts)}
        predictions, labels = (_numbers(values, number) for values in (predictions, labels))
        counts = list(counts.values())
    counts = as_tensor("counts", counts)
    counts = check_counts("counts", counts.where(counts != 0, 1)).cpu().numpy()
    labels = check_labels("labels", labels, len(counts)).cpu().numpy()
    predictions = check_labels("predictions", predictions, len(counts), len(labels)).cpu().numpy()
    members = group_of(counts, rule) | {"total": np.ones(len(counts), bool)}
    if mean_over == "classes":
        values = per_class_accuracy(predictions, labels, len(counts))
        members = {group: mask & ~np.isnan(values) for group, mask in members.items()}
    elif mean_over == "images":
        values = 100.0 * (predictions == labels)
        members = {group: mask[labels] for group, mask in members.items()}
    else:
        raise InputError(unknown("mean", mean_over, ["images", "classes"]))
    return {group: float(values[of].mean()) if of.any() else np.nan for group, of in members.items()}


def _numbers(values: object, number: Mapping[Any, int]) -> list[int]:
    """The class index of each label [M]; raises InputError for one that `counts` lacks."""
    found = values.tolist() if hasattr(values, "tolist") else list(values)
    if strange := next((value for value in found if value not in number), None):
        raise InputError(f"counts has no class {strange!r}")
    return [number[value] for value in found]


def per_class_accuracy(predictions: object, labels: object, num_classes: int) -> np.ndarray:
    """Accuracy [N] in percent of each class's test images; NaN for a class without any."""
    labels = check_labels("labels", labels, num_classes).cpu().numpy()
    predictions = check_labels("predictions", predictions, num_classes, len(labels)).cpu().numpy()
    images = np.bincount(labels, minlength=num_classes)
    correct = np.bincount(labels[predictions == labels], minlength=num_classes)
    return 100 * np.divide(correct, images, out=np.full(num_classes, np.nan), where=images > 0)


def within_group_predictions(
    scores: object, labels: object, counts: object, rule: str = "paper"
) -> np.ndarray:
    """Best class [M] among those of each image's own group (Table 5).

    scores [M, N]: the higher the better; labels [M]; counts [N].
    """
    counts = check_counts("counts", counts)
    scores = check_matrix("scores", scores, columns=len(counts)).detach().cpu().numpy()
    labels = check_labels("labels", labels, len(counts), len(scores)).cpu().numpy()
    best = np.empty(len(labels), np.int64)
    for mask in group_of(counts, rule).values():
        images, classes = mask[labels], np.flatnonzero(mask)
        if images.any():
            best[images] = classes[scores[np.ix_(images, classes)].argmax(axis=1)]
    return best


# ---------------------------------------------------------------- geometry


def cosine_matrix(queries: object, keys: object) -> np.ndarray:
    """Cosine similarities [N, N] between rows of two [N, F]; raises InputError for other shapes or NaN."""
    queries = check_matrix("queries", queries).double()
    keys = check_matrix("keys", keys, rows=len(queries), columns=queries.shape[1]).double()
    return (normalize(queries, dim=1) @ normalize(keys, dim=1).T).cpu().numpy()


def mismatches(prototypes: object, weights: object) -> int:
    """Classes whose prototype is nearer to another class's weight than to its own (Table 8); both [N, F]."""
    cosines = cosine_matrix(prototypes, weights)
    return int((cosines.argmax(axis=1) != np.arange(len(cosines))).sum())


# ---------------------------------------------------------------- bootstrap


def bootstrap_accuracies(
    correct: object,
    labels: object,
    counts: object,
    rule: str = "paper",
    replicates: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """Accuracies [replicates, R, 4] in percent (many, medium, few, total) with test images resampled.

    correct [R, M]: whether each of R predictions is right on each of M test images; labels [M]; counts [N].
    Images are drawn with replacement within each class. All R see the same draws, and so do calls with the
    same labels and seed: a difference of two within a replicate is a paired effect. `resample_seeds` draws
    training seeds as well. A group without test images is NaN.
    """
    counts = check_counts("counts", counts)
    labels = check_labels("labels", labels, len(counts)).cpu().numpy()
    correct = as_tensor("correct", correct).cpu().numpy()
    if correct.ndim != 2 or 0 in correct.shape or correct.shape[1] != len(labels) or correct.dtype != bool:
        raise InputError(
            f"correct must be booleans [R, {len(labels)}], found {correct.dtype} {list(correct.shape)}"
        )
    if replicates < 1:
        raise InputError(f"replicates must be at least 1, found {replicates}")

    # Sums of right images per group are one product of the draws (how often each image was drawn) with one
    # column for each group and prediction.
    order = np.argsort(labels, kind="stable")
    member = np.stack([mask[labels[order]] for mask in group_of(counts, rule).values()], 1).astype(np.float32)
    columns = (member[:, :, None] * correct.T[order].astype(np.float32)[:, None, :]).reshape(len(labels), -1)
    draws = _image_draws(np.bincount(labels), replicates, np.random.default_rng([seed, 0]))
    sums = np.concatenate([times @ columns for times in draws]).astype(np.float64)
    sums = sums.reshape(replicates, len(GROUPS), len(correct)).swapaxes(1, 2)
    sizes = member.sum(axis=0)
    grouped = np.divide(sums, sizes, out=np.full(sums.shape, np.nan), where=sizes > 0)
    return 100 * np.concatenate([grouped, sums.sum(axis=2, keepdims=True) / len(labels)], axis=2)


def _image_draws(sizes: np.ndarray, replicates: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each image, in order of class, is drawn: chunks [b, M], `replicates` rows in all."""
    size = np.repeat(sizes, sizes).astype(np.float32)
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    rows = max(1, CHUNK // len(size))
    for start in range(0, replicates, rows):
        shape = (min(rows, replicates - start), len(size))
        drawn = (generator.random(shape, dtype=np.float32) * size).astype(np.int64)
        drawn += first + np.arange(shape[0])[:, None] * shape[1]
        yield np.bincount(drawn.ravel(), minlength=drawn.size).reshape(shape).astype(np.float32)


def resample_seeds(draws: np.ndarray, seed: int = 0) -> np.ndarray:
    """Mean over training seeds, drawn with replacement too: draws [S, ..., B] -> [..., B], B replicates.

    All calls with as many seeds see the same draw. With few seeds this is a rough, rather narrow estimate of
    their spread.
    """
    seeds, replicates = len(draws), draws.shape[-1]
    chosen = np.random.default_rng([seed, seeds]).multinomial(seeds, [1 / seeds] * seeds, replicates)
    return np.einsum("s...b,bs->...b", draws, chosen / seeds)


def bootstrap_means(values: np.ndarray, replicates: int = 1000, seed: int = 0) -> np.ndarray:
    """Means [replicates] of values [K] drawn with replacement, the same draw for each K; NaN without any."""
    if not len(values):
        return np.full(replicates, np.nan)
    drawn = np.random.default_rng(seed).integers(len(values), size=(replicates, len(values)))
    return np.asarray(values)[drawn].mean(axis=1)


def interval(samples: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper percentile over the first axis of bootstrap samples [replicates, ...]."""
    tail = 50 * (1 - level)
    low, high = np.percentile(samples, [tail, 100 - tail], axis=0)
    return low, high
