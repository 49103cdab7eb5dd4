"""Long-tail data sets: images uint8 [M, H, W, C] or files, labels [M], class names, training counts.

Images of the small data sets are decoded once, in parallel, from a folder or archives into one array cached
on disk; those of ImageNet-LT and Places-LT stay files (`image_files`). The lists that make a balanced data
set long-tailed follow one stated rule (`long_tail_lists`) and are read where the data root has them.

    data = load_dataset("tiny_imagenet_lt", data_root="data")
    data.splits["train"].images, data.counts
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lt_core import paths
from lt_core.checks import (
    DataError,
    InputError,
    check_label,
    first_line,
    is_below,
    number_in_environment,
    unknown,
)
from lt_core.data import cifar, official
from lt_core.data.image_files import ImageFiles, as_rgb, decode_smaller
from lt_core.data.profiles import OwnImages, Profile, load_profile

Record = tuple[str, int]  # path below the image folder, label
SPLITS = ["train", "val", "test"]
SAMPLE = 1000  # images of a split of files that `check-data --deep` decodes
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Images [M, H, W, C] as uint8 or as files (or features [M, F] as float32) with labels [M] (int64)."""

    images: Tensor | ImageFiles
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """Named splits (`train`, `val`, `test`) over the same classes."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    wnids: tuple[str, ...] | None = None  # WordNet 3.0 identifiers, where the classes are synsets

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def counts(self) -> Tensor:
        """Training images per class [N]."""
        return torch.bincount(self.splits["train"].labels, minlength=self.num_classes)


# ---------------------------------------------------------------- the long-tail rule


def pareto_counts(
    num_classes: int = 200, largest: int = 480, smallest: int = 5, alpha: float = 6.0
) -> np.ndarray:
    """Counts [N], largest first: scaled Pareto (Lomax) quantiles (Tiny-ImageNet-LT)."""
    quantiles = (1 - (np.arange(num_classes) + 0.5) / num_classes) ** (-1 / alpha) - 1
    quantiles = np.sort(quantiles)[::-1] / quantiles.max()
    return np.clip(np.round(quantiles * largest), smallest, largest).astype(int)


def exponential_counts(num_classes: int = 100, largest: int = 480, smallest: int = 5) -> np.ndarray:
    """Counts [N], largest first, falling geometrically from `largest` to `smallest` (CIFAR-100-LT)."""
    steps = np.arange(num_classes) / (num_classes - 1)
    return np.round(largest * (smallest / largest) ** steps).astype(int)


def long_tail_lists(files: list[list[str]], sorted_counts: np.ndarray, images_per_class: int = 500) -> dict:
    """Lists {"train", "val"} of (path, label) from each class's files, by the repository's rule.

    One generator (NumPy's RandomState(0)) lays the sorted counts on the classes, then shuffles each class's
    files, sorted by name: the first n_c are training images, the last 20 validation images.
    Raises DataError unless each class has `images_per_class` files.
    """
    generator = np.random.RandomState(0)
    counts = sorted_counts[generator.permutation(len(files))]
    lists: dict[str, list[Record]] = {"train": [], "val": []}
    for label, (names, count) in enumerate(zip(files, counts, strict=True)):
        if len(names) != images_per_class:
            raise DataError(
                f"class {label} has {len(names)} of {images_per_class} images: the long-tail lists are made "
                "from the full data set; for a part of it put the lists themselves into the data root"
            )
        shuffled = np.array(sorted(names))[generator.permutation(images_per_class)]
        lists["train"] += [(str(name), label) for name in shuffled[:count]]
        lists["val"] += [(str(name), label) for name in shuffled[-20:]]
    return lists


def read_list(path: Path, prefix: str = "") -> list[Record]:
    """Records of a `path label` list, without a prefix of its paths.

    Raises DataError naming a line that is none or points upwards or elsewhere.
    """
    records = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list {path} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        name, _, label = line.strip().rpartition(" ")
        if not name or "\0" in name or not label.isdecimal() or len(label) > 9:
            raise DataError(f"{path}, line {number}: expected `path label`, found {line[:80]!r}")
        name = name.removeprefix(prefix)
        if not is_below(name):
            raise DataError(f"{path}, line {number}: {name!r} points out of the data set")
        records.append((str(PurePosixPath(name)), int(label)))
    if not records:
        raise DataError(f"the list {path} is empty")
    return records


# ---------------------------------------------------------------- where images come from


class ImageSource:
    """The files of one folder of the data root: unpacked there, in .tar or .tar.gz archives, or part in each.

    Archives are read in place, never unpacked. A file that several places hold is read from the first: the
    folder, then the archives by name. Raises DataError where there is neither, or an archive is damaged.
    """

    def __init__(self, root: Path, folder: str) -> None:
        archives = [*root.glob(f"{folder}*.tar"), *root.glob(f"{folder}*.tar.gz")]
        self.places = [place for place in (root / folder, *sorted(archives)) if place.exists()]
        if not self.places:
            raise DataError(f"{root} has neither the folder {folder} nor an archive {folder}*.tar or .tar.gz")
        # Where each file lies: in which place, and as which member of an archive.
        self._found: dict[str, tuple[Path, tarfile.TarInfo | None]] = {}
        for place in reversed(self.places):
            with _readable(place):
                self._found |= {name: (place, member) for name, member in _files_in(place, folder)}

    def __str__(self) -> str:
        return " and ".join(map(str, self.places))

    @property
    def names(self) -> Iterable[str]:
        """Paths of all files below the folder."""
        return self._found.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def contents(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Each of these files once with its content, in the order in which archives hold them.

        That order is the only quick one in a compressed archive. Raises DataError naming a file that is
        missing or cut short.
        """
        wanted = set(names)
        if missing := wanted - self._found.keys():
            raise DataError(f"{min(missing)} is missing in {self}")
        for place in self.places:
            here = [(name, member) for name, (at, member) in self._found.items() if at == place]
            with nullcontext() if place.is_dir() else tarfile.open(place) as archive:
                for name, member in here:
                    if name not in wanted:
                        continue
                    with _readable(f"{name} in {place}"):
                        file = place / name
                        content = archive.extractfile(member).read() if archive else file.read_bytes()
                    yield name, content

    def read(self, name: str) -> bytes:
        """Content of one file; raises DataError as `contents` does."""
        ((_, content),) = self.contents([name])
        return content

    def text(self, name: str) -> str:
        """Content of a text file; raises DataError naming it when it is missing or not UTF-8."""
        content = self.read(name)
        with _readable(f"{name} in {self}"):
            return content.decode()

    def stamp(self, names: Iterable[str]) -> list[tuple[str, int, int]]:
        """What changes when these files do: path, size and time of change of each, or of its archive."""
        found = {name: self._found[name] for name in names if name in self}
        held = {place if member else place / name for name, (place, member) in found.items()}
        return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(held)]


