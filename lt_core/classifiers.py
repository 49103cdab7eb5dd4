"""One registry of classifiers: a name -> a function of a feature cache; the compared systems are names too.

    predict(cache, "wh20")                 # [M], the paper's classifier with k = 20
    predict(cache, "lws")                  # fitted to its features, setting chosen on validation images
    prediction(cache, "lws").setting       # that setting

Predictions are kept under .cache/predictions, by what they depend on: each compared system is fitted once.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache as cached
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from lt_core import baselines, evidence, paths
from lt_core.baselines import Logits
from lt_core.cache import FeatureCache, kind_of, own_classifier
from lt_core.checks import InputError, TrainingError, check_labels, check_matrix, unknown
from lt_core.metrics import within_group_predictions
from lt_core.transfer import (
    ENSEMBLE,
    TEMPERATURE,
    continual_classifier,
    continual_classifiers,
    ensemble_probabilities,
    hybrid_classifier,
    hybrid_classifiers,
    knowledge_transfer,
    prototypes,
)

BUDGET = 8  # settings that validation chooses among, at most, for every classifier alike
CHUNK = 2**25  # logits held at once, 128 MB
FIT_LOG = "LT_FIT_LOG"  # environment variable: a file that gets a line for each fit, and for each one spared

Setting = dict[str, float]


@dataclass(frozen=True)
class Classifier:
    """How a classifier is made: `build(cache, **setting) -> logits`, and the settings to choose among.

    prepare: what all settings share, made once of the cache and given to `build` in its place.
    """

    build: Callable[..., Logits]
    settings: Sequence[Setting] = ({},)
    prepare: Callable[[FeatureCache], Any] = lambda cache: cache

    def of(self, cache: FeatureCache) -> Callable[..., Logits]:
        """`build` on this cache: setting -> logits; one with a seed takes the cache's."""
        seeded = "seed" in inspect.signature(self.build).parameters
        seed = {"seed": cache.meta.get("seed", 0)} if seeded else {}
        return partial(self.build, self.prepare(cache), **seed)


# ---------------------------------------------------------------- the paper's classifiers (Sec. 3, Eq. 1-9)


def rows(cache: FeatureCache, name: str) -> list[Tensor]:
    """The classifiers [N, F] that one of the paper's names averages (Eq. 8), each for Eq. 1-2."""
    if name not in ROWS:
        raise InputError(unknown("classifier with rows of its own", name, list(ROWS)))
    return ROWS[name](cache)


def _prototypes_and_weights(cache: FeatureCache) -> list[Tensor]:
    """norm(p) + norm(w): Eq. 9 with the learned weight where the transfer stands."""
    weights = check_matrix("weights", cache.weights)
    return [continual_classifier(cache.prototypes, weights, cache.counts, transfer=weights)]


def ensemble_ks(cache: FeatureCache) -> list[int]:
    """The k of the ensemble (Eq. 8) that some class exceeds: 0, 20 and 100 in the paper's data sets."""
    return [k for k in ENSEMBLE if k < cache.counts.max()]


def _hybrid(cache: FeatureCache, ks: Sequence[int], temperature: float = TEMPERATURE) -> list[Tensor]:
    return hybrid_classifiers(cache.prototypes, cache.weights, cache.counts, ks, temperature)


def _continual(cache: FeatureCache, ks: Sequence[int]) -> list[Tensor]:
    return continual_classifiers(cache.prototypes, cache.weights, cache.counts, ks)


def _roles(cache: FeatureCache, query: str, key: str) -> list[Tensor]:
    """Table 6: queries and keys of the transfer change roles; p and w of Eq. 7 stay."""
    p, w, counts = cache.prototypes, cache.weights, cache.counts
    queries, keys = getattr(cache, query), getattr(cache, key)
    transfers = {k: knowledge_transfer(queries, keys, counts, k) for k in ENSEMBLE}
    return [hybrid_classifier(p, w, counts, k, transfer=transfers[k]) for k in ENSEMBLE]


