"""The training loop: schedule, learning, repeatability, resuming after a kill, processes, refusals."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lt_core import paths, train
from lt_core.datasets import Dataset, Split, load_dataset
from lt_core.errors import CacheError, TrainingError
from lt_core.features import load_cache
from lt_core.losses import build_loss
from lt_core.models import ContrastiveHead, Model, build_backbone, build_classifier
from lt_core.profiles import Augmentation, Recipe
from lt_core.rsg import RSG
from lt_core.train import fit, load_checkpoint, lr_at, step_generator

RECIPE = Recipe(
    epochs=3,
    batch_size=64,
    learning_rate=0.05,
    classifier_learning_rate=0.1,
    augmentation=Augmentation(crop_padding=1),
)


def fresh(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model(build_backbone("digits_net"), build_classifier("cosine", 64, 10))


def run_fit(
    folder: Path,
    recipe: Recipe = RECIPE,
    seed: int = 0,
    model: Model | None = None,
    loss: str = "cross_entropy",
) -> tuple[Model, list]:
    folder.mkdir(parents=True, exist_ok=True)
    data = load_dataset("digits")
    model = model or fresh(seed)
    built = build_loss(loss, data.counts)
    return model, fit(model, data, recipe, "square_root", built, seed, folder, say=lambda line: None)


def assert_same(one: Model, two: Model) -> None:
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_without_a_run_folder_the_weights_are_the_same_and_nothing_is_written(tmp_path, monkeypatch):
    data, recipe = load_dataset("digits"), RECIPE.model_copy(update={"epochs": 1})
    kept, _ = run_fit(tmp_path / "run", recipe)
    monkeypatch.chdir(tmp_path)
    alone, loss = fresh(), build_loss("cross_entropy", data.counts)
    only_train = replace(data, splits={"train": data.splits["train"]})
    (entry,) = fit(alone, only_train, recipe, "square_root", loss, 0, None, say=lambda line: None)
    assert_same(kept, alone)
    assert set(entry) == {"epoch", "loss", "train_accuracy"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_schedule():
    assert lr_at(0, 100) == 1 and lr_at(50, 100) == pytest.approx(0.5)
    assert 0 < lr_at(99, 100) < 0.001 and lr_at(100, 100) == pytest.approx(0)
    assert [lr_at(step, 100, warmup=10) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert lr_at(10, 100, warmup=10) == 1
    rates = [lr_at(step, 100, warmup=10) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)


def test_random_choices_differ_between_steps_and_are_the_same_again():
    draws = {
        key: torch.rand(1, generator=step_generator(*key)).item()
        for key in [(0, 0, 0, 0), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0), (0, 0, 0, 1)]
    }
    assert len(set(draws.values())) == 5
    assert torch.rand(1, generator=step_generator(0, 0, 1, 0)).item() == draws[0, 0, 1, 0]


def test_it_learns_and_keeps_a_history(tmp_path):
    model, history = run_fit(tmp_path, RECIPE.model_copy(update={"epochs": 10}))
    assert [entry["epoch"] for entry in history] == list(range(1, 11))
    assert history[-1]["loss"] < history[0]["loss"] / 2 and history[-1]["val_accuracy"] > 60
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 10
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in shown] == [
        (entry["epoch"], pytest.approx(entry["loss"])) for entry in history
    ]
    best = load_checkpoint(tmp_path / "best.pt")
    assert best["epoch"] == max(history, key=lambda e: e["val_accuracy"])["epoch"]
    assert model.classifier.scale.item() != 16  # the scale is learned


def test_simclr_learns_without_labels(tmp_path):
    """Partners are found, the nearest other image is of the same class, and training labels play no part."""
    recipe = RECIPE.model_copy(update={"epochs": 6, "batch_size": 32})
    data = load_dataset("digits")
    part = data.splits["train"]
    unlabelled = data.splits | {"train": Split(part.images, torch.arange(len(part)) % 10)}

    def simclr(folder: Path, data: Dataset) -> tuple[Model, list]:
        torch.manual_seed(0)
        folder.mkdir()
        model = Model(build_backbone("digits_net"), ContrastiveHead(64))
        loss = build_loss("cross_entropy", data.counts)
        return model, fit(model, data, recipe, "uniform", loss, 0, folder, say=lambda line: None)

    model, history = simclr(tmp_path / "one", data)
    assert history[-1]["loss"] < history[0]["loss"] and history[-1]["train_accuracy"] > 40
    assert history[-1]["val_accuracy"] > 70
    assert_same(model, simclr(tmp_path / "two", replace(data, splits=unlabelled))[0])


def test_same_seed_same_weights(tmp_path):
    assert_same(run_fit(tmp_path / "a")[0], run_fit(tmp_path / "b")[0])
    other, _ = run_fit(tmp_path / "c", seed=1)
    assert not torch.equal(other.classifier.weight, run_fit(tmp_path / "a")[0].classifier.weight)


def test_backbone_and_classifier_have_their_own_learning_rates(tmp_path):
    slow = RECIPE.model_copy(update={"learning_rate": 1e-9, "weight_decay": 0.0, "epochs": 1})
    model, _ = run_fit(tmp_path, slow)
    start = fresh()
    for a, b in zip(model.backbone.parameters(), start.backbone.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert not torch.allclose(model.classifier.weight, start.classifier.weight, atol=1e-3)


def test_frozen_backbone_does_not_move_at_all(tmp_path):
    model, _ = run_fit(tmp_path, RECIPE.model_copy(update={"learning_rate": 0.0, "epochs": 1}))
    start = fresh()
    for (name, a), b in zip(
        model.backbone.state_dict().items(), start.backbone.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name  # batch-norm statistics included
    assert not torch.equal(model.classifier.weight, start.classifier.weight)


class Killed(BaseException):
    """Stands for a kill inside the process: nothing may catch it."""


@pytest.mark.parametrize("step_of_death", [0, 1, 3, 7, 13, 20])
def test_resume_after_death_at_any_step_is_exact(tmp_path, monkeypatch, step_of_death):
    whole, history = run_fit(tmp_path / "whole")
    monkeypatch.setattr(train, "SAVE_EVERY", -1)  # a checkpoint after every step
    seen = []

    def dying(*arguments):
        if len(seen) == step_of_death:
            raise Killed
        seen.append(arguments)
        return augment(*arguments)

    augment = train.augment
    monkeypatch.setattr(train, "augment", dying)
    with pytest.raises(Killed):
        run_fit(tmp_path / "killed")
    monkeypatch.setattr(train, "augment", augment)
    resumed, resumed_history = run_fit(tmp_path / "killed")
    assert_same(whole, resumed)
    for one, two in zip(history, resumed_history, strict=True):
        assert one == pytest.approx(two)


def test_resume_while_rsg_generates_is_exact(tmp_path, monkeypatch):
    """RSG and its loss change four fifths into training; the causal norm classifier follows a mean."""

    def run(folder: Path) -> tuple[Model, list]:
        torch.manual_seed(0)
        backbone = build_backbone("digits_net")
        generator = RSG(backbone.last_stage_channels, load_dataset("digits").counts)
        model = Model(backbone, build_classifier("causal_norm", 64, 10), generator)
        return run_fit(folder, RECIPE.model_copy(update={"epochs": 5}), model=model, loss="rsg")

    whole, history = run(tmp_path / "whole")
    monkeypatch.setattr(train, "SAVE_EVERY", -1)
    augment, left = train.augment, [31]  # 7 steps an epoch: in the middle of the last

    def dying(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return augment(*arguments)

    monkeypatch.setattr(train, "augment", dying)
    with pytest.raises(Killed):
        run(tmp_path / "killed")
    monkeypatch.setattr(train, "augment", augment)
    resumed, resumed_history = run(tmp_path / "killed")
    assert_same(whole, resumed)
    assert [entry["loss"] for entry in history] == pytest.approx([entry["loss"] for entry in resumed_history])
    assert resumed.generator.generating and resumed.classifier.direction.abs().sum() > 0


def test_resume_after_sigkill_is_exact(tmp_path):
    """A real process, killed three times while it trains and saves."""
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from lt_core import train; train.SAVE_EVERY = 0.02\n"
        "from test_train import run_fit, RECIPE\n"
        "run_fit(Path(sys.argv[1]), RECIPE.model_copy(update={'epochs': 8})); print('finished')\n"
    )
    folder, tests = tmp_path / "killed", Path(__file__).parent
    command = [sys.executable, "-c", script, str(folder), str(tests)]
    environment = os.environ | {"PYTHONPATH": str(paths.ROOT)}

    def progress() -> tuple[int, int]:
        if not (folder / "last.pt").exists():
            return (0, 0)
        state = load_checkpoint(folder / "last.pt")  # also: a checkpoint is whole at every moment
        return (state["epoch"], state["step"])

    kills = 0
    for _ in range(3):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        before, deadline = progress(), time.monotonic() + 60
        while progress() <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills >= 2
    assert b"finished" in subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    whole, _ = run_fit(tmp_path / "whole", RECIPE.model_copy(update={"epochs": 8}))
    for name, value in load_checkpoint(folder / "last.pt")["model"].items():
        assert torch.equal(value, whole.state_dict()[name]), name


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path):
    """torchrun with two processes on the CPU: one cache, one voice, as accurate as one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "lt_core", "train", "--profile", "digits", "--backbone", "sqrt"]
    environment = os.environ | {
        "LT_OUTPUT_ROOT": str(tmp_path),
        "PYTHONPATH": str(paths.ROOT),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("epoch 30/30") == 1
    cache = load_cache(tmp_path / "caches" / "digits" / "sqrt" / "seed0")
    assert cache.meta["accuracies"]["last"]["test"]["classifier"]["total"] > 85


def test_infinite_loss_is_an_error(tmp_path):
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) in epoch 1: lower the learning rate"):
        run_fit(tmp_path, RECIPE.model_copy(update={"learning_rate": 1e30, "classifier_learning_rate": 1e30}))


def test_a_damaged_checkpoint_is_refused(tmp_path):
    run_fit(tmp_path)
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CacheError, match="last.pt cannot be read .*delete it to start again"):
        run_fit(tmp_path)