def _files_in(place: Path, folder: str) -> Iterator[tuple[str, tarfile.TarInfo | None]]:
    """Path below the folder of each file of a directory or an archive, and its member of the archive."""
    if place.is_dir():
        yield from ((name, None) for name in files_below(place))
        return
    with tarfile.open(place) as archive:
        for member in archive:
            name = member.name.removeprefix(f"{folder}/")
            if member.isfile() and name != member.name and not any(map(_left_behind, name.split("/"))):
                yield name, member


LEFT_BEHIND = ("__MACOSX", "Thumbs.db", "desktop.ini")  # by operating systems, as are names with a dot


def _left_behind(name: str) -> bool:
    return name.startswith(".") or name in LEFT_BEHIND


def files_below(folder: Path) -> Iterator[str]:
    """Paths of all files below a folder; links are followed, what systems and JupyterLab leave is no data."""
    for place, folders, files in os.walk(folder, followlinks=True):
        here = Path(place)
        above = {here.resolve(), *here.resolve().parents}  # a link to one of them would never end
        folders[:] = [f for f in folders if not _left_behind(f) and (here / f).resolve() not in above]
        yield from ((here / f).relative_to(folder).as_posix() for f in files if not _left_behind(f))


@contextmanager
def _readable(what: object) -> Iterator[None]:
    """Turns whatever a damaged file raises (tarfile, gzip and zlib have many kinds) into a DataError."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{what} cannot be read: {first_line(error)}") from None


def decode(content: bytes, size: int, name: str = "image") -> np.ndarray:
    """One image as uint8 [size, size, 3]: short side resampled to `size`, centre cut. Raises DataError."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            scale = size / min(width, height)
            smaller = decode_smaller(image, scale)
            image = as_rgb(image)
            if (width, height) != (size, size):
                sides = [max(size, round(side * scale)) for side in (width, height)]
                image = image.resize(sides, Image.BICUBIC, box=(0, 0, smaller * width, smaller * height))
                left, top = (image.width - size) // 2, (image.height - size) // 2
                image = image.crop((left, top, left + size, top + size))
            return np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is not a readable image: {error}") from None


