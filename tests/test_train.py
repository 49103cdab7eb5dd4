"""The training loops: schedule, learning, repeatability, resuming after a kill, processes, refusals."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from lt_core import paths, train
from lt_core.cache import load_cache
from lt_core.checks import CacheError, InputError, TrainingError
from lt_core.data import image_files
from lt_core.data.datasets import Dataset, Split, load_dataset
from lt_core.data.image_files import ImageFiles
from lt_core.data.profiles import Augmentation, Recipe
from lt_core.losses import build_loss
from lt_core.models import ContrastiveHead, Model, build_backbone, build_classifier
from lt_core.rsg import RSG
from lt_core.samplers import epoch_batches
from lt_core.train import fit, fit_head, load_checkpoint, lr_at, step_generator

RECIPE = Recipe(
    epochs=3,
    batch_size=64,
    learning_rate=0.05,
    classifier_learning_rate=0.1,
    augmentation=Augmentation(crop_padding=1),
)
Run = tuple[Model, list[dict[str, float]]]


def fresh(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model(build_backbone("digits_net"), build_classifier("cosine", 64, 10))


def run_fit(
    folder: Path, seed: int = 0, model: Model | None = None, loss: str = "cross_entropy", **changes: object
) -> Run:
    """Train on digits with RECIPE and the changes to it."""
    data, model = load_dataset("digits"), model or fresh(seed)
    recipe, built = RECIPE.model_copy(update=changes), build_loss(loss, data.counts)
    return model, fit(model, data, recipe, "square_root", built, seed, folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    """A run that nothing disturbed."""
    return run_fit(tmp_path_factory.mktemp("whole"))


def assert_same(one: Run, two: Run) -> None:
    for (name, a), b in zip(one[0].state_dict().items(), two[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(one[1], two[1], strict=True):
        assert a == pytest.approx(b)


# ---------------------------------------------------------------- schedule and random choices


def test_schedule():
    assert lr_at(0, 100) == 1 and lr_at(50, 100) == pytest.approx(0.5)
    assert 0 < lr_at(99, 100) < 0.001 and lr_at(100, 100) == pytest.approx(0)
    assert [lr_at(step, 100, warmup=10) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert lr_at(10, 100, warmup=10) == 1
    rates = [lr_at(step, 100, warmup=10) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)


def test_random_choices_differ_between_steps_and_are_the_same_again():
    keys = [(0, 0, 0, 0), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0), (0, 0, 0, 1)]
    one, two = ([torch.rand(1, generator=step_generator(*key)).item() for key in keys] for _ in range(2))
    assert len(set(one)) == 5 and one == two


# ---------------------------------------------------------------- images


def test_it_learns_and_keeps_a_history(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lt_core"):
        model, history = run_fit(tmp_path, epochs=10)
    assert [entry["epoch"] for entry in history] == list(range(1, 11))
    assert history[-1]["loss"] < history[0]["loss"] / 2 and history[-1]["val_accuracy"] > 60
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 10
    assert [message.split("  ")[0] for message in caplog.messages] == [f"epoch {i}/10" for i in range(1, 11)]
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    expected = [(entry["epoch"], pytest.approx(entry["loss"])) for entry in history]
    assert [(event.step, event.value) for event in shown] == expected
    best = load_checkpoint(tmp_path / "best.pt")
    assert best["epoch"] == max(history, key=lambda e: e["val_accuracy"])["epoch"]
    assert model.classifier.scale.item() != 16  # the scale is learned


def test_simclr_learns_without_labels(tmp_path):
    """Positives are found, the nearest other image is of the same class, and labels play no part."""
    data, recipe = load_dataset("digits"), RECIPE.model_copy(update={"epochs": 6, "batch_size": 32})
    part = data.splits["train"]
    unlabelled = data.splits | {"train": Split(part.images, torch.arange(len(part)) % 10)}

    def simclr(folder: Path, data: Dataset) -> Run:
        torch.manual_seed(0)
        model = Model(build_backbone("digits_net"), ContrastiveHead(64))
        loss = build_loss("cross_entropy", data.counts)
        return model, fit(model, data, recipe, "uniform", loss, 0, folder)

    one = simclr(tmp_path / "one", data)
    first, last = one[1][0], one[1][-1]
    assert last["loss"] < first["loss"] and last["train_accuracy"] > 40 and last["val_accuracy"] > 70
    assert_same(one, simclr(tmp_path / "two", replace(data, splits=unlabelled)))


def test_precision_is_that_of_the_recipe_and_weights_stay_float32(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    wide, narrow = train.this_machine(), train.this_machine(precision="bfloat16")
    on_gpu, seen = torch.cuda.is_available(), []
    for machine in (wide, narrow):
        with machine.autocast():
            ones = torch.ones(2, 2, device=machine.device)
            seen.append((ones @ ones).dtype)
    assert seen == [torch.bfloat16 if on_gpu else torch.float32, torch.bfloat16]
    model, history = run_fit(tmp_path, precision="bfloat16")
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    assert history[-1]["loss"] == pytest.approx(whole[1][-1]["loss"], rel=0.1)
    assert on_gpu or history[0]["loss"] != whole[1][0]["loss"]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert on_gpu or "float32" in train.this_machine(precision="bfloat16").description


def test_same_seed_same_weights(tmp_path, whole):
    assert_same(run_fit(tmp_path / "again"), whole)
    other, _ = run_fit(tmp_path / "other", seed=1)
    assert not torch.equal(other.classifier.weight, whole[0].classifier.weight)


def test_backbone_and_classifier_have_their_own_learning_rates(tmp_path):
    model, _ = run_fit(tmp_path, learning_rate=1e-9, weight_decay=0.0, epochs=1)
    start = fresh()
    for a, b in zip(model.backbone.parameters(), start.backbone.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert not torch.allclose(model.classifier.weight, start.classifier.weight, atol=1e-3)


@pytest.mark.parametrize("every", [60, -1])
def test_infinite_loss_is_an_error_and_is_not_saved(tmp_path, monkeypatch, every):
    monkeypatch.setattr(train, "SAVE_EVERY", every)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) in epoch 1: lower the learning rate"):
        run_fit(tmp_path, learning_rate=1e30, classifier_learning_rate=1e30)
    if every < 0:  # a checkpoint after every step, up to the first that went wrong
        assert torch.tensor(load_checkpoint(tmp_path / "last.pt")["loss"]).isfinite()
    else:
        assert not (tmp_path / "last.pt").exists()


def test_short_epochs_share_a_checkpoint(tmp_path, monkeypatch):
    written, save = [], train.save_checkpoint
    monkeypatch.setattr(
        train, "save_checkpoint", lambda path, state: (written.append(path.name), save(path, state))
    )
    run_fit(tmp_path, epochs=4)
    assert written == ["best.pt", "last.pt"]


class Copies(TorchDispatchMode):
    """Counts copies to another device, and notes those that the step waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.waited = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, tensors = kwargs or {}, [value for value in args if isinstance(value, torch.Tensor)]
        name = function.overloadpacket.__name__
        goes = name == "_to_copy" and kwargs.get("device", tensors[0].device) != tensors[0].device
        between = len({tensor.device for tensor in tensors if tensor.ndim}) > 1  # an index on the CPU, copy_
        self.number += goes or between
        if between or (goes and not kwargs.get("non_blocking")):
            self.waited.append(name)
        return function(*args, **kwargs)


