"""The official lists: counts, both layouts, refusals, and checks of a tree of images."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from parts import class_folders, part_counts, write_part
from PIL import Image

from lt_core.checks import DataError
from lt_core.data import official
from lt_core.data.datasets import check_data, load_dataset, read_list
from lt_core.data.image_files import ImageFiles
from lt_core.data.official import ImageTree, check_official, digest, located, normalised, official_counts
from lt_core.metrics import group_of

LISTS = Path(os.environ.get("LT_DATA_ROOT", "")) / "official_lists"
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Both data sets in small."""
    root = tmp_path_factory.mktemp("part")
    for name in ("imagenet_lt", "places_lt"):
        write_part(root, name, divisor=400, size=24)
    return root


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path / "out"))


def made_lists(name: str) -> dict[str, list]:
    """Lists with the official counts and made-up files."""
    counts, per_class = official_counts(name), official.OFFICIAL[name].per_class
    folders = [f"n{label:08d}" for label in range(len(counts))]

    def rows(origin: str, numbers: list[int]) -> list:
        return [
            (f"{origin}/{folders[c]}/{origin}{c}_{i}.JPEG", c)
            for c, n in enumerate(numbers)
            for i in range(n)
        ]

    val, test = ([per_class[split]] * len(counts) for split in ("val", "test"))
    return {"train": rows("train", counts), "val": rows("train", val), "test": rows("val", test)}


@pytest.mark.parametrize(
    ("name", "images", "groups"),
    [
        ("imagenet_lt", (115846, 20000, 50000), (391, 463, 146)),
        ("places_lt", (62500, 7300, 36500), (132, 156, 77)),
    ],
)
def test_published_counts(name, images, groups):
    counts, per_class = official_counts(name), official.OFFICIAL[name].per_class
    assert (sum(counts), *(len(counts) * per_class[split] for split in ("val", "test"))) == images
    assert tuple(int(group.sum()) for group in group_of(np.array(counts)).values()) == groups


def test_lists_with_the_official_counts_pass_and_others_are_named(monkeypatch):
    lists = made_lists("imagenet_lt")
    with pytest.raises(
        DataError, match="ImageNet_LT_val.txt is not .*: its counts are right, but its images"
    ):
        check_official("imagenet_lt", normalised(lists))
    without = replace(official.OFFICIAL["imagenet_lt"], sha256={})
    monkeypatch.setitem(official.OFFICIAL, "imagenet_lt", without)
    check_official("imagenet_lt", normalised(lists))
    with pytest.raises(DataError, match="ImageNet_LT_val.txt is not the official list: it has 19999 images"):
        check_official("imagenet_lt", normalised(lists | {"val": lists["val"][1:]}))
    moved = [(lists["train"][0][0], 1), *lists["train"][1:]]
    with pytest.raises(DataError, match="train.txt is not .*: class 0 has 49 images, in the official one 50"):
        check_official("imagenet_lt", normalised(lists | {"train": moved}))
    classes = {0: 1, 1: 0}
    swapped = [(name, classes.get(label, label)) for name, label in lists["test"]]
    with pytest.raises(
        DataError, match="test.txt is not .*: class 1 is n00000000 there, n00000001 in the train one"
    ):
        check_official("imagenet_lt", normalised(lists | {"test": swapped}))
    with pytest.raises(
        DataError, match="Places_LT_train.txt is not .*: its counts are right, but its images"
    ):
        check_official("places_lt", normalised(made_lists("places_lt")))


@pytest.mark.skipif(not LISTS.is_dir(), reason="needs the official Places-LT lists under LT_DATA_ROOT")
def test_the_real_places_lists_in_both_layouts():
    images = normalised({split: read_list(LISTS / f"Places_LT_{split}.txt") for split in SPLITS})
    check_official("places_lt", images)

    def in_letters(image: official.Image) -> str:
        nested = image.class_name.replace("-", "/")
        return (
            f"data_256/{nested[0]}/{nested}/{image.file}"
            if image.origin == "train"
            else f"val_256/{image.file}"
        )

    other = {split: [(in_letters(i), i.label) for i in reversed(rows)] for split, rows in images.items()}
    check_official("places_lt", normalised(other))
    assert digest(normalised(other)["test"]) == digest(images["test"])
    assert len(official.class_folders(images["train"])) == 365


