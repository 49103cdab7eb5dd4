"""The one table of measured values: tables, claims and most figures are views of it.

    values = measure("embedded", ["sqrt/ensemble", "sqrt/cosine", "sqrt/mismatches"])
    values.loc["sqrt/ensemble"]                                   # [(seed, group), 1001]: value, then draws
    estimates(over_seeds(values.loc["sqrt/ensemble"]))            # value, low, high by group, in percent
    estimates(difference(values, "sqrt/ensemble", "sqrt/cosine")) # paired over test images and seeds

A row of the table is (subject, seed, group): the value and 1,000 bootstrap draws, paired between all subjects
of the same images. Subtracting two subjects aligns them on (seed, group), so a difference is always one over
the training seeds that both have. A subject is text:

    BACKBONE/CLASSIFIER                   top-1 accuracy in percent; test images drawn again within each class
    ... within                            candidates are the classes of the image's own group (Table 5)
    ... val-prototypes                    prototypes of the validation images
    ... on train, ... on val              other images than the test split
    BACKBONE/MEASURE                      a mean over classes (`MEASURES`); classes drawn again
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
from torch import Tensor
from torch.nn.functional import normalize

from lt_core import backbones, classifiers
from lt_core.cache import FeatureCache
from lt_core.checks import CacheError, InputError, check_labels
from lt_core.data.profiles import load_profile
from lt_core.metrics import (
    COLUMNS,
    GROUPS,
    bootstrap_accuracies,
    bootstrap_means,
    cosine_matrix,
    group_of,
    per_class_accuracy,
    resample_seeds,
)
from lt_core.transfer import TEMPERATURE

REPLICATES = 1000
START = "prototypes before fine-tuning"  # accuracy (total, percent) that training states in meta.json
FIRST_RANKS = 20  # of sorted similarities, in the measure of sharpness (Figure 8)
DATASETS = {  # as people write them
    "tiny_imagenet_lt": "Tiny-ImageNet-LT",
    "cifar100_lt": "CIFAR-100-LT",
    "imagenet_lt": "ImageNet-LT",
    "places_lt": "Places-LT",
    "digits": "handwritten digits",
    **{
        f"cifar{classes}_lt_{imbalance}": f"CIFAR-{classes}-LT (imbalance {imbalance})"
        for classes in (10, 100)
        for imbalance in (10, 50, 100)
    },
}


# ---------------------------------------------------------------- subjects


@dataclass(frozen=True)
class Subject:
    """What a row of the table is about; the text of the module's head, taken apart."""

    backbone: str
    name: str  # of a classifier or a measure
    images: str = "test"
    prototypes: str = "train"
    within: bool = False

    @classmethod
    def parse(cls, text: str) -> Subject:
        """Raises InputError for a text of another form."""
        form = r"([^/]+)/(.+?)( within)?( val-prototypes)?(?: on (train|val))?"
        if not (match := re.fullmatch(form, text)):
            raise InputError(f"a subject reads BACKBONE/CLASSIFIER, as in sqrt/wh20, found {text!r}")
        backbone, name, within, val, images = match.groups()
        return cls(backbone, name, images or "test", "val" if val else "train", bool(within))

    def predict(self, cache: FeatureCache, rule: str) -> classifiers.Prediction:
        within = rule if self.within else None
        return classifiers.prediction(cache, self.name, self.images, self.prototypes, within)


# ---------------------------------------------------------------- measures over classes


def _cosines(one: Tensor, other: Tensor) -> np.ndarray:
    """Cosine [N] of each row with the same row of another matrix."""
    return (normalize(one.double(), dim=1) * normalize(other.double(), dim=1)).sum(dim=1).cpu().numpy()


def _row(cache: FeatureCache, name: str) -> Tensor:
    return classifiers.rows(cache, name)[0]


def mismatched(cache: FeatureCache) -> np.ndarray:
    """N for each class whose prototype is nearest to another class's weight, else 0 [N] (Table 8)."""
    cosines = cosine_matrix(cache.prototypes, cache.weights)
    return len(cosines) * (cosines.argmax(axis=1) != np.arange(len(cosines)))


def gap(cache: FeatureCache) -> np.ndarray:
    """Similarity of a prototype to its nearest weight less the mean over ranks 2 to 20 [N] (Figure 8)."""
    ordered = np.sort(cosine_matrix(cache.prototypes, cache.weights), axis=1)[:, ::-1]
    return ordered[:, 0] - ordered[:, 1:FIRST_RANKS].mean(axis=1)


def entropy(cache: FeatureCache) -> np.ndarray:
    """Entropy of softmax(10 cos(p_i, w_j)) over j, in nats [N] (Figure 8)."""
    logits = TEMPERATURE * cosine_matrix(cache.prototypes, cache.weights)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return -(shares * np.log(shares)).sum(axis=1)


