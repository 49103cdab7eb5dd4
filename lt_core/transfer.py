"""Compositional knowledge transfer (Sec. 3, Eq. 1-9): classifiers built from prototypes and learned weights.

Pure functions of arrays; nothing is trained. Tensors or NumPy arrays in, tensors out; float32 and float64 are
kept, everything else becomes float32. Bad input raises an InputError (a ValueError) that names the argument.

    p = prototypes(train_features, train_labels, num_classes)
    classifiers = hybrid_classifiers(p, weights, counts, ks=(0, 20, 100))
    predictions = ensemble_probabilities(test_features, classifiers, scale).argmax(dim=1)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import pairwise

import numpy as np
import torch

from lt_core.errors import InputError, as_tensor, check_counts, check_labels, check_matrix, check_positive

TEMPERATURE = 10.0  # tau of Eq. 5 (Sec. 4.1)
SCALE = 16.0  # s of Eq. 2 at the start of training (Sec. 4.1)
ENSEMBLE = (0, 20, 100)  # the k of Eq. 8
ROWS = 2**14  # images normalised at once
QUERIES = 2**8  # classes that ask at once ...
KEYS = 2**12  # ... and classes that they read at once: 4 MB of attention in float32
SCORES = 2**20  # probabilities of one classifier held at once, 4 MB in float32 ...
IMAGES = 2**7  # ... but always those of so many images, for products are slow with fewer


def prototypes(features: object, labels: object, num_classes: int) -> torch.Tensor:
    """Class prototypes [N, F] (Eq. 3): the mean of each class's normalised features [M, F].

    labels [M]: class indices 0..num_classes-1. Raises InputError for a class without samples.
    """
    features = as_tensor("features", features)
    halves = features.ndim == 2 and features.dtype in (torch.float16, torch.bfloat16)
    if not halves:
        features = check_matrix("features", features)
    if not isinstance(num_classes, int | np.integer) or num_classes < 1:
        raise InputError(f"num_classes must be a whole number above 0, found {num_classes!r}")
    labels = check_labels("labels", labels, num_classes, len(features)).to(features.device)
    samples = torch.bincount(labels, minlength=int(num_classes))
    if (samples == 0).any():
        raise InputError(
            f"labels: class {int((samples == 0).nonzero()[0])} has no samples; each class needs one"
        )
    dtype = torch.float32 if halves else features.dtype
    sums = features.new_zeros(num_classes, features.shape[1], dtype=dtype)
    for start in range(0, len(features), ROWS):
        rows = slice(start, start + ROWS)
        block = features[rows]
        if halves:  # as of a file that is mapped: never as a whole in float32
            block = check_matrix("features", features, read=torch.arange(len(features))[rows])
        sums.index_add_(0, labels[rows], directions("features", block, first_row=start))
    return sums / samples[:, None]


def attention(
    queries: object, keys: object, counts: object, k: float = 0, temperature: float = TEMPERATURE
) -> torch.Tensor:
    """Attention [Q, N] between classes (Eq. 5-6): a_ij = softmax_j(tau * cos(query_i, key_j)).

    queries [Q, F] (Q = N in the paper), keys [N, F], counts [N]. Rows sum to 1. Zero where n_j <= k: such key
    rows are never read and may be NaN.
    """
    queries, keys, order, _ = _roles(("queries", "keys"), queries, keys, counts, (k,))
    cosines = directions("queries", queries) @ keys.T
    # The row maximum goes first, so that no temperature overflows.
    cosines = (cosines - cosines.amax(dim=1, keepdim=True)) * _factor("temperature", temperature, keys.dtype)
    full = queries.new_zeros(len(queries), len(order))
    full[:, order[: len(keys)]] = cosines.softmax(dim=1)
    return full


@torch.no_grad()  # so that a model's parameters can be given as they are
def knowledge_transfer(
    queries: object, keys: object, counts: object, k: float = 0, temperature: float = TEMPERATURE
) -> torch.Tensor:
    """Recomposed classifier w_kt [Q, F] (Eq. 4): the attention's mean of the normalised keys; not normalised.

    queries [Q, F] (Q = N in the paper), keys [N, F], counts [N]. Prototypes as queries and learned weights as
    keys are the method; the other roles are those of Table 6. Key rows with n_j <= k are never read and may
    be NaN.
    """
    queries, keys, _, read = _roles(("queries", "keys"), queries, keys, counts, (k,))
    recomposed = torch.empty_like(queries)
    for rows, _, means in _recomposed("queries", queries, keys, read, temperature):
        recomposed[rows] = means[0]
    return recomposed


def hybrid_classifiers(
    prototypes: object,
    weights: object,
    counts: object,
    ks: Sequence[float] = ENSEMBLE,
    temperature: float = TEMPERATURE,
) -> list[torch.Tensor]:
    """Hybrid classifiers w_h(k) (Eq. 7), one [N, F] for each k, at little more than the cost of a single one.

    prototypes [N, F], weights [N, F], counts [N]. Every class needs a weight: NaN is an error.
    """
    weights = check_matrix("weights", weights)
    _check_same_classes(prototypes, weights)
    return _classifiers(prototypes, weights, counts, ks, temperature, learned=weights)


def continual_classifiers(
    prototypes: object,
    weights: object,
    counts: object,
    ks: Sequence[float] = ENSEMBLE,
    temperature: float = TEMPERATURE,
) -> list[torch.Tensor]:
    """Continual classifiers w_hc(k) (Eq. 9), one [Q, F] for each k, at little more than the cost of one.

    weights [N, F], counts [N]: of the classes to transfer from; those with n <= k need no weight and may be
    NaN. prototypes [Q, F]: of the classes that get a row; the same N in the paper, but they may be new ones.
    """
    return _classifiers(prototypes, weights, counts, ks, temperature)


def hybrid_classifier(
    prototypes: object,
    weights: object,
    counts: object,
    k: float = 0,
    temperature: float = TEMPERATURE,
    transfer: object | None = None,
) -> torch.Tensor:
    """Hybrid classifier w_h(k) [N, F] (Eq. 7): norm(w_kt) + norm(p) + norm(w).

    prototypes [N, F], weights [N, F], counts [N]. transfer [N, F]: a recomposition with other roles (Table 6)
    in place of knowledge_transfer(prototypes, weights, ...). Every class needs a weight: NaN is an error.
    """
    if transfer is None:
        return hybrid_classifiers(prototypes, weights, counts, (k,), temperature)[0]
    weights = check_matrix("weights", weights)
    continual = continual_classifier(prototypes, weights, counts, k, temperature, transfer)
    return continual + directions("weights", weights.to(continual))


def continual_classifier(
    prototypes: object,
    weights: object,
    counts: object,
    k: float = 0,
    temperature: float = TEMPERATURE,
    transfer: object | None = None,
) -> torch.Tensor:
    """Continual classifier w_hc(k) [N, F] (Eq. 9): norm(w_kt) + norm(p).

    prototypes [N, F], weights [N, F], counts [N]. Classes with n <= k need no weight: such rows may be NaN.
    transfer [N, F]: as in hybrid_classifier.
    """
    prototypes = check_matrix("prototypes", prototypes)
    _check_same_classes(prototypes, weights)
    if transfer is None:
        return continual_classifiers(prototypes, weights, counts, (k,), temperature)[0]
    check_counts("counts", counts, len(prototypes))
    recomposed = check_matrix("transfer", transfer, *prototypes.shape)
    dtype = torch.promote_types(prototypes.dtype, recomposed.dtype)
    recomposed = recomposed.to(device=prototypes.device, dtype=dtype)
    return directions("transfer", recomposed) + directions("prototypes", prototypes.to(dtype))


def cosine_logits(features: object, weights: object, scale: float = SCALE) -> torch.Tensor:
    """Logits [M, N] of a cosine classifier (Eq. 2): scale * cos(feature, weight).

    features [M, F], weights [N, F]; the softmax of the logits is Eq. 1.
    """
    features = check_matrix("features", features)
    weights = check_matrix("weights", weights, columns=features.shape[1]).to(features.device)
    dtype = torch.promote_types(features.dtype, weights.dtype)
    scaled = directions("weights", weights.to(dtype)) * _factor("scale", scale, dtype)
    return directions("features", features.to(dtype)) @ scaled.T


def ensemble_probabilities(
    features: object, classifiers: Sequence[object], scale: float = SCALE
) -> torch.Tensor:
    """Class probabilities [M, N] (Eq. 8): the mean over classifiers of the softmax of their cosine logits.

    features [M, F]; classifiers: a sequence of [N, F], each used as the weights of Eq. 1-2.
    """
    features = check_matrix("features", features)
    if len(classifiers) == 0:
        raise InputError("classifiers must be a non-empty sequence of [N, F] matrices")
    matrices: list[torch.Tensor] = []
    for index, classifier in enumerate(classifiers):
        rows = len(matrices[0]) if matrices else None
        matrices.append(check_matrix(f"classifiers[{index}]", classifier, rows, features.shape[1]))
    dtype = reduce(torch.promote_types, (matrix.dtype for matrix in matrices), features.dtype)
    scale = _factor("scale", scale, dtype)
    total = features.new_zeros(len(features), len(matrices[0]), dtype=dtype)
    step = max(IMAGES, SCORES // total.shape[1])
    for index, matrix in enumerate(matrices):
        scaled = directions(f"classifiers[{index}]", matrix.to(total)) * scale
        for start in range(0, len(features), step):
            images = slice(start, start + step)
            seen = directions("features", features[images].to(dtype), first_row=start)
            total[images] += (seen @ scaled.T).softmax(dim=1)
    return total.div_(len(matrices))


def _check_same_classes(prototypes: object, weights: object) -> None:
    expected, found = as_tensor("prototypes", prototypes).shape, as_tensor("weights", weights).shape
    if found != expected:
        raise InputError(f"weights must have shape {list(expected)}, as prototypes, found {list(found)}")


def _roles(
    names: tuple[str, str], queries: object, keys: object, counts: object, ks: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """What asks and what is read, for several k.

    Returns queries [Q, F]; directions of the keys with n_j > min(ks) [K, F], the classes with the most images
    first; the classes in that order [N]; and for each k how many of them it reads.
    """
    queries = check_matrix(names[0], queries)
    counts = check_counts("counts", counts)
    found = as_tensor(names[1], keys).shape
    if len(found) == 2 and found[0] != len(counts):
        raise InputError(
            f"{names[1]} and counts must be of the same classes, "
            f"found {found[0]} rows and {len(counts)} counts"
        )
    order = counts.argsort(descending=True, stable=True)
    read = [_number_above(counts, k) for k in ks]
    kept = order[: max(read)]
    keys = check_matrix(names[1], keys, len(counts), queries.shape[1], read=kept).to(queries.device)
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    return queries.to(dtype), directions(names[1], keys.to(dtype), numbers=kept), order, read


@torch.no_grad()  # so that a model's parameters can be given as they are
def _classifiers(
    prototypes: object,
    weights: object,
    counts: object,
    ks: Sequence[float],
    temperature: float,
    learned: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Eq. 9 for each k; with the learned weights [N, F] of the same classes, Eq. 7."""
    if not np.iterable(ks) or len(ks) == 0:
        raise InputError(f"ks must be a sequence of at least one k, found {ks!r}")
    queries, keys, _, read = _roles(("prototypes", "weights"), prototypes, weights, counts, ks)
    classifiers = [torch.empty_like(queries) for _ in read]
    for rows, own, means in _recomposed("prototypes", queries, keys, read, temperature):
        if learned is not None:
            own = own + directions("weights", learned[rows].to(own), first_row=rows.start)
        for classifier, mean in zip(classifiers, means, strict=True):
            torch.add(directions("transfer", mean, first_row=rows.start), own, out=classifier[rows])
    return classifiers