def test_paths_in_no_layout_and_labels_of_two_classes_are_refused():
    with pytest.raises(DataError, match="'images/cat/1.jpg' is in none of the official layouts"):
        normalised({"train": [("images/cat/1.jpg", 0)]})
    (image,) = normalised({"train": [("data/ILSVRC/Data/CLS-LOC/train/n01440764/1.JPEG", 0)]})["train"]
    assert str(image) == "train/n01440764/1.JPEG 0"
    images = normalised({"train": [("train/cat/1.jpg", 0), ("train/dog/1.jpg", 0)]})["train"]
    with pytest.raises(DataError, match="images of cat and of dog as class 0"):
        official.class_folders(images)
    with pytest.raises(DataError, match="no image of class 0"):
        official.class_folders(normalised({"train": [("train/cat/1.jpg", 1)]})["train"])


@pytest.mark.parametrize(
    ("listed", "there"),
    [
        ("train/bar-indoor/1.jpg", "train/bar-indoor/1.jpg"),
        ("train/bar-indoor/1.jpg", "data_256/b/bar/indoor/1.jpg"),
        ("data_256/b/bar/indoor/1.jpg", "train/bar-indoor/1.jpg"),
        ("data_256/b/bar/indoor/1.jpg", "data_large/b/bar/indoor/1.jpg"),
        ("val/bar-indoor/Places365_val_1.jpg", "val_256/Places365_val_1.jpg"),
        ("val_256/Places365_val_1.jpg", "val/bar-indoor/Places365_val_1.jpg"),
    ],
)
def test_images_are_found_in_the_layout_that_is_there(tmp_path, listed, there):
    (tmp_path / there).parent.mkdir(parents=True)
    (tmp_path / there).touch()
    records = {"train": [("train/bar-indoor/9.jpg", 0)], "test": [(listed, 0)]}
    tree = ImageTree(tmp_path)
    assert located("places_lt", normalised(records)["test"], tree) == [there]
    assert there in tree and "train/other/1.jpg" not in tree


def test_a_part_is_a_data_set_of_files(root):
    data = load_dataset("imagenet_lt_part", root)
    assert data.num_classes == 1000 and data.counts.tolist() == part_counts("imagenet_lt", 400)
    assert data.wnids == tuple(class_folders("imagenet_lt", 1000)) and data.class_names[0]
    assert isinstance(data.splits["test"].images, ImageFiles) and len(data.splits["test"]) == 1000
    places = load_dataset("places_lt_part", root)
    assert places.class_names[:2] == ("place 000, indoor", "place 001") and places.wnids is None


def profile_of_parts(folder: Path) -> str:
    path = folder / "trial.toml"
    path.write_text(
        'same_as = "paper"\n[datasets]\nimagenet_lt = "imagenet_lt_part"\nplaces_lt = "places_lt_part"\n',
        encoding="utf-8",
    )
    return str(path)


def test_check_data_on_parts_and_its_refusals(root, tmp_path):
    profile = profile_of_parts(tmp_path)
    lines = list(check_data(profile, root, deep=True))
    assert any("1000 val, 1000 test images of 1000 classes are there" in line for line in lines)
    assert sum("of each split, evenly spaced, can be decoded" in line for line in lines) == 2
    with pytest.raises(DataError, match="ImageNet_LT_train.txt is not the official list: it has"):
        list(check_data("paper", root))

    tree = root / "imagenet" / "val"
    victims = sorted(tree.rglob("*.JPEG"))[:3]
    for victim in victims:
        victim.rename(victim.with_suffix(".away"))
    with pytest.raises(
        DataError, match="the test list names 1000 images, of which 3 are missing .* unpack or"
    ):
        list(check_data(profile, root))
    (report,) = (tmp_path / "out" / ".cache").glob("missing-*.txt")
    assert report.read_text().splitlines() == [v.relative_to(root / "imagenet").as_posix() for v in victims]
    for victim in victims:
        victim.with_suffix(".away").rename(victim)

    half = victims[0].read_bytes()
    victims[0].write_bytes(half[:100])
    with pytest.raises(DataError, match=rf"{victims[0].name} in .* is not a readable image"):
        list(check_data(profile, root, deep=True))
    victims[0].write_bytes(half)


def test_a_missing_list_is_one_sentence_with_its_source_and_its_place(tmp_path):
    (tmp_path / "ImageNet_LT_train.txt").write_text("train/cat/1.jpg 0\n")
    with pytest.raises(
        DataError,
        match=r"no list ImageNet_LT_val.txt, ImageNet_LT_test.txt: put there what lies at "
        r"https://\S+/ImageNet_LT_val.txt https://\S+/ImageNet_LT_test.txt; and .* no list "
        r"Places_LT_train.txt, Places_LT_val.txt, Places_LT_test.txt",
    ):
        list(check_data("paper", tmp_path))  # of both data sets at once


