"""Accuracy per group and per class, and how sure we can be of it.

Accuracies are top-1 in percent. `total` is the mean over test images; on a class-balanced test set it equals
the mean of the groups weighted by their share of the classes. A group without test images is NaN, not 0.

    group_accuracy(predictions, labels, counts)  # {"many": ..., "medium": ..., "few": ..., "total": ...}
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.nn.functional import normalize

from lt_core.errors import InputError, as_tensor, check_counts, check_labels, check_matrix
from lt_core.groups import GROUPS, group_of

COLUMNS = (*GROUPS, "total")
CHUNK = 2**21  # resampled images held at once, about 60 MB


def group_accuracy(
    predictions: object, labels: object, counts: object, rule: str = "paper"
) -> dict[str, float]:
    """Accuracy in percent of each group and in total; NaN for an empty group.

    predictions [M], labels [M]: class indices; counts [N]: training images of each class; rule: see `groups`.
    """
    predictions, labels, counts = _checked(predictions, labels, counts)
    correct = predictions == labels
    members = {group: mask[labels] for group, mask in group_of(counts, rule).items()}
    return {group: _percent(correct[of]) for group, of in members.items()} | {"total": _percent(correct)}


def per_class_accuracy(predictions: object, labels: object, num_classes: int) -> np.ndarray:
    """Accuracy [N] in percent of each class's test images; NaN for a class without any."""
    predictions, labels, _ = _checked(predictions, labels, np.ones(num_classes, np.int64))
    images = np.bincount(labels, minlength=num_classes)
    right = np.bincount(labels[predictions == labels], minlength=num_classes)
    return 100 * np.divide(right, images, out=np.full(num_classes, np.nan), where=images > 0)


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


def within_group_accuracy(
    scores: object, labels: object, counts: object, rule: str = "paper"
) -> dict[str, float]:
    """Accuracy in percent with test images and candidate classes restricted to the group (Table 5).

    scores [M, N]; labels [M]; counts [N]. Gives many, medium and few; NaN for an empty group.
    """
    best = within_group_predictions(scores, labels, counts, rule)
    accuracy = group_accuracy(best, labels, counts, rule)
    return {group: accuracy[group] for group in GROUPS}


def mismatches(prototypes: object, weights: object) -> int:
    """Classes whose prototype is nearer to another class's weight than to its own (Table 8); both [N, F]."""
    cosines = cosine_matrix(prototypes, weights)
    return int((cosines.argmax(axis=1) != np.arange(len(cosines))).sum())


def cosine_matrix(queries: object, keys: object) -> np.ndarray:
    """Cosine similarities [N, N] between rows of two [N, F]; raises InputError for other shapes or NaN."""
    queries = check_matrix("queries", queries).double()
    keys = check_matrix("keys", keys, rows=len(queries), columns=queries.shape[1]).double()
    return (normalize(queries, dim=1) @ normalize(keys, dim=1).T).cpu().numpy()


def bootstrap_accuracies(
    correct: object,
    labels: object,
    counts: object,
    rule: str = "paper",
    replicates: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """Accuracies [replicates, R, 4] in percent (many, medium, few, total) with test images resampled.

    correct [S, R, M]: whether each of R methods, trained with S seeds, is right on each of M test images.
    Images are drawn with replacement within each class. All methods and seeds see the same draw, so that a
    difference of two methods within a replicate is a paired effect; calls with the same labels and seed see
    the same draws too. Several training seeds are resampled as well (with few seeds this is a rough, rather
    narrow estimate of their spread). A group without test images is NaN.
    """
    correct, labels, group = _checked_bootstrap(correct, labels, counts, rule)
    if replicates < 1:
        raise InputError(f"replicates must be at least 1, found {replicates}")
    seeds, methods, images = correct.shape
    order = np.argsort(labels, kind="stable")
    member = (group[order, None] == np.arange(len(GROUPS))).astype(np.float32)
    right = correct.reshape(seeds * methods, images).T[order].astype(np.float32)
    columns = (member[:, :, None] * right[:, None, :]).reshape(images, -1)
    draws = _resampled_images(np.bincount(labels), replicates, np.random.default_rng([seed, 0]))
    sums = np.concatenate([times @ columns for times in draws]).astype(np.float64)
    sums = sums.reshape(replicates, len(GROUPS), seeds, methods)
    chosen = np.random.default_rng([seed, seeds]).multinomial(seeds, [1 / seeds] * seeds, replicates)
    sums = np.einsum("bgsr,bs->brg", sums, chosen / seeds)
    sizes = member.sum(axis=0)
    grouped = np.divide(sums, sizes, out=np.full(sums.shape, np.nan), where=sizes > 0)
    return 100 * np.concatenate([grouped, sums.sum(axis=2, keepdims=True) / images], axis=2)


def interval(samples: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper percentile over the first axis of bootstrap samples [replicates, ...]."""
    tail = 50 * (1 - level)
    low, high = np.percentile(samples, [tail, 100 - tail], axis=0)
    return low, high


def _resampled_images(
    sizes: np.ndarray, replicates: int, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """How often each image, in order of class, is drawn: chunks [b, M], `replicates` rows in all."""
    size = np.repeat(sizes, sizes).astype(np.float32)
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    rows = max(1, CHUNK // len(size))
    for start in range(0, replicates, rows):
        shape = (min(rows, replicates - start), len(size))
        drawn = (generator.random(shape, dtype=np.float32) * size).astype(np.int64)
        drawn += first + np.arange(shape[0])[:, None] * shape[1]
        yield np.bincount(drawn.ravel(), minlength=drawn.size).reshape(shape).astype(np.float32)


def _percent(correct: np.ndarray) -> float:
    return 100 * float(correct.mean()) if correct.size else float("nan")


def _checked(
    predictions: object, labels: object, counts: object
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts = check_counts("counts", counts)
    labels = check_labels("labels", labels, len(counts))
    predictions = check_labels("predictions", predictions, len(counts), len(labels))
    return predictions.cpu().numpy(), labels.cpu().numpy(), counts.cpu().numpy()


def _checked_bootstrap(correct: object, labels: object, counts: object, rule: str) -> tuple[np.ndarray, ...]:
    """correct [S, R, M] as booleans, labels [M], and the group number [M] of every image."""
    counts = check_counts("counts", counts)
    labels = check_labels("labels", labels, len(counts)).cpu().numpy()
    correct = as_tensor("correct", correct).cpu().numpy()
    if correct.ndim != 3 or 0 in correct.shape or correct.shape[2] != len(labels):
        raise InputError(
            f"correct must have shape [seeds, methods, {len(labels)}], found {list(correct.shape)}"
        )
    if correct.dtype != bool:
        raise InputError(f"correct must be booleans, found {correct.dtype}")
    group = np.argmax(np.stack(list(group_of(counts, rule).values())), axis=0)
    return correct, labels, group[labels]
