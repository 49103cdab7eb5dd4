"""How every backbone was trained and how accurate it is, from the `meta.json` of its caches.

frame = training_summary("embedded", ["sqrt", "uniform"])
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lt_core.backbones import cache_folder, seeds_shown
from lt_core.features import TENSORS, read_meta
from lt_core.metrics import COLUMNS

NAN = float("nan")
DESCRIPTION = ("dataset", "backbone", "seed", "network", "start", "sampler", "loss", "classifier")


def training_summary(profile: str, backbones: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """A line a backbone and seed: recipe, cost, and accuracies in percent as training stated them.

    train, val: of the classifier in the last epoch (augmented training images as sampled; validation images).
    test_*: of the last epoch's classifier; prototypes_*: of its prototypes; best_*: of the classifier of the
    epoch that was best on validation data. NaN where few-shot classes were not trained on. Raises CacheError
    for a missing cache.
    """
    return pd.DataFrame(
        _line(profile, name, one) for name in backbones for one in seeds_shown(profile, name, seed)
    ).round(2)


def _line(profile: str, backbone: str, seed: int) -> dict[str, object]:
    folder = cache_folder(profile, backbone, seed)
    meta = read_meta(folder)
    last, best = meta["accuracies"]["last"]["test"], meta["accuracies"]["best_on_validation"]["test"]
    final, epochs, minutes = meta["history"][-1], meta["recipe"]["epochs"], meta["seconds"] / 60
    line: dict[str, object] = {name: meta[name] for name in DESCRIPTION}
    line |= {
        "epochs": epochs,
        "minutes": minutes,
        "megabytes": (folder / TENSORS).stat().st_size / 1e6,
        "train": final["train_accuracy"],
        "val": final["val_accuracy"],
        "best_epoch": meta["epoch_of_best"],
    }
    for prefix, accuracies in (("test", last["classifier"]), ("prototypes", last["prototypes"])):
        line |= {f"{prefix}_{group}": _number(accuracies[group]) for group in COLUMNS}
    return line | {"best_total": _number(best["classifier"]["total"])}


def _number(value: float | None) -> float:
    return NAN if value is None else value