def test_the_published_train_list_is_known_by_its_blob(tmp_path, monkeypatch):
    (tmp_path / "ImageNet_LT_train.txt").write_bytes(b"hello\n")
    blob = "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
    for name, same in ((blob, True), (blob[::-1], False)):
        known = replace(official.OFFICIAL["imagenet_lt"], train_blob=name)
        monkeypatch.setitem(official.OFFICIAL, "imagenet_lt", known)
        assert official.is_published_train_list("imagenet_lt", tmp_path) == same


def test_of_several_processes_the_first_looks_for_the_files(root, tmp_path, monkeypatch):
    victim = next((root / "imagenet" / "val").rglob("*.JPEG"))
    victim.rename(victim.with_suffix(".away"))
    try:
        monkeypatch.setenv("RANK", "1")
        assert len(load_dataset("imagenet_lt_part", root).splits["test"]) == 1000
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(DataError, match="of which 1 are missing"):
            load_dataset("imagenet_lt_part", root)
    finally:
        victim.with_suffix(".away").rename(victim)


@pytest.mark.skipif(not LISTS.is_dir(), reason="needs the official Places-LT lists under LT_DATA_ROOT")
def test_the_official_lists_on_an_empty_tree_say_what_is_missing(tmp_path):
    for split in SPLITS:
        (tmp_path / f"Places_LT_{split}.txt").symlink_to(LISTS / f"Places_LT_{split}.txt")
    with pytest.raises(DataError, match="there is no folder .*places365: docs/full_scale.md says"):
        load_dataset("places_lt", tmp_path)
    (tmp_path / "places365").mkdir()
    with pytest.raises(
        DataError, match="62500 images, of which 62500 are missing .*; of all lists 106300 are"
    ):
        load_dataset("places_lt", tmp_path)


# ---------------------------------------------------------------- iNaturalist 2018


@pytest.fixture
def species(tmp_path, monkeypatch) -> Path:
    """Three species of 10, 5 and 1 training images, three each to test on, listed by two people."""
    monkeypatch.setattr(official, "INATURALIST", (16, 3))
    for split, counts, home in (("train", (10, 5, 1), ""), ("val", (3, 3, 3), "/home/user/inat/")):
        names = [
            (f"train_val2018/Aves/{c}/{split}{i}.jpg", c) for c, n in enumerate(counts) for i in range(n)
        ]
        (tmp_path / f"iNaturalist18_{split}.txt").write_text("".join(f"{home}{n} {c}\n" for n, c in names))
        for name, label in names:
            path = tmp_path / "inaturalist2018" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 12), (90 * label, 0, 0)).save(path)
    return tmp_path


def test_inaturalist_is_tested_on_its_validation_images(species):
    data = load_dataset("inaturalist_2018", species)
    assert {split: len(one) for split, one in data.splits.items()} == {"train": 13, "val": 3, "test": 9}
    assert data.counts.tolist() == [8, 4, 1]
    assert data.class_names == ("0", "1", "2")
    lines = list(check_data("inaturalist", species, deep=True))
    assert lines[0].startswith("inaturalist_2018: 13 train, 3 val, 9 test images of 3 classes are there")
    assert "the train list is not the published file byte for byte" in lines[1]
    assert lines[2].endswith("can be decoded")


@pytest.mark.parametrize(
    ("split", "change", "message"),
    [
        ("train", lambda lines: lines[1:], "_train.txt is not .*: it has 15 images of 3 classes, .* 16 of 3"),
        ("train", lambda lines: lines[:-1] + lines[:1], "it has 16 images of 2 classes"),
        ("val", lambda lines: [*lines[:-1], lines[-1][:-2] + "1\n"], "class 1 has 4 images, .* 3"),
    ],
)
def test_other_lists_of_inaturalist_are_refused(species, split, change, message):
    path = species / f"iNaturalist18_{split}.txt"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    with pytest.raises(DataError, match=message):
        load_dataset("inaturalist_2018", species)


def test_missing_lists_of_inaturalist_say_where_they_lie(tmp_path):
    with pytest.raises(
        DataError, match="has no list iNaturalist18_train.txt, iNaturalist18_val.txt: .*https"
    ):
        load_dataset("inaturalist_2018", tmp_path)
