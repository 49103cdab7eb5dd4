"""The two training loops: `fit` for images (CPU, GPU, processes under torchrun), `fit_head` for features.

Everything random is a function of (seed, epoch, step), and a checkpoint of `fit` holds all the rest, so a run
that is killed at any moment and started again ends with the same weights as one left alone.

    history = fit(model, data, recipe, "square_root", loss, seed=0, run=folder)
    history = fit_head(CosineClassifier(F, N), features, labels, loss, "square_root", learning_rate=0.1)
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import logging
import math
import os
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

from lt_core import paths
from lt_core.checks import CacheError, InputError, TrainingError, first_line, number_in_environment
from lt_core.data.augmentation import augment, resize, to_pixels
from lt_core.data.datasets import Dataset, Split
from lt_core.data.distributed import synchronise_batch_norms
from lt_core.data.image_files import (
    EVALUATION_BATCH,
    SQUARE,
    ImageFiles,
    Square,
    evaluation_batches,
    training_batches,
)
from lt_core.data.profiles import Recipe
from lt_core.losses import Loss
from lt_core.models import ContrastiveHead, Model, at_least_float32, fold_batch_norm
from lt_core.samplers import epoch_batches

SAVE_EVERY = 60  # seconds between checkpoints
PATIENCE = timedelta(hours=1)  # of processes that wait for the first one to write a cache
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
log = logging.getLogger(__name__)

# A forked child has not the threads that its parent computed with and would wait for them for ever.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


# ---------------------------------------------------------------- where it runs


@dataclass(frozen=True)
class Machine:
    """Device and precision, chosen once, and this process's place among the others.

    The last three change speed and memory, and results by rounding alone (with `micro_batch`, also the images
    that a batch norm averages over).
    """

    device: torch.device
    autocast: Callable[[], contextlib.AbstractContextManager]
    description: str  # what was chosen and why
    rank: int = 0
    world_size: int = 1
    workers: int = 0  # processes of this process that decode image files; 0: it does so itself
    micro_batch: int = 0  # images whose gradient is taken at once, summed to that of the batch; 0: all
    compiles: bool = False  # with torch.compile


def this_machine(
    workers: int | None = None, micro_batch: int = 0, compiles: bool = False, precision: str = "float32"
) -> Machine:
    """A GPU with bfloat16 where there is one, else the CPU; joins torchrun's process group.

    workers: None for all cores, shared by the processes of this computer, and for none without a GPU;
    precision: of the CPU, as a recipe states it, but float32 without AVX-512, where bfloat16 is ten times
    slower; the others are fields of `Machine`.
    """
    world_size = number_in_environment("WORLD_SIZE", 1)  # as torchrun sets it, with RANK and the others
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT") if world_size > 1 and not dist.is_initialized() else ()
    if absent := [name for name in needed if not os.environ.get(name)]:
        raise InputError(
            f"WORLD_SIZE is {world_size}, but there is no {absent[0]}: start with torchrun, or unset it"
        )
    cuda = torch.cuda.is_available()
    if min(workers or 0, micro_batch) < 0:
        raise InputError("--workers and --micro-batch must be 0 or above")
    device = torch.device("cuda", number_in_environment("LOCAL_RANK", 0)) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        backend = {"backend": "nccl", "device_id": device} if cuda else {"backend": "gloo"}
        dist.init_process_group(timeout=PATIENCE, **backend)
    rank = dist.get_rank() if world_size > 1 else 0
    if workers is None:
        workers = len(os.sched_getaffinity(0)) // number_in_environment("LOCAL_WORLD_SIZE", 1) if cuda else 0
    if cuda:
        torch.backends.cudnn.benchmark = True  # all batches are of one size
        text = f"{world_size} x {torch.cuda.get_device_name(device)}, bfloat16"
    else:
        keep_freed_memory()
        if torch.backends.cpu.get_cpu_capability() != "AVX512":
            precision = "float32"
        text = f"CPU, {torch.get_num_threads()} threads, {precision} (no GPU found)"
    narrow = cuda or precision == "bfloat16"
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=narrow)
    return Machine(device, autocast, text, rank, world_size, workers, micro_batch, compiles)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step instead of returning it to the kernel.

    Activations are large, so by default each is mapped, zeroed page by page and unmapped again in every step:
    half of the time of an EfficientNet's forward pass. Does nothing with another C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(parameter, 2**31 - 1)


# ---------------------------------------------------------------- schedule and optimiser


def lr_at(step: int, total: int, warmup: int = 0) -> float:
    """Learning rate at a step as a fraction of its peak: linear warm-up, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def build_optimiser(model: Model, recipe: Recipe) -> torch.optim.SGD:
    """SGD with two learning rates (paper, App. A): the backbone's and that of all else."""
    rest = [weight for name, weight in model.named_parameters() if not name.startswith("backbone.")]
    groups = [
        {"params": rest, "peak": recipe.classifier_learning_rate},
        {"params": list(model.backbone.parameters()), "peak": recipe.learning_rate},
    ]
    return torch.optim.SGD(
        groups,
        lr=recipe.classifier_learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


def step_generator(*key: int) -> torch.Generator:
    """The random choices of one step: an independent stream for each (seed, epoch, step, rank)."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1
    return torch.Generator().manual_seed(int(seed))


# ---------------------------------------------------------------- pixels in, features out


def training_pixels(
    images: Tensor | ImageFiles,
    epochs: Iterable[tuple[int, int, Tensor]],
    recipe: Recipe,
    seed: int,
    machine: Machine,
    views: int = 1,
) -> Iterator[Tensor]:
    """Augmented pixels [views * B, C, H, W] of each step; epochs: (epoch, first step, batches [steps, B]).

    Those of files are the same for any number of processes; images in memory, which lie on the device, are
    augmented a batch at once, from one random stream a step and process.
    """
    if isinstance(images, ImageFiles):
        yield from training_batches(images, epochs, recipe, seed, machine, views)
        return
    for epoch, first_step, batches in epochs:
        for step in range(first_step, len(batches)):
            generator = step_generator(seed, epoch, step, machine.rank)
            pixels = augment(images, batches[step].repeat(views), recipe.augmentation, generator)
            yield resize(pixels, recipe.input_size)


def evaluation_pixels(
    images: Tensor | ImageFiles, input_size: int, machine: Machine, times: int = 1, square: Square = SQUARE
) -> Iterator[Tensor]:
    """Pixels [B, C, H, W] of all images in order, without augmentation; of files their central squares.

    times: over again so often, by the same workers.
    """
    if isinstance(images, ImageFiles):
        yield from evaluation_batches(images, input_size, machine, times, square)
        return
    for _ in range(times):
        for chunk in images.split(EVALUATION_BATCH[machine.device.type]):
            yield resize(to_pixels(chunk.to(machine.device)), input_size)


@torch.inference_mode()
def feature_batches(
    backbone: nn.Module,
    images: Tensor | ImageFiles,
    input_size: int,
    machine: Machine,
    times: int = 1,
    fold: bool = True,
) -> Iterator[Tensor]:
    """Features [B, F] (float32, on the CPU) of all images in order, without augmentation.

    times: over again so often, by the same workers. fold: whether batch norms become parts of convolutions;
    False for a network that is trained in between, whose caller sees to `eval` from the second time on.
    """
    backbone.eval()
    network = None if fold else backbone
    square = getattr(backbone, "square", SQUARE)
    for pixels in evaluation_pixels(images, input_size, machine, times, square):
        if network is None:
            network = fold_batch_norm(backbone, pixels[:2])
        with machine.autocast():
            features = network(pixels)
        yield features.float().cpu()


def extract_features(
    backbone: nn.Module, images: Tensor | ImageFiles, input_size: int, machine: Machine
) -> Tensor:
    """Features [M, F] (float32, on the CPU) of images without augmentation."""
    return torch.cat(list(feature_batches(backbone, images, input_size, machine)))


@torch.inference_mode()
def accuracy(model: Model, labels: Tensor, batches: Iterator[Tensor], machine: Machine) -> float:
    """Top-1 accuracy in percent: of the classifier, or without one (SimCLR) of each image's nearest other.

    labels [M] of this process's images; batches: of `feature_batches`, the next ones are of these images.
    """
    model.eval()
    taken: list[Tensor] = []
    while sum(map(len, taken)) < len(labels):
        taken.append(next(batches))
    features = torch.cat(taken).to(machine.device)
    if isinstance(model.classifier, ContrastiveHead):
        cosines = normalize(features, dim=1) @ normalize(features, dim=1).T
        predictions = labels[cosines.fill_diagonal_(-1).argmax(1).cpu()]
    else:
        predictions = model.classifier(features).argmax(1).cpu()
    seen = torch.tensor([(predictions == labels).sum(), len(labels)], device=machine.device)
    if machine.world_size > 1:
        dist.all_reduce(seen)
    return 100 * (seen[0].double() / seen[1]).item()


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint (tensors and plain values) whole or not at all."""
    content = io.BytesIO()
    torch.save(state, content)
    with paths.atomic(path) as temporary, open(temporary, "wb") as file:
        file.write(content.getbuffer())  # not through write_bytes: a full disk would end Python 3.12.1 itself


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Content of a checkpoint (tensors and plain values only; nothing is unpickled). Raises CacheError."""
    if not path.is_file():
        raise CacheError(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself reads past flipped bits
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        return state
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CacheError(
            f"the checkpoint {path} cannot be read ({first_line(error)}): delete it to start again"
        ) from None


def resume(path: Path, state: dict[str, Any], model: Model, optimiser: torch.optim.SGD) -> None:
    """Fill `state`, model and optimiser from a checkpoint; raises CacheError unless it is of the same run."""
    saved = load_checkpoint(path)
    if saved.keys() != state.keys() | {"model", "optimiser"} or saved["seed"] != state["seed"]:
        raise CacheError(f"{path} is of another run: delete it to start again")
    try:
        model.load_state_dict(saved.pop("model"))
        optimiser.load_state_dict(saved.pop("optimiser"))
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CacheError(
            f"{path} does not fit this network ({first_line(error)}): delete it to start again"
        ) from None
    state |= saved


@contextlib.contextmanager
def sigterm_noted() -> Iterator[threading.Event]:
    """SIGTERM (a scheduler preempts the job) sets the event, and takes effect at the end of the block.

    Then it reaches whoever had asked for it, else it interrupts. Of several processes the first ends at the
    next step, with a checkpoint; the others go on until then, for it needs them to finish its step.
    """
    noted, before = threading.Event(), signal.getsignal(signal.SIGTERM)
    main = threading.current_thread() is threading.main_thread()  # signals reach the main thread alone
    if not main or before is signal.SIG_IGN:
        yield noted
        return
    signal.signal(signal.SIGTERM, lambda *_: noted.set())
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)
        if noted.is_set() and callable(before):
            before(signal.SIGTERM, None)
    if noted.is_set():
        raise KeyboardInterrupt


# ---------------------------------------------------------------- the loop for images


def fit(
    model: Model,
    data: Dataset,
    recipe: Recipe,
    sampler: str,
    loss: Loss,
    seed: int,
    run: Path,
    machine: Machine | None = None,
) -> list[dict[str, float]]:
    """Train `model` in place; returns the history, one entry an epoch (loss, accuracies in percent).

    With a `ContrastiveHead` in place of the classifier, a step sees two views of each image and the target of
    a view is the other one (SimCLR).
    Resumes from `run/last.pt` and leaves the last epoch there; `run/best.pt` is the best on validation data.
    SIGTERM ends it with a checkpoint after the step (KeyboardInterrupt). With several processes, batch norms
    and losses see the whole batch and the learning rate is that of one process, so results are the same.
    Raises TrainingError when the loss is not finite.
    """
    # Set-up: everything on the device; images in memory lie there, files are read by workers.
    machine = machine or this_machine(precision=recipe.precision)
    is_main_process = machine.rank == 0
    contrastive = isinstance(model.classifier, ContrastiveHead)
    views = 2 if contrastive else 1
    micro_batch = 0 if contrastive else machine.micro_batch  # SimCLR's images need each other
    train = data.splits["train"]
    images = train.images
    if isinstance(images, Tensor):
        images = images.to(machine.device)
    if machine.world_size > 1:
        synchronise_batch_norms(model, machine.device)
    model.to(machine.device, memory_format=torch.channels_last)
    loss.to(machine.device)
    optimiser = build_optimiser(model, recipe)
    network = model
    if machine.world_size > 1:
        network = nn.parallel.DistributedDataParallel(
            model,
            gradient_as_bucket_view=True,
            broadcast_buffers=machine.device.type == "cpu",  # on GPUs every buffer is synchronised already
        )
    if machine.compiles:
        network = torch.compile(network)

    # Resume: where the run stands, what this epoch has summed up so far, and what came before.
    state: dict[str, Any] = {
        "seed": seed,
        "epoch": 0,
        "step": 0,
        "loss": 0.0,
        "correct": 0,
        "seconds": 0.0,
        "history": [],
    }
    if (run / "last.pt").exists():
        resume(run / "last.pt", state, model, optimiser)
        log.info("resuming at epoch %d, step %d", state["epoch"] + 1, state["step"])
    started = time.monotonic()
    best: dict[str, Any] = {}  # of this process's epochs, until it is written

    def save() -> None:
        """Write last.pt, before it a new best.pt; the seconds since the last time are added to the run's."""
        nonlocal started
        if is_main_process:
            if best:
                save_checkpoint(run / "best.pt", best)
                best.clear()
            state["seconds"] += time.monotonic() - started
            parts = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
            save_checkpoint(run / "last.pt", state | parts)
        started = time.monotonic()

    def check_finite(total: float) -> None:
        """Before anything is saved: what is not finite would come back with every resume."""
        if not math.isfinite(total):
            raise TrainingError(f"the loss is {total} in epoch {state['epoch'] + 1}: lower the learning rate")

    # Batches and their order are a function of (seed, epoch) alone; one loader makes those of all epochs.
    @lru_cache(maxsize=2)  # the loader is ahead by an epoch at most
    def batches_of(epoch: int) -> Tensor:
        return epoch_batches(
            sampler, train.labels, recipe.batch_size, seed, epoch, machine.rank, machine.world_size
        )

    first, steps = (state["epoch"], state["step"]), len(train) // recipe.batch_size
    epochs = ((e, first[1] * (e == first[0]), batches_of(e)) for e in range(first[0], recipe.epochs))
    loader = training_pixels(images, epochs, recipe, seed, machine, views)

    # So are those of all validations, of which each process has its share; SimCLR's images need each other.
    val = data.splits["val"]
    if machine.world_size > 1 and not contrastive:
        share = slice(machine.rank, None, machine.world_size)
        val = Split(val.images[share], val.labels[share])
    validations = recipe.epochs - state["epoch"]
    val_features = feature_batches(
        model.backbone, val.images, recipe.input_size, machine, validations, fold=False
    )

    total, warmup = steps * recipe.epochs, steps * recipe.warmup_epochs
    with sigterm_noted() as preempted:
        while state["epoch"] < recipe.epochs:
            # Epoch: the targets [steps, B] of all its steps, at once.
            epoch = state["epoch"]
            targets = train.labels[batches_of(epoch)].repeat(1, views).to(machine.device)
            sums = torch.tensor([state["loss"], state["correct"]], device=machine.device, dtype=torch.float64)
            model.train()
            loss.begin_epoch(epoch / recipe.epochs)
            model.begin_epoch(epoch / recipe.epochs)
            for step in range(state["step"], steps):
                # Step: pixels, learning rates, gradient, weights.
                pixels = next(loader)
                for group in optimiser.param_groups:
                    group["lr"] = group["peak"] * lr_at(epoch * steps + step, total, warmup)
                sums += accumulate_gradient(network, loss, pixels, targets[step], micro_batch, machine)
                optimiser.step()
                optimiser.zero_grad()

                # Save within the epoch: now and then, and before a scheduler ends the process.
                stopping = preempted.is_set() and is_main_process
                if stopping or time.monotonic() - started > SAVE_EVERY:
                    state |= {"step": step + 1, "loss": sums[0].item(), "correct": sums[1].item()}
                    check_finite(state["loss"])
                    save()
                if stopping:
                    log.info(
                        "SIGTERM: stopped in epoch %d, step %d; the same command resumes", epoch + 1, step + 1
                    )
                    raise KeyboardInterrupt

            # Evaluate: validation data choose nothing but best.pt, which is stated beside the last epoch.
            entry = {
                "epoch": epoch + 1,
                "loss": sums[0].item() / steps,
                "train_accuracy": 100 * sums[1].item() / (steps * recipe.batch_size * views),
            }
            check_finite(entry["loss"])
            entry["val_accuracy"] = accuracy(model, val.labels, val_features, machine)
            highest = max((past["val_accuracy"] for past in state["history"]), default=-1.0)
            if is_main_process and entry["val_accuracy"] > highest:
                weights = {name: value.clone() for name, value in model.state_dict().items()}
                best |= {"seed": seed, "epoch": epoch + 1, "model": weights}

            # Log, then save, but not after each short epoch: with a last checkpoint goes the whole history.
            state["history"] = [*state["history"], entry]
            state |= {"epoch": epoch + 1, "step": 0, "loss": 0.0, "correct": 0}
            if is_main_process:
                seconds = state["seconds"] + time.monotonic() - started
                write_history(run, state["history"])
                log.info("%s", progress_line(entry, recipe, steps, seconds))
            if epoch + 1 == recipe.epochs or time.monotonic() - started > SAVE_EVERY:
                save()
        if machine.world_size > 1:
            dist.barrier()
    return state["history"]


def accumulate_gradient(
    network: nn.Module, loss: Loss, pixels: Tensor, target: Tensor, size: int, machine: Machine
) -> Tensor:
    """Add the gradient of one step, taken in parts of `size` images (0: all at once).

    Returns the loss and the number of correct predictions [2]; both, and the gradient, are those of the whole
    batch of all processes. Losses that look at the batch as a whole (LADE, RSG) see parts as batches.
    """
    size = size or len(pixels)
    parts = list(zip(pixels.split(size), target.split(size), strict=True))
    sums = torch.zeros(2, dtype=torch.float64, device=pixels.device)
    for number, (part, part_target) in enumerate(parts, start=1):
        waits = machine.world_size > 1 and number < len(parts)  # processes exchange the last sum alone
        with network.no_sync() if waits else contextlib.nullcontext():
            with machine.autocast():
                logits, wanted, extra_loss = network(part, part_target)
            share = len(part) / len(pixels)
            value = loss(at_least_float32(logits), wanted)
            # All processes have the same loss, and each the gradient of its own rows, which are averaged.
            ((machine.world_size * value + extra_loss) * share).backward()
        sums[0] += (value + extra_loss).detach() * share
        sums[1] += (logits.detach().argmax(1) == wanted)[: machine.world_size * len(part)].sum()
    return sums


def progress_line(entry: dict[str, float], recipe: Recipe, steps: int, seconds: float) -> str:
    """One line of progress for an epoch; seconds: of the whole run so far."""
    epoch = entry["epoch"]
    return (
        f"epoch {epoch}/{recipe.epochs}  loss {entry['loss']:.3f}  train {entry['train_accuracy']:.1f} %  "
        f"val {entry['val_accuracy']:.1f} %  {epoch * steps * recipe.batch_size / seconds:.0f} images/s  "
        f"{seconds / epoch * (recipe.epochs - epoch):.0f} s left"
    )


def write_history(run: Path, history: list[dict[str, float]]) -> None:
    """The history as one JSON line an epoch, and for TensorBoard."""
    with paths.atomic(run / "history.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")
    with paths.atomic(run / "tensorboard" / "events.out.tfevents.history") as temporary:
        temporary.write_bytes(tensorboard_events(history))


def read_history(run: Path) -> list[dict[str, float]]:
    """The history that `write_history` left. Raises CacheError where there is none."""
    try:
        lines = (run / "history.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
    except (OSError, ValueError):
        raise CacheError(f"{run} has no readable history.jsonl: delete it to train again") from None


def tensorboard_events(history: list[dict[str, float]]) -> bytes:
    """The content of an event file. TensorBoard's own writer is a thread that does not report a full disk."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    content = io.BytesIO()
    writer = RecordWriter(content)
    writer.write(Event(file_version="brain.Event:2").SerializeToString())
    for entry in history:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in entry.items()]
        writer.write(Event(step=entry["epoch"], summary=Summary(value=values)).SerializeToString())
    return content.getvalue()


# ---------------------------------------------------------------- the loop for features


def fit_head(
    head: nn.Module,
    features: Tensor,
    labels: Tensor,
    loss: Loss,
    sampler: str,
    learning_rate: float,
    epochs: int = 10,
    batch_size: int = 256,
    weight_decay: float = 5e-4,
    momentum: float = 0.9,
    seed: int = 0,
    val: tuple[Tensor, Tensor] | None = None,
    best: dict[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Train a head (features [B, F] -> logits [B, N]) in place: SGD, cosine decay to 0; returns the history.

    features [M, F], labels [M]; val: the same of the validation images, whose accuracy (percent) the history
    then states; best: filled with the `epoch` and the `state` of the head that was best on them.
    Parameters without gradient stay as they are. Deterministic in its arguments, whatever the global random
    state. Raises TrainingError when the loss is not finite.
    """
    steps = len(labels) // batch_size
    weights = [weight for weight in head.parameters() if weight.requires_grad]
    optimiser = torch.optim.SGD(weights, learning_rate, momentum, weight_decay=weight_decay)
    history: list[dict[str, float]] = []
    for epoch in range(epochs):
        head.train()
        loss.begin_epoch(epoch / epochs)
        sums = torch.zeros(2, dtype=torch.float64, device=features.device)
        batches = epoch_batches(sampler, labels, batch_size, seed, epoch).to(features.device)
        for step, rows in enumerate(batches):
            optimiser.param_groups[0]["lr"] = learning_rate * lr_at(epoch * steps + step, steps * epochs)
            logits = head(features[rows])
            value = loss(logits, labels[rows])
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            sums += torch.stack([value.detach().double(), (logits.argmax(1) == labels[rows]).sum()])
        if not math.isfinite(sums[0].item()):
            raise TrainingError(f"the loss is {sums[0].item()} at learning rate {learning_rate}: lower it")
        head.eval()
        entry = {
            "epoch": epoch + 1,
            "loss": sums[0].item() / steps,
            "train_accuracy": 100 * sums[1].item() / (steps * batch_size),
        }
        if val is not None:
            with torch.no_grad():
                entry["val_accuracy"] = 100 * (head(val[0]).argmax(1) == val[1]).double().mean().item()
            highest = max((past["val_accuracy"] for past in history), default=-1.0)
            if best is not None and entry["val_accuracy"] > highest:
                state = {name: value.clone() for name, value in head.state_dict().items()}
                best |= {"epoch": epoch + 1, "state": state}
        history.append(entry)
    return history
