"""Our runs of the systems that the paper compares itself with, found by their names in one place.

predictions("rsg", "imagenet_lt", "sqrt", study.caches)  # one [M] a seed, or Untestable while there is no run
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lt_core.baselines import BASELINES, Stage1, tune
from lt_core.features import FeatureCache
from lt_core.methods import learned, predict
from lt_core.report.claims.untestable import Untestable

Caches = Callable[..., list[FeatureCache]]

NAMES = {
    "lws": "LWS",
    "balms": "BALMS",
    "causal_norm": "Causal norm",
    "rsg": "RSG",
    "lade": "LADE",
    "disalign": "DisAlign",
}
IMAGENET = ("lws", "balms", "causal_norm", "rsg", "lade", "disalign")  # Table 1
PLACES = ("lws", "balms", "lade", "rsg", "disalign")  # Table 3

# Systems that their authors train end to end: role of the data set -> system -> backbone.
TRAINED = {
    "imagenet_lt": {"causal_norm": "causal_norm", "rsg": "rsg", "lade": "lade"},
    "places_lt": {"rsg": "places_rsg", "lade": "places_lade"},
}


def predictions(system: str, role: str, backbone: str, caches: Caches) -> list[np.ndarray]:
    """Predictions [M] on the test images, one a seed, of our run of a system.

    role: `imagenet_lt` or `places_lt`; backbone: ours that it is compared with, whose frozen features it uses
    or whose network it is trained on; caches: gives the caches of a backbone's seeds with the named splits.
    Raises Untestable while there is no such run.
    """
    if system not in TRAINED[role]:
        return [_tuned(system, cache) for cache in caches(backbone, "train", "val")]
    own = caches(TRAINED[role][system])
    network, ours = own[0].meta["network"], caches(backbone)[0].meta["network"]
    if network != ours:
        raise Untestable(
            f"{NAMES[system]} trained on {ours}, the network of `{backbone}` (here on {network})"
        )
    if system in BASELINES:  # a strength to choose at inference
        return [_tuned(system, cache) for cache in caches(TRAINED[role][system], "val")]
    return [predict(cache, learned(cache)) for cache in own]


def _tuned(system: str, cache: FeatureCache) -> np.ndarray:
    """Predictions [M] of a system on a cache's features, with the setting that validation chooses."""
    stage = Stage1.of(cache)
    tuned = tune(system, stage, cache.features("val"), cache.labels("val"), cache.meta["seed"])
    return tuned.logits(cache.features("test")).argmax(dim=1).cpu().numpy()
