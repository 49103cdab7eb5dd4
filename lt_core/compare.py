"""Predictions of one's own as a row of Table 1 (Table 3 for the Places-LT role), against each of its systems.

    values = own_values([Path("mine.npz")], "embedded", "sqrt", "mine")   # of the table of measured values
    print(compare(values, "embedded", "sqrt", "mine"))

A file holds the classes predicted for the test images of the backbone's cache, in its order, or their
scores: an .npy array, or an .npz with `predictions` [M] or `scores` [M, N] and its `seed`, if that is not the
next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lt_core.cache import kind_of
from lt_core.checks import DataError, InputError, check_labels, check_matrix, first_line
from lt_core.data.profiles import load_profile
from lt_core.metrics import COLUMNS
from lt_core.results import accuracies, caches_of, difference, estimates, measure, over_seeds
from lt_core.tables import plain_name, printed_rows

TABLES = {"imagenet_lt": "T1", "places_lt": "T3"}
# Rows beside those of the table, where it has them on other backbones only.
ON_THIS_BACKBONE = {
    "ensemble": "ensemble",
    "logit adjustment, t chosen": "logit_adjustment",
}


def own_values(files: Sequence[Path], profile: str, backbone: str, subject: str) -> pd.DataFrame:
    """The files as rows of the table of measured values, one for each training seed.

    A file without a seed is of the profile's next one. Raises InputError for another number of images or
    other classes than the backbone's test images have, and for two files of one seed.
    """
    caches = caches_of(profile, backbone)
    seeds = [cache.meta["seed"] for cache in caches]
    if len(files) > len(seeds):
        raise InputError(f"{backbone} has {len(seeds)} training seeds, but there are {len(files)} files")
    labels, counts = caches[0].labels("test").numpy(), caches[0].counts.numpy()
    predicted = []
    for file, seed in zip(files, seeds, strict=False):
        classes, own_seed = read_predictions(file, len(labels), len(counts))
        predicted.append((subject, seed if own_seed is None else own_seed, classes))
    if len({seed for _, seed, _ in predicted}) < len(files):
        raise InputError("two files are of the same training seed: their key `seed` tells them apart")
    return accuracies(predicted, labels, counts)


def read_predictions(file: Path, images: int, classes: int) -> tuple[np.ndarray, int | None]:
    """Predicted classes [M] and the seed that the file states, if it does. Raises DataError, InputError."""
    try:
        with open(file, "rb") as opened:
            loaded = np.load(opened, allow_pickle=False)
            stored = {"": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file} cannot be read as .npy or .npz of numbers ({first_line(error)})") from None
    found = [stored[name] for name in ("", "predictions", "scores") if name in stored]
    if len(found) != 1:
        raise InputError(f"{file} must hold either `predictions` [M] or `scores` [M, N]")
    if found[0].ndim == 2:
        scores = check_matrix(f"the scores of {file}", found[0], images, classes)
        predictions = scores.argmax(dim=1).numpy()
    else:
        predictions = check_labels(f"the predictions of {file}", found[0], classes, images).numpy()
    return predictions, int(stored["seed"]) if "seed" in stored else None


def compare(values: pd.DataFrame, profile: str, backbone: str, subject: str) -> pd.DataFrame:
    """A line for each row of the table and one for `subject`: accuracy by group, and `subject` less the row.

    Columns (kind, group) with kinds accuracy and difference: value, low and high, in percent and points.
    Effects are taken over the training seeds that both have. Raises InputError where no row shares one.
    """
    rows = printed_rows(TABLES[load_profile(profile).backbone(backbone).role])
    names = {row.subject: plain_name(row.row) for row in rows if row.subject}
    own = {"what it was trained with": kind_of(caches_of(profile, backbone)[0])}
    for label, name in (own | ON_THIS_BACKBONE).items():
        names.setdefault(f"{backbone}/{name}", f"{backbone} / {label}")
    everything = pd.concat([measure(profile, names), values])
    lines = {}
    for text, name in {**names, subject: subject}.items():
        if text not in everything.index:
            continue
        line = {("accuracy", group): one for group, one in _texts(over_seeds(everything.loc[text]), "{:.1f}")}
        if text != subject and _seeds(everything, text) & _seeds(everything, subject):
            less = difference(everything, subject, text)
            line |= {("difference", group): one for group, one in _texts(less, "{:+.1f}")}
        lines[name] = line
    if not any("difference" in kind for line in lines.values() for kind, _ in line):
        raise InputError(
            f"no row has a training seed of {subject} ({_listed(everything, subject)}): state the seed "
            "of each file under its key `seed`"
        )
    return pd.DataFrame(lines).T.reindex(
        columns=pd.MultiIndex.from_product([("accuracy", "difference"), COLUMNS])
    )


def _texts(draws: pd.DataFrame, number: str) -> list[tuple[str, str]]:
    """(group, `value [low, high]`) of each group; groups without classes are left out."""
    found = estimates(draws).dropna()
    form = f"{number} [{number}, {number}]"
    return [(group, form.format(one["value"], one["low"], one["high"])) for group, one in found.iterrows()]


def _seeds(values: pd.DataFrame, subject: str) -> set[int]:
    return set(values.loc[subject].index.unique("seed"))


def _listed(values: pd.DataFrame, subject: str) -> str:
    return " ".join(map(str, sorted(_seeds(values, subject))))
