"""Where prototype, learned weight and final classifier of a class lie among its images: Figure 6 (App. E).

    examples = example_classes(attention(p, w, counts, k=20), counts)
    data = figure6_data(cache.features("val"), cache.labels("val"), centres_of(cache), examples, cache)
    image = save_figure(figure6(data), "F6", profile, data, alt=...)
    cosines = centre_cosines(cache)           # the claims of App. E, in feature space, for all classes

UMAP is a picture: its distances carry no numbers. The claims are tested on cosines.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lt_core.errors import InputError, check_counts
from lt_core.groups import GROUPS, group_of
from lt_core.metrics import COLUMNS, interval
from lt_core.report.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILLION, style_of
from lt_core.report.semantics import bootstrap_means, group_names, with_interval
from lt_core.transfer import hybrid_classifier

K = 20  # of the transfer and of the final classifier drawn: w^h(20) is the one for few-shot classes
PANELS = 4
CENTRES = {  # how each centre of a class is drawn
    "prototype": style_of("prototypes").marker,
    "classifier weight": style_of("cosine").marker,
    "knowledge transfer classifier": "*",
}
ROLES = {"example": VERMILLION, "first": PURPLE, "second": GREEN}  # the paper's red, purple and green
MEASURES = {  # column of centre_cosines: words, colour, marker
    "weight_prototype": ("learned weight and prototype, before transfer", BLUE, "o"),
    "final_prototype": ("final classifier and prototype", VERMILLION, "s"),
    "final_weight": ("final classifier and learned weight", BLACK, "D"),
    "sum_prototype": ("control: plain sum of the two, and prototype", ORANGE, "^"),
}
DIFFERENCES = (
    "towards_prototype",  # cosine to the prototype: final classifier minus learned weight
    "weight_over_prototype",  # of the final classifier: cosine to the weight minus that to the prototype
    "beyond_sum",  # cosine to the prototype: final classifier minus the plain sum without transfer
)


@dataclass(frozen=True)
class Example:
    """A class and the two that it pays the most attention to; by_rule: one many-, one medium-shot."""

    few: int
    many: int
    medium: int
    by_rule: bool = True

    @property
    def classes(self) -> tuple[int, int, int]:
        return self.few, self.many, self.medium


def example_classes(attention: object, counts: object, limit: int = PANELS) -> list[Example]:
    """The examples of Figure 6, by a rule that does not look at the picture.

    In the order of the class indices: the few-shot classes whose two classes of highest attention [N, N]
    (their own left out) are one many- and one medium-shot. Where there is none: the class with the fewest
    training images (n; counts [N]) and its best-attended pair, whatever their groups. At most `limit`.
    """
    shares = np.array(attention, float)
    counts = check_counts("counts", counts).cpu().numpy()
    if shares.shape != (len(counts), len(counts)) or len(counts) < 3:
        raise InputError(
            f"attention must be [N, N] with N = {len(counts)}, 3 or more, found {list(shares.shape)}"
        )
    np.fill_diagonal(shares, -1.0)
    groups = group_names(counts)
    found = []
    for c in np.flatnonzero(group_of(counts)["few"]).tolist():
        pair = _best_pair(shares[c])
        by_group = {groups[j]: j for j in pair}
        if set(by_group) == {"many", "medium"}:
            found.append(Example(c, by_group["many"], by_group["medium"]))
    if not found:
        rarest = int(counts.argmin())
        found = [Example(rarest, *_best_pair(shares[rarest]), by_rule=False)]
    return found[:limit]


def _best_pair(shares: np.ndarray) -> list[int]:
    return np.argsort(-shares, kind="stable")[:2].tolist()


def centres_of(cache: Any, k: int = K) -> dict[str, torch.Tensor]:
    """The three centres of every class, each [N, F]: prototype, learned weight, final classifier w^h(k)."""
    final = hybrid_classifier(cache.prototypes, cache.weights, cache.counts, k)
    rows = (cache.prototypes, cache.weights, final)
    return dict(zip(CENTRES, rows, strict=True))


def figure6_data(
    features: torch.Tensor,
    labels: torch.Tensor,
    centres: dict[str, torch.Tensor],
    examples: Sequence[Example],
    cache: Any,
    seed: int = 0,
) -> pd.DataFrame:
    """Two-dimensional UMAP of each example's samples and nine centres, embedded together (a fit an example).

    features [M, F] and labels [M] of the split shown; centres: {kind: [N, F]}; class names and counts come
    from `cache`. Cosine metric, fixed seed. Columns: panel, role (example, first, second), class, n, group,
    kind (`sample` or a key of centres), x, y. Raises InputError when an example has no samples.
    """
    groups = group_names(check_counts("counts", cache.counts).cpu().numpy())
    frames = []
    for panel, example in enumerate(examples):
        parts, about = [], []
        for role, c in zip(ROLES, example.classes, strict=True):
            samples = features[labels == c]
            if not len(samples):
                raise InputError(f"features: class {cache.class_names[c]} has no samples to draw")
            kinds = ["sample"] * len(samples) + list(centres)
            parts += [samples, *(rows[c : c + 1] for rows in centres.values())]
            start = (panel, role, cache.class_names[c], int(cache.counts[c]), groups[c])
            about += [(*start, kind) for kind in kinds]
        frame = pd.DataFrame(about, columns=["panel", "role", "class", "n", "group", "kind"])
        frame[["x", "y"]] = _embedding(torch.cat(parts), seed)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _embedding(points: torch.Tensor, seed: int) -> np.ndarray:
    """UMAP coordinates [M, 2] of points [M, F] under the cosine metric, the same on every run."""
    with warnings.catch_warnings(action="ignore", category=ImportWarning):  # of TensorFlow, not used here
        from umap import UMAP

    directions = torch.nn.functional.normalize(points.float(), dim=1).numpy()
    neighbours = min(15, len(directions) - 1)
    model = UMAP(n_neighbors=neighbours, min_dist=0.1, metric="cosine", random_state=seed, n_jobs=1)
    return model.fit_transform(directions)


def figure6(data: pd.DataFrame, columns: int = 2) -> Figure:
    """Figure 6: a panel an example of figure6_data; dots are images, large markers the centres of a class."""
    panels = sorted(data["panel"].unique())
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    size = (4.5 * columns, 4.1 * rows + 0.5) if columns > 1 else (6.0, 5.4)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for ax, panel in zip(axes.flat, panels, strict=False):
        _umap_panel(ax, data[data["panel"] == panel])
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    look = {"color": GREY, "markeredgecolor": BLACK, "linestyle": "none"}
    handles = [
        Line2D([], [], color=GREY, marker="o", markersize=4, linestyle="none", label="validation image")
    ]
    for kind, marker in CENTRES.items():
        handles.append(Line2D([], [], marker=marker, markersize=_size(marker) ** 0.5, label=kind, **look))
    fig.legend(handles=handles, loc="outside lower center", ncols=2 if columns == 1 else 4, fontsize=9)
    return fig


def _umap_panel(ax: Axes, data: pd.DataFrame) -> None:
    handles = []
    for role, colour in ROLES.items():
        of_class = data[data["role"] == role]
        samples = of_class[of_class["kind"] == "sample"]
        ax.scatter(samples["x"], samples["y"], s=26, color=colour, alpha=0.6, lw=0)
        first = of_class.iloc[0]
        label = f"{first['class']} ({style_of(first['group']).label.lower()}, n = {first['n']})"
        handles.append(Line2D([], [], color=colour, marker="o", markersize=6, linestyle="none", label=label))
    for kind, marker in CENTRES.items():
        for role, colour in ROLES.items():
            centre = data[(data["role"] == role) & (data["kind"] == kind)]
            look = {"marker": marker, "color": colour, "edgecolor": BLACK, "lw": 1.0, "zorder": 3}
            ax.scatter(centre["x"], centre["y"], s=_size(marker), **look)
    ax.set_xticks([])
    ax.set_yticks([])
    for side in ax.spines.values():
        side.set_visible(True)
        side.set_color(GREY)
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.02, 1.0), fontsize=9, handletextpad=0.2)


def figure6_in_words(examples: Sequence[Example], cache: Any) -> str:
    """Which classes Figure 6 shows, and whether the rule chose them: one Markdown paragraph."""
    names = cache.class_names
    shown = "; ".join(f"{names[e.few]} with {names[e.many]} and {names[e.medium]}" for e in examples)
    if not examples[0].by_rule:
        return (
            "**Figure 6.** The rule finds no class here (no few-shot class attends most to one many- and one "
            f"medium-shot class), so the rarest class is shown with its best-attended pair: {shown}."
        )
    return f"**Figure 6.** The rule chooses, in the order of the panels: {shown}."


def drawn_distances_in_words(data: pd.DataFrame) -> str:
    """In how many panels the example's final classifier is drawn nearer to its prototype than its weight."""
    centres = data[(data["role"] == "example") & (data["kind"] != "sample")]
    nearer = []
    for _, panel in centres.groupby("panel"):
        places = panel.set_index("kind")[["x", "y"]]
        weight, final = (
            np.linalg.norm(places.loc[kind] - places.loc["prototype"])
            for kind in ("classifier weight", "knowledge transfer classifier")
        )
        nearer.append(bool(final < weight))
    return (
        "In the picture the final classifier of the example class lies nearer to its prototype than the "
        f"learned weight does in {sum(nearer)} of {len(nearer)} panels."
    )


