"""What claims are tested on: accuracies of (backbone, classifier) pairs and their uncertainty.

study = Study.of_profile("embedded")
gain = study.accuracy(Entry("sqrt", "wh20"), "few") - study.accuracy(Entry("sqrt", "cosine"), "few")
gain.value, gain.low, gain.high
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lt_core import backbones
from lt_core.baselines import BASELINES
from lt_core.errors import InputError
from lt_core.features import META, FeatureCache
from lt_core.groups import group_of
from lt_core.methods import predict
from lt_core.metrics import (
    COLUMNS,
    bootstrap_accuracies,
    group_accuracy,
    interval,
    within_group_predictions,
)
from lt_core.profiles import load_profile
from lt_core.report.claims.untestable import Untestable
from lt_core.report.rows import prototypes_from
from lt_core.report.systems import NAMES as SYSTEM_NAMES
from lt_core.report.systems import TRAINED, Run
from lt_core.transfer import cosine_logits

Load = Callable[[str], Sequence[FeatureCache]]
REPLICATES = 1000

NAMES = {
    "cosine": "cosine classifier",
    "dot_product": "dot-product classifier",
    "prototypes": "prototypes",
    "prototypes+cosine": "prototypes + classifier",
    "wh20": "w^h(20)",
    "wh100": "w^h(100)",
    "ensemble_wh_0_20_100": "ensemble",
    "whc20": "w^hc(20)",
    "whc100": "w^hc(100)",
    "ensemble_proto_whc_20_100": "ensemble of prototypes and w^hc",
    "ensemble_whc_20_100": "ensemble of w^hc",
    "attention_p2w": "p → w",
    "attention_w2p": "w → p",
    "attention_w2w": "w → w",
    "attention_p2p": "p → p",
}


@dataclass(frozen=True)
class Entry:
    """A classifier (a name of `methods`) of a backbone on the `train`, `val` or `test` images.

    source: split that prototypes come from; within: the candidates are the classes of the image's own group.
    """

    backbone: str
    method: str
    images: str = "test"
    source: str = "train"
    within: bool = False

    @property
    def what(self) -> str:
        name = "validation prototypes" if self.source == "val" else NAMES[self.method]
        where = {"train": " on training images", "val": " on validation images", "test": ""}[self.images]
        return name + where + " within the group" * self.within


@dataclass(frozen=True)
class System:
    """Our run of a published system (a name of `systems.NAMES`), to compare with our `backbone`.

    role: of the data set, `imagenet_lt` or `places_lt`.
    """

    name: str
    role: str
    backbone: str

    @property
    def what(self) -> str:
        return f"our {SYSTEM_NAMES[self.name]}"


@dataclass(frozen=True)
class Estimate:
    """A number and its bootstrap samples [replicates], which are paired within a study: they subtract."""

    value: float
    samples: np.ndarray

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return float(interval(self.samples)[0])

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return float(interval(self.samples)[1])

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.value - other.value, self.samples - other.samples)

    @property
    def open(self) -> bool:
        """Whether the interval contains 0."""
        return self.low <= 0 <= self.high

    def times(self, factor: float) -> Estimate:
        return Estimate(factor * self.value, factor * self.samples)


class Study:
    """Caches of named backbones, read once, and what was measured on them, computed once."""

    def __init__(self, load: Load, replicates: int = REPLICATES) -> None:
        """load: backbone -> the caches of its seeds, first the one with all splits; raises Untestable."""
        self._load = load
        self._replicates = replicates
        self._caches: dict[str, list[FeatureCache]] = {}
        self._accuracies: dict[Entry | System, tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def of_profile(cls, profile: str, seed: int = 0, replicates: int = REPLICATES) -> Study:
        """The study of a profile's caches, as `backbones.load_seeds` gives them."""
        return cls(lambda backbone: _of_profile(profile, backbone, seed), replicates)

    def caches(self, backbone: str, *splits: str) -> list[FeatureCache]:
        """The caches of a backbone's seeds that hold these splits; raises Untestable where there are none."""
        if backbone not in self._caches:
            self._caches[backbone] = list(self._load(backbone))
        usable = [c for c in self._caches[backbone] if set(splits) <= set(c.splits)]
        if not usable:
            absent = [split for split in splits if split not in self._caches[backbone][0].splits]
            raise Untestable(f"the {' and '.join(absent)} features of `{backbone}` in its cache")
        return usable

    def counts(self, backbone: str) -> np.ndarray:
        """Training images of each class [N]."""
        return self.caches(backbone)[0].counts.cpu().numpy()

    def classes(self, backbone: str, group: str) -> np.ndarray:
        """The classes of a group (`total`: all), a mask [N]; raises Untestable for an empty group."""
        counts = self.counts(backbone)
        mask = np.ones(len(counts), bool) if group == "total" else group_of(counts)[group]
        if not mask.any():
            raise Untestable(f"classes in the group `{group}`")
        return mask

    def accuracy(self, entry: Entry | System, group: str) -> Estimate:
        """Top-1 accuracy in percent of a group or `total`, averaged over seeds.

        Samples: images drawn again within each class, and seeds where there are several
        (`metrics.bootstrap_accuracies`). Raises Untestable where the run or the group does not exist.
        """
        self.classes(entry.backbone, group)
        if entry not in self._accuracies:
            self._accuracies[entry] = self._measured(entry)
        values, samples = self._accuracies[entry]
        column = COLUMNS.index(group)
        return Estimate(float(values[column]), samples[:, column])

    def spread(self, entry: Entry) -> Estimate:
        """Difference in points between the best and the worst group."""
        groups = [self.accuracy(entry, group) for group in COLUMNS[:3]]
        samples = np.stack([estimate.samples for estimate in groups])
        return Estimate(float(np.ptp([estimate.value for estimate in groups])), np.ptp(samples, axis=0))

    def per_class(self, backbone: str, measure: Callable[[FeatureCache], np.ndarray]) -> np.ndarray:
        """A measure of each class [N], averaged over seeds."""
        return np.mean([measure(cache) for cache in self.caches(backbone)], axis=0)

    def over_classes(self, values: np.ndarray, mask: np.ndarray | None = None) -> Estimate:
        """Mean of the values [N] of some classes; samples: these classes drawn again, the same each time."""
        values = np.asarray(values, float)
        values = values if mask is None else values[mask]
        drawn = np.random.default_rng(0).integers(len(values), size=(self._replicates, len(values)))
        return Estimate(float(values.mean()), values[drawn].mean(axis=1))

    def _measured(self, entry: Entry | System) -> tuple[np.ndarray, np.ndarray]:
        """Accuracies [4] and their samples [replicates, 4] of one entry."""
        images = entry.images if isinstance(entry, Entry) else "test"
        if isinstance(entry, System):
            predictions = self._run(entry)
            cache = self.caches(entry.backbone, images)[0]
        else:
            caches = self.caches(*_needed(entry))
            predictions = [_predicted(cache, entry) for cache in caches]
            cache = caches[0]
        labels = cache.labels(images).cpu().numpy()
        correct = np.stack(predictions) == labels
        samples = bootstrap_accuracies(correct[:, None], labels, cache.counts, replicates=self._replicates)
        values = [list(group_accuracy(p, labels, cache.counts).values()) for p in predictions]
        return np.mean(values, axis=0), samples[:, 0]

    def _run(self, system: System) -> list[np.ndarray]:
        """Predictions [M], one a seed, of our run of a system; raises Untestable while there is none."""
        trained = TRAINED[system.role].get(system.name)
        if trained is None:  # fitted to the frozen features of the backbone that it is compared with
            runs = [Run.of(system.name, c) for c in self.caches(system.backbone, "train", "val")]
        else:
            own = self.caches(trained, *(["val"] if system.name in BASELINES else []))
            network, ours = own[0].meta["network"], self.caches(system.backbone)[0].meta["network"]
            if network != ours:
                raise Untestable(
                    f"{SYSTEM_NAMES[system.name]} trained on {ours}, the network of `{system.backbone}` "
                    f"(here on {network})"
                )
            runs = [Run.own(cache) for cache in own]
        return [run.predictions.cpu().numpy() for run in runs]


