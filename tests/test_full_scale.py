"""The paper profile end to end, cut short: every class, tiny images, few steps, and everything after them.

The real network under torchrun with two processes (stopped, resumed, extracted), then all notebooks, with
small networks of each kind.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from parts import part_counts, write_part

from lt_core import paths
from lt_core.cache import load_cache
from lt_core.data.profiles import load_profile

pytestmark = pytest.mark.slow

HEAD = """same_as = "paper"
datasets = { imagenet_lt = "imagenet_lt_part", places_lt = "places_lt_part" }
recipes.from_scratch = { epochs = 2, batch_size = 256, input_size = 32 }
recipes.fine_tuned = { epochs = 1, batch_size = 64, learning_rate = 0.02, input_size = 32 }
recipes.fine_tuned_deep = { epochs = 1, batch_size = 64, learning_rate = 0.02, input_size = 32 }
recipes.head_only = { epochs = 2, batch_size = 64, input_size = 32 }
"""

SMALL = ("sqrt", "lade", "continual", "causal_norm", "imagenet_sqrt", "imagenet_frozen", "places_lade")
DOT = ("uniform_dot", "class_aware_dot")


def with_small_networks() -> str:
    """The paper's profile with small networks for SMALL, and the rest names for these."""
    paper = load_profile("paper")
    lines = [HEAD, "[aliases]"]
    for name, backbone in paper.backbones.items():
        stands_in = {"imagenet_lt": "lade" if name in DOT else "sqrt", "places_lt": "imagenet_sqrt"}
        if name not in SMALL:
            lines.append(f'{name} = "{stands_in[backbone.role]}"')
    for name in SMALL:
        lines += [f"[backbones.{name}]", 'network = "small_resnet"', 'start = "scratch"', "seeds = [0]"]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The data root, the outputs and the two profiles of these tests."""
    place = tmp_path_factory.mktemp("full_scale")
    for name in ("imagenet_lt", "places_lt"):
        write_part(place / "data", name, divisor=40, size=24)
    (place / "real.toml").write_text(HEAD + "backbones.sqrt.seeds = [0]\n", encoding="utf-8")
    (place / "small_networks.toml").write_text(with_small_networks(), encoding="utf-8")
    return place


def command(place: Path, profile: str, *words: str, processes: int = 1) -> subprocess.Popen[str]:
    """`python -m lt_core ...` on the profile, alone or under torchrun."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    options = ["--profile", str(place / f"{profile}.toml"), "--data-root", str(place / "data")]
    environment = os.environ | {
        "LT_OUTPUT_ROOT": str(place / profile),
        "PYTHONPATH": str(paths.ROOT),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [*launcher, "-m", "lt_core", *words, *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_check_data(place):
    out, err = command(place, "real", "check-data", "--deep").communicate(timeout=300)
    assert "1000 val, 1000 test images of 1000 classes are there" in out, err
    assert "365 val, 365 test images of 365 classes are there" in out


def test_two_processes_train_are_stopped_resume_and_extract(place):
    words = ("train", "--backbone", "sqrt")
    process = command(place, "real", *words, processes=2)
    runs, deadline = place / "real" / "runs", time.monotonic() + 400
    while not list(runs.rglob("history.jsonl")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0 and "SIGTERM: stopped in epoch 2" in out, (out[-1000:], err[-2000:])

    out, err = (process := command(place, "real", *words, processes=2)).communicate(timeout=900)
    assert process.returncode == 0, err[-3000:]
    assert out.count("resuming at epoch 2") == 1 and out.count("epoch 2/2") == 1
    cache = load_cache(place / "real" / "caches" / "imagenet_lt_part" / "sqrt" / "seed0")
    counts = part_counts("imagenet_lt", 40)
    assert cache.counts.tolist() == counts and cache.features("train").shape == (sum(counts), 2048)
    assert cache.meta["network"] == "resnext50_32x4d" and cache.meta["profile"] == "real"
    assert not list((place / "real" / ".cache" / "features").iterdir())


def test_all_notebooks(place):
    """Their backbones are trained on the way."""
    words = ("notebooks", "--jobs", "2")
    out, err = (process := command(place, "small_networks", *words)).communicate(timeout=1500)
    failed = [line for line in out.splitlines() if "FAILED" in line or line.startswith("backbone ")]
    assert process.returncode == 0 and not failed, (failed, err[-2000:])
    figures = place / "small_networks" / "figures" / "small_networks"
    assert {"T1.csv", "T9.csv", "F9.png", "claims.csv"} <= {path.name for path in figures.iterdir()}
