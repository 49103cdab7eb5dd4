"""A small study in memory: made-up feature caches in place of those of a profile."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lt_core import results
from lt_core.cache import FeatureCache
from lt_core.transfer import prototypes

COUNTS = torch.tensor([150, 120, 60, 30, 12, 6])
SPLITS = {"train": COUNTS, "val": torch.full((6,), 10), "test": torch.full((6,), 30)}
SEEDS = {"sqrt": [0, 1, 2], "uniform": [0, 1, 2], "uniform_dot": [0], "lade": [0], "continual": [0]}


def made_cache(backbone: str, seed: int, splits: tuple[str, ...] = ("train", "val", "test")) -> FeatureCache:
    """Features around one centre a class; the classifier is a noisy copy of the centres."""
    generator = torch.Generator().manual_seed(1000 * sum(map(ord, backbone)) + seed)
    centres = torch.randn(6, 8, generator=generator)
    parts = {}
    for name in ("train", "val", "test"):
        labels = torch.arange(6).repeat_interleave(SPLITS[name])
        parts[name] = centres[labels] + 1.2 * torch.randn(len(labels), 8, generator=generator), labels
    weights = centres + 0.5 * torch.randn(6, 8, generator=generator)
    if backbone == "continual":
        weights[COUNTS <= 20] = torch.nan
    return FeatureCache(
        weights=weights,
        scale=16.0,
        counts=COUNTS,
        prototypes=prototypes(*parts["train"], 6),
        splits={name: parts[name] for name in splits},
        meta={
            "dataset": "made up",
            "backbone": backbone,
            "seed": seed,
            "class_names": list("abcdef"),
        },
        bias=torch.zeros(6) if backbone in ("uniform_dot", "lade") else None,
    )


@pytest.fixture
def study(monkeypatch):
    """A profile `made_up` whose caches are `made_cache`; changes to its attribute `stored` are seen."""
    found = SimpleNamespace(stored={}, seeds=dict(SEEDS))

    def load(profile: str, backbone: str, seed: int) -> FeatureCache:
        key = backbone, seed
        if key not in found.stored:
            found.stored[key] = made_cache(backbone, seed)
        return found.stored[key]

    profile = SimpleNamespace(backbones=found.seeds)
    monkeypatch.setattr(results, "load", load)
    monkeypatch.setattr(results, "load_profile", lambda name: profile)
    monkeypatch.setattr(
        results.backbones,
        "seeds_shown",
        lambda profile, backbone, seed=None: found.seeds[backbone] if seed is None else [seed],
    )
    return found


def accuracy(cache: FeatureCache, classes: np.ndarray) -> float:
    """Total accuracy in percent on the test images."""
    return 100 * float((classes == cache.labels("test").numpy()).mean())
