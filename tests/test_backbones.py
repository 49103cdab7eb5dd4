"""Backbones end to end on digits: train, cache, resume, extract, and every refusal."""

import shutil
from functools import partial

import pytest
import torch

from lt_core import backbones, paths
from lt_core.backbones import (
    cache_folder,
    ensure,
    extract_command,
    load,
    load_seeds,
    seeds_shown,
    train_command,
)
from lt_core.errors import CacheError, DataError, InputError, ProfileError, TrainingError
from lt_core.features import META, TENSORS, load_cache
from lt_core.methods import learned, predict
from lt_core.metrics import group_accuracy
from lt_core.models import build_backbone
from lt_core.profiles import Recipe, load_profile
from lt_core.report import training_summary
from lt_core.transfer import prototypes


def quiet(line: str) -> None:
    """Progress that nobody reads."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The digits backbones, trained once for all tests of this file (they are not written to)."""
    root = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LT_OUTPUT_ROOT", str(root))
        for name in load_profile("digits").backbones:
            ensure("digits", name, 0, progress=quiet)
    return root


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path))


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
    for method, name in (("cosine", "classifier"), ("prototypes", "prototypes")):
        found = group_accuracy(predict(cache, method), cache.labels("test"), cache.counts)
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


def test_frozen_backbone_starts_from_the_pretraining(digits):
    cache = load("digits", "imagenet_frozen")
    assert (
        cache.meta["start"] == "supervised"
        and cache.meta["accuracies"]["last"]["test"]["classifier"]["total"] > 60
    )
    assert list((paths.runs() / "letters" / "supervised").glob("seed0-*/backbone.pt"))


def test_seeds_of_the_profile(digits):
    assert [cache.meta["seed"] for cache in load_seeds("digits", "sqrt", 0)] == [0]
    assert seeds_shown("embedded", "imagenet_frozen", 0) == EMBEDDED.backbone("imagenet_frozen").seeds
    assert seeds_shown("embedded", "imagenet_frozen", 9) == [9]


def test_a_second_call_trains_nothing(digits, monkeypatch):
    monkeypatch.setattr(backbones, "train_backbone", None)
    assert ensure("digits", "sqrt", 0, progress=quiet) == cache_folder("digits", "sqrt", 0)


def test_the_training_summary_is_what_the_caches_state(digits):
    frame = training_summary("digits", ["sqrt", "continual"]).set_index("backbone")
    meta = load("digits", "sqrt").meta
    stated = meta["accuracies"]["last"]["test"]
    assert frame.loc["sqrt", "test_few"] == stated["classifier"]["few"]
    assert frame.loc["sqrt", "prototypes_total"] == stated["prototypes"]["total"]
    assert frame.loc["sqrt", "val"] == round(meta["history"][-1]["val_accuracy"], 2)
    assert frame["test_total"].isna().to_dict() == {"sqrt": False, "continual": True}
    assert 0.05 < frame.loc["sqrt", "megabytes"] < 0.2 and frame.loc["sqrt", "minutes"] > 0


def test_extract_gives_the_same_cache(digits, tmp_path):
    run = next((paths.runs() / "digits" / "sqrt").glob("seed0-*"))
    extract_command("digits", "sqrt", str(run / "last.pt"), str(tmp_path / "again"))
    one, two = load("digits", "sqrt"), load_cache(tmp_path / "again")
    assert torch.equal(one.features("test"), two.features("test")) and torch.equal(one.weights, two.weights)
    with pytest.raises(CacheError, match="is not a checkpoint of digits/continual"):
        extract_command("digits", "continual", str(run / "last.pt"), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_train_all_skips_what_is_done(digits, capsys):
    train_command("digits", "all")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(load_profile("digits").backbones) and all(
        "done already" in line for line in lines
    )


def test_train_goes_where_it_is_told(trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained / "runs", tmp_path / "runs")  # finished runs: only extraction is left to do
    train_command("digits", "sqrt", seed=0, out=str(tmp_path / "elsewhere"))
    assert "resuming at epoch 31" in capsys.readouterr().out
    again = load_cache(tmp_path / "elsewhere" / "digits" / "sqrt" / "seed0")
    whole = load_cache(trained / "caches" / "digits" / "sqrt" / "seed0")
    assert torch.equal(again.weights, whole.weights)
    assert not (tmp_path / "caches").exists()


def test_missing_embedded_cache_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "SHIPPED_CACHES", tmp_path / "none")
    with pytest.raises(CacheError, match="python -m lt_core train --profile small --backbone sqrt --seed 0"):
        load("embedded", "sqrt")
    with pytest.raises(CacheError, match="seed 7"):
        load("embedded", "sqrt", 7)