def decode_split(source: ImageSource, records: list[Record], size: int, label: str) -> Split:
    """All images of a list, decoded in parallel on first use and read from the disk cache afterwards.

    The cache's file is named after the list and the state of the files; label: how its name begins.
    """
    names = [name for name, _ in records]
    key = hashlib.sha256(json.dumps([names, size, source.stamp(names)]).encode()).hexdigest()[:16]
    path = paths.decoded() / "decoded" / f"{label}-{size}px-{key}.npy"
    shape = (len(names), size, size, 3)
    images = read_array(path)
    if images is None or images.shape != shape:
        images = np.empty(shape, dtype=np.uint8)
        rows = defaultdict(list)
        for row, name in enumerate(names):
            rows[name].append(row)

        def fill(file: tuple[str, bytes]) -> None:
            name, content = file
            images[rows[name]] = decode(content, size, f"{name} in {source}")

        # This thread reads, file by file in the order of an archive; the others decode.
        with ThreadPoolExecutor() as pool:
            list(pool.map(fill, source.contents(rows)))
        write_array(path, images)
    labels = torch.tensor([label for _, label in records])
    return Split(torch.from_numpy(images), labels)


def write_array(path: Path, array: np.ndarray) -> None:
    """Keep an array that can be made again."""
    content = io.BytesIO()
    np.save(content, array)
    paths.write_sealed(path, content.getvalue())


def read_array(path: Path) -> np.ndarray | None:
    """The kept array, or None when it is missing or damaged (it is then made again)."""
    content = paths.read_sealed(path)
    return None if content is None else np.load(io.BytesIO(content), allow_pickle=False)


# ---------------------------------------------------------------- the data sets


@dataclass(frozen=True)
class Listing:
    """A data set before its images are decoded: where they are and which image is in which split."""

    name: str
    source: ImageSource | official.ImageTree
    lists: dict[str, list[Record]]  # train, val, test
    class_names: tuple[str, ...]
    size: int  # pixels, of the decoded images; 0: they stay files, which an ImageTree holds
    wnids: tuple[str, ...] | None = None


def check_listing(listing: Listing) -> None:
    """Raises DataError for labels outside the classes, classes without training images, missing files.

    Also for an image in two splits or with two labels (`check_lists`).
    All missing files are named in `.cache/missing-<data set>.txt`.
    """
    check_lists(listing.name, listing.lists)
    classes = listing.class_names
    for name in classes:
        check_label(f"{listing.name}: the name of a class", name)
    for split, records in listing.lists.items():
        labels = {label for _, label in records}
        where = f"{listing.name}: the {split} list"
        if max(labels) >= len(classes):
            raise DataError(f"{where} has label {max(labels)}, but there are {len(classes)} classes")
        if split == "train" and (absent := set(range(len(classes))) - labels):
            raise DataError(f"{where} has no image of class {min(absent)} ({classes[min(absent)]})")
    missing = {
        split: names
        for split, records in listing.lists.items()
        if (names := [name for name, _ in records if name not in listing.source])
    }
    if missing:
        split, names = next(iter(missing.items()))
        every = [name for names in missing.values() for name in names]
        report = paths.decoded() / f"missing-{listing.name}.txt"
        with paths.atomic(report) as temporary:
            temporary.write_text("\n".join(every) + "\n", encoding="utf-8")
        raise DataError(
            f"{listing.name}: the {split} list names {len(listing.lists[split])} images, of which "
            f"{len(names)} are missing in {listing.source}, first {names[0]}; of all lists {len(every)} are, "
            f"named in {report}: unpack or copy these"
        )


