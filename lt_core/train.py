"""The one training loop: CPU, one GPU, or many processes under torchrun (paper, App. A).

Everything random is a function of (seed, epoch, step), and the checkpoint holds all the rest, so a run
that is killed at any moment and started again ends with the same weights as one left alone.

    history = fit(model, data, recipe, "square_root", loss, seed=0, run=folder)
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import math
import os
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

from lt_core import paths
from lt_core.augmentation import augment, resize, to_pixels
from lt_core.datasets import Dataset, Split
from lt_core.errors import CacheError, InputError, TrainingError, first_line
from lt_core.image_files import ImageFiles, evaluation_batches, seed_of, training_batches
from lt_core.losses import Loss
from lt_core.models import ContrastiveHead, Model, partners
from lt_core.profiles import Recipe
from lt_core.samplers import epoch_batches
from lt_core.sync_batch_norm import synchronise_batch_norms

SAVE_EVERY = 60  # seconds between checkpoints within an epoch
PATIENCE = timedelta(hours=1)  # of processes that wait for the first one to write a cache
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
Say = Callable[[str], None]


# ---------------------------------------------------------------- where it runs


@dataclass(frozen=True)
class Machine:
    """Device and precision, chosen once, and this process's place among the others.

    The last four change speed and memory, and results by rounding alone (with `micro_batch`, also the images
    that a batch norm averages over).
    """

    device: torch.device
    autocast: Callable[[], contextlib.AbstractContextManager]
    description: str  # what was chosen and why
    rank: int = 0
    world_size: int = 1
    workers: int = 0  # processes of this process that decode image files; 0: it does so itself
    decodes_on_device: bool = False  # JPEG files
    micro_batch: int = 0  # images whose gradient is taken at once, summed to that of the batch; 0: all
    compiles: bool = False  # with torch.compile


def this_machine(workers: int | None = None, **options: int | bool) -> Machine:
    """A GPU with bfloat16 where there is one, else the CPU in float32; joins torchrun's process group.

    workers: None for all cores, shared by the processes of this computer; options: other fields of `Machine`.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    if min(workers or 0, options.get("micro_batch", 0)) < 0:
        raise InputError("--workers and --micro-batch must be 0 or above")
    if workers is None:
        workers = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if cuda else 0
    rank = dist.get_rank() if world_size > 1 else 0
    if not cuda:
        keep_freed_memory()
        text = f"CPU, {torch.get_num_threads()} threads, float32 (no GPU found)"
        place = (rank, world_size, workers)
        return Machine(torch.device("cpu"), contextlib.nullcontext, text, *place, **options)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True  # all batches are of one size

    def autocast() -> contextlib.AbstractContextManager:
        return torch.autocast("cuda", torch.bfloat16)

    text = f"{world_size} x {torch.cuda.get_device_name(device)}, bfloat16"
    return Machine(device, autocast, text, rank, world_size, workers, **options)


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
    """SGD with two learning rates, the backbone's and that of all else; a frozen one gets no gradient."""
    rest = [weight for name, weight in model.named_parameters() if not name.startswith("backbone.")]
    groups = [{"params": rest, "peak": recipe.classifier_learning_rate}]
    model.backbone.requires_grad_(not recipe.frozen)
    if not recipe.frozen:
        groups.append({"params": list(model.backbone.parameters()), "peak": recipe.learning_rate})
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
    return torch.Generator().manual_seed(seed_of(*key))


def training_pixels(
    images: Tensor | ImageFiles,
    batches: Tensor,
    recipe: Recipe,
    seed: int,
    epoch: int,
    first_step: int,
    machine: Machine,
    views: int = 1,
) -> Iterator[Tensor]:
    """Augmented pixels [views * B, C, H, W] of each step from `first_step` on; batches [steps, B].

    Those of files are the same for any number of processes; images in memory, which lie on the device, are
    augmented a batch at once, from one random stream a step and process.
    """
    if isinstance(images, ImageFiles):
        yield from training_batches(images, batches, recipe, seed, epoch, first_step, machine, views)
        return
    for step in range(first_step, len(batches)):
        generator = step_generator(seed, epoch, step, machine.rank)
        pixels = augment(images, batches[step].repeat(views), recipe.augmentation, generator)
        yield resize(pixels, recipe.input_size)


# ---------------------------------------------------------------- evaluation


def plain_pixels(images: Tensor | ImageFiles, input_size: int, machine: Machine) -> Iterator[Tensor]:
    """Batches of pixels [B, C, H, W] of all images in order, without augmentation."""
    if isinstance(images, ImageFiles):
        yield from evaluation_batches(images, input_size, machine)
        return
    batch = 64 if machine.device.type == "cpu" else 256  # what the caches of a CPU hold
    for chunk in images.split(batch):
        yield resize(to_pixels(chunk.to(machine.device)), input_size)


