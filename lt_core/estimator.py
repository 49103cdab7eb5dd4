"""Compositional knowledge transfer as a scikit-learn classifier, for anybody's features.

    model = CompositionalTransferClassifier().fit(features, labels)  # [M, F], [M]
    model.add_classes(few_features, few_labels)                      # new classes, without retraining
    model.predict(test_features)

Works in a Pipeline, GridSearchCV and clone. Bad input raises a ValueError that says what is wrong.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from lt_core import paths
from lt_core.baselines import Logits
from lt_core.cache import FeatureCache
from lt_core.checks import (
    CacheError,
    InputError,
    as_tensor,
    check_counts,
    check_labels,
    check_matrix,
    check_positive,
    unknown,
)
from lt_core.evidence import Evidence, WithDensity, image_density, image_evidence
from lt_core.losses import Loss, build_loss
from lt_core.models import CosineClassifier
from lt_core.train import fit_head
from lt_core.transfer import (
    ENSEMBLE,
    SCALE,
    TEMPERATURE,
    continual_classifiers,
    ensemble_probabilities,
    hybrid_classifiers,
    normalize,
    prototypes,
)

# Of scikit-learn's check_estimator, with the reasons; to be given to it as `expected_failed_checks`.
EXPECTED_FAILED_CHECKS = {
    "check_estimators_dtypes": (
        "its integer features have a row of zeros, which has no direction and so no cosine: refused by name"
    ),
    "check_fit_score_takes_y": "partial_fit on a fitted classifier adds classes, and refuses those it knows",
    "check_sample_weight_equivalence_on_dense_data": (
        "a sample given twice counts twice among a class's training samples, one of weight 2 once"
    ),
}

FORMAT_VERSION = 1
TENSORS = ("prototypes", "weights", "counts", "classifiers")  # what a stored classifier holds beside the JSON
OF_IMAGES = ("features", "labels")  # and one that reads its training samples
READERS = {"image_evidence": (Evidence, image_evidence), "image_density": (WithDensity, image_density)}
STRENGTH = {"image_evidence": 0.25, "image_density": 1.0}  # best on validation images of nine backbones
FLOATS = (np.float64, np.float32)  # other numbers become the first
BATCH, LEARNING_RATE = 128, 0.1  # of a training step, as where only the classifier of a backbone is trained
IMAGES = 2**12  # samples predicted at once


@contextmanager
def own_settings() -> Iterator[None]:
    """Within it nothing of PyTorch's process-wide settings matters: gradients, numbers, device, autocast."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.device("cpu"))
            for kind in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        torch.set_default_dtype(before)


