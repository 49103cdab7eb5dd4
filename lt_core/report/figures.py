"""One colour-blind-safe style for all figures, one way to save them, and the figures themselves.

    data = figure2_data(counts, {"prototypes": accuracy_p, "cosine": accuracy_w})
    with figure_style():
        fig, ax = plt.subplots()
        accuracy_by_class_size(ax, data)
        save_figure(fig, "F2", "embedded", data, alt="Validation accuracy against class size ...")

Figure functions draw what a data frame holds, on the axes that they are given, and return these axes. The
same frame is saved beside the picture.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lt_core import paths
from lt_core.errors import InputError, check_counts, unknown

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
    "dot_product": Style("Dot-product classifier", GREY, "X", ":"),
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
    "supervised": Style("Supervised initialisation", BLUE, "o", "-", ""),
    "simclr": Style("SimCLR initialisation", OCHRE, "s", "--", "//"),
    "supervised_sqrt": Style("Supervised, square root", BLUE, "o", "-", ""),
    "supervised_uniform": Style("Supervised, uniform", BLUE, "o", "--", "//"),
    "simclr_sqrt": Style("SimCLR, square root", OCHRE, "s", "-", ""),
    "simclr_uniform": Style("SimCLR, uniform", OCHRE, "s", "--", "//"),
    # print and here
    "published": Style("Published", GREY, "D", ":", ""),
    "reproduced": Style("Reproduced", BLACK, "o", "-", ""),
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
    """Within this block matplotlib draws in the style of all figures."""
    with mpl.rc_context(SETTINGS):
        yield


def style_of(name: str) -> Style:
    """The look of a classifier, group, sampler or initialisation; raises InputError for an unknown name."""
    if name not in STYLES:
        raise InputError(unknown("figure style", name, list(STYLES)))
    return STYLES[name]


def save_figure(
    fig: Figure, name: str, profile: str, data: pd.DataFrame, alt: str, decimals: int = 2
) -> Image:
    """Writes <name>.png (200 dpi), <name>.svg and <name>.csv (the plotted numbers) to figures/<profile>/.

    Closes the figure and returns the PNG for display in a notebook.

    Numbers are rounded to `decimals` places. `alt` says in words what the picture shows: the title of the
    SVG and the description of the PNG. The same figure gives the same bytes; no file is ever half written.
    """
    if not alt.strip():
        raise InputError("alt must say in words what the figure shows")
    folder = paths.figures(profile)
    with mpl.rc_context(SETTINGS):
        svg = _rendered(fig, "svg", {"Title": alt, "Date": None, "Creator": None})
        png = _rendered(fig, "png", {"Description": alt, "Software": None})
    table = data.round(decimals).to_csv(index=False, lineterminator="\n").encode()
    for suffix, content in (("png", png), ("svg", svg), ("csv", table)):
        with paths.atomic(folder / f"{name}.{suffix}") as temporary:
            temporary.write_bytes(content)
    plt.close(fig)
    return Image(data=png, format="png", width=round(100 * fig.get_figwidth()), alt=alt)


def figure2_data(counts: object, accuracies: Mapping[str, object], bins: int | None = None) -> pd.DataFrame:
    """The numbers of Figure 2: accuracy by class size, for each of two (or more) classifiers.

    counts [N]: training images a class; accuracies: {series: accuracy [N] in percent}. Gives a frame with
    the columns kind, series, class, images, accuracy, ci_low, ci_high, classes. Kinds: `class`, one class;
    `bin`, mean over the `classes` classes of a log-spaced bin, at their geometric mean of images, with its
    95 % interval over classes; `difference`, likewise for the first series minus the second, in points.
    Classes whose accuracy is NaN (no images) are left out.
    """
    counts = check_counts("counts", counts).cpu().numpy()
    series = {name: _accuracy_vector(name, values, len(counts)) for name, values in accuracies.items()}
    if len(series) < 2:
        raise InputError(f"accuracies must hold two series at least, found {len(series)}")
    first, second = list(series)[:2]
    bin_of = _log_bins(counts, bins or int(np.clip(len(counts) // 5, 4, 12)))
    records = []
    for name, values in series.items():
        records += [("class", name, c, counts[c], values[c], np.nan, np.nan, 1) for c in range(len(counts))]
        records += _binned("bin", name, counts, values, bin_of)
    difference = series[first] - series[second]
    records += _binned("difference", f"{first} - {second}", counts, difference, bin_of)
    columns = ["kind", "series", "class", "images", "accuracy", "ci_low", "ci_high", "classes"]
    frame = pd.DataFrame(records, columns=columns).astype({"class": "Int64"})
    return frame[frame["accuracy"].notna()].reset_index(drop=True)


def crossings(data: pd.DataFrame) -> list[float]:
    """Numbers of training images at which the binned difference of figure2_data changes its sign.

    Interpolated on the log axis between neighbouring bins; bins without a difference are passed over.
    """
    bins = data[(data["kind"] == "difference") & (data["accuracy"] != 0)]
    x, y = np.log(bins["images"].to_numpy(float)), bins["accuracy"].to_numpy(float)
    changes = np.flatnonzero(np.sign(y[1:]) != np.sign(y[:-1]))
    return [float(np.exp(x[i] - y[i] * (x[i + 1] - x[i]) / (y[i + 1] - y[i]))) for i in changes]


def accuracy_by_class_size(ax: Axes, data: pd.DataFrame, split: str = "validation") -> Axes:
    """Figure 2: accuracy of every class (faint) and of bins of classes against training images (log axis).

    data: of figure2_data, whose series are names of `STYLES`; split: named on the axis.
    """
    for name in data.loc[data["kind"] == "class", "series"].unique():
        style = style_of(name)
        of_series = data[data["series"] == name]
        one, mean = of_series[of_series["kind"] == "class"], of_series[of_series["kind"] == "bin"]
        ax.scatter(
            one["images"], one["accuracy"], s=9, color=style.colour, marker=style.marker, alpha=0.3, lw=0
        )
        low, high = (mean[bound].fillna(mean["accuracy"]) for bound in ("ci_low", "ci_high"))
        low, high = low.clip(0, 100), high.clip(0, 100)
        ax.fill_between(mean["images"], low, high, color=style.colour, alpha=0.15, lw=0)
        line = {"color": style.colour, "marker": style.marker, "linestyle": style.line}
        ax.plot(mean["images"], mean["accuracy"], label=style.label, **line)
    ax.set_xscale("log")
    images = data.loc[data["kind"] == "class", "images"]
    ax.set_xlim(images.min() / 1.12, images.max() * 1.12)
    ax.set_ylim(0, 102)
    _mark_groups(ax)
    _plain_log_ticks(ax)
    ax.set_xlabel("Training images of the class (log scale)")
    ax.set_ylabel(f"Top-1 accuracy, {split} split (%)")
    ax.legend(loc="best", handlelength=2.8)
    return ax


def _rendered(fig: Figure, form: str, metadata: dict[str, str | None]) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format=form, metadata=metadata)
    return buffer.getvalue()


def _accuracy_vector(name: str, values: object, length: int) -> np.ndarray:
    vector = np.asarray(values, float)
    if vector.shape != (length,):
        raise InputError(f"accuracies[{name!r}] must have shape [{length}], found {list(vector.shape)}")
    return vector


def _log_bins(counts: np.ndarray, bins: int) -> np.ndarray:
    """Number of the log-spaced bin [N] of each class."""
    edges = np.geomspace(counts.min(), counts.max() * 1.0001, bins + 1)
    return np.clip(np.digitize(counts, edges) - 1, 0, bins - 1)


def _binned(kind: str, name: str, counts: np.ndarray, values: np.ndarray, bin_of: np.ndarray) -> list[tuple]:
    """Mean and 95 % interval (normal, over classes) of each bin that has classes."""
    records = []
    for number in np.unique(bin_of[np.isfinite(values)]):
        members = (bin_of == number) & np.isfinite(values)
        inside, size = values[members], int(members.sum())
        half = 1.96 * inside.std(ddof=1) / np.sqrt(size) if size > 1 else np.nan
        images, mean = np.exp(np.log(counts[members]).mean()), inside.mean()
        records.append((kind, name, pd.NA, images, mean, mean - half, mean + half, size))
    return records


def _mark_groups(ax: Axes) -> None:
    """Borders of the groups as vertical lines, their names above the axes, as far as in view."""
    low, high = ax.get_xlim()
    inside = [border for border in BORDERS if low < border < high]
    for border in inside:
        ax.axvline(border, color=GREY, lw=1, ls=(0, (4, 3)), zorder=0.5)
    for name, start, end in (("few", 0, 20), ("medium", 20, 100), ("many", 100, np.inf)):
        left, right = max(start, low), min(end, high)
        if right > left * 1.05:
            middle = np.sqrt(left * right)
            ax.text(
                middle, 1.01, name, transform=ax.get_xaxis_transform(), ha="center", va="bottom", color=GREY
            )
    for border in inside:
        where = {"transform": ax.get_xaxis_transform(), "va": "top", "ha": "left", "rotation": 90}
        ax.text(border * 1.02, 0.97, f"n = {border}", color=GREY, size=8, **where)


def _plain_log_ticks(ax: Axes) -> None:
    """1-2-5 ticks written as plain numbers."""
    low, high = ax.get_xlim()
    ticks = [step * 10**power for power in range(7) for step in (1, 2, 5)]
    ax.set_xticks([tick for tick in ticks if low <= tick <= high])
    ax.set_xticks([], minor=True)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
