"""The classifiers of the paper's tables, by the names of `published.csv`, on a feature cache.

    predictions = predict(cache, "wh20", split="test")                # [M]

Every method takes a cache and features [M, F] and gives class probabilities [M, N]. A cache is a
`lt_core.features.FeatureCache` or anything with its `weights`, `scale`, `bias`, `counts`, `prototypes` and
`features(split)`; `causal_norm` reads its `direction` too. All but the classifiers that a backbone was
trained with (`cosine`, `dot_product`, `causal_norm`) are built from rows [N, F] that `classifiers` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from lt_core.causal_norm import causal_norm_logits
from lt_core.errors import InputError, as_tensor, check_matrix, unknown
from lt_core.transfer import (
    ENSEMBLE,
    continual_classifier,
    continual_classifiers,
    cosine_logits,
    ensemble_probabilities,
    hybrid_classifier,
    hybrid_classifiers,
    knowledge_transfer,
)

CHUNK = 2**25  # probabilities held at once, 128 MB

Scores = Callable[[Any, object], torch.Tensor]
Build = Callable[[Any], list[torch.Tensor]]


def _prototypes(cache: Any) -> list[torch.Tensor]:
    return [check_matrix("prototypes", cache.prototypes)]


def _prototypes_and_weights(cache: Any) -> list[torch.Tensor]:
    """norm(p) + norm(w): Eq. 9 with the learned weight where the transfer stands."""
    weights = check_matrix("weights", cache.weights)
    return [continual_classifier(cache.prototypes, weights, cache.counts, transfer=weights)]


def _hybrid(cache: Any, ks: tuple[int, ...]) -> list[torch.Tensor]:
    return hybrid_classifiers(cache.prototypes, cache.weights, cache.counts, ks)


def _continual(cache: Any, ks: tuple[int, ...]) -> list[torch.Tensor]:
    return continual_classifiers(cache.prototypes, cache.weights, cache.counts, ks)


def _prototypes_and_continual(cache: Any) -> list[torch.Tensor]:
    """Table 2's ensemble."""
    return _prototypes(cache) + _continual(cache, (20, 100))


def _roles(cache: Any, query: str, key: str) -> list[torch.Tensor]:
    """Table 6: what asks and what is read and recomposed; p and w of Eq. 7 stay."""
    p, w, counts = cache.prototypes, cache.weights, cache.counts
    queries, keys = getattr(cache, query), getattr(cache, key)
    recomposed = {k: knowledge_transfer(queries, keys, counts, k) for k in ENSEMBLE}
    return [hybrid_classifier(p, w, counts, k, transfer=recomposed[k]) for k in ENSEMBLE]


CLASSIFIERS: dict[str, Build] = {
    "prototypes": _prototypes,
    "prototypes+cosine": _prototypes_and_weights,
    "wh20": partial(_hybrid, ks=(20,)),
    "wh100": partial(_hybrid, ks=(100,)),
    "ensemble_wh_0_20_100": partial(_hybrid, ks=ENSEMBLE),
    "whc20": partial(_continual, ks=(20,)),
    "whc100": partial(_continual, ks=(100,)),
    "ensemble_proto_whc_20_100": _prototypes_and_continual,
    "ensemble_whc_20_100": partial(_continual, ks=(20, 100)),
    "attention_p2w": partial(_roles, query="prototypes", key="weights"),
    "attention_w2p": partial(_roles, query="weights", key="prototypes"),
    "attention_w2w": partial(_roles, query="weights", key="weights"),
    "attention_p2p": partial(_roles, query="prototypes", key="prototypes"),
}


def _built(cache: Any, features: object, build: Build) -> torch.Tensor:
    return ensemble_probabilities(features, build(cache), float(cache.scale))


def _cosine(cache: Any, features: object) -> torch.Tensor:
    """Eq. 1-2. Classes left out of training (NaN weights) are no candidates: their probability is 0."""
    weights = as_tensor("weights", cache.weights)
    trained = ~weights.isnan().any(dim=1)
    probabilities = cosine_logits(features, weights[trained], float(cache.scale)).softmax(dim=1)
    full = probabilities.new_zeros(len(probabilities), len(weights))
    full[:, trained] = probabilities
    return full


def _dot_product(cache: Any, features: object) -> torch.Tensor:
    """softmax(f W^T + b): Table 4a."""
    weights = check_matrix("weights", cache.weights)
    logits = check_matrix("features", features, columns=weights.shape[1]).to(weights) @ weights.T
    return (logits if cache.bias is None else logits + as_tensor("bias", cache.bias)).softmax(dim=1)


def _causal_norm(cache: Any, features: object) -> torch.Tensor:
    """TDE (Tang et al., NeurIPS 2020). Raises InputError for a backbone trained with another classifier."""
    if cache.direction is None:
        raise InputError("causal_norm needs a backbone that was trained with it: this cache has no direction")
    weights = check_matrix("weights", cache.weights)
    features = check_matrix("features", features, columns=weights.shape[1]).to(weights)
    return causal_norm_logits(features, weights, cache.direction.to(weights)).softmax(dim=1)


METHODS: dict[str, Scores] = {
    "cosine": _cosine,
    "dot_product": _dot_product,
    "causal_norm": _causal_norm,
    **{name: partial(_built, build=build) for name, build in CLASSIFIERS.items()},
}


def learned(cache: Any) -> str:
    """Name of the method that a backbone's own classifier is."""
    if cache.direction is not None:
        return "causal_norm"
    return "cosine" if cache.bias is None else "dot_product"


def classifiers(cache: Any, method: str) -> list[torch.Tensor]:
    """The classifiers [N, F] that a method averages (Eq. 8), each for Eq. 1-2 with the scale of the cache."""
    if method not in CLASSIFIERS:
        raise InputError(unknown("method with rows of its own", method, list(CLASSIFIERS)))
    return CLASSIFIERS[method](cache)


def probabilities(cache: Any, method: str, split: str = "test") -> torch.Tensor:
    """Class probabilities [M, N] of a method on a split (train, val or test)."""
    return _method(method)(cache, cache.features(split))


def predict(cache: Any, method: str, split: str = "test") -> np.ndarray:
    """Predicted classes [M] (int64) of a method on a split (train, val or test)."""
    score = _method(method)
    features = as_tensor("features", cache.features(split))
    chunks = features.split(max(1, CHUNK // len(cache.counts)))
    return torch.cat([score(cache, chunk).argmax(dim=1) for chunk in chunks]).cpu().numpy()


def _method(name: str) -> Scores:
    if name not in METHODS:
        raise InputError(unknown("method", name, list(METHODS)))
    return METHODS[name]