@torch.inference_mode()
def feature_batches(
    backbone: nn.Module, images: Tensor | ImageFiles, input_size: int, machine: Machine
) -> Iterator[Tensor]:
    """Features [B, F] (float32, on the CPU) of all images in order, without augmentation."""
    backbone.eval()
    for pixels in plain_pixels(images, input_size, machine):
        with machine.autocast():
            features = backbone(pixels)
        yield features.float().cpu()


def extract_features(
    backbone: nn.Module, images: Tensor | ImageFiles, input_size: int, machine: Machine
) -> Tensor:
    """Features [M, F] (float32, on the CPU) of images without augmentation."""
    return torch.cat(list(feature_batches(backbone, images, input_size, machine)))


@torch.inference_mode()
def accuracy(model: Model, split: Split, input_size: int, machine: Machine) -> float:
    """Top-1 accuracy in percent: of the classifier, or without one (SimCLR) of each image's nearest other."""
    model.eval()
    contrastive = isinstance(model.classifier, ContrastiveHead)
    if machine.world_size > 1 and not contrastive:  # each process its share
        share = slice(machine.rank, None, machine.world_size)
        split = Split(split.images[share], split.labels[share])
    features = extract_features(model.backbone, split.images, input_size, machine).to(machine.device)
    if contrastive:
        cosines = normalize(features, dim=1) @ normalize(features, dim=1).T
        predictions = split.labels[cosines.fill_diagonal_(-1).argmax(1).cpu()]
    else:
        predictions = model.classifier(features).argmax(1).cpu()
    seen = torch.tensor([(predictions == split.labels).sum(), len(split)], device=machine.device)
    if machine.world_size > 1:
        dist.all_reduce(seen)
    return 100 * (seen[0].double() / seen[1]).item()


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    content = io.BytesIO()
    torch.save(state, content)
    with paths.atomic(path) as temporary:
        temporary.write_bytes(content.getbuffer())


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


# ---------------------------------------------------------------- the loop


@contextlib.contextmanager
def sigterm_noted() -> Iterator[threading.Event]:
    """SIGTERM (a scheduler preempts the job) sets the event, and interrupts at the end of the block.

    Of several processes the first ends at the next step, with a checkpoint; the others go on until then, for
    it needs them to finish its step.
    """
    noted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield noted
        return
    before = signal.signal(signal.SIGTERM, lambda *_: noted.set())
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)
    if noted.is_set():
        raise KeyboardInterrupt


