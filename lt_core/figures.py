"""One colour-blind-safe style for all figures, one way to save them, and what two notebooks draw.

    out = paths.figures(profile)
    with figure_style():
        fig, ax = plt.subplots()
        ...
        image = save_figure(fig, out / "F2", data, alt="Validation accuracy against class size ...")

The frame that a figure draws is saved beside the picture.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lt_core import paths, results
from lt_core.metrics import GROUPS

# Okabe and Ito's palette, readable with any kind of colour blindness.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#767676"
OCHRE = "#A6761D"  # for Okabe and Ito's yellow, too pale for a line on white


@dataclass(frozen=True)
class Style:
    """How one thing looks in every figure; `hatch` is for bars."""

    label: str
    colour: str
    marker: str = "o"
    line: str = "-"
    hatch: str = ""


STYLES: dict[str, Style] = {
    # classifiers
    "cosine": Style("Cosine classifier", BLUE, "o", "-"),
    "prototypes": Style("Prototypes", VERMILLION, "s", "--"),
    "prototypes+cosine": Style("Prototypes + classifier", PURPLE, "D", "-."),
    "transfer": Style("Transfer component", GREEN, "P", ":"),
    "wh20": Style("$w^h(20)$", GREEN, "^", "--"),
    "wh100": Style("$w^h(100)$", SKY, "v", "-."),
    "whc20": Style("$w^{hc}(20)$", GREEN, "<", ":"),
    "whc100": Style("$w^{hc}(100)$", SKY, ">", ":"),
    "ensemble": Style("Ensemble", BLACK, "*", "-"),
    "dot_product": Style("Dot-product classifier", GREY, "X", ":", "//"),
    "balanced_softmax": Style("Balanced softmax", ORANGE, "h", "-."),
    # groups of classes, as in the paper's Figure 6
    "many": Style("Many-shot", PURPLE, "o", "-", ""),
    "medium": Style("Medium-shot", GREEN, "s", "--", "//"),
    "few": Style("Few-shot", VERMILLION, "^", ":", ".."),
    "total": Style("All classes", BLACK, "D", "-.", "xx"),
    # samplers
    "uniform": Style("Uniform sampling", SKY, "o", "-", ""),
    "sqrt": Style("Square-root sampling", ORANGE, "s", "--", "//"),
    "class_aware": Style("Class-aware sampling", GREY, "^", ":", ".."),
    # initialisations
    "supervised_sqrt": Style("Supervised, square root", BLUE, "o", "-", ""),
    "supervised_uniform": Style("Supervised, uniform", BLUE, "o", "--", "//"),
    "simclr_sqrt": Style("SimCLR, square root", OCHRE, "s", "-", ""),
    "simclr_uniform": Style("SimCLR, uniform", OCHRE, "s", "--", "//"),
}

SETTINGS = {
    "figure.figsize": (6.4, 4.0),
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "savefig.facecolor": "white",
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "axes.prop_cycle": mpl.cycler(color=[BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE, BLACK]),
    "svg.hashsalt": "lt_core",  # element names that do not change from run to run
    "svg.fonttype": "path",  # looks the same without the font
}

BORDERS = (20, 100)  # few-shot up to 20, many-shot from 100 training images (rule `paper`)


@contextmanager
def figure_style() -> Iterator[None]:
    """Within this block matplotlib and seaborn draw in the style of all figures."""
    with mpl.rc_context(SETTINGS):
        yield


def palette(names: Sequence[str]) -> dict[str, str]:
    """Colour of each name of `STYLES`, for seaborn's `palette`."""
    return {name: STYLES[name].colour for name in names}


def save_figure(fig: Figure, target: Path, data: pd.DataFrame, alt: str, decimals: int = 2) -> Image:
    """Write TARGET.png (200 dpi), .svg and .csv (the plotted numbers); close the figure and return the PNG.

    Numbers are rounded to `decimals` places, without a negative zero. `alt` says in words what the picture
    shows: the title of the SVG and the description of the PNG, which the report's index shows as its caption.
    The same figure gives the same bytes; no file is ever half written.
    """
    with mpl.rc_context(SETTINGS):
        svg = _rendered(fig, "svg", {"Title": alt, "Date": None, "Creator": None})
        png = _rendered(fig, "png", {"Description": alt, "Software": None})
    plt.close(fig)
    data = data.round(decimals)
    numbers = data.select_dtypes("float").columns
    data = data.assign(**{name: data[name] + 0.0 for name in numbers})
    table = data.to_csv(index=False, lineterminator="\n").encode()
    for suffix, content in ((".png", png), (".svg", svg), (".csv", table)):
        with paths.atomic(target.parent / (target.name + suffix)) as temporary:
            temporary.write_bytes(content)
    return Image(data=png, format="png", width=round(100 * fig.get_figwidth()), alt=alt)


