"""Backbones end to end on digits: train, cache, resume, extract, and every refusal."""

import logging
import shutil
import signal
from functools import partial

import pytest
import torch

from lt_core import backbones, cli, paths, results
from lt_core.backbones import cache_folder, ensure, load, seeds_shown
from lt_core.cache import META, TENSORS, load_cache, own_classifier
from lt_core.checks import CacheError, ProfileError, TrainingError
from lt_core.classifiers import predict
from lt_core.data.datasets import load_dataset
from lt_core.data.profiles import load_profile
from lt_core.metrics import group_accuracy
from lt_core.models import build_backbone
from lt_core.train import extract_features, load_checkpoint, this_machine
from lt_core.transfer import cosine_logits, prototypes


def run(command: str, profile: str, backbone: str, *words: object) -> int:
    """Exit status of `python -m lt_core COMMAND --profile PROFILE --backbone BACKBONE WORDS`."""
    return cli.main([command, "--profile", profile, "--backbone", backbone, *map(str, words)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The digits backbones, trained once for all tests of this file (they are not written to)."""
    root = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LT_OUTPUT_ROOT", str(root))
        for name in load_profile("digits").backbones:
            ensure("digits", name, 0)
    return root


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    """Outputs go to tmp_path, and what the command line changes in its process is put back."""
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path))
    log, sigterm = logging.getLogger("lt_core"), signal.getsignal(signal.SIGTERM)
    for name in ("handlers", "propagate", "level"):
        monkeypatch.setattr(log, name, getattr(log, name))
    yield
    signal.signal(signal.SIGTERM, sigterm)


@pytest.fixture
def digits(trained, monkeypatch):
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(trained))


def test_training_writes_a_cache_with_its_provenance(digits):
    cache = load("digits", "sqrt")
    assert cache.features("train").shape == (468, 64) and cache.features("test").shape == (400, 64)
    meta = cache.meta
    assert meta["backbone"] == "sqrt" and meta["sampler"] == "square_root" and meta["seed"] == 0
    assert len(meta["history"]) == meta["recipe"]["epochs"] == 30
    assert meta["accuracies"]["last"]["test"]["classifier"]["total"] > 85
    assert set(meta["accuracies"]) == {"last", "best_on_validation"} and 1 <= meta["epoch_of_best"] <= 30
    for key in ("code_version", "hardware", "seconds", "sha256", "network", "loss", "start", "date", "torch"):
        assert meta[key], key


def test_the_cache_gives_the_accuracies_that_it_states(digits):
    cache = load("digits", "sqrt")
    for classifier, name in (("cosine", "classifier"), ("prototypes", "prototypes")):
        found = group_accuracy(predict(cache, classifier), cache.labels("test"), cache.counts)
        assert found == pytest.approx(cache.meta["accuracies"]["last"]["test"][name], abs=1)


def test_the_cached_prototypes_are_those_of_the_training_features(digits):
    cache = load("digits", "sqrt")
    again = prototypes(cache.features("train"), cache.labels("train"), 10)
    assert torch.nn.functional.cosine_similarity(again, cache.prototypes).min() > 0.9999


@pytest.mark.parametrize("backbone", ["lade", "ldam_drw", "rsg", "causal_norm", "places_lade", "places_rsg"])
def test_compared_systems_train_backbones_of_their_own(digits, backbone):
    cache = load("digits", backbone)
    stated = cache.meta["accuracies"]["last"]
    assert stated["test"]["classifier"]["total"] > 80
    # What the loop saw is what the cache gives: the classifier as it is at test, on the same features.
    seen = cache.meta["history"][-1]["val_accuracy"]
    assert seen == pytest.approx(stated["val"]["classifier"]["total"], abs=1)
    assert (cache.direction is not None) == (backbone == "causal_norm")
    assert (cache.bias is not None) == (cache.meta["classifier"] == "dot_product")
    assert (cache.scale in (30, 50)) == (cache.meta["classifier"] == "cosine_fixed")


def test_continual_leaves_few_shot_classes_out(digits):
    cache = load("digits", "continual")
    assert torch.equal(cache.trained, cache.counts > 20)
    assert cache.features("train").shape[0] == 468  # features of all classes all the same
    stated = cache.meta["accuracies"]["last"]["test"]["classifier"]
    assert stated["few"] is None and stated["total"] is None and stated["many"] > 80


def test_a_frozen_backbone_keeps_the_weights_of_its_pretraining(digits):
    """Only the head is trained: the features are those of the pre-training, batch norms' means included."""
    cache = load("digits", "imagenet_frozen")
    assert cache.meta["start"] == "supervised"
    assert cache.meta["accuracies"]["last"]["test"]["classifier"]["total"] > 60
    (weights,) = (paths.runs() / "letters" / "supervised").glob("seed0-*/backbone.pt")
    network = build_backbone("digits_net")
    network.load_state_dict(load_checkpoint(weights)["backbone"])
    features = extract_features(network, load_dataset("digits").splits["test"].images, 0, this_machine())
    stored = cache.features("test")
    assert ((stored - features).abs().amax(1) <= features.abs().amax(1) / 250).all()  # int8
    best = cache.meta["history"][cache.meta["epoch_of_best"] - 1]["val_accuracy"]
    assert best == max(entry["val_accuracy"] for entry in cache.meta["history"])


def test_what_prototypes_reach_before_fine_tuning_is_stated(digits):
    cache = load("digits", "simclr_sqrt")
    (weights,) = (paths.runs() / "letters" / "simclr").glob("seed0-*/backbone.pt")
    network = build_backbone("digits_net")
    network.load_state_dict(load_checkpoint(weights)["backbone"])
    splits = load_dataset("digits").splits
    features = {s: extract_features(network, splits[s].images, 0, this_machine()) for s in ("train", "val")}
    means = prototypes(features["train"], splits["train"].labels, 10)
    found = cosine_logits(features["val"], means).argmax(1)
    expected = group_accuracy(found, splits["val"].labels, cache.counts)["total"]
    assert cache.meta["start_accuracy"] == pytest.approx(expected, abs=0.01)
    row = results.measure("digits", [f"simclr_sqrt/{results.START}"]).loc[f"simclr_sqrt/{results.START}"]
    assert results.estimates(row).value.tolist() == [cache.meta["start_accuracy"]]
    history = cache.meta["pretraining_history"]
    assert [entry["epoch"] for entry in history] == list(
        range(1, cache.meta["pretraining"]["recipe"]["epochs"] + 1)
    )

    scratch = load("digits", "sqrt").meta
    assert "start_accuracy" not in scratch and scratch["pretraining_history"] == []


def test_seeds_that_are_shown(digits, capsys):
    """All of the profile, or the one that is asked for, where it is there or can be trained."""
    assert [
        cache.meta["seed"] for cache in (load("digits", "sqrt", s) for s in seeds_shown("digits", "sqrt"))
    ] == [0]
    assert seeds_shown("digits", "sqrt", 9) == [9]
    assert (
        seeds_shown("embedded", "imagenet_frozen") == EMBEDDED.backbone("imagenet_frozen").seeds == [0, 1, 2]
    )
    assert seeds_shown("embedded", "imagenet_frozen", 2) == [2] and not capsys.readouterr().out
    assert seeds_shown("embedded", "imagenet_frozen", 9) == [0]
    assert capsys.readouterr().out == "imagenet_frozen: there is no seed 9 here, seed 0 is shown\n"


def test_a_second_call_trains_nothing(digits, monkeypatch):
    monkeypatch.setattr(backbones, "train_backbone", None)
    assert ensure("digits", "sqrt", 0) == cache_folder("digits", "sqrt", 0)


def test_the_line_about_a_cache_has_its_accuracies(digits):
    stated = load("digits", "continual").meta["accuracies"]["last"]["test"]
    many, total = stated["classifier"]["many"], stated["prototypes"]["total"]
    line = backbones.summary_line(cache_folder("digits", "continual", 0))
    assert line.startswith(f"test, many / medium / few / total: classifier {many:.1f} / ")
    assert " / - / -, prototypes " in line and line.endswith(f" / {total:.1f}")


def test_extract_gives_the_same_cache(digits, tmp_path, capsys):
    (last,) = (paths.runs() / "digits" / "sqrt").glob("seed0-*/last.pt")
    assert run("extract", "digits", "sqrt", "--checkpoint", last, "--out", tmp_path / "again") == 0
    one, two = load("digits", "sqrt"), load_cache(tmp_path / "again")
    assert torch.equal(one.features("test"), two.features("test")) and torch.equal(one.weights, two.weights)
    assert run("extract", "digits", "continual", "--checkpoint", last, "--out", tmp_path / "other") == 2
    assert "is not a checkpoint of digits/continual" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_train_all_skips_what_is_done(digits, capsys):
    assert run("train", "digits", "all") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(load_profile("digits").backbones)
    assert all("done already" in line for line in lines)


def test_train_goes_where_it_is_told(trained, tmp_path, capsys):
    shutil.copytree(trained / "runs", tmp_path / "runs")  # finished runs: only extraction is left to do
    assert run("train", "digits", "sqrt", "--seed", 0, "--out", tmp_path / "elsewhere") == 0
    assert "resuming at epoch 31" in capsys.readouterr().out
    again = load_cache(tmp_path / "elsewhere" / "digits" / "sqrt" / "seed0")
    whole = load_cache(trained / "caches" / "digits" / "sqrt" / "seed0")
    assert torch.equal(again.weights, whole.weights)
    assert not (tmp_path / "caches").exists()


@pytest.mark.parametrize(
    ("change", "backbone", "difference"),
    [
        ("recipes.from_scratch.epochs = 1", "sqrt", "recipe.epochs 30 and not 1"),
        (
            "recipes.from_scratch.augmentation.flip = true",
            "sqrt",
            "recipe.augmentation.flip False and not True",
        ),
        ('backbones.sqrt.sampler = "uniform"', "sqrt", "sampler 'square_root' and not 'uniform'"),
        ('backbones.sqrt.loss = "focal"', "sqrt", "loss 'cross_entropy' and not 'focal'"),
        ("backbones.lade.loss_options.penalty = 1.0", "lade", "loss_options.penalty 0.5 and not 1.0"),
        ("recipes.simclr.epochs = 7", "simclr_sqrt", r"pretraining.recipe.epochs \d+ and not 7"),
        ("backbones.sqrt.feature_dims = 8", "sqrt", "feature_dims 0 and not 8"),
    ],
)
def test_a_cache_that_was_made_otherwise_is_not_used(digits, tmp_path, capsys, change, backbone, difference):
    (tmp_path / "own.toml").write_text(f'same_as = "digits"\n{change}\n', encoding="utf-8")
    own = str(tmp_path / "own.toml")
    with pytest.raises(CacheError, match=f"seed0 was made with .*{difference}.*profile own asks for"):
        load(own, backbone)
    assert run("train", own, backbone) == 2  # nor is it "done already"
    assert capsys.readouterr().err.count("\n") == 1
    other = "uniform" if backbone == "sqrt" else "sqrt"
    if "from_scratch" not in change:
        assert load(own, other).meta["backbone"] == other


def test_what_older_caches_may_state_is_listed_with_its_reason_and_needed(monkeypatch):
    """A line of the profile that no cache needs any more is removed."""
    assert {name for one in EMBEDDED.older_caches for name in one.backbones} <= set(EMBEDDED.backbones)
    strict = EMBEDDED.model_copy(update={"older_caches": []})
    for one in EMBEDDED.older_caches:
        for name in one.backbones:
            with pytest.raises(CacheError, match=f"{name}/seed0 was made with"):
                backbones.is_made(cache_folder("embedded", name, 0), strict, name, 0)
            assert one.reason in results.provenance([load("embedded", name)])


def test_missing_embedded_cache_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "SHIPPED_CACHES", tmp_path / "none")
    with pytest.raises(CacheError, match="python -m lt_core train --profile small --backbone sqrt --seed 0"):
        load("embedded", "sqrt")
    with pytest.raises(CacheError, match="seed 7"):
        load("embedded", "sqrt", 7)


def test_a_cache_that_is_there_is_found_and_none_is_trained(digits, tmp_path, monkeypatch):
    assert backbones.if_made("digits", "sqrt", 0).meta["backbone"] == "sqrt"
    assert backbones.if_made("digits", "sqrt", 9) is None
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path / "elsewhere"))
    assert backbones.if_made("digits", "sqrt", 0) is None  # not among the shipped ones
    assert backbones.if_made("embedded", "sqrt", 0).meta["backbone"] == "sqrt"


