"""What a compared system starts from: a trained backbone's features and classifier, as plain arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lt_core.causal_norm import causal_norm_logits
from lt_core.errors import InputError, as_tensor, check_counts, check_labels, check_matrix, check_positive

Logits = Callable[[Tensor], Tensor]  # features [M, F] -> logits [M, N]


@dataclass(frozen=True)
class Stage1:
    """Features and the classifier of the first stage ("decoupling", Kang et al., ICLR 2020).

    weights [N, F], counts [N] of training images, scale of a cosine classifier. bias [N] makes it a
    dot-product classifier and direction [F] a causal norm one. prototypes [N, F] (Eq. 3) are needed by our
    classifiers only, training features [M, F] and labels [M] by what is fitted. Raises InputError otherwise.
    """

    weights: Tensor
    counts: Tensor
    scale: float = 16.0
    bias: Tensor | None = None
    direction: Tensor | None = None
    prototypes: Tensor | None = None
    features: Tensor | None = None
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        weights = check_matrix("weights", self.weights).float()
        num_classes, num_features = weights.shape
        counts = check_counts("counts", self.counts, num_classes)
        checked = {"weights": weights, "counts": counts, "scale": check_positive("scale", self.scale)}
        for name, length in (("bias", num_classes), ("direction", num_features)):
            if getattr(self, name) is not None:
                row = as_tensor(name, getattr(self, name))[None]
                checked[name] = check_matrix(name, row, 1, length).float()[0]
        if self.prototypes is not None:
            checked["prototypes"] = check_matrix("prototypes", self.prototypes, *weights.shape).float()
        if self.features is not None:
            features = check_matrix("features", self.features, columns=num_features).float()
            labels = check_labels("labels", self.labels, num_classes, len(features))
            if not torch.equal(torch.bincount(labels, minlength=num_classes), counts):
                raise InputError("counts must be those of the training labels, whatever the sampler was")
            checked |= {"features": features, "labels": labels}
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, cache: Any) -> Stage1:
        """A `lt_core.features.FeatureCache` as a first stage."""
        features, labels = cache.splits.get("train", (None, None))
        names = ("weights", "counts", "scale", "bias", "direction", "prototypes")
        return cls(**{name: getattr(cache, name) for name in names}, features=features, labels=labels)

    @property
    def training(self) -> tuple[Tensor, Tensor]:
        """Training features [M, F] and labels [M]; raises InputError where there are none."""
        if self.features is None:
            raise InputError("a second stage is fitted to training features, and there are none")
        return self.features, self.labels

    @property
    def rows(self) -> Tensor:
        """The classifier as rows [N, F] for dot products with `inputs`: for a cosine s norm(w), else w.

        Raises InputError for a causal norm classifier, whose logits are no dot products with features.
        """
        if self.direction is not None:
            raise InputError("a second stage starts from a cosine or dot-product classifier, not causal norm")
        return self.weights if self.bias is not None else self.scale * normalize(self.weights, dim=1)

    def inputs(self, features: Tensor) -> Tensor:
        """What the classifier sees of features [M, F]: their directions for a cosine, else the features."""
        features = check_matrix("features", features, columns=self.weights.shape[1]).float()
        return features if self.bias is not None else normalize(features, dim=1)

    def logits(self, features: Tensor) -> Tensor:
        """Logits [M, N] of the first stage's own classifier."""
        if self.direction is not None:
            return causal_norm_logits(features, self.weights, self.direction)
        logits = self.inputs(features) @ self.rows.T
        return logits if self.bias is None else logits + self.bias
