"""Figures 1 and 3, the paper's drawings of its idea, from a trained model: real classes, weights, attention.

c = clearest_class(cache)                                  # a few-shot class, by a stated rule
save_figure(figure1(figure1_data(cache, c)), "F1", ...)    # whom a rare class borrows from
save_figure(figure3(figure3_data(cache, c)), "F3", ...)    # how its classifier is put together
save_figure(distributions(distribution_data({"Tiny-ImageNet-LT": cache.counts})), "S_distributions", ...)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lt_core.errors import check_counts
from lt_core.groups import GROUPS, group_of
from lt_core.report.figures import BLACK, GREY, style_of
from lt_core.report.rendering import MINUS
from lt_core.report.semantics import group_names
from lt_core.transfer import attention, hybrid_classifier, knowledge_transfer

K = 20  # the transfer that is meant for few-shot classes
HELPERS = 3  # common classes in Figure 1
BARS = 6  # in Figure 3
PARTS = {  # of Eq. 7: a word and what it is
    "transfer": ("borrowed", "transfer component"),
    "prototypes": ("counted", "prototype"),
    "cosine": ("learned", "own weight"),
}


def clearest_class(cache: Any, k: int = K) -> int:
    """The few-shot class that gives a single common class the largest share of its attention (k = 20).

    The clearest case of the idea, not a typical one. Without few-shot classes: the rarest class.
    """
    shares = attention(cache.prototypes, cache.weights, cache.counts, k=k).numpy()
    few = group_of(cache.counts)["few"]
    if not few.any():
        return int(np.asarray(cache.counts).argmin())
    return int(np.where(few, shares.max(axis=1), -1.0).argmax())


# ---------------------------------------------------------------- Figure 1


def figure1_data(cache: Any, rare: int, k: int = K, helpers: int = HELPERS) -> pd.DataFrame:
    """What Figure 1 draws: the long tail, and the neighbourhood of a rare class in feature space.

    Lines of kind `class` (place: rank by training images); then of the rare class and of the `helpers`
    classes that it pays most attention to: `sample` (validation images), `prototype`, `weight`, and `final`
    of the rare class, with coordinates x and y. The coordinates are a linear projection of the normalised
    vectors onto the plane in which the mean directions of these classes' images differ most; angles and
    distances are real as far as a plane can show them. attention: share of the rare class's attention,
    percent.
    """
    counts = check_counts("counts", cache.counts).cpu().numpy()
    names, groups = list(cache.class_names), group_names(counts)
    shares = attention(cache.prototypes, cache.weights, counts, k=k)[rare]
    order = np.argsort(-counts, kind="stable")
    records = [
        ("class", place, names[c], counts[c], groups[c], 100 * float(shares[c]), np.nan, np.nan)
        for place, c in enumerate(order, start=1)
    ]
    place_of = {int(c): place for place, c in enumerate(order, start=1)}
    shown = [rare, *shares.argsort(descending=True, stable=True)[:helpers].tolist()]
    vectors: list[tuple[str, int, torch.Tensor]] = []
    for c in shown:
        samples = cache.features("val")[cache.labels("val") == c]
        vectors += [("sample", c, sample) for sample in samples]
        vectors += [("prototype", c, cache.prototypes[c]), ("weight", c, cache.weights[c])]
    final = hybrid_classifier(cache.prototypes, cache.weights, counts, k)[rare]
    vectors.append(("final", rare, final))
    points = _projected(
        torch.stack([v for _, _, v in vectors]), [c if kind == "sample" else -1 for kind, c, _ in vectors]
    )
    for (kind, c, _), (x, y) in zip(vectors, points, strict=True):
        records.append((kind, place_of[c], names[c], counts[c], groups[c], 100 * float(shares[c]), x, y))
    return pd.DataFrame(records, columns=["kind", "place", "class", "n", "group", "attention", "x", "y"])


def _projected(vectors: torch.Tensor, class_of: list[int]) -> np.ndarray:
    """Directions of vectors [M, F] on the main two axes of the class means: [M, 2]; -1: no class."""
    directions = torch.nn.functional.normalize(vectors.double(), dim=1).numpy()
    labels = np.array(class_of)
    means = np.stack([directions[labels == c].mean(axis=0) for c in dict.fromkeys(class_of) if c >= 0])
    _, _, axes = np.linalg.svd(means - means.mean(axis=0), full_matrices=False)
    axes = axes[:2] * np.sign(axes[:2, np.abs(axes[:2]).argmax(axis=1)].diagonal())[:, None]
    return (directions - means.mean(axis=0)) @ axes.T


def figure1_in_words(data: pd.DataFrame) -> str:
    """What Figure 1 shows, as one Markdown paragraph with its numbers."""
    near = data[data["kind"] == "prototype"]
    rare, helpers = near.iloc[0], near.iloc[1:]
    lent = ", ".join(f"{h['class']} (n = {h['n']}) {h['attention']:.1f} %" for _, h in helpers.iterrows())
    return (
        f"**Figure 1.** The example is **{rare['class']}**, which has {rare['n']} training images. Of its "
        f"attention to the classes with more than {K} images it gives {lent}. Chosen by a rule: of all "
        "few-shot classes the one that gives a single class the largest share, so the clearest case and not "
        "a typical one. Right: validation images (dots) and learned weights, projected onto the plane in "
        "which the four classes lie furthest apart; the width of an arrow is the share of attention."
    )


def figure1(data: pd.DataFrame) -> Figure:
    """Figure 1: where the rare class and its helpers stand in the long tail; what it reads from them."""
    fig, (tail, space) = plt.subplots(1, 2, figsize=(9.6, 4.6), width_ratios=(0.8, 1))
    near = data[data["kind"] == "prototype"]
    rare, helpers = near.iloc[0], near.iloc[1:]
    classes = data[data["kind"] == "class"]
    _long_tail(tail, classes["place"], classes["n"], classes["group"])
    tail.set_title("Few classes have many images, many have few", size=10, loc="left")
    tail.set_ylim(0, 1.08 * classes["n"].max())
    for line, (_, one) in enumerate(near.sort_values("place").iterrows()):
        text = f"{one['class']} (n = {one['n']})"
        where = {"xytext": (0.58, 0.64 - 0.1 * line), "textcoords": "axes fraction", "va": "center"}
        arrow = {"arrowstyle": "-", "color": GREY, "lw": 0.9, "relpos": (0, 0.5), "shrinkB": 4}
        weight = "bold" if one["class"] == rare["class"] else "normal"
        tail.annotate(text, (one["place"], one["n"]), size=9, weight=weight, arrowprops=arrow, **where)
        look = {"color": style_of(one["group"]).colour, "markeredgecolor": BLACK, "zorder": 4}
        tail.plot([one["place"]], [one["n"]], marker="o", **look)
    _neighbourhood(space, data, rare, helpers)
    return fig


def _neighbourhood(ax: Axes, data: pd.DataFrame, rare: pd.Series, helpers: pd.DataFrame) -> None:
    drawn = {"sample": ("o", 22), "prototype": ("s", 130), "weight": ("o", 80), "final": ("*", 240)}
    for name in [rare["class"], *helpers["class"]]:
        of_class = data[(data["class"] == name) & (data["kind"] != "class")]
        colour = style_of(of_class.iloc[0]["group"]).colour
        for kind, (marker, size) in drawn.items():
            if kind == "prototype" and name != rare["class"]:
                continue  # the common classes lend what they have learned
            points = of_class[of_class["kind"] == kind]
            faint = (
                {"alpha": 0.4, "lw": 0} if kind == "sample" else {"edgecolor": BLACK, "lw": 1, "zorder": 3}
            )
            ax.scatter(points["x"], points["y"], s=size, marker=marker, color=colour, **faint)
    for _, helper in helpers.iterrows():
        weight = data[(data["class"] == helper["class"]) & (data["kind"] == "weight")].iloc[0]
        width = 0.8 + 5 * helper["attention"] / helpers["attention"].max()
        arrow = {"arrowstyle": "-|>", "lw": width, "color": style_of(helper["group"]).colour, "alpha": 0.75}
        arrow |= {"shrinkA": 8, "shrinkB": 9, "mutation_scale": 12 + 2 * width}
        ax.annotate("", (rare["x"], rare["y"]), (weight["x"], weight["y"]), arrowprops=arrow)
        _beside(ax, weight, f"{helper['class']}\nlends {helper['attention']:.1f} %", rare)
    lenders = data[(data["kind"] == "weight") & data["class"].isin(helpers["class"])]
    own = data[(data["class"] == rare["class"]) & data["kind"].isin(["prototype", "weight", "final"])]
    _beside(
        ax, own[["x", "y"]].mean(), f"{rare['class']}\n(n = {rare['n']})", lenders[["x", "y"]].mean(), gap=26
    )
    kinds = (("o", 5, "validation image"), ("s", 9, "prototype of the rare class"))
    kinds += (("o", 10, "learned weight"), ("*", 15, "final classifier $w^h(20)$"))
    handles = [
        Line2D(
            [], [], marker=m, markersize=s, label=words, color=GREY, linestyle="none", markeredgecolor=edge
        )
        for (m, s, words), edge in zip(kinds, (GREY, BLACK, BLACK, BLACK), strict=True)
    ]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=2, fontsize=9)
    ax.set_title("A rare class borrows from better-known classes like it", size=10, loc="left")
    ax.margins(x=0.26, y=0.18)
    ax.set_aspect("equal", adjustable="datalim")
    ax.axis("off")


def _beside(ax: Axes, point: pd.Series, text: str, centre: pd.Series, gap: float = 15) -> None:
    """A label `gap` points beyond a point, seen from `centre`."""
    x, y = point["x"] - centre["x"], point["y"] - centre["y"]
    length = np.hypot(x, y) or 1.0
    where = {"textcoords": "offset points", "xytext": (gap * x / length, gap * y / length), "size": 9}
    across = "center" if abs(x) < 0.6 * length else ("left" if x > 0 else "right")
    up = "center" if abs(y) < 0.6 * length else ("bottom" if y > 0 else "top")
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    ax.annotate(text, (point["x"], point["y"]), ha=across, va=up, bbox=box, zorder=5, **where)


# ---------------------------------------------------------------- Figure 3


def figure3_data(cache: Any, rare: int, k: int = K, bars: int = BARS) -> pd.DataFrame:
    """What Figure 3 draws: how the classifier of one class is built.

    Lines of kind `attention`: the `bars` classes that it reads most (name, n, group, cosine of prototype and
    weight, value = attention in percent) and all others together; of kind `part`: the three unit vectors of
    Eq. 7 and their sum, with their coordinates x and y in the plane that holds the sum and most of the rest,
    and the cosine to the sum. The sum of the parts' coordinates is that of the sum.
    """
    p, w, counts = cache.prototypes, cache.weights, check_counts("counts", cache.counts)
    shares = attention(p, w, counts, k=k)[rare]
    directions = torch.nn.functional.normalize(w, dim=1)
    cosines = directions @ torch.nn.functional.normalize(p[rare], dim=0)
    groups = group_names(counts.numpy())
    order = [j for j in shares.argsort(descending=True, stable=True).tolist() if counts[j] > k]
    records = [
        (
            "attention",
            cache.class_names[j],
            int(counts[j]),
            groups[j],
            float(cosines[j]),
            100 * float(shares[j]),
        )
        for j in order[:bars]
    ]
    if others := order[bars:]:
        name = f"{len(others)} other classes" if len(others) > 1 else cache.class_names[others[0]]
        rest = (float(cosines[others].mean()), 100 * float(shares[others].sum()))
        records.append(("attention", name, int(counts[others].sum()), "", *rest))
    frame = pd.DataFrame(records, columns=["kind", "name", "n", "group", "cosine", "value"])
    transfer = knowledge_transfer(p, w, counts, k)[rare]
    parts = torch.nn.functional.normalize(torch.stack([transfer, p[rare], w[rare]]).double(), dim=1)
    total = hybrid_classifier(p, w, counts, k)[rare].double()
    along = total / total.norm()
    rest = parts - (parts @ along)[:, None] * along
    across = torch.linalg.svd(rest, full_matrices=False).Vh[0]
    across = across * torch.sign(parts[0] @ across)  # the borrowed part points up
    vectors = torch.cat([parts, total[None]])
    built = pd.DataFrame({"kind": "part", "name": [*PARTS, "sum"], "n": int(counts[rare])})
    built["group"], built["class"] = groups[rare], cache.class_names[rare]
    built["cosine"] = (vectors @ along / vectors.norm(dim=1)).numpy()
    built["value"] = vectors.norm(dim=1).numpy()
    built["x"], built["y"] = (vectors @ along).numpy(), (vectors @ across).numpy()
    return pd.concat([frame, built], ignore_index=True)


def figure3_in_words(data: pd.DataFrame) -> str:
    """What Figure 3 shows, as one Markdown paragraph with its numbers."""
    parts = data[data["kind"] == "part"].set_index("name")
    bars = data[data["kind"] == "attention"]
    shown, rare = bars[bars["group"] != ""], parts.iloc[0]
    cosines = ", ".join(f"{words} {_signed(parts.loc[name, 'cosine'])}" for name, (_, words) in PARTS.items())
    return (
        f"**Figure 3.** Left: the prototype of {rare['class']} is compared with the learned weight of every "
        f"class that has more than {K} images; the cosines, times τ = 10, go through a softmax. Most goes to "
        f"{shown.iloc[0]['name']}, {shown.iloc[0]['value']:.1f} %; the {len(shown)} classes shown get "
        f"{shown['value'].sum():.0f} % together. Right: the mean of those weights, the prototype and the "
        "class's own weight, each of length 1, are laid tip to tail in the plane that holds their sum. "
        f"Cosine to the sum: {cosines}."
    )


def figure3(data: pd.DataFrame) -> Figure:
    """Figure 3: left the attention of one class, right the three vectors of Eq. 7, laid tip to tail."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.2), width_ratios=(1, 1.15))
    parts = data[data["kind"] == "part"].set_index("name")
    rare = parts.iloc[0]
    _attention_bars(left, data[data["kind"] == "attention"])
    left.set_title(f"1. The prototype of {rare['class']} (n = {rare['n']}) asks", size=10, loc="left")
    _tip_to_tail(right, parts)
    right.set_title("2. Three unit vectors are added (Eq. 7)", size=10, loc="left")
    return fig


