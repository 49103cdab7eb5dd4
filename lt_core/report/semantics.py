"""Does attention select classes that mean something similar? Figure 9, and its question asked of all classes.

    shares = attention(cache.prototypes, cache.weights, cache.counts, k=0)      # [N, N]
    similarity = lch_matrix(class_synsets(cache.class_names, cache.meta["wnids"]))
    panels = figure9_data(shares, similarity, cache.class_names, cache.counts, drawn_classes(len(shares)))
    everything = semantic_test(shares, similarity, cache.counts)

A class is never its own candidate in these numbers: that its own weight is near says nothing of meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator
from scipy.stats import rankdata

from lt_core.errors import InputError, check_counts
from lt_core.groups import GROUPS, group_of
from lt_core.metrics import COLUMNS, interval
from lt_core.report.figures import BLACK, GREY, style_of
from lt_core.report.rendering import MINUS
from lt_core.wordnet import LARGEST

NEAREST = 10  # classes that Figure 9 shows of each
DRAWN = 5  # panels of Figure 9
PERMUTATIONS = 4999  # so that the smallest p-value is 0.0002
REPLICATES = 2000  # of the bootstrap over classes


def drawn_classes(num_classes: int) -> list[int]:
    """The five classes of Figure 9, drawn blindly: `numpy.random.default_rng(0)`, no replacement, sorted.

    The paper draws five at random, too, and does not say how.
    """
    chosen = np.random.default_rng(0).choice(num_classes, size=min(DRAWN, num_classes), replace=False)
    return sorted(chosen.tolist())


def nearest_shown(num_classes: int) -> int:
    """How many nearest classes are looked at: ten, but at most half of the other classes."""
    return max(1, min(NEAREST, (num_classes - 1) // 2))


def nearest_classes(attention: object) -> np.ndarray:
    """The other classes of each class [N, N - 1], by falling attention [N, N]."""
    shares = np.array(attention, float)
    np.fill_diagonal(shares, -1.0)
    return np.argsort(-shares, axis=1, kind="stable")[:, :-1]


def figure9_data(
    attention: object,
    similarity: np.ndarray,
    class_names: Sequence[str],
    counts: object,
    classes: Sequence[int],
) -> pd.DataFrame:
    """The bars of Figure 9: the other classes with the highest attention, for each of `classes`.

    attention [N, N] with k = 0, similarity [N, N] (Leacock-Chodorow), counts [N]. A line a bar: class, n, own
    (attention that the class pays to itself, percent), nearest (rank), neighbour, neighbour_n,
    neighbour_group, attention (percent), similarity, random (mean similarity to all other classes).
    """
    shares, similarity, counts = _checked(attention, similarity, counts)
    groups, order = group_names(counts), nearest_classes(shares)
    random = _mean_of_others(similarity)
    records = []
    for c in classes:
        for rank, j in enumerate(order[c, : nearest_shown(len(counts))], start=1):
            start = (class_names[c], counts[c], 100 * shares[c, c], rank)
            other = (class_names[j], counts[j], groups[j], 100 * shares[c, j])
            records.append((*start, *other, similarity[c, j], random[c]))
    columns = ["class", "n", "own", "nearest", "neighbour", "neighbour_n", "neighbour_group", "attention"]
    return pd.DataFrame(records, columns=[*columns, "similarity", "random"])


def figure9(data: pd.DataFrame, columns: int = 2) -> Figure:
    """Figure 9: a panel a class of figure9_data, bars of WordNet similarity by falling attention; a key."""
    names = list(dict.fromkeys(data["class"]))
    rows = -(-(len(names) + 1) // columns)
    height = 0.8 + 0.2 * max(7, int(data["nearest"].max()))
    fig, axes = plt.subplots(rows, columns, figsize=(8.6, rows * height), squeeze=False)
    for ax, name in zip(axes.flat, names, strict=False):
        _neighbour_bars(ax, data[data["class"] == name])
    for ax in axes.flat[len(names) :]:
        ax.axis("off")
    _key(axes.flat[len(names)], data)
    fig.get_layout_engine().set(wspace=0.06)
    for ax in axes.flat[max(0, len(names) - columns) : len(names)]:
        ax.set_xlabel("Leacock-Chodorow similarity in WordNet")
    return fig


def figure9_in_words(data: pd.DataFrame) -> list[str]:
    """Markdown lines: for each class of figure9_data, its nearest classes against all others."""
    lines = []
    for name in dict.fromkeys(data["class"]):
        bars = data[data["class"] == name]
        first, mean, random = bars.iloc[0], bars["similarity"].mean(), bars["random"].iloc[0]
        closest = bars.loc[bars["similarity"].idxmax()]
        best = f"; closest in meaning {closest['neighbour']} ({closest['similarity']:.2f})"
        lines.append(
            f"- {name} (n = {first['n']}, {first['own']:.0f} % of its attention goes to itself): mean "
            f"similarity of the {len(bars)} nearest {mean:.2f}, of all other classes {random:.2f} "
            f"({signed(mean - random)}){best if bars['similarity'].nunique() > 1 else ''}"
        )
    return lines


def _neighbour_bars(ax: Axes, data: pd.DataFrame) -> None:
    first = data.iloc[0]
    for _, bar in data.iterrows():
        style = style_of(bar["neighbour_group"])
        look = {"facecolor": style.colour, "hatch": style.hatch, "edgecolor": "white", "linewidth": 0}
        ax.barh(bar["nearest"], bar["similarity"], height=0.78, **look)
        beside = {"transform": ax.get_yaxis_transform(), "va": "center", "ha": "right"}
        ax.text(1.16, bar["nearest"], f"{bar['attention']:.1f} %", size=8.5, color=GREY, **beside)
    ax.axvline(first["random"], color=BLACK, lw=1.3, ls=(0, (3, 2)))
    ax.axvline(LARGEST, color=GREY, lw=1)
    ax.set_xlim(0, LARGEST + 0.04)
    ax.set_yticks(data["nearest"], data["neighbour"], size=8.5)
    ax.set_ylim(data["nearest"].max() + 0.6, 0.4)
    ax.grid(axis="y", visible=False)
    ax.set_title(f"{first['class']} (n = {first['n']})", size=10, weight="bold", loc="left")


def _key(ax: Axes, data: pd.DataFrame) -> None:
    present = [group for group in GROUPS if (data["neighbour_group"] == group).any()]
    handles: list[Patch | Line2D] = [
        Patch(facecolor=s.colour, hatch=s.hatch, edgecolor="white", label=f"{s.label} class")
        for s in map(style_of, present)
    ]
    handles.append(Line2D([], [], color=BLACK, lw=1.3, ls=(0, (3, 2)), label="mean over all other classes"))
    handles.append(Line2D([], [], color=GREY, lw=1, label=f"same meaning ({LARGEST:.2f})"))
    text = "Bars: the classes with the highest\nattention, highest first\nGrey: their share of the attention"
    ax.legend(handles=handles, loc="center left", title=text, fontsize=9, title_fontsize=9, alignment="left")


# ---------------------------------------------------------------- all classes


@dataclass(frozen=True)
class SemanticTest:
    """The answer for all classes and each group: a line a group in `table`, null samples by group in `null`.

    table: group, classes, rank_correlation, null_low, null_high, p_value, nearest, similarity_nearest,
    similarity_random, similarity_best (of as many classes closest in WordNet: the most that attention could
    reach), difference, ci_low, ci_high. NaN where WordNet puts all classes equally far apart.
    null: {group: rank correlations with permuted classes [permutations]}.
    """

    table: pd.DataFrame
    null: dict[str, np.ndarray]


def semantic_test(
    attention: object,
    similarity: np.ndarray,
    counts: object,
    permutations: int = PERMUTATIONS,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> SemanticTest:
    """Whether attention [N, N] (k = 0) and WordNet similarity [N, N] agree, over all classes and by group.

    Rank correlation: Spearman's between a class's attention to the other classes and its similarity to them,
    averaged over classes. Null: the classes are permuted on WordNet's side (rows and columns together, so
    that its structure stays: Mantel's test); p-value one-sided, (1 + #{null >= observed}) / (1 +
    permutations). Nearest against random: mean similarity of the `nearest_shown` classes of highest
    attention, minus the mean over all other classes, which is what classes drawn at random have on average;
    95 % interval by a bootstrap over classes.
    """
    shares, similarity, counts = _checked(attention, similarity, counts)
    members = {**group_of(counts), "total": np.ones(len(counts), bool)}
    ours, theirs = _standard_ranks(shares), _standard_ranks(similarity)
    generator = np.random.default_rng(seed)
    observed = (ours * theirs).sum(axis=1)
    permuted = np.empty((permutations, len(COLUMNS)))
    weights = np.stack([members[g] / max(1, members[g].sum()) for g in COLUMNS])
    for i in range(permutations):
        order = generator.permutation(len(counts))
        permuted[i] = weights @ (ours * theirs[np.ix_(order, order)]).sum(axis=1)
    nearest = nearest_shown(len(counts))
    top = np.take_along_axis(similarity, nearest_classes(shares)[:, :nearest], axis=1).mean(axis=1)
    random, best = _mean_of_others(similarity), _mean_of_closest(similarity, nearest)
    defined = bool(theirs.any())
    records, null = [], {}
    for column, group in enumerate(COLUMNS):
        inside = members[group]
        null[group] = permuted[:, column] if defined and inside.any() else np.full(permutations, np.nan)
        correlation = observed[inside].mean() if defined and inside.any() else np.nan
        gain = (top - random)[inside]
        low, high = interval(bootstrap_means(gain, replicates, seed))
        as_large = (1 + (null[group] >= correlation - 1e-12).sum()) / (1 + permutations)
        p_value = as_large if np.isfinite(correlation) else np.nan
        means = [
            values[inside].mean() if inside.any() else np.nan for values in (top, random, best, top - random)
        ]
        line = (group, int(inside.sum()), correlation, *interval(null[group]), p_value, nearest)
        records.append((*line, *means, low, high))
    columns = ["group", "classes", "rank_correlation", "null_low", "null_high", "p_value", "nearest"]
    columns += [
        "similarity_nearest",
        "similarity_random",
        "similarity_best",
        "difference",
        "ci_low",
        "ci_high",
    ]
    return SemanticTest(pd.DataFrame(records, columns=columns), null)


def semantic_figure_data(test: SemanticTest, bins: int = 40) -> pd.DataFrame:
    """What `semantic_figure` draws: the table of the test and the histogram of its null over all classes.

    Columns: kind (`group` or `null`), then those of the table; a line of kind `null` holds the left edge of a
    bin in null_low, its right edge in null_high and the number of permutations in it in `classes`.
    """
    table = test.table.assign(kind="group")
    null = test.null["total"][np.isfinite(test.null["total"])]
    if len(null):
        heights, edges = np.histogram(null, bins=bins)
        bars = {"kind": "null", "group": "total", "classes": heights, "null_low": edges[:-1]}
        table = pd.concat([table, pd.DataFrame(bars | {"null_high": edges[1:]})], ignore_index=True)
    return table[["kind", *test.table.columns]].astype({"nearest": "Int64"})


def semantic_figure(data: pd.DataFrame) -> Figure:
    """Left: rank correlation over all classes and its shuffled null; right: nearest against random by group.

    data: of semantic_figure_data.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.6), width_ratios=(1.1, 1))
    groups, null = data[data["kind"] == "group"], data[data["kind"] == "null"]
    observed = groups.set_index("group").loc["total"]
    if len(null):
        widths = null["null_high"] - null["null_low"]
        left.bar(
            null["null_low"], null["classes"], widths, align="edge", color=GREY, label="classes shuffled"
        )
        left.axvline(observed["rank_correlation"], color=BLACK, lw=2.5, label="classes as they are")
        left.legend(loc="upper center")
        left.set_ylim(0, 1.25 * null["classes"].max())
    else:
        text = "not defined: WordNet puts all\nclasses equally far apart"
        left.text(0.5, 0.5, text, transform=left.transAxes, ha="center", va="center")
    left.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]) if len(null) else NullLocator())
    left.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]) if len(null) else NullLocator())
    left.set_xlabel("Rank correlation of attention and WordNet similarity")
    left.set_ylabel("Permutations")
    names = [group for group in COLUMNS if _classes_of(groups, group)]
    for place, group in enumerate(names):
        line, style = groups.set_index("group").loc[group], style_of(group)
        spread = [[line["difference"] - line["ci_low"]], [line["ci_high"] - line["difference"]]]
        marker = {"fmt": style.marker, "color": style.colour, "capsize": 4, "markersize": 8}
        right.errorbar([place], [line["difference"]], yerr=spread, **marker)
    right.axhline(0, color=GREY, lw=1)
    labels = [f"{style_of(g).label}\n({_classes_of(groups, g)} classes)" for g in names]
    right.set_xticks(range(len(names)), labels, size=9)
    right.set_xlim(-0.5, len(names) - 0.5)
    right.set_ylabel(f"Similarity of the {int(observed['nearest'])} nearest\nminus a random class")
    right.grid(axis="x", visible=False)
    return fig


