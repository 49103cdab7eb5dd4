"""benchmarks/gpu.py: skipped in words without a GPU; it measures on the CPU with a small network."""

import importlib.util
import os
import subprocess
import sys
import tarfile
from types import ModuleType

import pytest
import torch

from lt_core import paths
from lt_core.data.profiles import Recipe, load_profile
from lt_core.rsg import RSG
from lt_core.train import this_machine

FILE = paths.ROOT / "benchmarks" / "gpu.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the benchmark would run")
def test_without_a_gpu_it_says_so():
    environment = os.environ | {"PYTHONPATH": str(paths.ROOT)}
    done = subprocess.run([sys.executable, FILE], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "skipped: this measures a GPU, and torch finds none\n"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    changes = {"batch_size": 8, "input_size": 32}
    return load_profile("paper").recipes["from_scratch"].model_copy(update=changes)


def test_what_it_measures(gpu, recipe, tmp_path):
    gpu.generated(tmp_path, 8)
    result = gpu.measure("small_resnet", recipe, tmp_path, 2, this_machine(workers=0))
    assert set(result) >= {"train_vs_resident", "decode", "extract", "first_step"}
    assert 0 < result["train_vs_resident"] < 2 and result["decode"] > 1 and result["extract"] > 1


def test_rsg_generates_while_its_memory_is_measured(gpu, recipe, tmp_path, monkeypatch):
    gpu.generated(tmp_path, 8)
    machine, passes, forward = this_machine(workers=0, micro_batch=4), [], RSG.forward

    def noting(rsg: RSG, maps: torch.Tensor, target: torch.Tensor) -> tuple:
        made = forward(rsg, maps, target)
        passes.append((len(maps), len(made[0])))
        return made

    monkeypatch.setattr(RSG, "forward", noting)
    monkeypatch.setattr(gpu, "CLASSES", 8)
    assert gpu.rsg_peak("small_resnet", recipe, tmp_path, machine) == 0.0  # of a GPU's memory
    assert [before for before, _ in passes] == [4, 4] and any(after > 4 for _, after in passes)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(RSG, "forward", full)
    assert gpu.rsg_peak("small_resnet", recipe, tmp_path, machine) is None


def test_second_stages_and_transfer_are_timed(gpu):
    device = torch.device("cpu")
    found = gpu.second_stages(torch.tensor([40, 20, 10, 5]), 8, device)
    assert set(found) == {"lws", "balms"} and min(found.values()) > 0
    assert min(gpu.transfer(300, 16, device).values()) > 0


def test_photographs_are_read_where_there_are_some(gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "generated", lambda folder: (folder / "made.jpg").touch())
    monkeypatch.delenv("LT_DATA_ROOT", raising=False)
    data, found = tmp_path / "data", tmp_path / "found"
    data.mkdir()
    found.mkdir()
    assert gpu.photographs(tmp_path, None) == gpu.photographs(tmp_path, str(data)) == "generated"
    assert capsys.readouterr().out.count("photographs is not measured: there is no") == 2
    (tmp_path / "one.JPEG").touch()
    with tarfile.open(data / gpu.SAMPLE, "w") as archive:
        archive.add(tmp_path / "one.JPEG", "sample/one.JPEG")
        archive.add(tmp_path / "one.JPEG", "sample/list.txt")
    assert gpu.photographs(found, str(data)) == gpu.SAMPLE
    assert [path.name for path in found.rglob("*.*")] == ["one.JPEG"]