def decode_listing(listing: Listing) -> Dataset:
    """The data set with its images as arrays or files; raises DataError as `check_listing`, `decode` do."""
    if number_in_environment("RANK", 0) == 0:  # of several processes the first looks for all, and ends them
        check_listing(listing)
    splits = {}
    for split, records in listing.lists.items():
        if listing.size:
            splits[split] = decode_split(listing.source, records, listing.size, f"{listing.name}-{split}")
        else:
            files = ImageFiles(listing.source.path, np.array([name for name, _ in records]))
            splits[split] = Split(files, torch.tensor([label for _, label in records]))
    return Dataset(listing.name, listing.class_names, splits, listing.wnids)


def _listed(root: Path, prefix: str, names: list[str], make: Callable[[], dict[str, list[Record]]]) -> dict:
    """The lists `<prefix>_<name>.txt` of the data root; where there are none, those of `make()`."""
    found = {name: root / f"{prefix}_{name}.txt" for name in names}
    if any(path.is_file() for path in found.values()):
        return {name: read_list(path) for name, path in found.items()}
    made = make()
    return {name: made[name] for name in names}


def _by_folder(source: ImageSource) -> dict[str, list[str]]:
    """Paths of the images of each folder, sorted."""
    folders = defaultdict(list)
    for name in sorted(name for name in source.names if name.lower().endswith(IMAGES)):
        folders[name.rpartition("/")[0]].append(name)
    return folders


def tiny_imagenet_classes(source: ImageSource) -> tuple[list[str], list[str]]:
    """Tiny-ImageNet's wnids in the order of wnids.txt and the first English name of each."""
    wnids = source.text("wnids.txt").split()
    words = dict(line.split("\t", 1) for line in source.text("words.txt").splitlines() if "\t" in line)
    return wnids, [words.get(wnid, wnid).split(",")[0].strip() for wnid in wnids]


def tiny_imagenet_lists(
    source: ImageSource, wnids: list[str], sorted_counts: np.ndarray | None = None
) -> dict[str, list[Record]]:
    """Tiny-ImageNet-LT's lists from the full tree, or those with other counts; test = the official
    validation images.

    A list with smaller counts is part of one with larger ones, and validation images are the same.
    """
    folders = _by_folder(source)
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    test = []
    for number, line in enumerate(source.text("val/val_annotations.txt").splitlines(), start=1):
        image, wnid = [*line.split(), "", ""][:2]
        if wnid not in label_of:
            raise DataError(f"val_annotations.txt in {source}, line {number}: no known class in {line!r}")
        test.append((f"val/images/{image}", label_of[wnid]))
    images = [folders[f"train/{wnid}/images"] for wnid in wnids]
    counts = pareto_counts(len(wnids)) if sorted_counts is None else sorted_counts
    return long_tail_lists(images, counts) | {"test": test}


def _tiny_imagenet(
    root: Path, name: str, names: list[str], size: int, sorted_counts: np.ndarray | None = None
) -> Listing:
    """Tiny-ImageNet-LT; with other counts always by the rule, for which the full data set must be there."""
    source = ImageSource(root, "tiny-imagenet-200")
    wnids, words = tiny_imagenet_classes(source)
    if sorted_counts is None:
        lists = _listed(root, "TinyImageNet_LT", names, lambda: tiny_imagenet_lists(source, wnids))
    else:
        made = tiny_imagenet_lists(source, wnids, sorted_counts)
        lists = {split: made[split] for split in names}
    return Listing(name, source, lists, tuple(words), size, tuple(wnids))


def cifar100_lists(source: ImageSource, classes: list[str]) -> dict[str, list[Record]]:
    """CIFAR-100-LT's lists (val-20 variant) from the full tree of PNG files."""
    folders = _by_folder(source)
    made = long_tail_lists([folders[f"train/{name}"] for name in classes], exponential_counts(len(classes)))
    test = [(file, label) for label, name in enumerate(classes) for file in folders[f"test/{name}"]]
    return made | {"test": test}