def _recomposed(
    name: str, queries: torch.Tensor, keys: torch.Tensor, read: list[int], temperature: float
) -> Iterator[tuple[slice, torch.Tensor, list[torch.Tensor]]]:
    """Eq. 4 in blocks of queries, so that nothing [Q, N] is ever built.

    Yields the rows of a block, its directions [B, F] and its recompositions [B, F], one for each of `read`.
    """
    temperature = _factor("temperature", temperature, keys.dtype)
    for start in range(0, len(queries), QUERIES):
        rows = slice(start, start + QUERIES)
        asking = directions(name, queries[rows], first_row=start)
        yield rows, asking, _means(asking, keys, read, temperature)


def _means(
    asking: torch.Tensor, keys: torch.Tensor, read: list[int], temperature: float
) -> list[torch.Tensor]:
    """The attention's means [B, F] of the first read[0], read[1], ... keys.

    Every similarity is computed once: the keys of a larger k are among those of a smaller one, so sums over
    disjoint parts (n > 100, 20 < n <= 100, n <= 20) add up. They are kept relative to the largest similarity
    so far; thus no temperature overflows them or empties a row.
    """
    peak = asking.new_full((len(asking), 1), -2.0)  # below every cosine
    sums, mass = torch.zeros_like(asking), torch.zeros_like(peak)
    means = {}
    for first, last in pairwise(sorted({*range(0, len(keys), KEYS), *read})):
        offset = first % KEYS
        if offset == 0:  # one product for the classes of every k
            block = asking @ keys[first : first + KEYS].T
        cosines = block[:, offset : offset + last - first]
        higher = torch.maximum(peak, cosines.amax(dim=1, keepdim=True))
        powers = cosines.sub_(higher).mul_(temperature).exp_()
        shrink = ((peak - higher) * temperature).exp()
        sums.mul_(shrink).addmm_(powers, keys[first:last])
        mass.mul_(shrink).add_(powers.sum(dim=1, keepdim=True))
        peak = higher
        if last in read:
            means[last] = sums / mass
    return [means[number] for number in read]