def _attention_bars(ax: Axes, bars: pd.DataFrame) -> None:
    for place, (_, bar) in enumerate(bars.iterrows()):
        style = style_of(bar["group"]) if bar["group"] else None
        look = {"facecolor": style.colour, "hatch": style.hatch} if style else {"facecolor": "#CCCCCC"}
        ax.barh(place, bar["value"], height=0.75, edgecolor="white", linewidth=0, **look)
        cosine = ("cos " if style else "mean cos ") + _signed(bar["cosine"])
        ax.text(bar["value"], place, f"  {bar['value']:.1f} %  ({cosine})", va="center", size=8.5)
    names = [f"{bar['name']} (n = {bar['n']})" if bar["group"] else bar["name"] for _, bar in bars.iterrows()]
    ax.set_yticks(range(len(bars)), names, size=9)
    ax.set_ylim(len(bars) - 0.4, -0.6)
    ax.set_xlim(0, 1.75 * bars["value"].max())
    ax.set_xlabel(f"Attention to the learned weights\nof classes with more than {K} images (%)")
    ax.grid(axis="y", visible=False)
    present = [group for group in GROUPS if (bars["group"] == group).any()]
    looks = [(style_of(group), style_of(group).label.lower()) for group in present]
    handles = [
        plt.Rectangle((0, 0), 1, 1, facecolor=s.colour, hatch=s.hatch, edgecolor="white", label=label)
        for s, label in looks
    ]
    ax.legend(handles=handles, loc="center right", fontsize=9)