def _cifar100_lt(root: Path) -> Listing:
    source = ImageSource(root, "cifar-100-images")
    folders = (name.split("/") for name in source.names if name.lower().endswith(IMAGES))
    classes = sorted({parts[1] for parts in folders if parts[0] == "train" and len(parts) == 3})
    lists = _listed(root, "CIFAR100_LT", SPLITS, lambda: cifar100_lists(source, classes))
    return Listing("cifar100_lt", source, lists, tuple(name.replace("_", " ") for name in classes), 32)


def _official(root: Path, name: str, whole: bool = True) -> Listing:
    """ImageNet-LT or Places-LT; unless `whole`, with lists of any length, for a trial run on a part."""
    from lt_core.data.wordnet import synset_of  # takes seconds to import, and no other data set needs it

    files = official.list_files(name, root)
    # Lists in circulation have somebody's home folder before their paths; only the layout's part is read.
    images = official.normalised({split: read_list(path, "/") for split, path in files.items()})
    if whole:
        official.check_official(name, images)
    source = official.ImageTree(root / official.OFFICIAL[name].folder)
    lists = {
        split: list(zip(official.located(name, rows, source), [row.label for row in rows], strict=True))
        for split, rows in images.items()
    }
    folders = official.class_folders(images["train"])
    wnids = tuple(folders) if name == "imagenet_lt" else None
    names = [synset_of(wnid).split(".")[0] for wnid in wnids] if wnids else folders
    words = tuple(name.replace("-", ", ").replace("_", " ") for name in names)
    return Listing(name if whole else f"{name}_part", source, lists, words, 0, wnids)


def _inaturalist(root: Path) -> Listing:
    """iNaturalist 2018: tested on its validation list, as in the field; ours are taken of training images."""
    name = "inaturalist_2018"
    files = official.list_files(name, root)
    lists = official.inaturalist_lists({split: read_list(path, "/") for split, path in files.items()})
    source = official.ImageTree(root / official.OFFICIAL[name].folder)
    lists, classes = _with_validation(name, lists), _names_of_classes(lists["train"])
    return Listing(name, source, lists, tuple(classes), 0)


# ---------------------------------------------------------------- data sets of one's own

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
VAL_SHARE, VAL_MOST, VAL_LEAST = 5, 20, 5  # made of a fifth of the images, 20 at most, of classes of 5


def own_listing(name: str, own: OwnImages, data_root: str | Path | None = None) -> Listing:
    """A folder `train/<class>/*`, `val/`, `test/`, or lists of `path label` lines with the folder they name.

    Without a validation split it is made of training images (`held_out`). Raises DataError for classes that
    training lacks and for an image that is in two splits or has two labels.
    """
    folder = _below(data_root, own.folder)
    source = ImageSource(folder.parent, folder.name) if own.size else official.ImageTree(folder)
    if own.lists:
        prefix = f"{folder.as_posix()}/"  # lists may name files by their whole path
        lists = {split: read_list(_below(data_root, file), prefix) for split, file in own.lists.items()}
        classes = _names_of_classes(lists["train"])
    else:
        lists, classes = _tree_lists(folder)
    if "val" not in lists:
        lists = _with_validation(name, lists)
    lists = {split: lists[split] for split in SPLITS if split in lists}
    return Listing(name, source, lists, tuple(classes), own.size)


def _with_validation(name: str, lists: dict[str, list[Record]]) -> dict[str, list[Record]]:
    """The lists in the order of SPLITS, with validation images taken out of the training images."""
    check_lists(name, lists)  # as they were given: what follows moves images from one to another
    train = list(dict.fromkeys(lists["train"]))
    taken = held_out(np.array([label for _, label in train]))
    if not taken.any():
        raise DataError(
            f"{name} has no validation images, and no class has {VAL_LEAST} training images for some"
        )
    parts = {"train": list(compress(train, ~taken)), "val": list(compress(train, taken))}
    return parts | {split: records for split, records in lists.items() if split != "train"}


