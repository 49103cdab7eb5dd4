"""Compositional knowledge transfer (Sec. 3, Eq. 1-9): classifiers built from prototypes and learned weights.

Pure functions of arrays; nothing is trained. Tensors or NumPy arrays in, tensors out; float32 and float64 are
kept, everything else becomes float32. Bad input raises an InputError (a ValueError) that names the argument.

    p = prototypes(train_features, train_labels, num_classes)
    classifiers = [hybrid_classifier(p, weights, counts, k) for k in (0, 20, 100)]
    predictions = ensemble_probabilities(test_features, classifiers, scale).argmax(dim=1)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lt_core.errors import InputError, as_tensor, check_counts, check_labels, check_matrix, check_positive

TEMPERATURE = 10.0  # tau of Eq. 5 (Sec. 4.1)
SCALE = 16.0  # s of Eq. 2 at the start of training (Sec. 4.1)
BLOCK = 2**24  # attention values held at once, 64 MB in float32
ROWS = 2**14  # images normalised at once


def prototypes(features: object, labels: object, num_classes: int) -> torch.Tensor:
    """Class prototypes [N, F] (Eq. 3): the mean of each class's normalised features [M, F].

    labels [M]: class indices 0..num_classes-1. Raises InputError for a class without samples.
    """
    features = check_matrix("features", features)
    if not isinstance(num_classes, int | np.integer) or num_classes < 1:
        raise InputError(f"num_classes must be a whole number above 0, found {num_classes!r}")
    labels = check_labels("labels", labels, num_classes, len(features)).to(features.device)
    samples = torch.bincount(labels, minlength=int(num_classes))
    if (samples == 0).any():
        raise InputError(
            f"labels: class {int((samples == 0).nonzero()[0])} has no samples; each class needs one"
        )
    sums = features.new_zeros(num_classes, features.shape[1])
    for start in range(0, len(features), ROWS):
        rows = slice(start, start + ROWS)
        sums.index_add_(0, labels[rows], _directions("features", features[rows], first_row=start))
    return sums / samples[:, None]


def attention(
    queries: object, keys: object, counts: object, k: float = 0, temperature: float = TEMPERATURE
) -> torch.Tensor:
    """Attention [N, N] between classes (Eq. 5-6): a_ij = softmax_j(tau * cos(query_i, key_j)).

    queries [N, F], keys [N, F], counts [N]. Rows sum to 1. Zero where n_j <= k: such key rows are never read
    and may be NaN.
    """
    queries, keys, kept = _roles(("queries", "keys"), queries, keys, counts, k)
    full = queries.new_zeros(len(queries), len(queries))
    full[:, kept] = _softmax(queries, keys, check_positive("temperature", temperature))
    return full


def knowledge_transfer(
    queries: object, keys: object, counts: object, k: float = 0, temperature: float = TEMPERATURE
) -> torch.Tensor:
    """Recomposed classifier w_kt [N, F] (Eq. 4): the attention's mean of the normalised keys; not normalised.

    queries [N, F], keys [N, F], counts [N]. Prototypes as queries and learned weights as keys are the method;
    the other roles are those of Table 6. Key rows with n_j <= k are never read and may be NaN.
    """
    return _recomposed(("queries", "keys"), queries, keys, counts, k, temperature)


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
    weights = check_matrix("weights", weights)
    continual = continual_classifier(prototypes, weights, counts, k, temperature, transfer)
    return continual + _directions("weights", weights.to(continual))


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
    found = list(as_tensor("weights", weights).shape)
    if found != list(prototypes.shape):
        raise InputError(f"weights must have shape {list(prototypes.shape)}, as prototypes, found {found}")
    if transfer is None:
        names = ("prototypes", "weights")
        recomposed = _recomposed(names, prototypes, weights, counts, k, temperature)
    else:
        check_counts("counts", counts, len(prototypes))
        recomposed = check_matrix("transfer", transfer, *prototypes.shape)
    dtype = torch.promote_types(prototypes.dtype, recomposed.dtype)
    recomposed = recomposed.to(device=prototypes.device, dtype=dtype)
    return _directions("transfer", recomposed) + _directions("prototypes", prototypes.to(dtype))


def cosine_logits(features: object, weights: object, scale: float = SCALE) -> torch.Tensor:
    """Logits [M, N] of a cosine classifier (Eq. 2): scale * cos(feature, weight).

    features [M, F], weights [N, F]; the softmax of the logits is Eq. 1.
    """
    features = check_matrix("features", features)
    scale = check_positive("scale", scale)
    return _logits(_directions("features", features), "weights", weights, scale)


def ensemble_probabilities(
    features: object, classifiers: Sequence[object], scale: float = SCALE
) -> torch.Tensor:
    """Class probabilities [M, N] (Eq. 8): the mean over classifiers of the softmax of their cosine logits.

    features [M, F]; classifiers: a sequence of [N, F], each used as the weights of Eq. 1-2.
    """
    features = check_matrix("features", features)
    scale = check_positive("scale", scale)
    if len(classifiers) == 0:
        raise InputError("classifiers must be a non-empty sequence of [N, F] matrices")
    directions = _directions("features", features)
    total = _logits(directions, "classifiers[0]", classifiers[0], scale).softmax(dim=1)
    for index in range(1, len(classifiers)):
        logits = _logits(directions, f"classifiers[{index}]", classifiers[index], scale, rows=total.shape[1])
        total = total + logits.softmax(dim=1)
    return total / len(classifiers)


def _logits(
    directions: torch.Tensor, name: str, weights: object, scale: float, rows: int | None = None
) -> torch.Tensor:
    weights = check_matrix(name, weights, rows, directions.shape[1]).to(directions.device)
    dtype = torch.promote_types(directions.dtype, weights.dtype)
    return directions.to(dtype) @ (_directions(name, weights.to(dtype)) * _at_most_largest(scale, dtype)).T


def _softmax(queries: torch.Tensor, keys: torch.Tensor, temperature: float) -> torch.Tensor:
    """Attention of directions to directions. The row maximum goes first, so that no temperature overflows."""
    cosines = queries @ keys.T
    cosines = cosines - cosines.amax(dim=1, keepdim=True)
    return (cosines * _at_most_largest(temperature, cosines.dtype)).softmax(dim=1)


def _recomposed(
    names: tuple[str, str], queries: object, keys: object, counts: object, k: float, temperature: float
) -> torch.Tensor:
    """Eq. 4, in blocks of queries: neither [N, N] nor a row of a class with n_j <= k is ever built."""
    queries, keys, _ = _roles(names, queries, keys, counts, k)
    temperature = check_positive("temperature", temperature)
    recomposed = torch.empty_like(queries)
    step = max(1, BLOCK // len(keys))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        recomposed[rows] = _softmax(queries[rows], keys, temperature) @ keys
    return recomposed


def _roles(
    names: tuple[str, str], queries: object, keys: object, counts: object, k: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Directions of queries [N, F] and of keys of the K classes with n_j > k [K, F]; these classes [K]."""
    queries = check_matrix(names[0], queries)
    counts = check_counts("counts", counts, len(queries))
    kept = _exceeding(counts, k)
    keys = check_matrix(names[1], keys, *queries.shape, read=kept).to(queries.device)
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    queries = _directions(names[0], queries.to(dtype))
    return queries, _directions(names[1], keys.to(dtype), numbers=kept), kept.to(queries.device)


def _exceeding(counts: torch.Tensor, k: float) -> torch.Tensor:
    """Indices of the classes with more than k training images (Eq. 6)."""
    try:
        valid = float(k) >= 0
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise InputError(f"k must be a number of training images, 0 or more, found {k!r}")
    kept = (counts > float(k)).nonzero().flatten()
    if len(kept) == 0:
        raise InputError(
            f"k={k}: no class has more than {k} training images (the largest has {int(counts.max())}), "
            "so there is nothing to transfer from; choose a smaller k"
        )
    return kept


def _directions(
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


def _at_most_largest(number: float, dtype: torch.dtype) -> float:
    return min(number, torch.finfo(dtype).max)