ROWS: dict[str, Callable[[FeatureCache], list[Tensor]]] = {
    "prototypes": lambda cache: [cache.prototypes],
    "prototypes+cosine": _prototypes_and_weights,
    "wh20": partial(_hybrid, ks=(20,)),
    "wh100": partial(_hybrid, ks=(100,)),
    "ensemble": lambda cache: _hybrid(cache, ensemble_ks(cache)),
    "whc20": partial(_continual, ks=(20,)),
    "whc100": partial(_continual, ks=(100,)),
    "ensemble_p_whc": lambda cache: [cache.prototypes, *_continual(cache, (20, 100))],  # Table 2
    "ensemble_whc": partial(_continual, ks=(20, 100)),  # Table 9, "continual"
    "p2w": partial(_roles, query="prototypes", key="weights"),
    "w2p": partial(_roles, query="weights", key="prototypes"),
    "w2w": partial(_roles, query="weights", key="weights"),
    "p2p": partial(_roles, query="prototypes", key="prototypes"),
}


def _log_ensemble(cache: FeatureCache, matrices: list[Tensor]) -> Logits:
    """Log probabilities of Eq. 8, with the scale of the backbone."""

    def logits(features: Tensor) -> Tensor:
        probabilities = ensemble_probabilities(features, matrices, cache.scale)
        return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()

    return logits


def _paper(cache: FeatureCache, name: str) -> Logits:
    return _log_ensemble(cache, rows(cache, name))


def _ensemble(cache: FeatureCache, temperature: float) -> Logits:
    return _log_ensemble(cache, _hybrid(cache, ensemble_ks(cache), temperature))


def _adjusted_ensemble(cache: FeatureCache, strength: float) -> Logits:
    ensemble = _paper(cache, "ensemble")
    return lambda features: baselines.adjust(ensemble(features), cache.counts, strength)


def _trained(cache: FeatureCache, kind: str) -> Logits:
    """The classifier of that kind that the backbone was trained with; left-out classes are no candidates."""
    if kind_of(cache) != kind:
        raise InputError(f"this backbone was trained with a {kind_of(cache)} classifier, not with {kind}")
    own, left_out = own_classifier(cache), ~cache.trained
    return lambda features: own(features).masked_fill(left_out, -torch.inf)


# ---------------------------------------------------------------- the registry


def _grid(**values: Sequence[float]) -> list[Setting]:
    return [dict(zip(values, point, strict=True)) for point in product(*values.values())]