MEASURES: dict[str, Callable[[FeatureCache], np.ndarray]] = {
    "mismatches": mismatched,  # the mean over classes is their number
    "gap": gap,
    "entropy": entropy,
    "cos(w, p)": lambda cache: _cosines(cache.weights, cache.prototypes),
    "cos(wh20, p)": lambda cache: _cosines(_row(cache, "wh20"), cache.prototypes),
    "cos(wh20, w)": lambda cache: _cosines(_row(cache, "wh20"), cache.weights),
    "cos(p+w, p)": lambda cache: _cosines(_row(cache, "prototypes+cosine"), cache.prototypes),
}


# ---------------------------------------------------------------- measuring


@lru_cache(maxsize=64)
def load(profile: str, backbone: str, seed: int) -> FeatureCache:
    """A cache of the profile, read once a process."""
    return backbones.load(profile, backbone, seed)


def dataset_name(cache: FeatureCache) -> str:
    """The name of a cache's data set for readers; of one of your own as the cache has it."""
    name = cache.meta["dataset"]
    return DATASETS.get(name, name)


def caches_of(profile: str, backbone: str, seed: int | None = None) -> list[FeatureCache]:
    """The caches of the seeds that are shown of a backbone (`backbones.seeds_shown`)."""
    return [load(profile, backbone, one) for one in backbones.seeds_shown(profile, backbone, seed)]


def measure(
    profile: str, subjects: Iterable[str], seed: int | None = None, rule: str = "paper"
) -> pd.DataFrame:
    """The measured values of these subjects: index (subject, seed, group), columns 0 (value) to 1000.

    seed: None for all seeds of the profile. rule: of grouping (`metrics.RULES`). Accuracies in percent; NaN
    for an empty group. Seeds whose features are not stored are left out, and so is a subject without any, or
    of a backbone that the profile has not: `table.attrs["missing"]` says why, {subject: reason}.
    """
    tables, missing = [], {}
    predicted: dict[tuple, list[tuple[str, int, np.ndarray]]] = {}  # predictions of the same images together
    known: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}
    for text in dict.fromkeys(subjects):
        subject = Subject.parse(text)
        if subject.backbone not in load_profile(profile).backbones:
            missing[text] = f"a backbone `{subject.backbone}`"
            continue
        for cache in caches_of(profile, subject.backbone, seed):
            one = cache.meta["seed"]
            try:
                if subject.name == START:
                    tables.append(_constant(text, one, cache.meta.get("start_accuracy"), cache))
                    continue
                if subject.name in MEASURES:
                    tables.append(class_means(text, one, MEASURES[subject.name](cache), cache.counts, rule))
                    continue
                classes = subject.predict(cache, rule).classes
            except CacheError as error:  # this seed's cache does not store the features
                missing[text] = str(error)
                continue
            key = (cache.meta["dataset"], subject.images, tuple(cache.counts.tolist()))
            known.setdefault(key, (cache.labels(subject.images).numpy(), cache.counts.numpy()))
            predicted.setdefault(key, []).append((text, one, classes))
    tables += [accuracies(found, *known[key], rule) for key, found in predicted.items()]
    if not tables:
        raise InputError(f"nothing can be measured: {'; '.join(missing.values())}")
    table = pd.concat(tables)
    table.attrs["missing"] = {text: why for text, why in missing.items() if text not in table.index}
    return table


def accuracies(
    predicted: list[tuple[str, int, np.ndarray]], labels: np.ndarray, counts: np.ndarray, rule: str = "paper"
) -> pd.DataFrame:
    """Rows of the table from predictions (subject, seed, classes [M]) for labels [M] and counts [N].

    Also for predictions of one's own: append the result to a table with `pd.concat`.
    """
    classes = [
        check_labels(f"predictions of {subject}", found, len(counts), len(labels)).numpy()
        for subject, _, found in predicted
    ]
    correct = np.stack(classes) == labels
    draws = bootstrap_accuracies(correct, labels, counts, rule, REPLICATES)  # [B, R, 4]
    masks = [mask[labels] for mask in group_of(counts, rule).values()] + [np.ones(len(labels), bool)]
    values = np.stack(
        [100 * correct[:, of].mean(axis=1) if of.any() else np.full(len(correct), np.nan) for of in masks], 1
    )
    content = np.concatenate([values[:, :, None], draws.transpose(1, 2, 0)], axis=2)
    rows = [(subject, seed, group) for subject, seed, _ in predicted for group in COLUMNS]
    return _table(rows, content.reshape(len(rows), -1))


def class_means(
    subject: str, seed: int, values: np.ndarray, counts: object, rule: str = "paper"
) -> pd.DataFrame:
    """Rows of the table from a number for each class [N]: its mean over a group, classes drawn again."""
    members = group_of(counts, rule) | {"total": np.ones(len(values), bool)}
    content = []
    for group in COLUMNS:
        inside = np.asarray(values, float)[members[group]]
        mean = inside.mean() if len(inside) else np.nan
        content.append([mean, *bootstrap_means(inside, REPLICATES)])
    return _table([(subject, seed, group) for group in COLUMNS], np.array(content))


