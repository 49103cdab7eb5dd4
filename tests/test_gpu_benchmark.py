"""benchmarks/gpu.py: skipped in words without a GPU; it measures on the CPU with a small network."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from lt_core import paths
from lt_core.data.profiles import load_profile
from lt_core.train import this_machine

FILE = paths.ROOT / "benchmarks" / "gpu.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the benchmark would run")
def test_without_a_gpu_it_says_so():
    environment = os.environ | {"PYTHONPATH": str(paths.ROOT)}
    done = subprocess.run([sys.executable, FILE], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "skipped: this measures a GPU, and torch finds none\n"


def test_what_it_measures(tmp_path):
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FILE)
    gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)
    gpu.generated(tmp_path, 8)
    changes = {"batch_size": 8, "input_size": 32}
    recipe = load_profile("paper").recipes["from_scratch"].model_copy(update=changes)
    result = gpu.measure("small_resnet", recipe, tmp_path, 2, this_machine(workers=0))
    assert set(result) >= {"train_vs_resident", "decode", "extract", "first_step"}
    assert 0 < result["train_vs_resident"] < 2 and result["decode"] > 1 and result["extract"] > 1