def _needed(entry: Entry) -> list[str]:
    """Backbone and splits that an entry reads."""
    return [entry.backbone, entry.images, *([] if entry.source == "train" else [entry.source])]


def _predicted(cache: FeatureCache, entry: Entry) -> np.ndarray:
    """Predictions [M] of one seed."""
    if entry.source == "train" and not entry.within:
        return predict(cache, entry.method, entry.images)
    if entry.method != "prototypes":
        raise InputError(f"only prototypes have a source and a within-group accuracy, found {entry.method!r}")
    scores = cosine_logits(cache.features(entry.images), prototypes_from(cache, entry.source))
    if entry.within:
        return within_group_predictions(scores, cache.labels(entry.images), cache.counts)
    return scores.argmax(dim=1).cpu().numpy()


def _of_profile(profile: str, backbone: str, seed: int) -> list[FeatureCache]:
    chosen = load_profile(profile)
    if backbone not in chosen.backbones:
        raise Untestable(f"a backbone `{backbone}` in the profile {profile}")
    folders = [
        backbones.cache_folder(profile, backbone, s) for s in backbones.seeds_shown(profile, backbone, seed)
    ]
    if not chosen.trains and not all((folder / META).exists() for folder in folders):
        raise Untestable(f"the feature caches of the backbone `{backbone}`")
    return backbones.load_seeds(profile, backbone, seed)