AUGMENTATIONS = [
    Augmentation(crop_padding=2, flip=True),
    Augmentation(random_resized_crop=0.3, flip=True, colour_jitter=0.4, hue=0.1, grey=0.2),
]


def one_step(device: torch.device, how: Augmentation) -> Callable[[], None]:
    """A training step on images that lie on the device."""
    machine = replace(train.this_machine(), device=device)
    images = torch.zeros(20, 16, 16, 3, dtype=torch.uint8, device=device)
    recipe = RECIPE.model_copy(update={"augmentation": how})
    model = Model(build_backbone("small_resnet"), build_classifier("cosine", 256, 6)).to(device)
    loss = build_loss("lade", torch.tensor([5, 4, 4, 3, 2, 2])).to(device)
    targets = torch.zeros(1, 8, dtype=torch.long, device=device)

    def step() -> None:
        (pixels,) = train.training_pixels(images, [(0, 0, torch.zeros(1, 8).long())], recipe, 0, machine)
        train.accumulate_gradient(model, loss, pixels, targets[0], 0, machine)

    return step


@pytest.mark.parametrize("how", AUGMENTATIONS)
def test_a_step_waits_for_no_copy(how):
    """On a device that holds no values whatever asks for one fails, and every copy to it is seen."""
    step = one_step(torch.device("meta"), how)
    with Copies() as copies:
        step()
    assert copies.number >= 3 and not copies.waited


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: a step's waits are counted on the CPU alone"
)
@pytest.mark.parametrize("how", AUGMENTATIONS)
def test_a_step_never_waits_for_a_gpu(how):
    step = one_step(torch.device("cuda"), how)
    step()  # what the first one alone sets up may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_workers_are_started_once_for_all_epochs(tmp_path, monkeypatch):
    """One decodes training images, one validation images, from the first epoch to the last."""
    digits, folder = load_dataset("digits"), tmp_path / "images"
    splits = {}
    for name, number in (("train", 80), ("val", 40)):
        split = digits.splits[name]
        rows = np.linspace(0, len(split) - 1, number).astype(int)
        files = [f"{name}{row}.png" for row in rows]
        folder.mkdir(exist_ok=True)
        for row, file in zip(rows, files, strict=True):
            Image.fromarray(split.images[row].numpy().squeeze()).convert("RGB").save(folder / file)
        splits[name] = Split(ImageFiles(folder, np.array(files)), split.labels[rows])
    read = image_files.Crops.__getitem__

    def noting(crops: image_files.Crops, crop: image_files.Crop) -> object:
        (tmp_path / f"{'test' if crop[1] is None else 'training'} images by {os.getpid()}").touch()
        return read(crops, crop)

    monkeypatch.setattr(image_files.Crops, "__getitem__", noting)
    model = Model(build_backbone("small_resnet"), build_classifier("cosine", 256, 10))
    recipe = RECIPE.model_copy(update={"batch_size": 40, "input_size": 16, "augmentation": Augmentation()})
    machine = replace(train.this_machine(), workers=1)
    data, loss = replace(digits, splits=splits), build_loss("cross_entropy", digits.counts)
    history = fit(model, data, recipe, "uniform", loss, 0, tmp_path, machine)
    assert len(history) == 3 and len({entry["val_accuracy"] for entry in history}) > 1
    noted = sorted(path.name.split(" by ") for path in tmp_path.glob("* images by *"))
    assert [what for what, _ in noted] == ["test images", "training images"]
    assert str(os.getpid()) not in {process for _, process in noted}