def _size(marker: str) -> float:
    """Area of a centre's marker, in points squared."""
    return 190.0 if marker == "*" else 110.0


# ---------------------------------------------------------------- the claims, in feature space


def centre_cosines(cache: Any, k: int = K) -> pd.DataFrame:
    """Cosines between the centres of each class, a line a class: class, n, group and the keys of MEASURES.

    Eq. 7 adds the prototype, so that the final classifier comes nearer to it by construction; `sum_prototype`
    is the control, norm(p) + norm(w) without any transfer.
    """
    p, w, final = (_directions(rows) for rows in centres_of(cache, k).values())
    plain = _directions(p + w)
    values = {"weight_prototype": w * p, "final_prototype": final * p, "final_weight": final * w}
    values["sum_prototype"] = plain * p
    counts = check_counts("counts", cache.counts).cpu().numpy()
    columns = {"class": list(cache.class_names), "n": counts, "group": group_names(counts)}
    return pd.DataFrame(columns | {name: v.sum(dim=1).numpy() for name, v in values.items()})


def centre_summary(cosines: pd.DataFrame, replicates: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Means of centre_cosines by group, with 95 % intervals (bootstrap over classes) and the middle 90 %.

    Columns: group, classes, measure (a key of MEASURES or one of DIFFERENCES), mean, ci_low, ci_high, low,
    high.
    """
    extended = cosines.assign(
        towards_prototype=cosines["final_prototype"] - cosines["weight_prototype"],
        weight_over_prototype=cosines["final_weight"] - cosines["final_prototype"],
        beyond_sum=cosines["final_prototype"] - cosines["sum_prototype"],
    )
    records = []
    for group in COLUMNS:
        inside = extended if group == "total" else extended[extended["group"] == group]
        for measure in [*MEASURES, *DIFFERENCES] if len(inside) else []:
            values = inside[measure].to_numpy(float)
            means = interval(bootstrap_means(values, replicates, seed))
            records.append((group, len(inside), measure, values.mean(), *means, *interval(values, 0.9)))
    columns = ["group", "classes", "measure", "mean", "ci_low", "ci_high", "low", "high"]
    return pd.DataFrame(records, columns=columns)


def centres_by_group(summary: pd.DataFrame) -> Figure:
    """Mean cosine of each pair of centres by group (dots), and the middle 90 % of classes (lines)."""
    fig, ax = plt.subplots(figsize=(7.2, 4.2))
    groups = [group for group in GROUPS if (summary["group"] == group).any()]
    for shift, (measure, (words, colour, marker)) in enumerate(MEASURES.items()):
        lines = summary[(summary["measure"] == measure) & summary["group"].isin(groups)]
        x = np.arange(len(groups)) + 0.16 * (shift - (len(MEASURES) - 1) / 2)
        ax.vlines(x, lines["low"], lines["high"], color=colour, lw=1.8, alpha=0.6)
        ax.plot(x, lines["mean"], color=colour, marker=marker, markersize=8, linestyle="none", label=words)
    sizes = summary.drop_duplicates("group").set_index("group")["classes"]
    ax.set_xticks(range(len(groups)), [f"{style_of(g).label}\n({sizes[g]} classes)" for g in groups])
    ax.set_xlim(-0.5, len(groups) - 0.5)
    ax.grid(axis="x", visible=False)
    ax.set_ylabel("Cosine similarity in feature space")
    fig.legend(loc="outside upper center", ncols=2, fontsize=9)
    return fig


def centres_in_words(summary: pd.DataFrame) -> list[str]:
    """Markdown lines: what the cosines say about the three claims of App. E."""
    lines = summary.set_index(["group", "measure"])
    text = []
    if ("few", "towards_prototype") in lines.index:
        moved, before, after, control, beyond = (
            lines.loc[("few", name)]
            for name in (
                *("towards_prototype", "weight_prototype", "final_prototype"),
                *("sum_prototype", "beyond_sum"),
            )
        )
        text.append(
            f"- Few-shot classes move towards their prototype: {_verdict(moved['ci_low'] > 0)}. Cosine to "
            f"the prototype {before['mean']:.2f} before, {after['mean']:.2f} after transfer "
            f"({_with_interval(moved)}). But Eq. 7 adds the prototype itself, so this is nearly true by "
            "construction: the plain sum of prototype and weight, without any transfer, reaches "
            f"{control['mean']:.2f}; the transfer changes that by {with_interval(beyond['mean'], beyond)}."
        )
    if ("many", "final_weight") in lines.index:
        near, far = lines.loc[("many", "final_weight")], lines.loc[("many", "final_prototype")]
        over = lines.loc[("many", "weight_over_prototype")]
        text.append(
            f"- Common classes stay close to their learned weight: {_verdict(over['ci_low'] > 0)}, if close "
            "means closer than to the prototype. Many-shot classes: cosine of the final classifier to the "
            f"weight {near['mean']:.2f}, to the prototype {far['mean']:.2f} ({_with_interval(over)}). This, "
            f"too, is helped by construction: with k = {K} a many-shot class also reads its own weight."
        )
    own = lines.loc[("total", "weight_prototype")]
    by_group = ", ".join(
        f"{group} {lines.loc[(group, 'weight_prototype'), 'mean']:.2f}"
        for group in GROUPS
        if (group, "weight_prototype") in lines.index
    )
    text.append(
        f"- Prototype and learned weight of a class differ: {_verdict(own['ci_high'] < 0.9)}, if a mean "
        f"cosine below 0.9 counts as different. Mean {own['mean']:.2f} over all classes ({by_group})."
    )
    return text


def _verdict(holds: bool) -> str:
    return "**holds** here" if holds else "**does not hold** here"


def _with_interval(line: pd.Series) -> str:
    return f"difference {with_interval(line['mean'], line)}"


def _directions(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows, dim=1)
