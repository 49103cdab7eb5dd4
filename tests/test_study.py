"""A study of one's own images or features, from folder to report; and what its data may look like."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lt_core import backbones, cli, study
from lt_core.cache import FeatureCache, load_cache
from lt_core.checks import DataError, InputError
from lt_core.classifiers import predict
from lt_core.data import datasets
from lt_core.data.profiles import FOLDER, OwnImages, load_profile
from lt_core.estimator import CompositionalTransferClassifier
from lt_core.export import load_model
from lt_core.models import build_backbone

COUNTS = {"ant": 40, "bee": 12, "cat": 6}


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path / "outputs"))
    load_profile.cache_clear()


def picture(path: Path, colour: int, generator: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = generator.integers(0, 60, (40, 44, 3))
    pixels[..., colour] += 150
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def tree(tmp_path) -> Path:
    """train/<class>/*, val/, test/ of three classes that differ in colour."""
    generator = np.random.default_rng(0)
    for colour, (name, count) in enumerate(COUNTS.items()):
        for split, number in (("train", count), ("val", 4), ("test", 5)):
            for image in range(number):
                picture(tmp_path / "pets" / split / name / f"{image}.png", colour, generator)
    return tmp_path / "pets"


def listing(folder: Path, **lists: str) -> datasets.Listing:
    return datasets.own_listing("pets", OwnImages(folder=str(folder), lists=lists))


# ---------------------------------------------------------------- data


def test_a_tree_becomes_a_data_set(tree):
    found = listing(tree)
    assert found.class_names == ("ant", "bee", "cat")
    assert {split: len(records) for split, records in found.lists.items()} == {
        "train": 58,
        "val": 12,
        "test": 15,
    }
    assert found.lists["test"][-1] == ("test/cat/4.png", 2)


def test_what_systems_leave_behind_and_links_change_nothing(tree, tmp_path):
    expected = listing(tree)
    for left in (".ipynb_checkpoints/a.png", ".DS_Store", "ant/._0.png", "__MACOSX/0.png", "ant/Thumbs.db"):
        (tree / "train" / left).parent.mkdir(exist_ok=True)
        (tree / "train" / left).write_bytes(b"left behind")
    (tree / "train" / "ant" / "notes.txt").write_text("no image")
    (tree / "train" / "ant" / "round").symlink_to(tree / "train")  # would never end
    assert listing(tree).lists == expected.lists

    linked = tmp_path / "linked"
    (linked / "train").mkdir(parents=True)
    for name in COUNTS:  # class folders as links, and splits as links
        (linked / "train" / name).symlink_to(tree / "train" / name)
    for split in ("val", "test"):
        (linked / split).symlink_to(tree / split)
    (tree / "train" / "ant" / "round").unlink()
    assert listing(linked).lists == expected.lists


def test_without_validation_images_some_training_images_become_them(tree):
    whole = listing(tree).lists["train"]
    for path in (tree / "val").rglob("*.png"):
        path.unlink()
    for folder in (*(tree / "val").iterdir(), tree / "val"):
        folder.rmdir()
    found = listing(tree).lists
    assert list(found) == ["train", "val", "test"]
    assert sorted(found["train"] + found["val"]) == sorted(whole)
    assert np.bincount([label for _, label in found["val"]]).tolist() == [8, 2, 1]
    assert found == listing(tree).lists  # the same every time


def test_held_out_images_are_few_and_leave_rare_classes_alone():
    labels = np.repeat([0, 1, 2], (500, 7, 4))
    assert np.bincount(labels[datasets.held_out(labels)], minlength=3).tolist() == [20, 1, 0]


def write_lists(tree: Path) -> dict[str, str]:
    files = {}
    for split, records in listing(tree).lists.items():
        files[split] = str(tree.parent / f"{split}.txt")
        lines = [f"{path} {label}" for path, label in records]
        Path(files[split]).write_text("\n".join(lines) + "\n")
    return files


def test_lists_give_the_same_data_set(tree):
    files = write_lists(tree)
    found = listing(tree, **files)
    assert (found.lists, found.class_names) == (listing(tree).lists, ("ant", "bee", "cat"))


def test_lists_may_name_files_by_their_whole_path(tree):
    files = write_lists(tree)
    for file in files.values():
        lines = Path(file).read_text().splitlines()
        Path(file).write_text("".join(f"{tree}/{line}\n" for line in lines))
    assert listing(tree, **files).lists == listing(tree).lists
    Path(files["test"]).write_text("/etc/passwd 0\n")
    with pytest.raises(DataError, match="points out of the data set"):
        listing(tree, **files)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("test/cat/4.png 2", "test/cat/4.png is both a train and a test image"),
        ("train/ant/0.png 1", "train/ant/0.png has the labels 0 and 1 in the train list"),
    ],
)
def test_lists_are_compared_with_each_other(tree, line, message):
    files = write_lists(tree)
    with open(files["train"], "a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=re.escape(message)):
        datasets.decode_listing(listing(tree, **files))  # what training reads
    with pytest.raises(DataError, match=re.escape(message)):  # before some of train become validation images
        listing(tree, train=files["train"], test=files["test"])


def test_images_of_a_stated_size_are_held_in_memory(tree, tmp_path):
    profile = tmp_path / "small_pets.toml"
    digits = (FOLDER / "digits.toml").read_text()
    own = f'[images.pets]\nfolder = "{tree}"\nsize = 16\n'
    profile.write_text(digits.replace('imagenet_lt = "digits"', 'imagenet_lt = "pets"') + own)
    images = load_profile(str(profile)).images
    split = datasets.load_dataset("pets", own=images).splits["test"]
    assert split.images.shape == (15, 16, 16, 3) and split.images.dtype == torch.uint8
    assert split.images[0].float().mean((0, 1)).argmax() == 0  # ants are red
    assert any(
        "pets: all of them can be decoded" in line for line in datasets.check_data(str(profile), deep=True)
    )
    lists = write_lists(tree)
    with tarfile.open(tree.with_suffix(".tar"), "w") as archive:
        archive.add(tree, "pets")
    shutil.rmtree(tree)
    packed = OwnImages(folder=str(tree), lists=lists, size=16)
    found = datasets.load_dataset("pets", own={"pets": packed}).splits["test"]
    assert torch.equal(found.images, split.images)


def test_a_line_given_twice_is_said_and_is_one_image(tree, caplog):
    files = write_lists(tree)
    expected = listing(tree, train=files["train"]).lists
    with open(files["train"], "a") as file:
        file.write("train/ant/0.png 0\n" * 2)
    assert listing(tree, train=files["train"]).lists == expected
    assert "lines that stand twice: 2 of the train list" in caplog.text


def test_equal_files_in_two_splits_are_found(tree):
    assert datasets.same_content(listing(tree)) == []
    copy = tree / "test" / "bee" / "copy.png"
    copy.write_bytes((tree / "train" / "bee" / "3.png").read_bytes())
    assert datasets.same_content(listing(tree)) == [("train/bee/3.png", "test/bee/copy.png")]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda tree: (tree / "test" / "dog").mkdir() or picture_in(tree / "test" / "dog"),
            "dog is no class",
        ),
        (lambda tree: picture_in(tree / "train"), "is in no folder of a class"),
        (lambda tree: (tree / "train").rename(tree / "training"), "has no folder train"),
        (lambda tree: (tree / "val" / "ant" / "0.png").write_bytes(b"<html>"), "is not a readable image"),
        (lambda tree: (tree / "test").rename(tree / "t") and (tree / "test").mkdir(), "test has no images"),
    ],
)
def test_wrong_trees_are_refused_in_one_line(tree, tmp_path, capsys, spoil, message):
    spoil(tree)
    words = ["study", str(tree), "--network", "small_resnet", "--out", str(tmp_path / "out")]
    assert cli.main(words) == cli.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def picture_in(folder: Path) -> None:
    picture(folder / "0.png", 0, np.random.default_rng(1))


# ---------------------------------------------------------------- features, extracted once


@pytest.fixture
def job(tree):
    """A study's backbone, made ready."""
    profile = tree.parent / "study-pets.toml"
    images = {"pets": OwnImages(folder=str(tree))}
    options = study.Options()
    splits = ["train", "val", "test"]
    study._write_profile(profile, "a study", "pets", images, "small_resnet", options, splits, 58)
    return backbones.prepare(load_profile(str(profile)), "study", 0)


def test_a_killed_extraction_goes_on_where_it_stopped(job, monkeypatch):
    expected = backbones.extract_splits(job.model.backbone, job)
    monkeypatch.setattr(study, "SHARD", 16)
    monkeypatch.setattr("lt_core.data.image_files.EVALUATION_BATCH", {"cpu": 8})
    seen: list[int] = []
    whole = study.feature_batches

    def dying(network, images, size, machine):
        for number, batch in enumerate(whole(network, images, size, machine)):
            if number == 5 and len(seen) == 0:
                seen.append(len(images))
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(study, "feature_batches", dying)
    with pytest.raises(KeyboardInterrupt):
        study.kept_features(job)

    def counting(network, images, size, machine):
        seen.append(len(images))
        yield from whole(network, images, size, machine)

    monkeypatch.setattr(study, "feature_batches", counting)
    found = study.kept_features(job)
    assert seen == [58, 58 - 32, 12, 15]  # two shards of 16 were kept
    for split, features in found.items():
        torch.testing.assert_close(features, expected[split].float(), atol=2e-3, rtol=2e-3)

    again = study.kept_features(job)  # all is there: nothing is extracted
    assert len(seen) == 4
    assert all(torch.equal(again[split], found[split]) for split in found)


def test_changed_images_are_extracted_again(job, tree, monkeypatch):
    before = study.kept_features(job)
    picture(tree / "test" / "ant" / "0.png", 2, np.random.default_rng(5))
    after = study.kept_features(job)
    assert torch.equal(before["train"], after["train"])
    changed = (before["test"] != after["test"]).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [0]


def test_a_network_that_does_not_take_the_images_is_refused(tree, tmp_path, capsys):
    words = ["study", str(tree), "--network", "digits_net", "--weights", "none", "--out", str(tmp_path / "o")]
    assert cli.main(words) == cli.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert "digits_net does not take images of [3, 8, 8]" in error and error.count("\n") == 1


# ---------------------------------------------------------------- the whole


@pytest.fixture
def without_report(monkeypatch):
    """The notebook is not run: its own test does that. Of the fitted systems one is enough."""
    monkeypatch.setattr(study.runner, "run", lambda options: 0)
    slow = ("balms", "disalign", "crt")
    monkeypatch.setattr(study, "ROWS", {k: v for k, v in study.ROWS.items() if v not in slow})


def test_a_study_ends_with_a_cache_and_the_chosen_classifier(tree, tmp_path, without_report, capsys):
    out = tmp_path / "out"
    words = ["study", str(tree), "--network", "small_resnet", "--out", str(out)]
    assert cli.main(words) == 0
    cache = load_cache(out / "caches" / "pets" / "study" / "seed0")
    assert cache.class_names == ["ant", "bee", "cat"]
    assert (predict(cache, "cosine") == cache.labels("test").numpy()).mean() > 0.9

    # The file is the classifier that validation chose, on the network that made the features.
    model = load_model(out / "model")
    label = next(label for label, name in study.ROWS.items() if name == model.config["classifier"])
    assert label in capsys.readouterr().out
    images = datasets.load_dataset("pets", own=load_profile(str(out / "study-pets.toml")).images)
    pixels = torch.cat(list(study_pixels(images.splits["test"], model.config["input_size"])))
    assert torch.equal(model(pixels).argmax(1), torch.from_numpy(predict(cache, model.config["classifier"])))


def test_a_study_of_a_network_of_timm_with_a_file_of_weights(tree, tmp_path, without_report):
    network = build_backbone("timm:vit_tiny_patch16_224")
    torch.save(network.network.state_dict(), tmp_path / "mine.pth")
    out = tmp_path / "out"
    words = ["study", str(tree), "--network", "timm:vit_tiny_patch16_224", "--size", "32", "--out", str(out)]
    assert cli.main([*words, "--weights", str(tmp_path / "mine.pth")]) == 0
    model = load_model(out / "model")
    assert torch.equal(model.backbone.network.norm.weight, network.network.norm.weight)
    assert (model.config["network"], model.config["input_size"]) == ("timm:vit_tiny_patch16_224", 32)
    image = tree / "test" / "bee" / "0.png"
    scores = model(model.pixels(image))
    (cache_file,) = (out / "caches").rglob("meta.json")
    features = model.backbone(model.pixels(image))
    stored = load_cache(cache_file.parent).features("test")
    errors = (stored - features).abs().amax(1) / features.abs().max()
    assert errors.min() < 0.01  # int8: extraction cut the image as the exported model does
    assert model.config["square"] == {"part": 0.9, "resampling": "bicubic"}  # as timm states it
    assert scores.shape == (1, 3) and model.class_names == ["ant", "bee", "cat"]


def study_pixels(split: datasets.Split, size: int):
    for row in range(len(split)):
        yield split.images.pixels(row, size)[None]


def arrays(label=str) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    found = {}
    for split, counts in (("train", (130, 30, 8)), ("val", (9, 9, 9)), ("test", (20, 20, 20))):
        labels = np.repeat([0, 1, 2], counts)
        found[f"{split}_features"] = generator.normal(size=(len(labels), 8)) + 3 * np.eye(3, 8)[labels]
        found[f"{split}_labels"] = np.array([label(f"1{one}") for one in labels])
    return found


def test_a_study_of_features(tmp_path, without_report):
    np.savez(tmp_path / "mine.npz", **arrays())
    assert cli.main(["study", "--features", str(tmp_path / "mine.npz"), "--out", str(tmp_path / "out")]) == 0
    cache = load_cache(tmp_path / "out" / "caches" / "mine" / "study" / "seed0")
    assert cache.class_names == ["10", "11", "12"]
    profile = str(tmp_path / "out" / "study-mine.toml")
    assert backbones.load(profile, "study").meta["dataset"] == "mine"
    model = load_model(tmp_path / "out" / "model")
    found = model(cache.features("test")).argmax(1)
    assert torch.equal(found, torch.from_numpy(predict(cache, model.config["classifier"])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": None}, "needs both train_features and train_labels"),
        ({"tets_labels": np.zeros(3)}, "unknown array 'tets_labels'"),
        ({"test_labels": np.array(["13"] * 60)}, "the test label '13' is none of the training labels"),
        ({"test_labels": np.array(["10"] * 59)}, "test labels must be 60"),
        ({"train_labels": np.zeros(168)}, "train labels must be 168 whole numbers or texts"),
        ({"class_names": np.array(["a", "b"])}, "must name 3 classes"),
        ({"train_features": np.full((168, 8), np.nan)}, "train features has NaN"),
        ({"weights": np.ones((3, 7))}, "weights must have 8 columns"),
    ],
)
def test_wrong_arrays_are_refused_in_one_line(tmp_path, capsys, change, message):
    wrong = {name: value for name, value in (arrays() | change).items() if value is not None}
    np.savez(tmp_path / "mine.npz", **wrong)
    words = ["study", "--features", str(tmp_path / "mine.npz"), "--out", str(tmp_path / "out")]
    assert cli.main(words) == cli.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list((tmp_path / "out").rglob("meta.json"))


@pytest.mark.parametrize(
    "words",
    [
        "study",
        "study DIR --features F.npz",
        "study DIR",
        "study DIR --network small_resnet --val V.txt",
        "study DIR --network small_resnet --fine-tune -1",
        "study --features F.npz --network small_resnet",
        "study nowhere --network small_resnet",
    ],
)
def test_wrong_requests_are_refused_in_one_line(words, capsys):
    assert cli.main(words.split()) == cli.EXIT_BAD_INPUT
    assert capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------- FeatureCache.from_arrays


def splits(found: dict[str, np.ndarray], kind=np.asarray) -> dict[str, tuple]:
    return {s: (kind(found[f"{s}_features"]), found[f"{s}_labels"]) for s in ("train", "val", "test")}


def test_arrays_of_any_kind_give_the_same_cache():
    one = FeatureCache.from_arrays(**splits(arrays(), lambda x: x.astype(np.float32)))
    kinds = (lambda x: x, lambda x: torch.tensor(x, requires_grad=True), lambda x: x.tolist())
    for kind in kinds:
        other = FeatureCache.from_arrays(**splits(arrays(int), kind))
        torch.testing.assert_close(other.features("test"), one.features("test"))
        assert (predict(other, "ensemble") == predict(one, "ensemble")).all()
    half = FeatureCache.from_arrays(**splits(arrays(), lambda x: torch.from_numpy(x).bfloat16()))
    assert (predict(half, "ensemble") == predict(one, "ensemble")).mean() > 0.95


def test_it_learns_what_the_estimator_learns():
    found = arrays()
    cache = FeatureCache.from_arrays(**splits(found))
    model = CompositionalTransferClassifier(random_state=0).fit(
        found["train_features"], found["train_labels"]
    )
    names = np.array(cache.class_names)
    agreement = names[predict(cache, "ensemble")] == model.predict(found["test_features"])
    assert agreement.mean() >= 0.9  # they differ in the seed of the classifier's start


def test_given_weights_are_taken_and_validation_is_made_where_there_is_none():
    found = arrays()
    weights = np.eye(3, 8)
    given = (found["train_features"], found["train_labels"])
    cache = FeatureCache.from_arrays(given, weights=weights, scale=5, class_names=["x", "y", "z"])
    assert cache.class_names == ["x", "y", "z"] and cache.scale == 5
    assert cache.weights.tolist() == weights.tolist()
    assert [len(cache.labels(split)) for split in cache.splits] == [168 - 27, 27]
    with pytest.raises(InputError, match="no class has 5"):
        FeatureCache.from_arrays((np.ones((4, 2)), [0, 0, 1, 1]))


# ---------------------------------------------------------------- the profile


def test_the_profile_can_be_trained_again(job):
    assert job.recipe.frozen and job.recipe.input_size == 64
    assert json.dumps(job.profile.images["pets"].model_dump())


def test_fine_tuning_trains_the_network(tree, tmp_path, without_report):
    out = tmp_path / "out"
    words = ["study", str(tree), "--network", "small_resnet", "--fine-tune", "1", "--out", str(out)]
    assert cli.main([*words, "--size", "32"]) in (0, cli.EXIT_FAILED)  # one epoch may end at chance
    recipe = load_profile(str(out / "study-pets.toml")).recipes["fine_tuned"]
    assert (recipe.epochs, recipe.input_size, recipe.learning_rate) == (1, 32, 0.1)
    assert list((out / "runs").rglob("last.pt"))
