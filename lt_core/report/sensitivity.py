"""Beyond the paper: how much the results depend on tau, k, the ensemble's members and the number of images.

    data = temperature_and_k(cache, temperatures=(1, 3, 10, 30, 100), ks=(0, 20, 100))
    fig = temperature_and_k_heatmaps(data)

Accuracies are top-1 in percent on the validation images: nothing here looks at the test split.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display
from ipywidgets import Dropdown, FloatLogSlider, IntSlider, Output, VBox, Widget
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lt_core.errors import InputError
from lt_core.features import FeatureCache
from lt_core.metrics import COLUMNS, group_accuracy
from lt_core.notebooks import REPORT
from lt_core.report.figures import GREY, figure_style, style_of
from lt_core.transfer import (
    ENSEMBLE,
    attention,
    cosine_logits,
    ensemble_probabilities,
    hybrid_classifiers,
    prototypes,
)

SPLIT = "val"


def _accuracy(cache: FeatureCache, rows: Sequence[object]) -> dict[str, float]:
    """Accuracy in percent a group of the mean of the probabilities of classifiers [N, F]."""
    scores = ensemble_probabilities(cache.features(SPLIT), rows, cache.scale)
    return group_accuracy(scores.argmax(dim=1), cache.labels(SPLIT), cache.counts)


def _hybrids(
    cache: FeatureCache, ks: Sequence[int], temperature: float = 10.0, centres: object = None
) -> list[object]:
    own = cache.prototypes if centres is None else centres
    return hybrid_classifiers(own, cache.weights, cache.counts, ks, temperature)


def temperature_and_k(cache: FeatureCache, temperatures: Sequence[float], ks: Sequence[int]) -> pd.DataFrame:
    """Accuracy of w^h(k) at each tau and k: columns temperature, k, group, accuracy."""
    return pd.DataFrame(
        (temperature, k, group, accuracy)
        for temperature in temperatures
        for k in ks
        for group, accuracy in _accuracy(cache, _hybrids(cache, [k], temperature)).items()
    ).set_axis(["temperature", "k", "group", "accuracy"], axis=1)


def ensemble_temperature(cache: FeatureCache, temperatures: Sequence[float]) -> pd.DataFrame:
    """Accuracy of the ensemble of Eq. 8 at each tau: columns temperature, group, accuracy."""
    return pd.DataFrame(
        (temperature, group, accuracy)
        for temperature in temperatures
        for group, accuracy in _accuracy(cache, _hybrids(cache, ENSEMBLE, temperature)).items()
    ).set_axis(["temperature", "group", "accuracy"], axis=1)


def ensemble_members(cache: FeatureCache) -> pd.DataFrame:
    """Accuracy of every ensemble of some of k = 0, 20, 100: columns members, group, accuracy."""
    chosen = [some for size in (1, 2, 3) for some in combinations(ENSEMBLE, size)]
    return pd.DataFrame(
        (" + ".join(map(str, some)), group, accuracy)
        for some in chosen
        for group, accuracy in _accuracy(cache, _hybrids(cache, some)).items()
    ).set_axis(["members", "group", "accuracy"], axis=1)


def images_per_prototype(
    cache: FeatureCache, shots: Sequence[int], draws: int = 5, seed: int = 0
) -> pd.DataFrame:
    """Accuracy when prototypes are means of at most `shots` training images a class, drawn `draws` times.

    The learned weights stay. Columns: classifier (prototypes, ensemble), shots, draw, group, accuracy.
    """
    features, labels = cache.features("train"), cache.labels("train").numpy()
    generator = np.random.default_rng(seed)
    records = []
    for shot in shots:
        for draw in range(draws):
            chosen = _at_most(labels, shot, generator)
            centres = prototypes(features[chosen], labels[chosen], len(cache.counts))
            for name, rows in (
                ("prototypes", [centres]),
                ("ensemble", _hybrids(cache, ENSEMBLE, centres=centres)),
            ):
                accuracies = _accuracy(cache, rows)
                records += [(name, shot, draw, group, accuracies[group]) for group in COLUMNS]
    return pd.DataFrame(records, columns=["classifier", "shots", "draw", "group", "accuracy"])


def _at_most(labels: np.ndarray, shots: int, generator: np.random.Generator) -> np.ndarray:
    """Indices of at most `shots` images of each class, drawn at random."""
    order = generator.permutation(len(labels))
    sorted_by_class = order[np.argsort(labels[order], kind="stable")]
    classes = labels[sorted_by_class]
    first = np.searchsorted(classes, classes)
    return sorted_by_class[np.arange(len(labels)) - first < shots]


# ---------------------------------------------------------------- figures


def group_curves(ax: Axes, data: pd.DataFrame, x: str, label: str, mark: float | None = None) -> Axes:
    """Accuracy against column `x` on a log axis, a line a group; `mark` is the paper's choice."""
    for group in COLUMNS:
        line, style = data[data["group"] == group].groupby(x)["accuracy"].mean(), style_of(group)
        ax.plot(line.index, line, label=style.label, color=style.colour, marker=style.marker, ls=style.line)
    ax.set_xscale("log")
    values = sorted(data[x].unique())
    ax.set_xticks(values, [f"{value:g}" for value in values])
    ax.set_xticks([], minor=True)
    if mark is not None:
        ax.axvline(mark, color=GREY, lw=1, ls=(0, (4, 3)), zorder=0.5)
    ax.set_xlabel(label)
    ax.set_ylabel("Top-1 accuracy, validation split (%)")
    return ax


