"""Compositional knowledge transfer (Sec. 3, Eq. 1-9): classifiers built from prototypes and learned weights.

Pure functions of arrays; nothing is trained. Tensors or NumPy arrays in, tensors out; float32 and float64 are
kept, everything else becomes float32. Bad input raises an InputError (a ValueError) that names the argument.

    p = prototypes(train_features, train_labels, num_classes)
    classifiers = hybrid_classifiers(p, weights, counts, ks=(0, 20, 100))
    predictions = ensemble_probabilities(test_features, classifiers, scale).argmax(dim=1)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from lt_core.checks import InputError, as_tensor, check_counts, check_labels, check_matrix, check_positive

TEMPERATURE = 10.0  # tau of Eq. 5 (Sec. 4.1)
SCALE = 16.0  # s of Eq. 2 at the start of training (Sec. 4.1)
ENSEMBLE = (0, 20, 100)  # the k of Eq. 8
# Rows that are worked on at once, so that memory does not grow with the number of classes or images.
FEATURE_BLOCK = 2**14  # features normalised for prototypes
QUERY_BLOCK = 2**8  # queries of the attention: 0.1 GB of similarities to 100,000 keys
SCORES_BLOCK = 2**20  # probabilities of one classifier ...
LEAST_IMAGES = 2**7  # ... but never fewer images than these, for products are slow with fewer


def normalize(name: str, rows: Tensor, numbers: Tensor | None = None) -> Tensor:
    """v / |v| for each row v of a matrix [M, F]; raises InputError for a row of zeros.

    The largest entry is brought to 1 first, so that no square leaves the number range. name and numbers [M]
    (row numbers, where `rows` is a part of a matrix) are for the message.
    """
    largest = rows.abs().amax(dim=1, keepdim=True)
    if not largest.all():
        row = int((largest == 0).nonzero()[0, 0])
        row = row if numbers is None else int(numbers[row])
        raise InputError(f"{name}: row {row} is a zero vector, which has no direction")
    rows = rows / largest
    return rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


# ---------------------------------------------------------------- prototypes and attention


def prototypes(features: object, labels: object, num_classes: int) -> Tensor:
    """Class prototypes [N, F] (Eq. 3): the mean of each class's normalised features [M, F].

    labels [M]: class indices 0..num_classes-1. Raises InputError for a class without samples.
    """
    features = as_tensor("features", features)
    if not isinstance(num_classes, int | np.integer) or num_classes < 1:
        raise InputError(f"num_classes must be a whole number above 0, found {num_classes!r}")
    if features.ndim != 2 or 0 in features.shape:
        check_matrix("features", features)
    labels = check_labels("labels", labels, num_classes, len(features)).to(features.device)
    samples = torch.bincount(labels, minlength=int(num_classes))
    if (samples == 0).any():
        raise InputError(
            f"labels: class {int((samples == 0).nonzero()[0])} has no samples; each class needs one"
        )
    # Block by block: features of a file that is mapped are never in memory as a whole, nor in float32.
    sums = None
    for rows in torch.arange(len(features), device=features.device).split(FEATURE_BLOCK):
        block = check_matrix("features", features, read=rows)
        if sums is None:
            sums = block.new_zeros(num_classes, block.shape[1])
        sums.index_add_(0, labels[rows], normalize("features", block, rows))
    return sums / samples[:, None]


def attention(
    queries: object, keys: object, counts: object, k: float = 0, temperature: float = TEMPERATURE
) -> Tensor:
    """Attention [Q, N] between classes (Eq. 5-6): a_ij = softmax_j(tau * cos(query_i, key_j)).

    queries [Q, F] (Q = N in the paper), keys [N, F], counts [N]. Rows sum to 1. Zero where n_j <= k: such key
    rows are never read and may be NaN.
    """
    queries, keys, order, _ = _queries_and_keys(("queries", "keys"), queries, keys, counts, (k,))
    shares = queries.new_zeros(len(queries), len(order))
    shares[:, order[: len(keys)]] = _softmax(queries @ keys.T, temperature)
    return shares


@torch.no_grad()  # so that a model's parameters can be given as they are
def knowledge_transfer(
    queries: object, keys: object, counts: object, k: float = 0, temperature: float = TEMPERATURE
) -> Tensor:
    """Recomposed classifier w_kt [Q, F] (Eq. 4): the attention's mean of the normalised keys; not normalised.

    queries [Q, F] (Q = N in the paper), keys [N, F], counts [N]. Prototypes as queries and learned weights as
    keys are the method; the other roles are those of Table 6. Key rows with n_j <= k are never read and may
    be NaN.
    """
    return _transfers(("queries", "keys"), queries, keys, counts, (k,), temperature)[0]


# ---------------------------------------------------------------- classifiers


@torch.no_grad()
def hybrid_classifiers(
    prototypes: object,
    weights: object,
    counts: object,
    ks: Sequence[float] = ENSEMBLE,
    temperature: float = TEMPERATURE,
) -> list[Tensor]:
    """Hybrid classifiers w_h(k) (Eq. 7), one [N, F] for each k, at little more than the cost of a single one.

    prototypes [N, F], weights [N, F], counts [N]. Every class needs a weight: NaN is an error.
    """
    weights = check_matrix("weights", weights)
    _check_same_classes(prototypes, weights)
    classifiers = continual_classifiers(prototypes, weights, counts, ks, temperature)
    own = normalize("weights", weights.to(classifiers[0]))
    return [classifier.add_(own) for classifier in classifiers]


@torch.no_grad()
def continual_classifiers(
    prototypes: object,
    weights: object,
    counts: object,
    ks: Sequence[float] = ENSEMBLE,
    temperature: float = TEMPERATURE,
) -> list[Tensor]:
    """Continual classifiers w_hc(k) (Eq. 9), one [Q, F] for each k, at little more than the cost of one.

    weights [N, F], counts [N]: of the classes to transfer from; those with n <= k need no weight and may be
    NaN. prototypes [Q, F]: of the classes that get a row; the same N in the paper, but they may be new ones.
    """
    transfers = _transfers(("prototypes", "weights"), prototypes, weights, counts, ks, temperature)
    own = normalize("prototypes", check_matrix("prototypes", prototypes).to(transfers[0]))
    return [normalize("transfer", transfer).add_(own) for transfer in transfers]


def hybrid_classifier(
    prototypes: object,
    weights: object,
    counts: object,
    k: float = 0,
    temperature: float = TEMPERATURE,
    transfer: object | None = None,
) -> Tensor:
    """Hybrid classifier w_h(k) [N, F] (Eq. 7): norm(w_kt) + norm(p) + norm(w).

    prototypes [N, F], weights [N, F], counts [N]. transfer [N, F]: a recomposition with other roles (Table 6)
    in place of knowledge_transfer(prototypes, weights, ...). Every class needs a weight: NaN is an error.
    """
    if transfer is None:
        return hybrid_classifiers(prototypes, weights, counts, (k,), temperature)[0]
    weights = check_matrix("weights", weights)
    continual = continual_classifier(prototypes, weights, counts, k, temperature, transfer)
    return continual + normalize("weights", weights.to(continual))


def continual_classifier(
    prototypes: object,
    weights: object,
    counts: object,
    k: float = 0,
    temperature: float = TEMPERATURE,
    transfer: object | None = None,
) -> Tensor:
    """Continual classifier w_hc(k) [N, F] (Eq. 9): norm(w_kt) + norm(p).

    prototypes [N, F], weights [N, F], counts [N]. Classes with n <= k need no weight: such rows may be NaN.
    transfer [N, F]: as in hybrid_classifier.
    """
    prototypes = check_matrix("prototypes", prototypes)
    _check_same_classes(prototypes, weights)
    if transfer is None:
        return continual_classifiers(prototypes, weights, counts, (k,), temperature)[0]
    check_counts("counts", counts, len(prototypes))
    transfer = check_matrix("transfer", transfer, *prototypes.shape).to(prototypes.device)
    dtype = torch.promote_types(prototypes.dtype, transfer.dtype)
    return normalize("transfer", transfer.to(dtype)) + normalize("prototypes", prototypes.to(dtype))


# ---------------------------------------------------------------- scoring images


def cosine_logits(features: object, weights: object, scale: float = SCALE) -> Tensor:
    """Logits [M, N] of a cosine classifier (Eq. 2): scale * cos(feature, weight).

    features [M, F], weights [N, F]; the softmax of the logits is Eq. 1.
    """
    features = check_matrix("features", features)
    weights = check_matrix("weights", weights, columns=features.shape[1]).to(features.device)
    dtype = torch.promote_types(features.dtype, weights.dtype)
    scaled = normalize("weights", weights.to(dtype)) * check_positive("scale", scale, dtype)
    return normalize("features", features.to(dtype)) @ scaled.T


def ensemble_probabilities(features: object, classifiers: Sequence[object], scale: float = SCALE) -> Tensor:
    """Class probabilities [M, N] (Eq. 8): the mean over classifiers of the softmax of their cosine logits.

    features [M, F]; classifiers: a sequence of [N, F], each used as the weights of Eq. 1-2.
    """
    features = check_matrix("features", features)
    if len(classifiers) == 0:
        raise InputError("classifiers must be a non-empty sequence of [N, F] matrices")
    matrices: list[Tensor] = []
    for index, classifier in enumerate(classifiers):
        rows = len(matrices[0]) if matrices else None
        matrix = check_matrix(f"classifiers[{index}]", classifier, rows, features.shape[1])
        matrices.append(matrix.to(features.device))
    dtype = reduce(torch.promote_types, (matrix.dtype for matrix in matrices), features.dtype)
    scale = check_positive("scale", scale, dtype)
    scaled = [scale * normalize(f"classifiers[{i}]", matrix.to(dtype)) for i, matrix in enumerate(matrices)]
    total = features.new_zeros(len(features), len(matrices[0]), dtype=dtype)
    for rows in torch.arange(len(features)).split(max(LEAST_IMAGES, SCORES_BLOCK // total.shape[1])):
        block = slice(int(rows[0]), int(rows[-1]) + 1)
        seen = normalize("features", features[block].to(dtype), rows)
        for matrix in scaled:
            total[block] += (seen @ matrix.T).softmax(dim=1)
    return total.div_(len(matrices))


# ---------------------------------------------------------------- Eq. 4-6 for several k


def _transfers(
    names: tuple[str, str],
    queries: object,
    keys: object,
    counts: object,
    ks: Sequence[float],
    temperature: float,
) -> list[Tensor]:
    """Eq. 4 [Q, F] for each k. Similarities are computed once; nothing [Q, N] is held in memory."""
    queries, keys, _, num_read = _queries_and_keys(names, queries, keys, counts, ks)
    transfers = [torch.empty_like(queries) for _ in num_read]
    for start in range(0, len(queries), QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        cosines = queries[block] @ keys.T
        for transfer, number in zip(transfers, num_read, strict=True):
            torch.mm(_softmax(cosines[:, :number], temperature), keys[:number], out=transfer[block])
    return transfers


def _softmax(cosines: Tensor, temperature: float) -> Tensor:
    """softmax(tau * cosines) over the keys; the row maximum goes first, so that no tau overflows."""
    temperature = check_positive("temperature", temperature, cosines.dtype)
    return (cosines - cosines.amax(dim=1, keepdim=True)).mul_(temperature).softmax(dim=1)


def _queries_and_keys(
    names: tuple[str, str], queries: object, keys: object, counts: object, ks: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Normalised queries [Q, F] and keys of the classes with n_j > min(ks), those with most images first.

    Also the order of all classes [N] by falling count, and for each k how many of the keys it reads: the keys
    of a larger k are the first of those of a smaller one.
    """
    if not np.iterable(ks) or len(ks) == 0:
        raise InputError(f"ks must be a sequence of at least one k, found {ks!r}")
    queries = check_matrix(names[0], queries)
    counts = check_counts("counts", counts)
    shape = as_tensor(names[1], keys).shape
    if len(shape) == 2 and shape[0] != len(counts):
        raise InputError(
            f"{names[1]} and counts must be of the same classes, "
            f"found {shape[0]} rows and {len(counts)} counts"
        )
    order = counts.argsort(descending=True, stable=True)
    num_read = [_number_above(counts, k) for k in ks]
    kept = order[: max(num_read)]
    keys = check_matrix(names[1], keys, len(counts), queries.shape[1], read=kept).to(queries.device)
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    return (
        normalize(names[0], queries.to(dtype)),
        normalize(names[1], keys.to(dtype), kept),
        order,
        num_read,
    )


def _number_above(counts: Tensor, k: float) -> int:
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


def _check_same_classes(prototypes: object, weights: object) -> None:
    expected, found = as_tensor("prototypes", prototypes).shape, as_tensor("weights", weights).shape
    if found != expected:
        raise InputError(f"weights must have shape {list(expected)}, as prototypes, found {list(found)}")