# ---------------------------------------------------------------- resuming


class Killed(BaseException):
    """Stands for a kill inside the process: nothing may catch it."""


def killed_after(steps: int, run: Callable[[], object]) -> None:
    """`run` killed in the step after so many, with a checkpoint after every step."""
    augment, left = train.augment, [None] * steps

    def dying(*arguments: object) -> object:
        if not left:
            raise Killed
        left.pop()
        return augment(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "SAVE_EVERY", -1)
        patch.setattr(train, "augment", dying)
        with pytest.raises(Killed):
            run()


@pytest.mark.parametrize("steps", [0, 1, 3, 7, 13, 20])
def test_resume_after_death_at_any_step_is_exact(tmp_path, whole, steps):
    killed_after(steps, lambda: run_fit(tmp_path))
    assert_same(run_fit(tmp_path), whole)


def test_resume_while_rsg_generates_is_exact(tmp_path):
    """RSG and its loss change four fifths into training; the causal norm classifier follows a mean."""

    def run(folder: Path) -> Run:
        torch.manual_seed(0)
        backbone = build_backbone("digits_net")
        rsg = RSG(backbone.last_stage_channels, load_dataset("digits").counts)
        model = Model(backbone, build_classifier("causal_norm", 64, 10), rsg)
        return run_fit(folder, model=model, loss="rsg", epochs=5)

    killed_after(31, lambda: run(tmp_path / "killed"))  # 7 steps an epoch: in the middle of the last
    resumed = run(tmp_path / "killed")
    assert_same(resumed, run(tmp_path / "whole"))
    assert resumed[0].rsg.generating and resumed[0].classifier.direction.abs().sum() > 0


DYING = """
import os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from lt_core import train
from test_train import run_fit

folder, dies = Path(sys.argv[2]), sys.argv[3] == "dies"
train.SAVE_EVERY = 0.02

def written():
    return (folder / "last.pt").stat().st_mtime_ns if (folder / "last.pt").exists() else 0

def watch(before):
    while written() == before:
        time.sleep(0.013)
    os.kill(os.getpid(), signal.SIGKILL)

if dies:
    threading.Thread(target=watch, args=(written(),), daemon=True).start()
run_fit(folder, epochs=8)
"""


def test_resume_after_sigkill_is_exact(tmp_path):
    """A real process, killed three times while it trains and saves."""
    last, environment = tmp_path / "killed" / "last.pt", os.environ | {"PYTHONPATH": str(paths.ROOT)}
    command = [sys.executable, "-c", DYING, str(Path(__file__).parent), str(last.parent)]
    reached = []
    for _ in range(3):
        assert subprocess.run([*command, "dies"], env=environment).returncode == -signal.SIGKILL
        state = load_checkpoint(last)  # whole at every moment
        reached.append((state["epoch"], state["step"]))
    assert reached == sorted(set(reached)) and reached[-1] < (8, 0)
    subprocess.run([*command, "lives"], env=environment, check=True)
    expected = run_fit(tmp_path / "whole", epochs=8)[0].state_dict()
    for name, value in load_checkpoint(last)["model"].items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("2", "WORLD_SIZE is 2, but there is no RANK: start with torchrun, or unset it"),
        ("two", "the environment variable WORLD_SIZE must be a whole number, found 'two'"),
        ("-1", "the environment variable WORLD_SIZE must be a whole number, found '-1'"),
    ],
)
def test_what_a_cluster_left_in_the_environment_is_named(monkeypatch, value, message):
    monkeypatch.setenv("WORLD_SIZE", value)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match=message):
        train.this_machine()