def _number_above(counts: torch.Tensor, k: float) -> int:
    """How many classes have more than k training images (Eq. 6)."""
    try:
        valid = float(k) >= 0
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise InputError(f"k must be a number of training images, 0 or more, found {k!r}")
    number = int((counts > float(k)).sum())
    if number == 0:
        raise InputError(
            f"k={k}: no class has more than {k} training images (the largest has {int(counts.max())}), "
            "so there is nothing to transfer from; choose a smaller k"
        )
    return number


def directions(
    name: str, matrix: torch.Tensor, first_row: int = 0, numbers: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows divided by their norm; `first_row` or `numbers` name the row when one of them is zero."""
    norms = torch.linalg.vector_norm(matrix, dim=1, keepdim=True)
    limits = torch.finfo(matrix.dtype)
    if ((norms > limits.tiny**0.4) & (norms < limits.max**0.4)).all():
        return matrix / norms
    # Squares of very small or very large values leave the number range: bring the largest value to 1 first.
    largest = matrix.abs().amax(dim=1, keepdim=True)
    zero = (largest == 0).flatten().nonzero().flatten()
    if len(zero):
        row = first_row + int(zero[0]) if numbers is None else int(numbers[int(zero[0])])
        raise InputError(f"{name}: row {row} is a zero vector, which has no direction")
    scaled = matrix / largest
    return scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True)


def _factor(name: str, value: float, dtype: torch.dtype) -> float:
    """A scale or temperature that `dtype` can hold; raises InputError unless it is above 0."""
    return min(check_positive(name, value), torch.finfo(dtype).max)