def _below(data_root: str | Path | None, path: str) -> Path:
    """A path as it is; a relative one starts at the data root."""
    given = Path(path).expanduser()
    return given if given.is_absolute() else paths.data_root(data_root) / given


def held_out(labels: np.ndarray) -> np.ndarray:
    """Which training images [M] become validation images: a fifth, at most 20, of each class of 5 or more."""
    generator, chosen = np.random.RandomState(0), np.zeros(len(labels), bool)
    order = np.argsort(labels, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):  # those of each class
        rows = generator.permutation(rows)
        if len(rows) >= VAL_LEAST:
            chosen[rows[: min(VAL_MOST, len(rows) // VAL_SHARE)]] = True
    return chosen


def image_names(folder: Path) -> list[str]:
    """Paths of all images below a folder, sorted; files of other kinds are no data."""
    return sorted(name for name in files_below(folder) if name.lower().endswith(IMAGES))


def _tree_lists(folder: Path) -> tuple[dict[str, list[Record]], list[str]]:
    """The lists of a tree `<split>/<class>/*`, and its classes: folders of train with an image in them."""
    names = {split: [f"{split}/{name}" for name in image_names(folder / split)] for split in SPLITS}
    if not (folder / "train").is_dir():
        raise DataError(f"{folder} has no folder train: images belong into train/<class>/, val/ and test/")
    if flat := next((n for of in names.values() for n in of if n.count("/") < 2), None):
        raise DataError(f"{flat} in {folder} is in no folder of a class: images belong into <split>/<class>/")
    classes = sorted({name.split("/")[1] for name in names["train"]})
    label_of = {name: label for label, name in enumerate(classes)}
    lists: dict[str, list[Record]] = {}
    for split in SPLITS:
        if (folder / split).is_dir():
            folders = [entry.name for entry in (folder / split).iterdir() if entry.is_dir()]
            for name in sorted(set(folders) - set(classes)):
                if split == "train" and not _left_behind(name):
                    log.warning("train/%s in %s has no image: it is no class", name, folder)
            if strange := next((n for n in names[split] if n.split("/")[1] not in label_of), None):
                raise DataError(f"{strange} in {folder}: {strange.split('/')[1]} is no class of train/")
            if not names[split]:
                raise DataError(f"{folder / split} has no images ({', '.join(IMAGES)})")
            lists[split] = [(name, label_of[name.split("/")[1]]) for name in names[split]]
    return lists, classes


def _names_of_classes(train: list[Record]) -> list[str]:
    """The folder that a class's images share, where they do and each class has its own; else its number."""
    folders: dict[int, set[str]] = defaultdict(set)
    for name, label in train:
        folders[label].add(name.rpartition("/")[0].rpartition("/")[2])
    numbers = range(max(folders) + 1)
    names = [min(folders.get(label, {""})) for label in numbers]
    told_apart = all(len(of) == 1 for of in folders.values()) and len(set(names)) == len(names)
    return names if told_apart and all(names) else [str(label) for label in numbers]


def check_lists(name: str, lists: dict[str, list[Record]]) -> None:
    """Raises DataError for an image in two splits or with two labels; says how many are listed twice."""
    known: dict[str, tuple[str, int]] = {}
    twice = []
    for split, records in lists.items():
        for path, label in records:
            other = known.setdefault(path, (split, label))
            if other[0] != split:
                raise DataError(f"{name}: {path} is both a {other[0]} and a {split} image")
            if other[1] != label:
                raise DataError(f"{name}: {path} has the labels {other[1]} and {label} in the {split} list")
        if len(records) != len({path for path, _ in records}):
            twice.append(f"{len(records) - len({path for path, _ in records})} of the {split} list")
    if twice:
        log.warning("%s: lines that stand twice: %s", name, ", ".join(twice))


def same_content(listing: Listing) -> list[tuple[str, str]]:
    """Pairs (path, path) of equal files in different splits, each file of the later split once."""
    by_size: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for split, records in listing.lists.items():
        for path, _ in records:
            by_size[(listing.source.path / path).stat().st_size].append((split, path))
    pairs = []
    for files in (files for files in by_size.values() if len({split for split, _ in files}) > 1):
        first: dict[str, tuple[str, str]] = {}
        for split, path in files:
            digest = paths.file_digest(listing.source.path / path)
            other = first.setdefault(digest, (split, path))
            if other[0] != split:
                pairs.append((other[1], path))
    return pairs


# ---------------------------------------------------------------- built-in data sets


DIGIT_COUNTS = (120, 104, 75, 54, 39, 28, 20, 14, 9, 5)  # largest first
DIGIT_VAL, DIGIT_TEST = 15, 40  # images a class


def _digits() -> Dataset:
    """scikit-learn's 8 x 8 digits (1,797 images), resampled to a long tail."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(-1)
    generator = np.random.RandomState(1)
    counts = np.array(DIGIT_COUNTS)[generator.permutation(10)]
    chosen: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for label, count in enumerate(counts):
        order = generator.permutation(np.flatnonzero(bunch.target == label))
        chosen["test"] += order[:DIGIT_TEST].tolist()
        chosen["val"] += order[DIGIT_TEST : DIGIT_TEST + DIGIT_VAL].tolist()
        chosen["train"] += order[DIGIT_TEST + DIGIT_VAL :][:count].tolist()
    labels = torch.from_numpy(bunch.target).long()
    splits = {split: Split(images[rows], labels[rows]) for split, rows in chosen.items()}
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return Dataset("digits", names, splits)


def _letters() -> Dataset:
    """Generated 8 x 8 images of the letters A to Z, shifted, turned and scaled: pre-training for `digits`."""
    generator = np.random.RandomState(0)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    fonts = {size: ImageFont.load_default(size) for size in range(44, 64)}
    splits = {}
    for split, per_class in (("train", 100), ("val", 20)):
        images = [_draw_letter(letter, fonts, generator) for letter in letters for _ in range(per_class)]
        labels = torch.arange(len(letters)).repeat_interleave(per_class)
        splits[split] = Split(torch.from_numpy(np.stack(images)).unsqueeze(-1), labels)
    return Dataset("letters", tuple(letters), splits)


def _draw_letter(letter: str, fonts: dict, generator: np.random.RandomState) -> np.ndarray:
    """One letter, drawn at 64 px and reduced to 8 x 8 grey levels."""
    canvas = Image.new("L", (64, 64))
    font = fonts[generator.randint(min(fonts), max(fonts) + 1)]
    centre = tuple(32 + generator.randint(-6, 7, size=2))
    ImageDraw.Draw(canvas).text(centre, letter, fill=255, font=font, anchor="mm", stroke_width=3)
    canvas = canvas.rotate(generator.uniform(-15, 15), resample=Image.BICUBIC)
    return np.asarray(canvas.resize((8, 8), Image.BOX))


def _cifar_lt(root: Path, num_classes: int, imbalance: int) -> Dataset:
    """The field's CIFAR-10-LT or CIFAR-100-LT; validation images are taken out of the training images."""
    splits, names = cifar.read_archive(root, num_classes)
    images, labels = splits["train"]
    rows = cifar.cut(labels.numpy(), imbalance)
    taken = held_out(labels.numpy()[rows])
    parts = {"train": rows[~taken], "val": rows[taken]}
    made = {split: Split(images[of], labels[of]) for split, of in parts.items()}
    return Dataset(f"cifar{num_classes}_lt_{imbalance}", names, made | {"test": Split(*splits["test"])})


# ---------------------------------------------------------------- data sets by name


TINY_IMAGENET_SIZES = {
    "tiny_imagenet_lt_half": (pareto_counts() + 1) // 2,
    "tiny_imagenet_lt_double": np.minimum(2 * pareto_counts(), 480),  # the other 20 are for validation
    "tiny_imagenet_480": np.full(200, 480),
}
FROM_IMAGES: dict[str, Callable[[Path], Listing]] = {
    "tiny_imagenet_lt": lambda root: _tiny_imagenet(root, "tiny_imagenet_lt", SPLITS, 64),
    # What more data changes: half and twice the images of each class, and as many of each as there are.
    **{
        name: partial(_tiny_imagenet, name=name, names=SPLITS, size=64, sorted_counts=counts)
        for name, counts in TINY_IMAGENET_SIZES.items()
    },
    # Pre-training for the 32 px images of CIFAR.
    "tiny_imagenet_480_32px": partial(
        _tiny_imagenet,
        name="tiny_imagenet_480_32px",
        names=["train", "val"],
        size=32,
        sorted_counts=TINY_IMAGENET_SIZES["tiny_imagenet_480"],
    ),
    "cifar100_lt": _cifar100_lt,
    "imagenet_lt": lambda root: _official(root, "imagenet_lt"),
    "places_lt": lambda root: _official(root, "places_lt"),
    "imagenet_lt_part": lambda root: _official(root, "imagenet_lt", whole=False),
    "places_lt_part": lambda root: _official(root, "places_lt", whole=False),
    "inaturalist_2018": _inaturalist,
}
BUILT_IN: dict[str, Callable[[], Dataset]] = {"digits": _digits, "letters": _letters}
FROM_ARCHIVE: dict[str, Callable[[Path], Dataset]] = {
    f"cifar{classes}_lt_{imbalance}": partial(_cifar_lt, num_classes=classes, imbalance=imbalance)
    for classes in cifar.FILES
    for imbalance in cifar.IMBALANCES
}


def listing_of(
    name: str, data_root: str | Path | None = None, own: Mapping[str, OwnImages] | None = None
) -> Listing:
    """Where the images of a data set are; own: those that a profile names. Raises InputError, DataError."""
    if own and name in own:
        return own_listing(name, own[name], data_root)
    if name not in FROM_IMAGES:
        raise InputError(unknown("data set", name, [*BUILT_IN, *FROM_ARCHIVE, *FROM_IMAGES, *(own or {})]))
    return FROM_IMAGES[name](paths.data_root(data_root))


def load_dataset(
    name: str, data_root: str | Path | None = None, own: Mapping[str, OwnImages] | None = None
) -> Dataset:
    """The data set of that name; those made of images need a data root (or LT_DATA_ROOT).

    own: the data sets that a profile names itself (`Profile.images`).
    Raises InputError for an unknown name and DataError for missing or unreadable files.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]()
    if name in FROM_ARCHIVE:
        return FROM_ARCHIVE[name](paths.data_root(data_root))
    return decode_listing(listing_of(name, data_root, own))


def check_data(profile: str, data_root: str | Path | None = None, deep: bool = False) -> Iterator[str]:
    """Lines about each data set that a profile trains on; with `deep`, images are decoded too.

    All of them where they are held in memory, of files SAMPLE of each split, evenly spaced. Raises DataError
    for the first thing that is missing or wrong in each data set, when all have been looked at.
    """
    chosen, problems = load_profile(profile), []
    for name in sorted({*chosen.datasets.values(), *(one.dataset for one in chosen.pretraining.values())}):
        try:
            yield from _check_dataset(name, chosen, data_root, deep)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("; and ".join(problems))


def _check_dataset(name: str, profile: Profile, data_root: str | Path | None, deep: bool) -> Iterator[str]:
    if name in BUILT_IN:
        yield f"{name}: built in, nothing to check"
        return
    if name in FROM_ARCHIVE:
        splits = load_dataset(name, data_root).splits
        yield f"{name}: {', '.join(f'{len(one)} {split}' for split, one in splits.items())} images are there"
        return
    listing = listing_of(name, data_root, profile.images)
    check_listing(listing)
    sizes = ", ".join(f"{len(records)} {split}" for split, records in listing.lists.items())
    classes = len(listing.class_names)
    yield f"{name}: {sizes} images of {classes} classes are there, in {listing.source}"
    if name in official.OFFICIAL and official.OFFICIAL[name].train_blob:
        same = official.is_published_train_list(name, paths.data_root(data_root))
        yield f"{name}: the train list {'is' if same else 'is not'} the published file byte for byte" + (
            "" if same else "; its counts and classes are right"
        )
    if not deep:
        return
    data = decode_listing(listing)
    if listing.size:
        yield f"{name}: all of them can be decoded"
        return
    for split in data.splits.values():
        split.images.check(SAMPLE)
    yield f"{name}: {SAMPLE} of each split, evenly spaced, can be decoded"