def test_precision_is_a_part_of_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    path = tmp_path / "narrow.toml"
    path.write_text('same_as = "digits"\n[recipes.from_scratch]\nprecision = "bfloat16"\n', encoding="utf-8")
    profile = load_profile(str(path))
    folder = backbones.train_backbone(profile, "sqrt", 0)
    meta = load_cache(folder).meta
    assert meta["recipe"]["precision"] == "bfloat16"
    assert "bfloat16" in meta["hardware"] or torch.cuda.is_available()
    assert meta["accuracies"]["last"]["test"]["classifier"]["total"] > 80
    with pytest.raises(CacheError, match="recipe.precision 'bfloat16' and not 'float32'"):
        backbones.is_made(folder, load_profile("digits"), "sqrt", 0)


@pytest.mark.parametrize("backbone", ["sqrt", "supervised_sqrt"])
def test_caches_from_before_precision_was_stated_stay_valid(tmp_path, monkeypatch, backbone):
    profile = load_profile("digits")
    meta = backbones.made_as(profile, backbone, 0)
    for part in (part for part in (meta, meta["pretraining"]) if part):
        assert part["recipe"].pop("precision") == "float32"
    (tmp_path / META).touch()
    monkeypatch.setattr(backbones, "read_meta", lambda folder: meta)
    assert backbones.is_made(tmp_path, profile, backbone, 0)