def test_only_profiles_that_do_not_train_read_the_shipped_caches(tmp_path):
    assert cache_folder("embedded", "sqrt", 0).is_relative_to(paths.SHIPPED_CACHES)
    assert cache_folder("small", "sqrt", 0) == tmp_path / "caches" / "tiny_imagenet_lt" / "sqrt" / "seed0"


def test_refusals():
    with pytest.raises(
        ProfileError, match="unknown profile 'tiny': choose one of digits, embedded, paper, small"
    ):
        load("tiny", "sqrt")
    with pytest.raises(
        ProfileError, match="profile digits: unknown backbone 'resnet': choose one of balanced_softmax"
    ):
        load("digits", "resnet")
    with pytest.raises(InputError, match="--seed must be 0 or above, found -1"):
        train_command("digits", "sqrt", seed=-1)
    with pytest.raises(CacheError, match="there is no checkpoint none.pt"):
        extract_command("digits", "sqrt", "none.pt", "out")
    with pytest.raises(DataError, match="`small` trains what it ships"):
        train_command("embedded", "sqrt")


def test_a_model_at_chance_is_refused(tmp_path):
    job = backbones.prepare(load_profile("digits"), "sqrt", 0, say=quiet)
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
    assert set(cache.splits) == set(declared.stored_splits)
    assert len(cache.labels("test")) == 10_000
    assert "unknown" not in meta["code_version"] and "changes" not in meta["code_version"]
    if "train" in cache.splits:
        counts = torch.bincount(cache.labels("train"), minlength=len(cache.counts))
        assert torch.equal(counts, cache.counts)
    assert Recipe(**meta["recipe"]) == EMBEDDED.recipes[declared.recipe]
    assert (meta["backbone"], meta["seed"], meta["sampler"], meta["loss"], meta["start"]) == (
        *(backbone, seed, declared.sampler, declared.loss, declared.start),
    )
    found = group_accuracy(predict(cache, learned(cache)), cache.labels("test"), cache.counts)
    stated = meta["accuracies"]["last"]["test"]["classifier"]
    assert found["many"] == pytest.approx(stated["many"], abs=0.5)  # int8 against float32


def test_embedded_caches_are_small_and_all_belong_to_the_profile():
    files = list(paths.SHIPPED_CACHES.rglob("*.safetensors"))
    shipped = [file for file in files if file.relative_to(paths.SHIPPED_CACHES).parts[0] != "digits"]
    assert sum(file.stat().st_size for file in shipped) < 120e6
    places = {file.parent.relative_to(paths.SHIPPED_CACHES).as_posix() for file in shipped}
    assert places == {
        f"{EMBEDDED.dataset_of(name)}/{name}/seed{seed}"
        for name, one in EMBEDDED.backbones.items()
        for seed in one.seeds
    }


def test_seeds_of_a_frozen_backbone_store_their_features_once(tmp_path, monkeypatch):
    digits = load_profile("digits")
    several = digits.backbone("imagenet_frozen").model_copy(update={"seeds": [0, 1]})
    profile = digits.model_copy(update={"backbones": digits.backbones | {"imagenet_frozen": several}})
    monkeypatch.setattr(backbones, "_refuse_chance", lambda *a: None)  # nothing is trained
    monkeypatch.setattr(backbones, "_start", lambda *a: None)

    def built(name: str, weights: int) -> torch.nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(weights)
            return build_backbone(name)

    for seed, weights in ((0, 0), (1, 0), (2, 2)):  # the first two start from the same weights
        monkeypatch.setattr(backbones, "build_backbone", partial(built, weights=weights))
        job = backbones.prepare(profile, "imagenet_frozen", seed, say=quiet)
        backbones.write_cache(job, tmp_path / f"seed{seed}")
    stored = [(tmp_path / f"seed{seed}" / TENSORS).stat().st_size for seed in range(3)]
    assert stored[1] < stored[0] / 4 and stored[2] == stored[0]
    zero, one = load_cache(tmp_path / "seed0"), load_cache(tmp_path / "seed1")
    assert torch.equal(zero.features("test"), one.features("test")) and set(one.splits) == {"test"}


def test_pretraining_at_chance_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(backbones, "fit", lambda *a, **k: [{"val_accuracy": 5.0}])
    with pytest.raises(TrainingError, match="validation accuracy 5.00 % .* is chance among 26"):
        backbones.pretrain(load_profile("digits"), "simclr", 0, say=quiet)
    assert not list(tmp_path.rglob("backbone.pt"))