# The first of equals is chosen, so small rates stand first.
RATES = _grid(learning_rate=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0))
STRENGTHS = _grid(strength=(0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0))
OF_THE_ENSEMBLE = _grid(
    strength=(-0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
)  # it favours rare classes already


def _head(loss: str, sampler: str) -> Classifier:
    return Classifier(partial(baselines.retrained, loss=loss, sampler=sampler), RATES)


CLASSIFIERS: dict[str, Classifier] = {
    # what a backbone was trained with
    "cosine": Classifier(partial(_trained, kind="cosine")),
    "dot_product": Classifier(partial(_trained, kind="dot_product")),
    "causal_norm": Classifier(
        baselines.causal_norm, _grid(strength=(0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0))
    ),
    # the paper's
    **{name: Classifier(partial(_paper, name=name)) for name in ROWS},
    "ensemble_tuned": Classifier(_ensemble, _grid(temperature=(1, 2, 5, 10, 20, 30, 50, 100))),
    # the compared systems, and others that the paper does not show
    "lws": Classifier(baselines.lws, RATES),
    "balms": Classifier(baselines.balms, _grid(learning_rate=(0.03, 0.1, 0.5, 3.0), init_power=(0.1, 0.3))),
    "disalign": Classifier(baselines.disalign, _grid(learning_rate=(0.1, 1.0), rho=(0.8, 1.2, 1.6, 2.0))),
    "crt": _head("cross_entropy", "class_aware"),
    "tau_norm": Classifier(baselines.tau_norm, _grid(tau=(0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0))),
    "ncm": Classifier(baselines.ncm),
    "balanced_softmax_head": _head("balanced_softmax", "uniform"),
    "class_balanced_head": _head("class_balanced", "uniform"),
    "focal_head": _head("focal", "uniform"),
    "lade_head": _head("lade", "uniform"),
    "logit_adjustment": Classifier(baselines.logit_adjustment, STRENGTHS),
    "logit_adjustment_0.5": Classifier(baselines.logit_adjustment, _grid(strength=(0.5,))),
    "logit_adjustment_1": Classifier(baselines.logit_adjustment, _grid(strength=(1.0,))),
    "ensemble+logit_adjustment": Classifier(_adjusted_ensemble, OF_THE_ENSEMBLE),
    "ensemble+logit_adjustment_0.5": Classifier(_adjusted_ensemble, _grid(strength=(0.5,))),
    "ensemble+logit_adjustment_1": Classifier(_adjusted_ensemble, _grid(strength=(1.0,))),
    # beyond the paper: evidence of the stored training images
    "image_density": Classifier(
        evidence.image_density,
        _grid(share=(0.4, 0.8), strength=(0.5, 0.75, 1.0, 1.25)),
        evidence.WithDensity,
    ),
    "image_evidence": Classifier(
        evidence.image_evidence,
        _grid(share=(0.4, 0.8), strength=(-0.25, 0.0, 0.25, 0.5)),
        evidence.Evidence,
    ),
}


def name_of(cache: FeatureCache, name: str) -> str:
    """`own` is the classifier that the backbone was trained with; raises InputError for an unknown name."""
    name = kind_of(cache) if name == "own" else name
    if name not in CLASSIFIERS:
        raise InputError(unknown("classifier", name, ["own", *CLASSIFIERS]))
    return name


def build(cache: FeatureCache, name: str, **setting: float) -> Logits:
    """The classifier of that name: features [M, F] -> logits [M, N]."""
    return CLASSIFIERS[name_of(cache, name)].of(cache)(**setting)


# ---------------------------------------------------------------- choosing a setting on validation images


@dataclass(frozen=True)
class Fitted:
    """A classifier with the setting that validation chose, and the record of all that were tried."""

    logits: Logits
    setting: Setting
    tried: list[tuple[Setting, float]]  # with validation accuracy in percent; NaN: training diverged

    @property
    def note(self) -> str:
        """What the classifier says of how it was fitted."""
        return getattr(self.logits, "note", "")


def fit(cache: FeatureCache, name: str | Classifier) -> Fitted:
    """The classifier with the setting of the best total accuracy on validation images, the first of equals.

    name: of the registry, or a classifier that is not in it. The test images play no part. Raises
    TrainingError when no setting could be trained.
    """
    classifier = name if isinstance(name, Classifier) else CLASSIFIERS[name_of(cache, name)]
    settings, build_on = classifier.settings, classifier.of(cache)
    if len(settings) == 1:
        return Fitted(build_on(**settings[0]), settings[0], [])
    best, tried = (-1.0, None, {}), []
    features, labels = cache.features("val"), cache.labels("val")
    for setting in settings:
        try:
            logits = build_on(**setting)
        except TrainingError:
            tried.append((setting, float("nan")))
            continue
        accuracy = 100 * (logits(features).argmax(1) == labels).double().mean().item()
        tried.append((setting, accuracy))
        if accuracy > best[0]:
            best = accuracy, logits, setting
    if best[1] is None:
        raise TrainingError(f"{name}: no setting could be trained")
    return Fitted(best[1], best[2], tried)


# ---------------------------------------------------------------- predictions, kept on disk


@dataclass(frozen=True)
class Prediction:
    """Predicted classes [M] (int64), the setting that validation chose, what was tried, seconds, a remark."""

    classes: np.ndarray
    setting: Setting
    tried: list[tuple[Setting, float]]
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Question:
    """What is to be predicted: a classifier's classes on the images of a split.

    prototypes: split that prototypes are computed from. within: a grouping rule; the candidates are then the
    classes of the image's own group under it (Table 5).
    """

    name: str
    images: str = "test"
    prototypes: str = "train"
    within: str | None = None


def predict(cache: FeatureCache, name: str, images: str = "test") -> np.ndarray:
    """Predicted classes [M] (int64) of a classifier on the images of a split (train, val or test)."""
    return prediction(cache, name, images).classes


def prediction(
    cache: FeatureCache, name: str, images: str = "test", prototypes: str = "train", within: str | None = None
) -> Prediction:
    """As `predict`, with how it came about; read from .cache where this very prediction was made before."""
    question = Question(name_of(cache, name), images, prototypes, within)
    if "sha256" not in cache.meta:  # of arrays in memory: there is nothing to know it by
        return _predicted(cache, question)
    target = _place(cache, question)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):  # notebooks side by side: who comes second reads
        found, how = _read(target, len(cache.counts)), "read"
        if found is None:
            found, how = _predicted(cache, question), "fitted"
            _write(target, found)
        _count(how, cache, question)
    return found


