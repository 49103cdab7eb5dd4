"""Figures 4, 5, 7 and 8: how well prototypes separate the classes of differently trained backbones.

data = prototype_accuracy({"uniform": cache0, "sqrt": cache1})
fig = prototype_panels(data)
"""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lt_core.features import FeatureCache
from lt_core.groups import GROUPS
from lt_core.metrics import COLUMNS, cosine_matrix, group_accuracy
from lt_core.report.figures import style_of
from lt_core.report.rows import prototypes_from
from lt_core.transfer import cosine_logits

SOURCES = {"train": "Training prototypes", "val": "Validation prototypes"}
IMAGES = {"train": "training images", "test": "test images"}
FIRST_RANKS = 20  # of Figure 8's inset, and of its measure of sharpness


def prototype_accuracy(backbones: Mapping[str, FeatureCache]) -> pd.DataFrame:
    """Accuracy of prototype classifiers, all classes as candidates (Figures 4, 5, 7).

    backbones: series (a name of `STYLES`) -> cache with train, val and test features. Gives a frame with the
    columns series, prototypes, images, group, accuracy (percent): training and validation prototypes on
    training and test images.
    """
    records = []
    for series, cache in backbones.items():
        for source in SOURCES:
            centres = prototypes_from(cache, source)
            for images in IMAGES:
                predictions = cosine_logits(cache.features(images), centres).argmax(dim=1)
                accuracy = group_accuracy(predictions, cache.labels(images), cache.counts)
                records += [(series, source, images, group, accuracy[group]) for group in COLUMNS]
    return pd.DataFrame(records, columns=["series", "prototypes", "images", "group", "accuracy"])


def prototype_panels(data: pd.DataFrame) -> Figure:
    """Figures 4, 5, 7: columns are the source of the prototypes, rows the images; bars by group and series.

    data: of `prototype_accuracy`. The axes share the range 0 to 100.
    """
    fig, axes = plt.subplots(len(IMAGES), len(SOURCES), figsize=(9.6, 6.2), sharex=True, sharey=True)
    for (source, title), column in zip(SOURCES.items(), axes.T, strict=True):
        for (images, what), ax in zip(IMAGES.items(), column, strict=True):
            panel = data[(data["prototypes"] == source) & (data["images"] == images)]
            _grouped_bars(ax, panel)
            ax.set_title(f"{title}, {what}", size=10.5)
    for ax in axes[:, 0]:
        ax.set_ylabel("Top-1 accuracy (%)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return fig


def _grouped_bars(ax: Axes, panel: pd.DataFrame) -> None:
    """A cluster of bars a group, a bar a series, each with its value."""
    series = list(dict.fromkeys(panel["series"]))
    width = 0.84 / len(series)
    for number, name in enumerate(series):
        style = style_of(name)
        heights = panel[panel["series"] == name].set_index("group")["accuracy"].reindex(GROUPS)
        left = np.arange(len(GROUPS)) + (number - (len(series) - 1) / 2) * width
        look = {"color": style.colour, "hatch": style.hatch, "edgecolor": "white", "linewidth": 0.5}
        bars = ax.bar(left, heights, width * 0.94, label=style.label, **look)
        ax.bar_label(bars, fmt="%.0f", size=8, padding=1)
    ax.set_xticks(range(len(GROUPS)), [style_of(group).label for group in GROUPS])
    ax.set_ylim(0, 108)
    ax.set_yticks(range(0, 101, 20))
    ax.grid(axis="x", visible=False)


def similarity_curves(backbones: Mapping[str, FeatureCache]) -> pd.DataFrame:
    """Mean over classes of the sorted cosines from a prototype to all learned weights (Figure 8).

    Gives a frame with the columns series, rank (1 = the nearest weight), similarity.
    """
    parts = []
    for series, cache in backbones.items():
        ordered = np.sort(cosine_matrix(cache.prototypes, cache.weights), axis=1)[:, ::-1]
        ranks = np.arange(1, ordered.shape[1] + 1)
        parts.append(pd.DataFrame({"series": series, "rank": ranks, "similarity": ordered.mean(axis=0)}))
    return pd.concat(parts, ignore_index=True)


def sharpness(backbones: Mapping[str, FeatureCache], temperature: float = 10.0) -> pd.DataFrame:
    """How selective the similarities are, a row a series.

    gap: mean similarity at rank 1 minus the mean over ranks 2 to 20; effective classes: exp of the mean
    entropy of softmax(temperature * cosine), the lower the sharper.
    """
    curves = similarity_curves(backbones)
    rows = []
    for series, cache in backbones.items():
        curve = curves.loc[curves["series"] == series, "similarity"].to_numpy()
        logits = temperature * cosine_matrix(cache.prototypes, cache.weights)
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        entropy = -(shares * np.log(shares)).sum(axis=1).mean()
        rows.append((series, curve[0] - curve[1:FIRST_RANKS].mean(), np.exp(entropy)))
    return pd.DataFrame(rows, columns=["series", "gap", "effective classes"])


def similarity_panels(data: pd.DataFrame) -> Figure:
    """Figure 8: all ranks, and beside them the first 20. data: of `similarity_curves`."""
    fig, (whole, nearest) = plt.subplots(1, 2, figsize=(9.6, 4.2))
    for name in dict.fromkeys(data["series"]):
        style, curve = style_of(name), data[data["series"] == name]
        line = {"color": style.colour, "linestyle": style.line}
        whole.plot(curve["rank"], curve["similarity"], label=style.label, **line)
        first = curve[curve["rank"] <= FIRST_RANKS]
        nearest.plot(first["rank"], first["similarity"], marker=style.marker, markersize=4, **line)
    whole.set_title("All classes", size=10.5)
    nearest.set_title("The nearest classes", size=10.5)
    nearest.set_xticks([rank for rank in (1, 5, 10, 15, 20) if rank <= data["rank"].max()])
    for ax in (whole, nearest):
        ax.set_xlabel("Rank by similarity to the prototype")
    whole.set_ylabel("Mean cosine to the learned weight")
    fig.legend(loc="outside lower center", ncols=4)
    return fig