def _constant(subject: str, seed: int, value: float | None, cache: FeatureCache) -> pd.DataFrame:
    """A row for `total` without draws of its own. Raises CacheError where the cache does not state it."""
    if value is None:
        raise CacheError(f"{START} of `{cache.meta['backbone']}`, which its cache does not state")
    return _table([(subject, seed, "total")], np.full((1, REPLICATES + 1), float(value)))


def _table(rows: list[tuple[str, int, str]], content: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(content, pd.MultiIndex.from_tuples(rows, names=["subject", "seed", "group"]))


# ---------------------------------------------------------------- reading the table


def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean over the seeds of rows [(seed, group), 1001], seeds drawn again: [group, 1001]; attrs["seeds"]."""
    seeds = list(rows.index.unique("seed"))
    groups = list(rows.index.unique("group"))
    content = np.stack([rows.xs(seed, level="seed").loc[groups].to_numpy() for seed in seeds])
    mean = np.concatenate([content[..., :1].mean(axis=0), resample_seeds(content[..., 1:])], axis=-1)
    table = pd.DataFrame(mean, pd.Index(groups, name="group"))
    table.attrs["seeds"] = seeds
    return table


def difference(values: pd.DataFrame, subject: str, against: str) -> pd.DataFrame:
    """Subject less another over the seeds that both have: [group, 1001]. Raises InputError without such."""
    # pandas aligns on (seed, group): what one of the two lacks becomes NaN and is dropped.
    rows = values.loc[subject] - values.loc[against]
    shared = set(values.loc[subject].index.unique("seed")) & set(values.loc[against].index.unique("seed"))
    if not shared:
        raise InputError(f"{subject} and {against} share no training seed")
    return over_seeds(rows[rows.index.get_level_values("seed").isin(shared)])


def estimates(draws: pd.DataFrame) -> pd.DataFrame:
    """Value and 95 % interval of rows [..., 1001]: columns value, low, high."""
    samples = draws.iloc[:, 1:].to_numpy()
    low, high = np.percentile(samples, [2.5, 97.5], axis=1)
    return pd.DataFrame({"value": draws.iloc[:, 0], "low": low, "high": high}, draws.index)


def spread(rows: pd.DataFrame) -> pd.DataFrame:
    """Best less worst group of rows [(seed, group), 1001], as a further group `spread`."""
    by_seed = {seed: rows.xs(seed, level="seed").loc[list(GROUPS)] for seed in rows.index.unique("seed")}
    content = {(seed, "spread"): np.ptp(one.to_numpy(), axis=0) for seed, one in by_seed.items()}
    table = pd.DataFrame(content).T
    table.index.names = ["seed", "group"]
    return table


# ---------------------------------------------------------------- where values come from


def settings(profile: str, subject: str, seed: int | None = None) -> dict[int, classifiers.Prediction]:
    """The prediction behind a subject for each measured seed: chosen setting, what was tried, seconds."""
    parsed, found = Subject.parse(subject), {}
    for cache in caches_of(profile, parsed.backbone, seed):
        with suppress(CacheError):  # this seed's cache does not store the features
            found[cache.meta["seed"]] = parsed.predict(cache, "paper")
    return found


def per_class(profile: str, subjects: Iterable[str], seed: int | None = None) -> pd.DataFrame:
    """Accuracy in percent of every class: columns subject, seed, class, class_name, count, n, accuracy."""
    tables = []
    for text in dict.fromkeys(subjects):
        subject = Subject.parse(text)
        for cache in caches_of(profile, subject.backbone, seed):
            labels = cache.labels(subject.images).numpy()
            found = subject.predict(cache, "paper").classes
            columns: Mapping[str, object] = {
                "subject": text,
                "seed": cache.meta["seed"],
                "class": range(len(cache.counts)),
                "class_name": cache.class_names,
                "count": cache.counts.numpy(),
                "n": np.bincount(labels, minlength=len(cache.counts)),
                "accuracy": per_class_accuracy(found, labels, len(cache.counts)).round(2),
            }
            tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def provenance(caches: list[FeatureCache]) -> str:
    """How the backbone of these caches was trained, from their `meta.json`: one line of text."""
    meta = caches[0].meta
    recipe = meta["recipe"]
    rates = f"{recipe['classifier_learning_rate']:g}"
    rates += f" (backbone {recipe['learning_rate']:g})" if recipe["learning_rate"] else " (backbone frozen)"
    left_out = "; few-shot classes left out of training" if meta["leave_out"] == "few" else ""
    minutes = sum(cache.meta.get("seconds", 0) for cache in caches) / len(caches) / 60
    return (
        f"{meta['backbone']} on {dataset_name(caches[0])}: {meta['network']}, start {meta['start']}, "
        f"{meta['classifier']} classifier, {meta['loss']}, sampler {meta['sampler']}{left_out}; "
        f"{recipe['epochs']} epochs, batch {recipe['batch_size']}, learning rate {rates}, weight decay "
        f"{recipe['weight_decay']:g}, last epoch; seeds {', '.join(str(c.meta['seed']) for c in caches)}; "
        f"{minutes:.1f} min a seed on {meta['hardware']}; code {meta['code_version']}"
        + "".join(f"; {remark}" for remark in meta.get("remarks", []))
    )