def prototypes_of(cache: FeatureCache, split: str) -> Tensor:
    """Prototypes [N, F] (Eq. 3) of the `train` images, as stored, or of those of another split."""
    if split == "train":
        return cache.prototypes
    return prototypes(cache.features(split), cache.labels(split), len(cache.counts))


def device() -> torch.device:
    """Where classifiers are fitted and applied: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _predicted(cache: FeatureCache, question: Question) -> Prediction:
    started, cache = time.monotonic(), cache.to(device())
    if question.prototypes != "train":
        cache = replace(cache, prototypes=prototypes_of(cache, question.prototypes))
    fitted = fit(cache, question.name)
    features, labels = cache.features(question.images), cache.labels(question.images)
    size = max(1, CHUNK // len(cache.counts))
    classes = []
    for part, own in zip(features.split(size), labels.split(size), strict=True):
        logits = fitted.logits(part)
        if question.within:
            classes.append(within_group_predictions(logits, own, cache.counts, question.within))
        else:
            classes.append(logits.argmax(dim=1).cpu().numpy())
    seconds = round(time.monotonic() - started, 2)
    return Prediction(np.concatenate(classes), fitted.setting, fitted.tried, seconds, fitted.note)


def _place(cache: FeatureCache, question: Question) -> Path:
    """Where a prediction is kept: named by the cache, the question, its settings and the code behind it."""
    settings = CLASSIFIERS[question.name].settings
    features = cache.meta.get("shared_features", {}).get("sha256", "")
    key = [cache.meta["sha256"], features, cache.meta.get("seed"), asdict(question), settings, _code()]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return paths.decoded() / "predictions" / f"{digest}.npz"


@cached
def _code() -> str:
    """sha256 of the modules that a prediction depends on."""
    names = (
        "baselines",
        "cache",
        "classifiers",
        "evidence",
        "losses",
        "metrics",
        "models",
        "samplers",
        "train",
        "transfer",
    )
    content = b"".join((paths.PACKAGE / f"{name}.py").read_bytes() for name in names)
    return hashlib.sha256(content).hexdigest()


def _write(target: Path, found: Prediction) -> None:
    record = {"setting": found.setting, "tried": found.tried, "seconds": found.seconds, "note": found.note}
    content = io.BytesIO()
    np.savez(content, classes=found.classes.astype(np.int32), record=np.array(json.dumps(record)))
    paths.write_sealed(target, content.getvalue())


def _read(target: Path, num_classes: int) -> Prediction | None:
    """The kept prediction, or None where there is none that is whole (it is then made again)."""
    if (content := paths.read_sealed(target)) is None:
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        classes = check_labels("classes", stored["classes"], num_classes).numpy()
        record: dict[str, Any] = json.loads(str(stored["record"]))
    tried = [(setting, accuracy) for setting, accuracy in record["tried"]]
    return Prediction(classes, record["setting"], tried, record["seconds"], record["note"])


def _count(what: str, cache: FeatureCache, question: Question) -> None:
    """A line in the run's account for each compared system: fitted here, or read from .cache."""
    account = os.environ.get(FIT_LOG)
    if account and len(CLASSIFIERS[question.name].settings) > 1:
        with open(account, "a", encoding="utf-8") as file:
            file.write(f"{what} {question.name} {cache.meta.get('backbone')} {cache.meta.get('seed')}\n")