class CompositionalTransferClassifier(ClassifierMixin, BaseEstimator):
    """The ensemble of hybrid classifiers (Eq. 8) on features [M, F], with rows for new classes by Eq. 9.

    `fit` needs learned weights of a cosine classifier [N, F]; without them it learns one on the features.

    ensemble_k: the k of the ensemble (Eq. 6); those that no class exceeds are left out (`ensemble_k_`).
    temperature: tau of the attention (Eq. 5).
    scale: s of Eq. 2; None: the learned one (1 at least), or 16 when the weights are given.
    sampler: what a learned classifier is trained with: `uniform`, `class_aware` or `square_root`.
    epochs: how long it is trained; random_state: seed of its start and of the sampler.
    classifier: `ensemble`, or `image_evidence` or its simplest form `image_density` in its place, which read
    the training samples when they predict (`lt_core.evidence`; not in the paper). They take no new classes.
    share: their weight of the samples' evidence; strength: of their logit adjustment, None: 0.25 and 1.

    Fitted: `classes_` [N] sorted, `counts_` [N] training samples, `prototypes_` [N, F], `weights_` [N, F]
    (NaN for added classes), `classifiers_` [E, N, F] one for each of `ensemble_k_`, and `scale_`. Where
    samples are read, also their directions `features_` [M, F] and `labels_` [M], positions in `classes_`.
    """

    def __init__(
        self,
        ensemble_k: Sequence[float] = ENSEMBLE,
        temperature: float = TEMPERATURE,
        scale: float | None = None,
        sampler: str = "square_root",
        epochs: int = 20,
        random_state: int | np.random.RandomState | None = 0,
        classifier: str = "ensemble",
        share: float = 0.4,
        strength: float | None = None,
    ) -> None:
        self.ensemble_k = ensemble_k
        self.temperature = temperature
        self.scale = scale
        self.sampler = sampler
        self.epochs = epochs
        self.random_state = random_state
        self.classifier = classifier
        self.share = share
        self.strength = strength

    @own_settings()
    def fit(
        self,
        X: object,
        y: object,
        classifier_weights: object | None = None,
        sample_weight: object | None = None,
    ) -> Self:
        """Build the ensemble from features X [M, F] and labels y [M] (numbers or strings).

        classifier_weights [N, F]: rows of a trained cosine classifier, in the sorted order of the labels.
        sample_weight [M]: how much each sample counts in its class's prototype and in the loss of a learned
        classifier; those of weight 0 are left out, others are evidence alike. A learned classifier is
        trained where X lies.
        Raises InputError for values that do not fit, and where there is one class and no weight to give it.
        """
        device = X.device if isinstance(X, torch.Tensor) else torch.device("cpu")
        X, y = validate_data(self, _plain_array(X), _plain_array(y), dtype=FLOATS)
        check_classification_targets(y)
        if sample_weight is not None:
            sample_weight = _check_sample_weight(
                _plain_array(sample_weight), X, ensure_non_negative=True, dtype=X.dtype
            )
            counting = sample_weight > 0
            X, y, sample_weight = X[counting], y[counting], sample_weight[counting]
        check_positive("temperature", self.temperature)
        if self.classifier not in ("ensemble", *READERS):
            raise InputError(unknown("classifier", self.classifier, ["ensemble", *READERS]))
        if self.strength is not None and not (
            isinstance(self.strength, Real) and math.isfinite(self.strength)
        ):
            raise InputError(f"strength must be a finite number or None, found {self.strength!r}")
        given_scale = None if self.scale is None else check_positive("scale", self.scale)
        classes, labels, counts = np.unique(y, return_inverse=True, return_counts=True)
        ks = _exceeded(self.ensemble_k, counts.max())
        if classifier_weights is None:
            weights, scale = self._learned(X, labels, counts, sample_weight, device)
        else:
            weights = check_matrix("classifier_weights", classifier_weights, len(classes), X.shape[1])
            scale = SCALE
        means = prototypes(X, labels, len(classes))
        if sample_weight is not None:
            means = weighted_prototypes(X, labels, len(classes), sample_weight)
        built = hybrid_classifiers(means, weights, counts, ks, self.temperature)
        self.ensemble_k_, self.scale_ = ks, given_scale or scale
        self.classes_, self.counts_ = classes, counts
        self.prototypes_, self.weights_ = means.numpy(), weights.numpy(force=True).copy()
        self.classifiers_ = torch.stack(built).numpy()
        self._settle()
        if self.classifier in READERS:
            self.features_, self.labels_ = normalize("X", as_tensor("X", X)).float().numpy(), labels
            self._reader = self._made_reader()
        return self

    def _settle(self) -> None:
        """Keep what this fit is of: as everywhere in scikit-learn, `set_params` changes the next one."""
        self.classifier_, self.share_, self.strength_ = self.classifier, self.share, self.strength

    def partial_fit(self, X: object, y: object, classes: object | None = None) -> Self:
        """`fit` the first time, `add_classes` afterwards: labels must then be new. classes is not needed."""
        return self.add_classes(X, y) if hasattr(self, "classes_") else self.fit(X, y)

    @own_settings()
    def add_classes(self, X_new: object, y_new: object) -> Self:
        """Rows for new classes from a few features [M, F] with labels [M], without retraining (Eq. 9).

        They borrow from the classes with learned weights; the rows of known classes stay as they are. Raises
        InputError for a label that is known already or of another kind.
        """
        check_is_fitted(self)
        X, y = validate_data(self, _plain_array(X_new), _plain_array(y_new), reset=False, dtype=FLOATS)
        if self.classifier_ in READERS:
            raise InputError(f"{self.classifier_} takes no new classes, classifier='ensemble' does")
        check_classification_targets(y)
        new, labels, counts = np.unique(y, return_inverse=True, return_counts=True)
        if _is_text(new) != _is_text(self.classes_):
            examples = new.tolist()[0], self.classes_.tolist()[0]
            raise InputError(
                "y_new has labels such as {!r}, the known ones are such as {!r}".format(*examples)
            )
        if not _is_text(new):
            new = _as_kind(new, self.classes_.dtype)
        if known := np.intersect1d(new, self.classes_).tolist():
            raise InputError(f"y_new: the class {known[0]!r} is known already, only new classes can be added")
        means = prototypes(X, labels, len(new))
        learned = ~np.isnan(self.weights_).any(axis=1)
        built = continual_classifiers(
            means, self.weights_[learned], self.counts_[learned], self.ensemble_k_, self.temperature
        )
        classes = np.concatenate([self.classes_, new])
        order = classes.argsort()
        self.classes_ = classes[order]
        self.counts_ = np.concatenate([self.counts_, counts])[order]
        self.prototypes_ = np.concatenate([self.prototypes_, means.numpy()])[order]
        self.weights_ = np.concatenate([self.weights_, np.full_like(means.numpy(), np.nan)])[order]
        self.classifiers_ = np.concatenate([self.classifiers_, torch.stack(built).numpy()], axis=1)[:, order]
        return self

    @own_settings()
    def predict_proba(self, X: object) -> np.ndarray:
        """Probabilities [M, N] of the classes, in the order of `classes_`, of features X [M, F] (Eq. 8)."""
        return self._probabilities(self._checked(X)).numpy()

    @own_settings()
    def predict(self, X: object) -> np.ndarray:
        """Labels [M] of features X [M, F]: the most probable classes."""
        parts = as_tensor("X", self._checked(X)).split(IMAGES)
        return self.classes_[torch.cat([self._probabilities(part).argmax(dim=1) for part in parts]).numpy()]

    def _checked(self, X: object) -> np.ndarray:
        check_is_fitted(self)
        return validate_data(self, _plain_array(X), reset=False, dtype=FLOATS)

    def _made_reader(self) -> Logits:
        """The classifier that reads the training samples: directions [M, F] -> logits [M, N]."""
        prepare, build = READERS[self.classifier_]
        cache = FeatureCache(
            weights=torch.from_numpy(self.weights_).float(),
            scale=self.scale_,
            counts=torch.from_numpy(self.counts_),
            prototypes=torch.from_numpy(self.prototypes_).float(),
            splits={"train": (torch.from_numpy(self.features_), torch.from_numpy(self.labels_))},
            meta={},
        )
        strength = STRENGTH[self.classifier_] if self.strength_ is None else self.strength_
        return build(prepare(cache), check_positive("share", self.share_), strength)

    def __getstate__(self) -> dict[str, Any]:
        """Without the reader, which is made again of the rest."""
        return {name: value for name, value in super().__getstate__().items() if name != "_reader"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if state.get("classifier_") in READERS:
            self._reader = self._made_reader()

    def _probabilities(self, features: object) -> torch.Tensor:
        if self.classifier_ in READERS:
            directions = normalize("X", as_tensor("X", features)).float()
            return self._reader(directions).softmax(dim=1)
        return ensemble_probabilities(features, list(self.classifiers_), self.scale_)

    def _learned(
        self,
        X: np.ndarray,
        labels: np.ndarray,
        counts: np.ndarray,
        sample_weight: np.ndarray | None,
        device: torch.device,
    ) -> tuple[torch.Tensor, float]:
        """A cosine classifier trained on the features as on a frozen backbone: weights [N, F] and scale."""
        if len(counts) < 2:
            raise InputError("y has one class: a classifier needs two to learn from, or classifier_weights")
        if not isinstance(self.epochs, Integral) or self.epochs < 1:
            raise InputError(f"epochs must be a whole number above 0, found {self.epochs!r}")
        seed = int(check_random_state(self.random_state).randint(2**31))
        features, targets = as_tensor("X", X).to(device), torch.from_numpy(labels).to(device)
        how = counts, self.sampler, int(self.epochs), seed, sample_weight
        return learned_classifier(features, targets, *how)

    def save(self, path: str | Path) -> None:
        """Store the fitted classifier in one safetensors file with a JSON description, replacing it whole.

        Raises InputError for labels or parameters that are neither text nor plain numbers.
        """
        check_is_fitted(self)
        description = {
            "format_version": FORMAT_VERSION,
            "parameters": self.get_params()
            | {"classifier": self.classifier_, "share": self.share_, "strength": self.strength_},
            "classes": self.classes_.tolist(),
            "classes_type": "str" if self.classes_.dtype.kind == "U" else self.classes_.dtype.name,
            "ensemble_k": self.ensemble_k_,
            "scale": self.scale_,
            "feature_names": getattr(self, "feature_names_in_", np.empty(0)).tolist(),
        }
        try:
            text = json.dumps(description, default=_plain)
        except TypeError as error:
            raise InputError(f"the classifier cannot be stored: {error}") from None
        names = _stored(self.classifier_)
        tensors = {name: np.ascontiguousarray(getattr(self, f"{name}_")) for name in names}
        with paths.atomic(Path(path)) as temporary:
            temporary.write_bytes(save(tensors, {"json": text, "sha256": _sha256(tensors, text)}))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The classifier that `save` stored; nothing is unpickled. Raises CacheError for any other file."""
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                names = set(file.keys()) & {*TENSORS, *OF_IMAGES}
                tensors = {name: file.get_tensor(name) for name in names}
            if _sha256(tensors, metadata["json"]) != metadata["sha256"]:
                raise CacheError(f"{path} is damaged: its content does not have the hash that it states")
            return cls._from(json.loads(metadata["json"]), tensors)
        except FileNotFoundError:
            raise CacheError(f"there is no stored classifier {path}") from None
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise CacheError(f"{path} does not hold a stored classifier ({error})") from None

    @classmethod
    def _from(cls, description: dict[str, Any], tensors: dict[str, np.ndarray]) -> Self:
        """Raises an error of some kind unless everything fits together."""
        if description["format_version"] != FORMAT_VERSION:
            raise InputError(
                f"format version {description['format_version']}, this code reads {FORMAT_VERSION}"
            )
        parameters = description["parameters"]
        model = cls(**parameters | {"ensemble_k": tuple(parameters["ensemble_k"])})
        model.classes_ = np.array(description["classes"], dtype=_plain_type(description["classes_type"]))
        model.ensemble_k_ = tuple(description["ensemble_k"])
        model.scale_ = check_positive("scale", description["scale"])
        model._settle()
        rows, columns = tensors["prototypes"].shape
        check_matrix("prototypes", tensors["prototypes"], len(model.classes_))
        check_counts("counts", tensors["counts"], rows)
        learned = ~np.isnan(tensors["weights"]).any(axis=1)
        check_matrix(
            "weights", tensors["weights"], rows, columns, read=torch.from_numpy(learned).nonzero()[:, 0]
        )
        if tensors["classifiers"].shape != (len(model.ensemble_k_), rows, columns):
            raise InputError("the classifiers do not fit the prototypes")
        for classifier in tensors["classifiers"]:
            check_matrix("classifiers", classifier)
        for name in _stored(model.classifier):
            setattr(model, f"{name}_", tensors[name])
        if model.classifier in READERS:
            check_labels("labels", model.labels_, rows, len(check_matrix("features", model.features_)))
            model._reader = model._made_reader()
        model.n_features_in_ = columns
        if description["feature_names"]:
            model.feature_names_in_ = np.array(description["feature_names"], dtype=object)
        return model


@own_settings()
def learned_classifier(
    features: torch.Tensor,
    labels: torch.Tensor,
    counts: object,
    sampler: str,
    epochs: int,
    seed: int,
    sample_weight: np.ndarray | None = None,
) -> tuple[torch.Tensor, float]:
    """A cosine classifier trained on features [M, F] as on a frozen backbone: weights [N, F] and scale.

    It is trained on the device of the features; sample_weight [M]: of each sample's loss, whose mean counts
    as 1.
    """
    # Cosines see directions alone; taken here, very small and very large features keep theirs.
    features = normalize("X", features).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = CosineClassifier(features.shape[1], len(counts)).to(features.device)
    loss, head = build_loss("cross_entropy", counts).to(features.device), classifier
    if sample_weight is not None:
        relative = as_tensor("sample_weight", sample_weight / sample_weight.mean()).to(features)
        features = torch.cat([features, relative[:, None]], dim=1)
        head = _WeightedHead(classifier)
        loss = _WeightedLoss(counts, head)
    batch = min(BATCH, len(features))
    fit_head(head, features, labels.clone(), loss, sampler, LEARNING_RATE, epochs, batch, seed=seed)
    # Labels that the features say nothing about draw the scale to 0, and below it a class's own direction
    # would count against it.
    return classifier.weight.detach().cpu(), max(1.0, classifier.scale.item())


class _WeightedHead(torch.nn.Module):
    """A classifier of features [M, F + 1] whose last column is the weight of the sample, for the loss."""

    def __init__(self, classifier: torch.nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.weights = features[:, -1]
        return self.classifier(features[:, :-1])


class _WeightedLoss(Loss):
    """Cross-entropy, each sample times its weight."""

    def __init__(self, counts: object, head: _WeightedHead) -> None:
        super().__init__(counts)
        self.weights_of = lambda: head.weights

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        losses = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        return (self.weights_of() * losses).mean()


def weighted_prototypes(
    X: np.ndarray, labels: np.ndarray, num_classes: int, sample_weight: np.ndarray
) -> torch.Tensor:
    """Eq. 3 with a weighted mean [N, F]; every class has a sample of positive weight."""
    unit, of = normalize("X", as_tensor("X", X)), torch.from_numpy(labels)
    weight = as_tensor("sample_weight", sample_weight).to(unit)
    sums = unit.new_zeros(num_classes, unit.shape[1]).index_add_(0, of, weight[:, None] * unit)
    return sums / torch.bincount(of, weight, num_classes)[:, None]


def _plain_array(value: object) -> object:
    """A tensor of any float type, with gradient or on any device, as NumPy's; other things as they are."""
    if not isinstance(value, torch.Tensor):
        return value
    narrow = value.is_floating_point() and value.dtype not in (torch.float32, torch.float64)
    return (value.float() if narrow else value).numpy(force=True)


def _as_kind(new: np.ndarray, kind: np.dtype) -> np.ndarray:
    """New labels as the known ones are kept; raises InputError where that would change one."""
    with np.errstate(invalid="ignore"):
        same = new.astype(kind)
    if (changed := same != new).any():
        raise InputError(f"y_new: {new[changed][0].item()!r} is no label of the known kind, {kind}")
    return same


def _exceeded(ks: Sequence[float], largest: int) -> tuple[float, ...]:
    """The ks that some class exceeds, in their order; raises InputError when there are none."""
    try:
        kept = tuple(k for k in ks if not k >= largest)
    except TypeError:
        raise InputError(
            f"ensemble_k must be a sequence of numbers of training samples, found {ks!r}"
        ) from None
    if not kept:
        raise InputError(f"ensemble_k={ks!r}: the largest class has {largest} samples; name a smaller k")
    return kept


def _is_text(labels: np.ndarray) -> bool:
    return labels.dtype.kind not in "biuf"


def _plain(value: object) -> object:
    """NumPy's numbers and arrays as Python's, for JSON."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{value!r} is neither text nor a plain number")


def _plain_type(name: str) -> np.dtype:
    """Type of stored labels; raises InputError for one that would claim more memory than the labels have."""
    if np.dtype(name).itemsize > 16:
        raise InputError(f"labels cannot be of the type {name}")
    return np.dtype(name)


def _stored(classifier: str) -> tuple[str, ...]:
    """Names of the tensors of a stored classifier."""
    return TENSORS + (OF_IMAGES if classifier in READERS else ())


def _sha256(tensors: dict[str, np.ndarray], text: str) -> str:
    """Of the description and all values."""
    digest = hashlib.sha256(text.encode())
    for name in (name for name in TENSORS + OF_IMAGES if name in tensors):
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()