def fit(
    model: Model,
    data: Dataset,
    recipe: Recipe,
    sampler: str,
    loss: Loss,
    seed: int,
    run: Path | None,
    machine: Machine | None = None,
    say: Say = print,
) -> list[dict[str, float]]:
    """Train `model` in place; returns the history, one entry an epoch (loss, accuracies in percent).

    With a `ContrastiveHead` in place of the classifier, a step sees two views of each image and the target of
    a view is its partner (SimCLR); negatives come from this process's share of the batch.
    Resumes from `run/last.pt` and leaves the last epoch there; `run/best.pt` is the best on validation data.
    Without a `run` (and then without validation data) nothing is kept but the model.
    SIGTERM ends it with a checkpoint after the step (KeyboardInterrupt). With several processes, batch norms
    average over the whole batch and the learning rate is that of one process, so results are the same.
    Raises TrainingError when the loss is not finite.
    """
    machine = machine or this_machine()
    keeps = machine.rank == 0 and run is not None
    contrastive = isinstance(model.classifier, ContrastiveHead)
    views = 2 if contrastive else 1
    micro_batch = 0 if contrastive else machine.micro_batch  # SimCLR's images need each other
    train = data.splits["train"]
    images, labels = train.images, train.labels.to(machine.device)
    if isinstance(images, Tensor):
        images = images.to(machine.device)
    if machine.world_size > 1:
        synchronise_batch_norms(model, machine.device)
    model.to(machine.device, memory_format=torch.channels_last)
    loss.to(machine.device)
    optimiser = build_optimiser(model, recipe)
    network = model
    if machine.world_size > 1:
        network = nn.parallel.DistributedDataParallel(model)
    if machine.compiles:
        network = torch.compile(network)

    state: dict[str, Any] = {
        "seed": seed,
        "epoch": 0,
        "step": 0,
        "loss": 0.0,
        "right": 0,
        "seconds": 0.0,
        "history": [],
    }
    if run is not None and (run / "last.pt").exists():
        _resume(run / "last.pt", state, model, optimiser)
        say(f"resuming at epoch {state['epoch'] + 1}, step {state['step']}")

    def save() -> None:
        if keeps:
            state["seconds"] += time.monotonic() - started
            save_checkpoint(
                run / "last.pt", state | {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
            )

    started = time.monotonic()
    steps = len(train) // recipe.batch_size
    total, warmup = steps * recipe.epochs, steps * recipe.warmup_epochs
    with sigterm_noted() as preempted:
        while state["epoch"] < recipe.epochs:
            epoch = state["epoch"]
            batches = epoch_batches(
                sampler, train.labels, recipe.batch_size, seed, epoch, machine.rank, machine.world_size
            )
            running_loss = torch.tensor(state["loss"], device=machine.device, dtype=torch.float64)
            right = torch.tensor(state["right"], device=machine.device, dtype=torch.float64)
            model.train()
            if recipe.frozen:
                model.backbone.eval()
            loss.begin_epoch(epoch / recipe.epochs)
            model.begin_epoch(epoch / recipe.epochs)
            supply = training_pixels(images, batches, recipe, seed, epoch, state["step"], machine, views)
            for step, pixels in enumerate(supply, start=state["step"]):
                for group in optimiser.param_groups:
                    group["lr"] = group["peak"] * lr_at(epoch * steps + step, total, warmup)
                target = partners(len(pixels), machine.device) if contrastive else labels[batches[step]]
                value, correct = _accumulate_gradient(network, loss, pixels, target, micro_batch, machine)
                optimiser.step()
                optimiser.zero_grad()
                running_loss += value
                right += correct

                stopping = preempted.is_set() and keeps
                if stopping or time.monotonic() - started > SAVE_EVERY:
                    state |= {"step": step + 1, "loss": running_loss.item(), "right": right.item()}
                    save()
                    started = time.monotonic()
                if stopping:
                    say(f"SIGTERM: stopped in epoch {epoch + 1}, step {step + 1}; the same command resumes")
                    raise KeyboardInterrupt

            entry = {
                "epoch": epoch + 1,
                "loss": running_loss.item() / steps,
                "train_accuracy": 100 * right.item() / (steps * recipe.batch_size * views),
            }
            if not math.isfinite(entry["loss"]):
                raise TrainingError(
                    f"the loss is {entry['loss']} in epoch {epoch + 1}: lower the learning rate"
                )
            if run is not None:
                entry["val_accuracy"] = accuracy(model, data.splits["val"], recipe.input_size, machine)
                best = max((past["val_accuracy"] for past in state["history"]), default=-1.0)
                if keeps and entry["val_accuracy"] > best:
                    now = {"seed": seed, "epoch": epoch + 1, "model": model.state_dict()}
                    save_checkpoint(run / "best.pt", now)
            state["history"] = [*state["history"], entry]
            state |= {"epoch": epoch + 1, "step": 0, "loss": 0.0, "right": 0}
            save()
            if keeps:
                _log(run, state["history"])
                passed = state["seconds"]
                left = passed / (epoch + 1) * (recipe.epochs - epoch - 1)
                say(
                    f"epoch {epoch + 1}/{recipe.epochs}  loss {entry['loss']:.3f}  "
                    f"train {entry['train_accuracy']:.1f} %  val {entry['val_accuracy']:.1f} %  "
                    f"{(epoch + 1) * steps * recipe.batch_size / passed:.0f} images/s  {left:.0f} s left"
                )
            started = time.monotonic()
        if machine.world_size > 1:
            dist.barrier()
    return state["history"]


def _resume(path: Path, state: dict[str, Any], model: Model, optimiser: torch.optim.SGD) -> None:
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


def _accumulate_gradient(
    network: nn.Module, loss: Loss, pixels: Tensor, target: Tensor, size: int, machine: Machine
) -> tuple[Tensor, Tensor]:
    """Add the gradient of one step, taken in parts of `size` images (0: all at once).

    Returns the loss and the number of right predictions, both over all processes. Losses that look at the
    batch as a whole (LADE, RSG) see parts as batches.
    """
    size = size or len(pixels)
    parts = list(zip(pixels.split(size), target.split(size), strict=True))
    total, right = torch.zeros(2, dtype=torch.float64, device=pixels.device)
    for number, (part, wanted) in enumerate(parts, start=1):
        waits = machine.world_size > 1 and number < len(parts)  # processes exchange the last sum alone
        with network.no_sync() if waits else contextlib.nullcontext():
            with machine.autocast():
                logits, wanted, further = network(part, wanted)
            value = (loss(logits.float(), wanted) + further) * (len(part) / len(pixels))
            value.backward()
        total += value.detach()
        right += (logits.detach().argmax(1) == wanted)[: len(part)].sum()
    if machine.world_size > 1:
        seen = torch.stack([total / machine.world_size, right])
        dist.all_reduce(seen)
        total, right = seen
    return total, right


def _log(run: Path, history: list[dict[str, float]]) -> None:
    """The history as one JSON line an epoch, and for TensorBoard."""
    with paths.atomic(run / "history.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")
    with paths.atomic(run / "tensorboard" / "events.out.tfevents.history") as temporary:
        temporary.write_bytes(_tensorboard_events(history))


def _tensorboard_events(history: list[dict[str, float]]) -> bytes:
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