def _tip_to_tail(ax: Axes, parts: pd.DataFrame) -> None:
    look = {"arrowstyle": "-|>", "lw": 3, "mutation_scale": 18, "shrinkA": 0, "shrinkB": 0}
    sides = {"transfer": (-8, 4, "right"), "prototypes": (0, 8, "center"), "cosine": (8, 4, "left")}
    handles = []
    x = y = 0.0
    for name, (short, words) in PARTS.items():
        part, (right, up, align) = parts.loc[name], sides[name]
        tip, middle = (x + part["x"], y + part["y"]), (x + part["x"] / 2, y + part["y"] / 2)
        colour = style_of(name).colour
        ax.annotate("", tip, (x, y), arrowprops=look | {"color": colour})
        beside = {"textcoords": "offset points", "ha": align, "va": "bottom", "size": 10, "color": colour}
        ax.annotate(short, middle, (right, up), **beside)
        label = f"{short}: {words}, cosine to the sum {_signed(part['cosine'])}"
        handles.append(Line2D([], [], color=colour, lw=3, label=label))
        x, y = tip
    total = parts.loc["sum"]
    ax.annotate("", (total["x"], total["y"]), (0, 0), arrowprops=look | {"color": BLACK})
    beside = {"textcoords": "offset points", "ha": "center", "va": "top", "size": 10}
    ax.annotate("the final classifier $w^h(20)$", (total["x"] / 2, 0), (0, -9), **beside)
    heights = np.cumsum([0, *parts.loc[list(PARTS), "y"]])
    margin = 0.12 * total["x"]
    ax.update_datalim([(-margin, min(heights) - 2 * margin), (total["x"] + margin, max(heights) + margin)])
    ax.autoscale_view()
    ax.set_aspect("equal", adjustable="datalim")
    ax.axis("off")
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.02), fontsize=9)


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", MINUS)


