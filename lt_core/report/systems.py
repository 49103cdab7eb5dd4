"""The systems that the paper compares itself with: where our own run of each comes from.

system_of("ResNet152 backbone / RSG* [31]")                     # "rsg"
Run.of("lws", cache).predictions                                # [M], fitted to this cache's features
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lt_core.backbones import load_seeds
from lt_core.baselines import BASELINES, Stage1, tune
from lt_core.errors import InputError, unknown
from lt_core.features import FeatureCache
from lt_core.methods import learned
from lt_core.profiles import load_profile

NAMES = {
    "lws": "LWS",
    "balms": "BALMS",
    "causal_norm": "Causal norm",
    "rsg": "RSG",
    "lade": "LADE",
    "disalign": "DisAlign",
    "ldam_drw": "LDAM-DRW",  # not in print
}
IMAGENET = ("lws", "balms", "causal_norm", "rsg", "lade", "disalign")  # Table 1
PLACES = ("lws", "balms", "lade", "rsg", "disalign")  # Table 3

# Systems that their authors train end to end: role of the data set -> system -> backbone.
TRAINED = {
    "imagenet_lt": {name: name for name in ("causal_norm", "rsg", "lade", "ldam_drw")},
    "places_lt": {"rsg": "places_rsg", "lade": "places_lade"},
}


def trained_systems(profile: str, role: str, seed: int = 0) -> dict[str, list[FeatureCache]]:
    """System -> the caches of its own backbone, one a seed, for the systems that the profile trains."""
    known = load_profile(profile).backbones
    return {s: load_seeds(profile, name, seed) for s, name in TRAINED[role].items() if name in known}


def system_of(printed_row: str) -> str:
    """The system that a row of Table 1 or 3 quotes; raises InputError for another row."""
    label = printed_row.rpartition(" / ")[2].lower()
    for system, name in NAMES.items():
        if label.startswith(name.lower()):
            return system
    raise InputError(unknown("quoted system", printed_row, list(NAMES.values())))


@dataclass(frozen=True)
class Run:
    """Predictions [M] of one run on the test images, what validation chose, and seconds of all fits."""

    predictions: Tensor
    setting: dict[str, float]
    seconds: float

    @classmethod
    def of(cls, method: str, cache: FeatureCache) -> Run:
        """A method of `lt_core.baselines` on a cache's features, with the setting that validation chooses."""
        tuned = tune(method, Stage1.of(cache), cache.features("val"), cache.labels("val"), cache.meta["seed"])
        return cls(tuned.logits(cache.features("test")).argmax(dim=1), tuned.setting, tuned.seconds)

    @classmethod
    def own(cls, cache: FeatureCache) -> Run:
        """The classifier that a backbone was trained with; of causal norm, validation sets the strength."""
        if learned(cache) in BASELINES:
            return cls.of(learned(cache), cache)
        return cls(Stage1.of(cache).logits(cache.features("test")).argmax(dim=1), {}, 0.0)
