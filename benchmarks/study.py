"""Time and peak memory of `study --features`: the whole report from many features of many classes.

    python benchmarks/study.py [--images 100000] [--dims 768] [--classes 1000]

Features are made up: a Gaussian around the centre of each class, training images from about 900 to 5 a class,
15 test images of each. The peak is that of the resident memory of all processes together, looked at twice a
second. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

TEST_IMAGES = 15  # of each class
RAREST, LARGEST = 5, 900  # training images, before they are scaled to the number that is asked for
SPREAD = 2.5  # deviation of a feature within a class, that of the centres being 1


def write_features(file: Path, images: int, dims: int, classes: int) -> None:
    """Arrays as `study --features` reads them: of a long tail, `images` of both splits together."""
    generator = np.random.default_rng(0)
    counts = LARGEST * (RAREST / LARGEST) ** (np.arange(classes) / (classes - 1))
    counts = np.maximum(RAREST, counts * (images - TEST_IMAGES * classes) / counts.sum()).astype(int)
    centres = generator.standard_normal((classes, dims), np.float32)
    arrays = {}
    for split, each in (("train", counts), ("test", np.full(classes, TEST_IMAGES))):
        labels = np.repeat(np.arange(classes), each)
        noise = generator.standard_normal((len(labels), dims), np.float32)
        arrays |= {f"{split}_features": centres[labels] + SPREAD * noise, f"{split}_labels": labels}
    np.savez(file, **arrays)


def resident_gib(process: psutil.Process) -> float:
    """Resident memory of a process and all that it started."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 2**30


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100_000, help="training and test images together")
    parser.add_argument("--dims", type=int, default=768, help="dimensions of a feature")
    parser.add_argument("--classes", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "made_up.npz"
        write_features(file, options.images, options.dims, options.classes)
        command = [
            sys.executable,
            "-m",
            "lt_core",
            "study",
            "--features",
            str(file),
            "--out",
            f"{folder}/out",
        ]
        started, peak = time.monotonic(), 0.0
        study = subprocess.Popen(command)
        while study.poll() is None:
            try:
                peak = max(peak, resident_gib(psutil.Process(study.pid)))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.5)
        status = study.wait()
    found = {"status": status, "seconds": round(time.monotonic() - started), "peak_gib": round(peak, 2)}
    print(json.dumps(vars(options) | found))
    return status


if __name__ == "__main__":
    sys.exit(main())