def _rendered(fig: Figure, form: str, metadata: dict[str, str | None]) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format=form, metadata=metadata)
    return buffer.getvalue()


def class_size_axis(ax: Axes, counts: object) -> None:
    """A logarithmic x axis of training images with plain ticks and the borders of the groups."""
    low, high = np.min(counts) / 1.12, np.max(counts) * 1.12
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ticks = [step * 10**power for power in range(7) for step in (1, 2, 5)]
    ax.set_xticks([tick for tick in ticks if low <= tick <= high])
    ax.set_xticks([], minor=True)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    place = {"transform": ax.get_xaxis_transform(), "color": GREY}
    for border in (border for border in BORDERS if low < border < high):
        ax.axvline(border, color=GREY, lw=1, ls=(0, (4, 3)), zorder=0.5)
        ax.text(border * 1.02, 0.97, f"n = {border}", size=8, va="top", ha="left", rotation=90, **place)
    for name, start, end in (("few", 0, 20), ("medium", 20, 100), ("many", 100, np.inf)):
        left, right = max(start, low), min(end, high)
        if right > left * 1.05:
            ax.text(np.sqrt(left * right), 1.01, name, ha="center", va="bottom", **place)
    ax.set_xlabel("Training images of the class (log scale)")


# ---------------------------------------------------------------- Figures 4, 5 and 7

SOURCES = {"": "Training prototypes", " val-prototypes": "Validation prototypes"}
IMAGES = {" on train": "training images", "": "test images"}


def prototype_accuracy(profile: str, backbones: dict[str, str], seed: int | None = None) -> pd.DataFrame:
    """Accuracy of prototypes, all classes as candidates (Figures 4, 5, 7), with 95 % intervals, in percent.

    backbones: series (a name of `STYLES`) -> backbone. A line for each series, source of the prototypes,
    images and group: series, prototypes, images, group, accuracy, ci_low, ci_high, seeds.
    """
    subjects = {
        (series, source, images): f"{backbone}/prototypes{source}{images}"
        for series, backbone in backbones.items()
        for source in SOURCES
        for images in IMAGES
    }
    values = results.measure(profile, subjects.values(), seed)
    lines = []
    for (series, source, images), subject in subjects.items():
        draws = results.over_seeds(values.loc[subject])
        for group, one in results.estimates(draws).iterrows():
            where = (series, SOURCES[source], IMAGES[images], group)
            seeds = " ".join(map(str, draws.attrs["seeds"]))
            lines.append((*where, one["value"], one["low"], one["high"], seeds))
    columns = ["series", "prototypes", "images", "group", "accuracy", "ci_low", "ci_high", "seeds"]
    return pd.DataFrame(lines, columns=columns)


def prototype_panels(data: pd.DataFrame, dataset: str) -> Figure:
    """Figures 4, 5, 7: columns are the source of the prototypes, rows the images; bars by group and series.

    data: of `prototype_accuracy`; dataset: named in the title.
    """
    series = list(dict.fromkeys(data["series"]))
    fig, axes = plt.subplots(2, 2, figsize=(9.6, 6.4), sharex=True, sharey=True)
    width = 0.8 / len(series)
    for column, source in zip(axes.T, SOURCES.values(), strict=True):
        for ax, images in zip(column, IMAGES.values(), strict=True):
            panel = data[(data["prototypes"] == source) & (data["images"] == images)]
            for place, name in enumerate(series):
                bars, style = (
                    panel[panel["series"] == name].set_index("group").loc[list(GROUPS)],
                    STYLES[name],
                )
                x = np.arange(len(GROUPS)) + (place - (len(series) - 1) / 2) * width
                error = [bars["accuracy"] - bars["ci_low"], bars["ci_high"] - bars["accuracy"]]
                look = {"color": style.colour, "hatch": style.hatch, "edgecolor": "white", "linewidth": 0}
                ax.bar(x, bars["accuracy"], width * 0.94, label=style.label, **look)
                ax.errorbar(x, bars["accuracy"], error, fmt="none", ecolor=BLACK, elinewidth=1, capsize=2)
            ax.set_title(f"{source}, {images}", size=10.5)
            ax.set_xticks(range(len(GROUPS)), [STYLES[group].label for group in GROUPS])
            ax.set_ylim(0, 102)
            ax.grid(axis="x", visible=False)
    for ax in axes[:, 0]:
        ax.set_ylabel("Top-1 accuracy (%)")
    fig.suptitle(dataset, size=11)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return fig