def test_only_profiles_that_do_not_train_read_the_shipped_caches(tmp_path):
    assert cache_folder("embedded", "sqrt", 0).is_relative_to(paths.SHIPPED_CACHES)
    assert cache_folder("small", "sqrt", 0) == tmp_path / "caches" / "tiny_imagenet_lt" / "sqrt" / "seed0"


def test_unknown_names_list_the_known_ones():
    with pytest.raises(
        ProfileError,
        match="unknown profile 'tiny': choose one of balanced, bfloat16, digits, double, embedded, "
        "half, inaturalist, paper, small, weight_decay",
    ):
        load("tiny", "sqrt")
    with pytest.raises(
        ProfileError, match="profile digits: unknown backbone 'resnet': choose one of balanced_softmax"
    ):
        load("digits", "resnet")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "digits", "sqrt", "--seed", -1), "--seed must be 0 or above, found -1"),
        (("train", "embedded", "sqrt"), "`small` trains what it ships"),
        (
            ("extract", "digits", "sqrt", "--checkpoint", "none.pt", "--out", "out"),
            "there is no checkpoint none.pt",
        ),
    ],
)
def test_refusals_of_the_command_line(words, message, capsys):
    assert run(*words) == 2
    assert message in capsys.readouterr().err


def test_a_model_at_chance_is_refused(tmp_path):
    job = backbones.prepare(load_profile("digits"), "sqrt", 0)
    torch.nn.init.ones_(job.model.classifier.weight)  # all classes look alike: always class 0
    with pytest.raises(TrainingError, match="nothing was learned, so nothing is kept"):
        backbones.write_cache(job, tmp_path / "cache")
    assert not (tmp_path / "cache" / META).exists()