def semantics_in_words(test: SemanticTest) -> list[str]:
    """Markdown lines: what the numbers say about the paper's claim, for all classes and by group."""
    lines = test.table.set_index("group")
    everything = lines.loc["total"]
    if not np.isfinite(everything["rank_correlation"]):
        return [
            "WordNet puts all these classes equally far apart: the question has no answer here, and "
            "attention can neither follow meaning nor miss it."
        ]
    agrees = everything["p_value"] < 0.05 and everything["ci_low"] > 0
    verdict = "**holds**" if agrees else "**does not hold**"
    nearest = int(everything["nearest"])
    text = [
        f"That attention selects classes of similar meaning {verdict} here. Rank correlation "
        f"{signed(everything['rank_correlation'])} over {int(everything['classes'])} classes; with shuffled "
        f"classes 95 % lie between {signed(everything['null_low'])} and {signed(everything['null_high'])} "
        f"({p_in_words(everything['p_value'])}). The {nearest} nearest classes have a similarity of "
        f"{everything['similarity_nearest']:.2f}, classes at random {everything['similarity_random']:.2f}: "
        f"{with_interval(everything['difference'], everything)}. The {nearest} closest in WordNet would have "
        f"{everything['similarity_best']:.2f}: attention makes {_share_of_possible(everything):.0f} % of the "
        "possible gain."
    ]
    for group in (g for g in GROUPS if lines.loc[g, "classes"]):
        line = lines.loc[group]
        text.append(
            f"- {style_of(group).label} classes ({int(line['classes'])}): rank correlation "
            f"{signed(line['rank_correlation'])} ({p_in_words(line['p_value'])}), nearest minus random "
            f"{with_interval(line['difference'], line)}"
        )
    return text