def test_an_empty_world_size_is_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "")
    assert train.this_machine().world_size == 1


def test_a_damaged_checkpoint_is_refused(tmp_path):
    (tmp_path / "last.pt").write_bytes(b"PK\3\4 cut short")
    with pytest.raises(CacheError, match="last.pt cannot be read .*delete it to start again"):
        run_fit(tmp_path)


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
    assert (result.stdout + result.stderr).count("epoch 30/30") == 1
    cache = load_cache(tmp_path / "caches" / "digits" / "sqrt" / "seed0")
    assert cache.meta["accuracies"]["last"]["test"]["classifier"]["total"] > 85


# ---------------------------------------------------------------- features

EPOCHS, BATCH, RATE, DECAY, MOMENTUM = 5, 16, 0.1, 0.01, 0.8


def features_of(seed: int, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [M, 8] around six close centres, and labels [M] with a long tail."""
    generator = torch.Generator().manual_seed(seed)
    labels = (6 * torch.rand(images, generator=generator) ** 2).long()
    return torch.eye(6, 8)[labels] + 0.5 * torch.randn(images, 8, generator=generator), labels


def head_of(kind: str) -> torch.nn.Module:
    torch.manual_seed(3)
    return build_classifier(kind, 8, 6)


@pytest.mark.parametrize(
    ("kind", "sampler", "loss"),
    [
        ("cosine", "square_root", "cross_entropy"),
        ("dot_product", "class_aware", "lade"),
        ("cosine_fixed", "uniform", "ldam_drw"),  # whose class weights come in late
    ],
)
def test_a_head_is_trained_by_plain_sgd(kind, sampler, loss):
    (features, labels), val, best = features_of(0, 200), features_of(1, 90), {}
    head, loss = head_of(kind), build_loss(loss, torch.bincount(labels))
    arguments = sampler, RATE, EPOCHS, BATCH, DECAY, MOMENTUM, 7
    before = torch.random.get_rng_state()
    history = fit_head(head, features, labels, loss, *arguments, val=val, best=best)
    assert torch.equal(torch.random.get_rng_state(), before)

    plain = head_of(kind)
    weights, states, accuracies = list(plain.parameters()), [], []
    velocity = [torch.zeros_like(weight) for weight in weights]
    for epoch in range(EPOCHS):
        loss.begin_epoch(epoch / EPOCHS)
        losses = []
        for step, rows in enumerate(epoch_batches(sampler, labels, BATCH, 7, epoch)):
            value = loss(plain(features[rows]), labels[rows])
            gradients = torch.autograd.grad(value, weights)
            rate = RATE * lr_at(12 * epoch + step, 12 * EPOCHS)
            with torch.no_grad():
                for weight, speed, gradient in zip(weights, velocity, gradients, strict=True):
                    weight -= rate * speed.mul_(MOMENTUM).add_(gradient + DECAY * weight)
            losses.append(value.item())
        states.append({name: value.clone() for name, value in plain.state_dict().items()})
        accuracies.append(100 * (plain(val[0]).argmax(1) == val[1]).double().mean().item())
        assert history[epoch]["loss"] == pytest.approx(sum(losses) / 12)
    assert [entry["val_accuracy"] for entry in history] == accuracies
    assert best["epoch"] == 1 + accuracies.index(max(accuracies))
    for found, expected in ((head.state_dict(), states[-1]), (best["state"], states[best["epoch"] - 1])):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0)


def test_what_is_frozen_in_a_head_stays():
    features, labels = features_of(0, 200)
    head, start = head_of("dot_product"), head_of("dot_product")
    head.weight.requires_grad_(False)
    loss = build_loss("focal", torch.bincount(labels))
    history = fit_head(head, features, labels, loss, "uniform", 0.1, batch_size=BATCH)
    assert torch.equal(head.weight, start.weight) and not torch.equal(head.bias, start.bias)
    assert len(history) == 10 and set(history[0]) == {"epoch", "loss", "train_accuracy"}


def test_a_head_that_diverges_says_so():
    features, labels = features_of(0, 200)
    loss = build_loss("cross_entropy", torch.bincount(labels))
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at learning rate 1e\+30: lower it"):
        fit_head(head_of("dot_product"), features, labels, loss, "uniform", 1e30, batch_size=BATCH)