EMBEDDED = load_profile("embedded")


@pytest.mark.parametrize(
    ("backbone", "seed"), [(name, seed) for name, one in EMBEDDED.backbones.items() for seed in one.seeds]
)
def test_embedded_caches_are_whole_and_say_where_they_come_from(backbone, seed):
    declared = EMBEDDED.backbone(backbone)
    cache = load_cache(paths.SHIPPED_CACHES / EMBEDDED.dataset_of(backbone) / backbone / f"seed{seed}")
    meta = cache.meta
    assert "test" in cache.splits and set(cache.splits) == set(declared.stored_splits)
    assert len(cache.labels("test")) == 10_000
    assert "unknown" not in meta["code_version"] and "changes" not in meta["code_version"]
    assert backbones.is_made(cache_folder("embedded", backbone, seed), EMBEDDED, backbone, seed)
    logits = own_classifier(cache)(cache.features("test")).masked_fill(~cache.trained, -torch.inf)
    found = group_accuracy(logits.argmax(1), cache.labels("test"), cache.counts)
    stated = meta["accuracies"]["last"]["test"]["classifier"]
    assert found["many"] == pytest.approx(stated["many"], abs=0.5)  # int8 against float32


def test_embedded_caches_are_small_and_all_belong_to_the_profile():
    files = list(paths.SHIPPED_CACHES.rglob("*.safetensors"))
    shipped = [file for file in files if file.relative_to(paths.SHIPPED_CACHES).parts[0] != "digits"]
    assert sum(file.stat().st_size for file in shipped) < 200e6
    places = {file.parent.relative_to(paths.SHIPPED_CACHES).as_posix() for file in shipped}
    belong = {
        profile: {
            f"{load_profile(profile).dataset_of(name)}/{name}/seed{seed}"
            for name, one in load_profile(profile).backbones.items()
            for seed in one.seeds
        }
        for profile in ("embedded", "half", "double", "balanced")
    }
    assert places >= belong["embedded"] and places <= set().union(*belong.values())


