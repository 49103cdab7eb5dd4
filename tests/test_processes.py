"""Several processes train what one trains, stop at SIGTERM, resume in another number, and extract."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lt_core import paths
from lt_core.data.distributed import shared_features
from lt_core.train import load_checkpoint

# In double precision: in float32, 12 steps enlarge the rounding of sums in another order to 1e-5 and more.
TOLERANCE = 1e-12  # of the largest weight of each tensor

SCRIPT = """
import os, signal, sys
from pathlib import Path
import numpy as np, torch
from lt_core import train
from lt_core.data.datasets import Dataset, Split
from lt_core.data.image_files import ImageFiles
from lt_core.losses import build_loss
from lt_core.models import ContrastiveHead, Model, build_backbone, build_classifier
from lt_core.rsg import RSG
from lt_core.data.profiles import Augmentation, Recipe
from lt_core.data.distributed import shared_features

images, run, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[5]
stop, micro_batch = int(sys.argv[3]), int(sys.argv[4])
names = np.array(sorted(path.name for path in images.iterdir()))
labels = torch.arange(len(names)) % 6
split = Split(ImageFiles(images, names), labels)
data = Dataset("made", tuple("abcdef"), {"train": split, "val": split})
recipe = Recipe(
    epochs=3, batch_size=8, learning_rate=0.001, classifier_learning_rate=0.01, input_size=32,
    augmentation=Augmentation(random_resized_crop=0.3, flip=True, colour_jitter=0.4),
)
torch.manual_seed(0)
backbone, loss = build_backbone("small_resnet"), build_loss("cross_entropy", data.counts)
head, rsg = "cosine", None
if kind == "lade":
    head, loss = "dot_product", build_loss("lade", data.counts)
elif kind == "ldam_drw":  # its weights divide by their sum over the batch
    head, loss = "cosine_fixed", build_loss("ldam_drw", data.counts, deferred_until=0.0)
elif kind == "rsg":
    head, loss = "cosine_fixed", build_loss("rsg", data.counts)
    rsg = RSG(backbone.last_stage_channels, data.counts, generate_from=0.5)
elif kind == "causal_norm":
    head = "causal_norm"
elif kind in ("balanced_softmax", "class_balanced", "focal"):
    loss = build_loss(kind, data.counts)
head = ContrastiveHead(256) if kind == "simclr" else build_classifier(head, 256, 6)
model = Model(backbone, head, rsg).double()
loss.double()
for part in (model.backbone, model.classifier):
    part.register_forward_pre_hook(lambda _, given: (given[0].double(),))
schedule, steps = train.lr_at, [0]

def counting(*given):
    steps[0] += 1
    if steps[0] == 2 * stop:  # two groups of weights
        os.kill(os.getpid(), signal.SIGTERM)
    return schedule(*given)

train.lr_at = counting
run.mkdir(exist_ok=True)
machine = train.this_machine(micro_batch=micro_batch)
train.fit(model, data, recipe, "square_root", loss, 0, run, machine)

def blocks_of(rows):
    return train.feature_batches(model.backbone, split.images[rows], 32, machine)

features = shared_features(len(split), 256, blocks_of, machine.rank, machine.world_size)
if machine.rank == 0:
    np.save(run / "features.npy", features)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in range(37):  # an odd number: shares of processes differ
        small = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((50, 40), Image.Resampling.BICUBIC)
        image.save(folder / "images" / f"{number:02d}.jpg", quality=95)
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    return folder


def train(
    folder: Path, run: str, processes: int, stop: int = 0, micro_batch: int = 0, kind: str = "plain"
) -> int:
    """The script's exit status; 0 for the whole run, another after SIGTERM in step `stop`."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [
        str(folder / "script.py"),
        str(folder / "images"),
        str(folder / run),
        str(stop),
        str(micro_batch),
        kind,
    ]
    environment = os.environ | {
        "PYTHONPATH": str(paths.ROOT),
        "OMP_NUM_THREADS": "1",
        "LT_OUTPUT_ROOT": str(folder / "out"),
    }
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert stop or result.returncode == 0, result.stderr[-3000:]
    return result.returncode


def test_one_process_makes_all_features_and_leaves_nothing_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path))
    expected = 1e5 * torch.rand(7, 3)  # bfloat16 networks pass the range of float16
    features = shared_features(7, 3, lambda rows: iter(expected[rows].split(2)))
    assert torch.equal(features, expected)
    assert not list((tmp_path / ".cache" / "features").iterdir())


@pytest.fixture(scope="module")
def alone(folder) -> dict:
    """What one process makes of it."""
    train(folder, "alone", 1)
    return load_checkpoint(folder / "alone" / "last.pt")


def assert_same(folder: Path, run: str, alone: dict) -> None:
    found = load_checkpoint(folder / run / "last.pt")
    for name, expected in alone["model"].items():
        expected = expected.double()  # booleans have no size
        difference = (found["model"][name].double() - expected).abs().max().item()
        assert difference <= TOLERANCE * max(1.0, expected.abs().max().item()), (name, difference)
    for one, two in zip(found["history"], alone["history"], strict=True):
        assert one == pytest.approx(two, rel=1e-4)


@pytest.mark.slow
def test_two_processes_with_half_the_batch_give_the_weights_of_one(folder, alone):
    train(folder, "two", 2)
    assert_same(folder, "two", alone)
    features = np.load(folder / "two" / "features.npy")
    assert features.shape == (37, 256) and features.dtype == np.float32
    np.testing.assert_allclose(features, np.load(folder / "alone" / "features.npy"), atol=1e-5)
    assert not list((folder / "out" / ".cache" / "features").iterdir())


LOSSES = ("cross_entropy", "balanced_softmax", "class_balanced", "focal", "lade", "ldam_drw")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*LOSSES, "rsg", "causal_norm", "simclr"])
def test_losses_see_the_whole_batch(folder, kind):
    """What looks at the batch as a whole does not depend on the number of processes either."""
    train(folder, f"{kind}1", 1, kind=kind)
    alone = load_checkpoint(folder / f"{kind}1" / "last.pt")
    for processes in (2, 4):
        train(folder, f"{kind}{processes}", processes, kind=kind)
        assert_same(folder, f"{kind}{processes}", alone)


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_that_another_number_of_processes_resumes(folder, alone):
    assert train(folder, "stopped", 2, stop=6) != 0
    state = load_checkpoint(folder / "stopped" / "last.pt")
    assert (state["epoch"], state["step"]) == (1, 2)  # 4 steps an epoch: right after the sixth
    assert not (folder / "stopped" / "features.npy").exists()
    train(folder, "stopped", 1)
    assert_same(folder, "stopped", alone)


@pytest.mark.slow
def test_accumulated_gradients_learn_alike(folder, alone):
    """Batch norms see parts of the batch, so that weights are near, not equal."""
    train(folder, "parts", 2, micro_batch=2)
    found = load_checkpoint(folder / "parts" / "last.pt")
    assert found["history"][-1]["loss"] == pytest.approx(alone["history"][-1]["loss"], rel=0.3)
    weight = torch.nn.functional.cosine_similarity(
        found["model"]["classifier.weight"], alone["model"]["classifier.weight"]
    )
    assert weight.min() > 0.9