def signed(value: float) -> str:
    """A difference with its sign: `+0.27`."""
    return f"{value:+.2f}".replace("-", MINUS)


def with_interval(value: float, line: pd.Series) -> str:
    """A difference with the 95 % interval of its line: `+0.27 [+0.25, +0.29]`."""
    return f"{signed(value)} [{signed(line['ci_low'])}, {signed(line['ci_high'])}]"


def p_in_words(p_value: float) -> str:
    """A p-value of a permutation test: `p = 0.03`, or `p < 0.001`."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def _share_of_possible(line: pd.Series) -> float:
    """Gain of the nearest classes over random ones, in percent of the largest possible."""
    return 100 * line["difference"] / (line["similarity_best"] - line["similarity_random"])


def _classes_of(groups: pd.DataFrame, group: str) -> int:
    return int(groups.set_index("group").loc[group, "classes"])


def _checked(
    attention: object, similarity: object, counts: object
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts = check_counts("counts", counts).cpu().numpy()
    shares, similarity = np.asarray(attention, float), np.asarray(similarity, float)
    for name, matrix in (("attention", shares), ("similarity", similarity)):
        if matrix.shape != (len(counts), len(counts)) or not np.isfinite(matrix).all():
            raise InputError(
                f"{name} must be finite and of shape {[len(counts)] * 2}, found {list(matrix.shape)}"
            )
    if len(counts) < 3:
        raise InputError(f"counts: the comparison needs 3 classes at least, found {len(counts)}")
    return shares, similarity, counts


def group_names(counts: np.ndarray) -> list[str]:
    """many, medium or few for each class [N]."""
    masks = group_of(counts)
    return [next(group for group in GROUPS if masks[group][c]) for c in range(len(counts))]


def _mean_of_others(similarity: np.ndarray) -> np.ndarray:
    """Mean similarity of each class to all others [N]."""
    return (similarity.sum(axis=1) - similarity.diagonal()) / (len(similarity) - 1)


def _mean_of_closest(similarity: np.ndarray, how_many: int) -> np.ndarray:
    """Mean similarity of each class to the `how_many` others that are closest to it in WordNet [N]."""
    others = similarity[~np.eye(len(similarity), dtype=bool)].reshape(len(similarity), -1)
    return -np.sort(-others, axis=1)[:, :how_many].mean(axis=1)


def _standard_ranks(values: np.ndarray) -> np.ndarray:
    """Each row's ranks without the diagonal, centred and of norm 1: products of two rows are Spearman's
    correlation. Zero on the diagonal, and in rows whose values are all the same (no order to agree with)."""
    off = ~np.eye(len(values), dtype=bool)
    ranks = rankdata(values[off].reshape(len(values), -1), axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(ranks, axis=1, keepdims=True)
    full = np.zeros_like(values)
    full[off] = np.divide(ranks, norms, out=np.zeros_like(ranks), where=norms > 0).ravel()
    return full


def bootstrap_means(values: np.ndarray, replicates: int, seed: int) -> np.ndarray:
    """Means [replicates] of values [K] drawn with replacement; NaN without values."""
    if not len(values):
        return np.full(replicates, np.nan)
    drawn = np.random.default_rng(seed).integers(len(values), size=(replicates, len(values)))
    return values[drawn].mean(axis=1)