def temperature_and_k_heatmaps(data: pd.DataFrame) -> Figure:
    """Accuracy of w^h(k) over tau and k, a panel a group. data: of `temperature_and_k`."""
    fig, axes = plt.subplots(1, len(COLUMNS), figsize=(12.0, 3.6), sharey=True)
    for group, ax in zip(COLUMNS, axes, strict=True):
        grid = data[data["group"] == group].pivot(index="k", columns="temperature", values="accuracy")
        ax.imshow(grid, cmap="viridis", aspect="auto", origin="lower")
        middle = (grid.to_numpy().min() + grid.to_numpy().max()) / 2
        for (row, column), value in np.ndenumerate(grid.to_numpy()):
            colour = "black" if value > middle else "white"
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, size=9)
        ax.set_xticks(range(grid.shape[1]), [f"{tau:g}" for tau in grid.columns])
        ax.set_yticks(range(grid.shape[0]), [f"{k:g}" for k in grid.index])
        ax.grid(visible=False)
        ax.set_title(style_of(group).label, size=10.5)
        ax.set_xlabel("Temperature τ")
    axes[0].set_ylabel("Classes read: n > k")
    return fig


def attention_view(cache: FeatureCache, class_index: int, k: int = 20, temperature: float = 10.0) -> Figure:
    """One class: whom its prototype reads, and how its classifiers do on its test images.

    Raises InputError for a class that does not exist or a k that no class exceeds.
    """
    if not 0 <= class_index < len(cache.counts):
        raise InputError(f"class_index must lie in 0..{len(cache.counts) - 1}, found {class_index}")
    shares = attention(cache.prototypes, cache.weights, cache.counts, k, temperature)[class_index]
    top = shares.topk(min(10, int((cache.counts > k).sum())))
    fig, (left, right) = plt.subplots(1, 2, figsize=(10.0, 3.8), width_ratios=(1.5, 1))
    names = [f"{cache.class_names[j]} (n = {cache.counts[j]})" for j in top.indices.tolist()]
    left.barh(range(len(names)), 100 * top.values, color=style_of("transfer").colour)
    left.set_yticks(range(len(names)), names, size=9)
    left.invert_yaxis()
    left.grid(axis="y", visible=False)
    left.set_xlabel("Attention (%)")
    count = int(cache.counts[class_index])
    left.set_title(
        f"{cache.class_names[class_index]} (n = {count}) reads from, k = {k}, τ = {temperature:g}", size=10.5
    )
    recalls = _recalls(cache, class_index, k, temperature)
    colours = [style_of(name).colour for name in ("cosine", "prototypes", "transfer")]
    bars = right.bar(range(3), recalls.values(), color=colours, width=0.6)
    right.bar_label(bars, fmt="%.0f", size=9)
    right.set_xticks(range(3), recalls.keys())
    right.set_ylim(0, 108)
    right.grid(axis="x", visible=False)
    right.set_ylabel("Its test images recognised (%)")
    return fig


def explorer(cache: FeatureCache) -> Widget | Figure:
    """Choose a class, k and tau and see `attention_view`: live in Jupyter, a picture in a report.

    Starts with the class that has the fewest training images.
    """
    start, largest = int(cache.counts.argmin()), int(cache.counts.max())
    if os.environ.get(REPORT):
        return attention_view(cache, start)
    order = cache.counts.argsort(stable=True).tolist()
    classes = Dropdown(
        options=[(f"{cache.class_names[c]} (n = {cache.counts[c]})", c) for c in order],
        value=start,
        description="class",
    )
    k = IntSlider(20, min=0, max=largest - 1, description="k", continuous_update=False)
    temperature = FloatLogSlider(10, min=-1, max=3, description="tau", continuous_update=False)
    view = Output()

    def draw(*_: object) -> None:
        with figure_style(), view:
            view.clear_output(wait=True)
            fig = attention_view(cache, classes.value, k.value, temperature.value)
            display(fig)
            plt.close(fig)

    for control in (classes, k, temperature):
        control.observe(draw, names="value")
    draw()
    return VBox([classes, k, temperature, view])


def _recalls(cache: FeatureCache, class_index: int, k: int, temperature: float) -> dict[str, float]:
    """Percent of the class's test images that three classifiers recognise among all classes."""
    features = cache.features("test")[cache.labels("test") == class_index]
    (hybrid,) = _hybrids(cache, [k], temperature)
    rows = {"Cosine\nclassifier": cache.weights, "Prototypes": cache.prototypes, f"$w^h({k})$": hybrid}
    return {
        name: 100 * (cosine_logits(features, one).argmax(dim=1) == class_index).double().mean().item()
        for name, one in rows.items()
    }
