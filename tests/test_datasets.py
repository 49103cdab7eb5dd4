"""Data sets: the long-tail rule, lists, sources, decoding, the built-in ones, and real images."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lt_core import paths
from lt_core.checks import DataError, InputError
from lt_core.data import official
from lt_core.data.datasets import (
    FROM_IMAGES,
    TINY_IMAGENET_SIZES,
    ImageSource,
    Listing,
    check_data,
    check_lists,
    cifar100_lists,
    decode,
    decode_listing,
    exponential_counts,
    load_dataset,
    long_tail_lists,
    pareto_counts,
    read_list,
    tiny_imagenet_classes,
    tiny_imagenet_lists,
)
from lt_core.metrics import group_of

needs_images = pytest.mark.skipif(
    not os.environ.get("LT_DATA_ROOT"), reason="LT_DATA_ROOT names no folder with the image data sets"
)


def groups(counts) -> list[int]:
    return [int(mask.sum()) for mask in group_of(counts).values()]


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path / "outputs"))


# ---------------------------------------------------------------- the rule


def test_tiny_imagenet_lt_counts():
    counts = pareto_counts()
    assert counts.sum() == 11_198 and counts.max() == 480 and counts.min() == 5
    assert groups(counts) == [32, 99, 69]


def test_cifar100_lt_counts():
    counts = exponential_counts()
    assert counts.sum() == 10_547 and counts.max() == 480 and counts.min() == 5
    assert groups(counts) == [35, 34, 31]


def test_a_list_is_part_of_every_larger_one_and_validation_images_stay_the_same():
    files = [[f"{c}/{i}.png" for i in range(500)] for c in range(200)]
    half, double, balanced = (long_tail_lists(files, counts) for counts in TINY_IMAGENET_SIZES.values())
    today = long_tail_lists(files, pareto_counts())
    assert [len(one["train"]) for one in (half, today, double, balanced)] == [5654, 11_198, 21_494, 96_000]
    assert set(half["train"]) < set(today["train"]) < set(double["train"]) < set(balanced["train"])
    assert half["val"] == today["val"] == double["val"] == balanced["val"]
    assert not set(balanced["train"]) & set(balanced["val"])


def test_lists_are_disjoint_and_as_long_as_the_rule_says():
    files = [[f"{c}/{i}.png" for i in range(500)] for c in range(4)]
    lists = long_tail_lists(files, np.array([480, 100, 20, 5]))
    train, val = {n for n, _ in lists["train"]}, {n for n, _ in lists["val"]}
    assert not train & val and len(train) == 605 and len(val) == 80
    shuffled = long_tail_lists([names[::-1] for names in files], np.array([480, 100, 20, 5]))
    assert shuffled == lists  # the order of the file listing does not matter


def test_a_part_of_the_images_makes_no_lists():
    with pytest.raises(DataError, match="class 0 has 3 of 500 images"):
        long_tail_lists([["a", "b", "c"]], np.array([5]))


# ---------------------------------------------------------------- lists and sources


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.png", "line 1: expected `path label`"),
        ("a.png -1", "expected `path label`"),
        ("a.png one", "expected `path label`"),
        ("../a.png 0", "points out of the data set"),
        ("/etc/passwd 0", "points out of the data set"),
        ("", "expected `path label`"),
    ],
)
def test_bad_list_lines_are_refused(tmp_path, line, message):
    path = tmp_path / "list.txt"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        read_list(path)


def test_empty_and_missing_lists_are_refused(tmp_path):
    (tmp_path / "list.txt").write_text("")
    with pytest.raises(DataError, match="is empty"):
        read_list(tmp_path / "list.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read_list(tmp_path / "none.txt")


def make_tree(root: Path, per_class: int = 3) -> dict:
    """Three classes of coloured 10 x 8 PNG files and the list of them."""
    records = []
    for label, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        for number in range(per_class):
            path = root / "pets" / f"class {label}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (10, 8), colour).save(path)
            records.append((path.relative_to(root / "pets").as_posix(), label))
    return {"train": records}


def pack(root: Path, archive: str, files: slice = slice(None)) -> None:
    """Move the files `files` of the folder `pets` (in order of name) into an archive."""
    with tarfile.open(root / archive, "w:gz" if archive.endswith(".gz") else "w") as content:
        for file in sorted(path for path in (root / "pets").rglob("*.png"))[files]:
            content.add(file, file.relative_to(root).as_posix())
            file.unlink()
    if not list((root / "pets").rglob("*.png")):
        shutil.rmtree(root / "pets")


def pets(root: Path, lists: dict, class_names: tuple = ("a", "b", "c")):
    return decode_listing(Listing("pets", ImageSource(root, "pets"), lists, class_names, size=6))


@pytest.mark.parametrize(
    "archives",
    [
        {},
        {"pets.tar": slice(None)},
        {"pets.tar.gz": slice(None)},
        {"pets-rest.tar.gz": slice(2, 6), "pets-subset.tar": slice(None)},  # two archives of one data set
        {"pets-1.tar.gz": slice(0, 5), "pets-2.tar.gz": slice(None)},
        {"pets-new.tar": slice(1, 4)},  # the rest is unpacked
    ],
)
def test_any_image_tree_becomes_a_data_set(tmp_path, archives):
    lists = make_tree(tmp_path)
    for archive, files in archives.items():
        pack(tmp_path, archive, files)
    data = pets(tmp_path, lists, ("cat", "dog", "bird"))
    train = data.splits["train"]
    assert train.images.shape == (9, 6, 6, 3) and train.images.dtype == torch.uint8
    assert data.counts.tolist() == [3, 3, 3] and data.class_names == ("cat", "dog", "bird")
    for image, label in zip(train.images, train.labels, strict=True):
        assert image[..., int(label)].min() > 250 and image.float().sum(-1).max() <= 260


def test_of_two_copies_of_a_file_the_unpacked_one_is_read(tmp_path):
    make_tree(tmp_path)
    pack(tmp_path, "pets.tar")
    (tmp_path / "pets" / "class 0").mkdir(parents=True)
    (tmp_path / "pets" / "class 0" / "0.png").write_text("mine")
    source = ImageSource(tmp_path, "pets")
    assert source.text("class 0/0.png") == "mine" and len(set(source.names)) == 9


def test_the_files_of_an_archive_come_in_its_order_whatever_the_order_asked(tmp_path):
    make_tree(tmp_path)
    contents = {file.name: file.read_bytes() for file in (tmp_path / "pets" / "class 2").iterdir()}
    pack(tmp_path, "pets.tar.gz")
    found = list(ImageSource(tmp_path, "pets").contents(f"class 2/{i}.png" for i in (2, 0, 1, 2)))
    assert [name for name, _ in found] == [f"class 2/{i}.png" for i in range(3)]
    assert [content for _, content in found] == [contents[f"{i}.png"] for i in range(3)]


def test_decoded_arrays_are_cached_and_damage_is_repaired(tmp_path):
    images = make_tree(tmp_path)["train"]
    lists = {split: images[first::3] for first, split in enumerate(("train", "val", "test"))}
    first = pets(tmp_path, lists)
    files = sorted((paths.decoded() / "decoded").glob("*.npy"))
    assert len(files) == 3
    stamps = [f.stat().st_mtime_ns for f in files]
    pets(tmp_path, lists)
    assert [f.stat().st_mtime_ns for f in files] == stamps
    files[0].write_bytes(files[0].read_bytes()[:100])
    again = pets(tmp_path, lists)
    for split in first.splits:
        assert torch.equal(first.splits[split].images, again.splits[split].images)


@pytest.mark.parametrize("archive", [None, "pets.tar"])
def test_a_changed_file_is_decoded_again(tmp_path, archive):
    for colour in ("red", "lime"):
        (tmp_path / "pets").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(tmp_path / "pets" / "a.png")
        if archive:
            pack(tmp_path, archive)
        pixels = pets(tmp_path, {"train": [("a.png", 0)]}, ("a",)).splits["train"].images
        assert pixels[0, 0, 0].tolist() == ([255, 0, 0] if colour == "red" else [0, 255, 0])


def test_wrong_trees_are_refused_with_the_name_of_the_file(tmp_path):
    lists = make_tree(tmp_path)
    with pytest.raises(
        DataError, match=r"pets: the train list names 10 images, of which 1 are missing in .*, first no.png"
    ):
        pets(tmp_path, lists | {"train": [*lists["train"], ("no.png", 0)]})
    with pytest.raises(DataError, match="train list has no image of class 3 .d."):
        pets(tmp_path, lists, tuple("abcd"))
    with pytest.raises(DataError, match="train list has label 2, but there are 2 classes"):
        pets(tmp_path, lists, tuple("ab"))
    (tmp_path / "pets" / "class 1" / "0.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match="class 1/0.png in .* is not a readable image"):
        pets(tmp_path, lists)
    assert not list((paths.decoded() / "decoded").glob("pets-train*"))  # nothing half-decoded stays
    with pytest.raises(DataError, match="has neither the folder birds nor an archive"):
        ImageSource(tmp_path, "birds")


def test_truncated_archive_is_refused(tmp_path):
    make_tree(tmp_path)
    pack(tmp_path, "pets.tar")
    whole = (tmp_path / "pets.tar").read_bytes()
    (tmp_path / "pets.tar").write_bytes(whole[:700])
    with pytest.raises(DataError, match="cannot be read|missing"):
        pets(tmp_path, {"train": [("class 0/0.png", 0)]}, ("a",))


def test_decode_cuts_the_centre_out():
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (10, 0, 30, 20))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    pixels = decode(buffer.getvalue(), 20)
    assert pixels.shape == (20, 20, 3) and (pixels[..., 2] == 255).all() and (pixels[..., 0] == 0).all()


def test_data_root_must_be_named_and_exist(tmp_path, monkeypatch):
    monkeypatch.delenv("LT_DATA_ROOT", raising=False)
    with pytest.raises(DataError, match="--data-root DIR or the variable LT_DATA_ROOT"):
        load_dataset("cifar100_lt")
    with pytest.raises(DataError, match="is not a folder"):
        load_dataset("cifar100_lt", tmp_path / "none")
    with pytest.raises(InputError, match="unknown data set 'mnist': choose one of cifar100_lt, cifar"):
        load_dataset("mnist")


def test_check_data_says_what_is_there_and_what_is_missing(tmp_path):
    assert list(check_data("digits")) == [
        "digits: built in, nothing to check",
        "letters: built in, nothing to check",
    ]
    with pytest.raises(DataError, match="has neither the folder cifar-100-images nor an archive"):
        list(check_data("small", tmp_path))


# ---------------------------------------------------------------- built-in


def test_digits():
    data = load_dataset("digits")
    assert sorted(data.counts.tolist(), reverse=True) == [120, 104, 75, 54, 39, 28, 20, 14, 9, 5]
    assert groups(data.counts) == [2, 4, 4]
    assert torch.bincount(data.splits["val"].labels).tolist() == [15] * 10
    assert torch.bincount(data.splits["test"].labels).tolist() == [40] * 10
    rows = [{row.numpy().tobytes() for row in split.images} for split in data.splits.values()]
    assert len(rows[0] | rows[1] | rows[2]) == sum(map(len, rows))  # no image in two splits


def test_letters_are_made_the_same_every_time():
    one, two = load_dataset("letters"), load_dataset("letters")
    assert one.num_classes == 26 and torch.equal(one.splits["train"].images, two.splits["train"].images)
    means = one.splits["train"].images.float().mean((1, 2, 3))
    assert means.min() > 20  # a letter is on every image


# ---------------------------------------------------------------- real images


@needs_images
def test_tiny_imagenet_rule_reproduces_the_lists_line_for_line():
    """On the whole data set, whether it is unpacked or in several archives."""
    root = paths.data_root()
    source = ImageSource(root, "tiny-imagenet-200")
    wnids, _ = tiny_imagenet_classes(source)
    made = tiny_imagenet_lists(source, wnids)
    for split in ("train", "val", "test"):
        assert made[split] == read_list(root / f"TinyImageNet_LT_{split}.txt"), split


@needs_images
def test_real_data_sets_load():
    tiny = load_dataset("tiny_imagenet_lt")
    assert {n: len(s) for n, s in tiny.splits.items()} == {"train": 11_198, "val": 4_000, "test": 10_000}
    assert groups(tiny.counts) == [32, 99, 69] and tiny.wnids[0] == "n02124075"
    assert tiny.class_names[0] == "Egyptian cat"
    cifar = load_dataset("cifar100_lt")
    assert {n: len(s) for n, s in cifar.splits.items()} == {"train": 10_547, "val": 2_000, "test": 10_000}
    assert groups(cifar.counts) == [35, 34, 31] and cifar.splits["train"].images.shape[1:] == (32, 32, 3)
    assert cifar.class_names[:2] == ("apple", "aquarium fish")


@needs_images
def test_cifar_counts_are_laid_on_classes_as_in_the_lists():
    root = paths.data_root()
    source = ImageSource(root, "cifar-100-images")
    classes = sorted({name.split("/")[1] for name in source.names})

    class Full:
        names = frozenset(
            f"{s}/{c}/{c}_{i:06}.png" for s in ("train", "test") for c in classes for i in range(500)
        )

    made = cifar100_lists(Full(), classes)
    counts = np.bincount([label for _, label in made["train"]])
    listed = np.bincount([label for _, label in read_list(root / "CIFAR100_LT_train.txt")])
    assert counts.tolist() == listed.tolist()


@needs_images
def test_check_data_on_real_images():
    lines = list(check_data("small"))
    assert any("11198 train, 4000 val, 10000 test images of 200 classes are there" in line for line in lines)


def test_what_systems_leave_behind_is_no_class_and_no_image(tmp_path):
    (tmp_path / "real").mkdir()
    for split, number in (("train", 500), ("test", 3)):
        for name in ("apple", "bee"):
            folder = tmp_path / "real" / split / name
            folder.mkdir(parents=True)
            for image in range(number):
                (folder / f"{image:03d}.png").touch()
    (tmp_path / "cifar-100-images").symlink_to(tmp_path / "real")
    expected = FROM_IMAGES["cifar100_lt"](tmp_path)
    assert expected.class_names == ("apple", "bee")
    for left in (
        "train/.ipynb_checkpoints/a.png",
        "train/.DS_Store",
        "test/bee/.DS_Store",
        "train/bee/notes.txt",
    ):
        path = tmp_path / "real" / left
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "real" / "test").rename(tmp_path / "elsewhere")
    (tmp_path / "real" / "test").symlink_to(tmp_path / "elsewhere")  # a split that is a link
    found = FROM_IMAGES["cifar100_lt"](tmp_path)
    assert (found.class_names, found.lists) == (expected.class_names, expected.lists)


def test_lists_that_contradict_each_other_are_refused():
    lists = {"train": [("a.png", 0), ("b.png", 1)], "test": [("c.png", 0)]}
    check_lists("pets", lists)
    with pytest.raises(DataError, match="pets: a.png is both a train and a test image"):
        check_lists("pets", lists | {"test": [("a.png", 0)]})
    with pytest.raises(DataError, match="pets: a.png has the labels 0 and 1 in the train list"):
        check_lists("pets", lists | {"train": [("a.png", 0), ("a.png", 1)]})


def test_official_lists_may_have_somebodys_home_folder_before_their_paths(tmp_path):
    lines = ["train/airfield/a.jpg 0", "train/zoo/b.jpg 1"]
    found = []
    for prefix in ("", "/", "/home/user/places-lt/"):
        (tmp_path / "list.txt").write_text("".join(f"{prefix}{line}\n" for line in lines))
        found.append(official.normalised({"train": read_list(tmp_path / "list.txt", "/")}))
    assert found[0] == found[1] == found[2]
    assert [image.class_name for image in found[0]["train"]] == ["airfield", "zoo"]
