"""Published data sets: their lists, and where the images lie.

ImageNet-LT and Places-LT (Liu et al., CVPR 2019), and at the end iNaturalist 2018.

The lists, `path label` a line, circulate with the paths of two directory layouts and the same content, so
they are compared as normalised records, and the images are found in either layout:

    imagenet/   train/n01440764/*.JPEG     val/n01440764/ILSVRC2012_val_*.JPEG, or val/ILSVRC2012_val_*.JPEG
    places365/  train/airfield/*.jpg       val/airfield/Places365_val_*.jpg
          or    data_256/a/airfield/*.jpg  val_256/Places365_val_*.jpg        (or data_large, val_large)

    images = normalised(records)
    check_official("places_lt", images)
    names = located("places_lt", images["train"], tree)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from lt_core.checks import DataError, is_below

COUNTS = Path(__file__).with_name("official_counts.json")  # training images of each class, by label
# The code of the paper's reference for its recipe (Kang et al.), which ships both sets of lists.
SOURCE = (
    "https://raw.githubusercontent.com/facebookresearch/classifier-balancing/"
    "22370c64141cc662f62ead89447c838c4a7977b5/data"
)
# A path of a list: whatever stands before the layout, a folder of the layout, the class, the file.
LAYOUT = re.compile(
    r"(?:.*?/)??(?P<top>train|val|val_256|val_large|data_256/[^/]+|data_large/[^/]+)/"
    r"(?:(?P<class_name>.+)/)?(?P<file>[^/]+)"
)


@dataclass(frozen=True)
class Image:
    """One record of a list, whatever layout its path had."""

    origin: str  # "train" or "val": which part of ImageNet or Places365 it is from
    class_name: str  # of the folder: n01440764, apartment_building-outdoor
    file: str
    label: int

    def __str__(self) -> str:
        """One line; a validation file's number is unique, so its folder says nothing new."""
        folder = f"{self.class_name}/" if self.origin == "train" else ""
        return f"{self.origin}/{folder}{self.file} {self.label}"


@dataclass(frozen=True)
class Official:
    """What is known of a published data set."""

    prefix: str  # of its lists: <prefix>_train.txt
    folder: str  # of its images below the data root
    per_class: dict[str, int]  # validation and test images of each class
    patterns: dict[str, tuple[str, ...]]  # of each origin: places of a file in the known layouts
    sha256: dict[str, str]  # of each list's normalised records, sorted; where it is known
    train_blob: str = ""  # git's name of the train list as it circulates, where nothing else is known


OFFICIAL = {
    "imagenet_lt": Official(
        prefix="ImageNet_LT",
        folder="imagenet",
        per_class={"val": 20, "test": 50},
        patterns={"train": ("train/{name}/{file}",), "val": ("val/{name}/{file}", "val/{file}")},
        sha256={
            "val": "5da53cbd61c10cd273ba5992beb9f02e5dd669ca1c68956fb7f1e12c16913593",
            "test": "c6213692e39b00b26d9aa84a1e43ee9940778d069e36a07e00c437bcbb2fafdc",
        },
        train_blob="a063f095fcd475db4cf8b0658c4b73955535bbf9",
    ),
    "places_lt": Official(
        prefix="Places_LT",
        folder="places365",
        per_class={"val": 20, "test": 100},
        patterns={
            "train": (
                "train/{name}/{file}",
                "data_256/{letter}/{nested}/{file}",
                "data_large/{letter}/{nested}/{file}",
            ),
            "val": ("val/{name}/{file}", "val_256/{file}", "val_large/{file}"),
        },
        sha256={
            "train": "b71a98a3a55b40f034159bebc0a706508ed0e52fdac0830115e6f3e3dc0ff0c0",
            "val": "fc9a0c20cf06763deea55b4fce57d18f8d767c7aed5ecb766af1d524a25c4c98",
            "test": "dbfa272ef22c10cc960146ea1c810dde4e800d87eb0359942b7409d19cb3da53",
        },
    ),
    "inaturalist_2018": Official(
        prefix="iNaturalist18",
        folder="inaturalist2018",
        per_class={"val": 3},
        patterns={},
        sha256={},
        train_blob="4accdb7584d2f0a5106c40a33ed6afa392189bcc",
    ),
}
INATURALIST = (437_513, 8_142)  # training images and classes; the counts of classes are in no list we have
INATURALIST_TOP = "train_val2018/"  # of all paths


# ---------------------------------------------------------------- lists


def list_files(name: str, root: Path) -> dict[str, Path]:
    """The lists in the data root; raises DataError for missing ones, naming where to fetch them."""
    prefix = OFFICIAL[name].prefix
    files = {split: root / f"{prefix}_{split}.txt" for split in ("train", *OFFICIAL[name].per_class)}
    if missing := [path.name for path in files.values() if not path.is_file()]:
        addresses = " ".join(f"{SOURCE}/{prefix}/{name}" for name in missing)
        raise DataError(f"{root} has no list {', '.join(missing)}: put there what lies at {addresses}")
    return files


def is_published_train_list(name: str, root: Path) -> bool:
    """Whether the train list is, byte for byte, the file that circulates under the name that git gave it."""
    content = (root / f"{OFFICIAL[name].prefix}_train.txt").read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest() == OFFICIAL[name].train_blob


def official_counts(name: str) -> list[int]:
    """Training images of each class, by label."""
    return json.loads(COUNTS.read_text(encoding="utf-8"))[name]