def test_seeds_of_a_frozen_backbone_store_their_features_once(tmp_path, monkeypatch):
    digits = load_profile("digits")
    several = digits.backbone("imagenet_frozen").model_copy(update={"seeds": [0, 1]})
    profile = digits.model_copy(update={"backbones": digits.backbones | {"imagenet_frozen": several}})
    monkeypatch.setattr(backbones, "refuse_chance", lambda *a: None)  # nothing is trained
    monkeypatch.setattr(backbones, "start_weights", lambda *a: None)

    def built(name: str, weights: int) -> torch.nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(weights)
            return build_backbone(name)

    for seed, weights in ((0, 0), (1, 0), (2, 2)):  # the first two start from the same weights
        monkeypatch.setattr(backbones, "build_backbone", partial(built, weights=weights))
        job = backbones.prepare(profile, "imagenet_frozen", seed)
        backbones.write_cache(job, tmp_path / f"seed{seed}")
    stored = [(tmp_path / f"seed{seed}" / TENSORS).stat().st_size for seed in range(3)]
    assert stored[1] < stored[0] / 4 and stored[2] == stored[0]
    zero, one = load_cache(tmp_path / "seed0"), load_cache(tmp_path / "seed1")
    assert set(one.splits) == set(zero.splits) == {"train", "val", "test"}
    assert torch.equal(zero.features("test"), one.features("test"))


def test_pretraining_at_chance_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(backbones, "fit", lambda *a, **k: [{"val_accuracy": 5.0}])
    with pytest.raises(TrainingError, match="validation accuracy 5.00 % .* is chance among 26"):
        backbones.pretrain(load_profile("digits"), "simclr", 0)
    assert not list(tmp_path.rglob("backbone.pt"))