# ---------------------------------------------------------------- the data sets

DATA_NAMES = {"tiny_imagenet_lt": "Tiny-ImageNet-LT", "cifar100_lt": "CIFAR-100-LT"}


def stands_for(role: str, cache: Any) -> str:
    """Title of a data set: the paper's (`ImageNet-LT`, `Places-LT`), or what stands in its place."""
    dataset = cache.meta["dataset"]
    name = DATA_NAMES.get(dataset, dataset)
    return role if dataset == role.lower().replace("-", "_") else f"In place of {role}: {name}"


def distribution_data(counts_of: Mapping[str, object]) -> pd.DataFrame:
    """Training images of every class, largest first: data set, place, n, group.

    counts_of: {name of the data set: training images a class [N]}.
    """
    frames = []
    for name, counts in counts_of.items():
        n = check_counts(f"counts of {name}", counts).cpu().numpy()
        n = np.sort(n)[::-1]
        columns = {"data set": name, "place": np.arange(1, len(n) + 1), "n": n, "group": group_names(n)}
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def distributions(data: pd.DataFrame) -> Figure:
    """Training images of each class on a log axis, largest class first, a panel a data set."""
    names = list(dict.fromkeys(data["data set"]))
    fig, axes = plt.subplots(1, len(names), figsize=(4.8 * len(names), 3.8), sharey=True, squeeze=False)
    for ax, name in zip(axes.flat, names, strict=True):
        one = data[data["data set"] == name]
        _long_tail(ax, one["place"], one["n"], one["group"])
        ax.set_yscale("log")
        ax.set_title(f"{name}\n{len(one)} classes, {one['n'].sum():,} training images", size=10, loc="left")
    top = data["n"].max()
    ticks = [step * 10**power for power in range(5) for step in (1, 2, 5)]
    axes.flat[0].set_ylim(data["n"].min() / 1.5, 1.3 * top)
    axes.flat[0].set_yticks([t for t in ticks if data["n"].min() / 1.5 <= t <= 1.3 * top])
    axes.flat[0].set_yticks([], minor=True)
    axes.flat[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for ax in axes.flat[1:]:
        ax.set_ylabel("")
    return fig


def _long_tail(ax: Axes, place: pd.Series, n: pd.Series, group: pd.Series) -> None:
    """Bars without gaps, coloured by group, with the number of classes and images of each in the legend."""
    for name in GROUPS:
        inside = group == name
        if not inside.any():
            continue
        style = style_of(name)
        label = f"{style.label}: {inside.sum()} classes, {n[inside].sum():,} images"
        look = {"color": style.colour, "label": label, "linewidth": 0}
        ax.bar(place[inside], n[inside], width=1.0, **look)
    ax.set_xlim(0.5, len(place) + 0.5)
    ax.set_xlabel("Classes, largest first")
    ax.set_ylabel("Training images of the class")
    ax.grid(axis="x", visible=False)
    ax.legend(loc="upper right", fontsize=8.5)