def normalised(records: dict[str, list[tuple[str, int]]]) -> dict[str, list[Image]]:
    """The records of each split without the layout of their paths.

    Validation files that lie in one folder have the class that training images of their label have.
    Raises DataError for a path in neither layout.
    """
    parsed = {split: [_parsed(path, label) for path, label in rows] for split, rows in records.items()}
    class_of = {image.label: image.class_name for image in parsed["train"]}
    return {
        split: [
            image if image.class_name else replace(image, class_name=class_of.get(image.label, ""))
            for image in images
        ]
        for split, images in parsed.items()
    }


def _parsed(path: str, label: int) -> Image:
    found = LAYOUT.fullmatch(path)
    if not found:
        raise DataError(f"{path!r} is in none of the official layouts, such as train/<class>/<file>")
    origin = "val" if found["top"].startswith("val") else "train"
    return Image(origin, (found["class_name"] or "").replace("/", "-"), found["file"], label)


def class_folders(images: list[Image]) -> list[str]:
    """The folder of each class, by label; raises DataError when a label has two, or none."""
    folders: dict[int, str] = {}
    for image in images:
        if folders.setdefault(image.label, image.class_name) != image.class_name:
            one, two = folders[image.label], image.class_name
            raise DataError(f"the training list has images of {one} and of {two} as class {image.label}")
    if absent := set(range(max(folders) + 1)) - set(folders):
        raise DataError(f"the training list has no image of class {min(absent)}")
    return [folders[label] for label in sorted(folders)]


def check_official(name: str, lists: dict[str, list[Image]]) -> None:
    """Raises DataError, naming the first difference, unless the lists are the published ones."""
    official, counts = OFFICIAL[name], official_counts(name)
    class_of = {image.label: image.class_name for image in lists["train"]}
    for split, images in lists.items():
        expected = counts if split == "train" else [official.per_class[split]] * len(counts)
        found = Counter(image.label for image in images)
        where = f"{official.prefix}_{split}.txt is not the official list"
        if len(images) != sum(expected):
            raise DataError(f"{where}: it has {len(images)} images, the official one {sum(expected)}")
        for label, number in enumerate(expected):
            if found[label] != number:
                raise DataError(
                    f"{where}: class {label} has {found[label]} images, in the official one {number}"
                )
        for image in images:
            if image.class_name != (name_there := class_of[image.label]):
                raise DataError(
                    f"{where}: class {image.label} is {image.class_name} there, {name_there} in the train one"
                )
        if split in official.sha256 and digest(images) != official.sha256[split]:
            raise DataError(f"{where}: its counts are right, but its images are others")


def digest(images: list[Image]) -> str:
    """sha256 of a list's records, whatever their order and layout."""
    return hashlib.sha256("\n".join(sorted(map(str, images))).encode()).hexdigest()


def inaturalist_lists(lists: dict[str, list[tuple[str, int]]]) -> dict[str, list[tuple[str, int]]]:
    """The lists of iNaturalist 2018 without what stands before the paths; the field tests on `val`.

    Raises DataError, naming the first difference, unless images and classes are as many as published.
    """
    official, (images, classes) = OFFICIAL["inaturalist_2018"], INATURALIST
    for split, records in lists.items():
        per_class = official.per_class.get(split)
        found = Counter(label for _, label in records)
        where = f"{official.prefix}_{split}.txt is not the official list"
        expected = classes * per_class if per_class else images
        if (len(records), sorted(found)) != (expected, list(range(classes))):
            raise DataError(
                f"{where}: it has {len(records)} images of {len(found)} classes, "
                f"the official one {expected} of {classes}"
            )
        for other in (label for label in found if per_class and found[label] != per_class):
            raise DataError(
                f"{where}: class {other} has {found[other]} images, in the official one {per_class}"
            )
    named = {
        split: [(INATURALIST_TOP + path.rpartition(INATURALIST_TOP)[2], label) for path, label in records]
        for split, records in lists.items()
    }
    return {"train": named["train"], "test": named["val"]}


# ---------------------------------------------------------------- images


class ImageTree:
    """A folder of images too many to list as a whole; `name in tree` reads each of its folders once.

    Raises DataError when there is no such folder.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise DataError(f"there is no folder {path}: docs/full_scale.md says what belongs there")
        self.path = path
        self._files: dict[str, set[str]] = {}

    def __str__(self) -> str:
        return str(self.path)

    def __contains__(self, name: str) -> bool:
        folder, _, file = name.rpartition("/")
        if folder not in self._files:
            place = self.path / folder
            self._files[folder] = {entry.name for entry in place.iterdir()} if place.is_dir() else set()
        return file in self._files[folder]


def located(name: str, images: list[Image], tree: ImageTree) -> list[str]:
    """Each image's path below the tree, in the layout that the first image of its origin is found in.

    Of no layout that is there, the first: its files are then reported as missing.
    """
    chosen: dict[str, str] = {}
    for image in images:
        if image.origin not in chosen:
            patterns = OFFICIAL[name].patterns[image.origin]
            there = [pattern for pattern in patterns if (tree.path / _place(pattern, image)).parent.is_dir()]
            chosen[image.origin] = (there or patterns)[0]
    return [_place(chosen[image.origin], image) for image in images]


def _place(pattern: str, image: Image) -> str:
    name = image.class_name
    place = pattern.format(name=name, file=image.file, letter=name[:1], nested=name.replace("-", "/"))
    if not is_below(place):
        raise DataError(f"{place!r} points out of the data set")
    return place
