"""Claims that hold by construction or by counting: no training, little cost, new classes for free."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from lt_core.errors import InputError, unknown
from lt_core.features import FeatureCache
from lt_core.methods import ENSEMBLE, classifiers, predict
from lt_core.models import build_backbone
from lt_core.report.claims.decisions import Part, part
from lt_core.report.claims.study import Study
from lt_core.transfer import continual_classifier, prototypes

IMAGE_SHAPES = {  # channels, height, width where the recipe keeps the stored size
    "digits": (1, 8, 8),
    "tiny_imagenet_lt": (3, 64, 64),
    "cifar100_lt": (3, 32, 32),
    "imagenet_lt": (3, 224, 224),
    "places_lt": (3, 224, 224),
}
SAME_PREDICTIONS = 99.0  # percent; stored features are rounded, so ties may fall differently
LITTLE = 1.0  # percent of the network's own cost
ROUNDING = 1e-5  # between two orders of float32 sums


@part
def closed_form(study: Study) -> Part:
    """The ensemble rebuilt from saved features, labels and weights alone predicts what the table's does."""
    saved = study.caches("sqrt", "train")[0]
    centres = prototypes(saved.features("train"), saved.labels("train"), len(saved.counts))
    arrays = SimpleNamespace(
        weights=saved.weights.clone(),
        counts=saved.counts.clone(),
        prototypes=centres,
        scale=saved.scale,
        features=saved.features,
    )
    same = predict(arrays, "ensemble_wh_0_20_100") == predict(saved, "ensemble_wh_0_20_100")
    share = 100 * float(np.mean(same))
    text = (
        f"rebuilt from the saved features and weights of `sqrt`, without a training step: {share:.1f} % of "
    )
    return Part(text + "the test images get the same class as in the table", share >= SAME_PREDICTIONS)


@part
def cheap(study: Study) -> Part:
    """Multiply-adds of building and using the ensemble against those of the network."""
    saved = study.caches("sqrt")[0]
    forward = forward_cost(saved.meta["network"], image_shape(saved))
    extra = 100 * scoring_cost(saved) * (len(ENSEMBLE) - 1) / forward
    images = int(saved.counts.sum())
    build = 100 * building_cost(saved) / (forward * images)
    text = (
        f"scoring an image with three classifiers in place of one adds {_percent(extra)} % to the "
        f"multiply-adds of the network's forward pass; building the three costs {_percent(build)} % of one "
        f"forward pass over the {images} training images"
    )
    return Part(text, extra <= LITTLE and build <= LITTLE)


@part
def new_classes(study: Study) -> Part:
    """The row of each class left out of training, made without any other new class, is that of the table."""
    saved = study.caches("continual")[0]
    together = classifiers(saved, "whc20")[0]
    trained = saved.trained.nonzero().flatten()
    new = (~saved.trained).nonzero().flatten()
    largest = 0.0
    for c in new:
        known = torch.cat([trained, c[None]])
        alone = continual_classifier(saved.prototypes[known], saved.weights[known], saved.counts[known], 20)
        largest = max(largest, float((alone - together[known]).abs().max()))
    text = (
        f"{len(new)} classes that `continual` was not trained on, each added alone from its prototype: no "
        f"row, old or new, differs from that of the table by more than {ROUNDING:g}"
    )
    return Part(text if largest <= ROUNDING else f"{text}: found {largest:.1e}", largest <= ROUNDING)


def image_shape(saved: FeatureCache) -> tuple[int, int, int]:
    """Channels, height and width of the images that a cache's network received."""
    dataset, size = saved.meta["dataset"].removesuffix("_part"), saved.meta["recipe"]["input_size"]
    if dataset not in IMAGE_SHAPES:
        raise InputError(unknown("data set", dataset, list(IMAGE_SHAPES)))
    channels, *stored = IMAGE_SHAPES[dataset]
    return (channels, *([size, size] if size else stored))


@cache
def forward_cost(network: str, shape: tuple[int, int, int]) -> int:
    """Multiply-adds of a network's forward pass of one image [C, H, W], counted without computing it."""
    with torch.device("meta"), torch.no_grad():
        model, image = build_backbone(network).eval(), torch.empty(1, *shape)
        with FlopCounterMode(display=False) as counter:
            model(image)
    return counter.get_total_flops() // 2


def scoring_cost(saved: FeatureCache) -> int:
    """Multiply-adds of scoring one image with one classifier: N x F."""
    return saved.prototypes.numel()


def building_cost(saved: FeatureCache) -> int:
    """Multiply-adds of Eq. 4 and 5: for each k, N queries times the classes above k, twice."""
    keys = sum(int((saved.counts > k).sum()) for k in ENSEMBLE)
    return 2 * keys * saved.prototypes.numel()


def _percent(value: float) -> str:
    """Two digits that count; below 0.01 just that."""
    return f"{value:.2g}" if value >= 0.01 else "less than 0.01"
