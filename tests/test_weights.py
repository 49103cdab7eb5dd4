"""Public ImageNet weights: every layout of SimCLR checkpoints gives the same network; the rest is refused."""

import os
import re
import shutil
from http.client import IncompleteRead
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision

from lt_core.checks import DataError
from lt_core.data.weights import (
    SEPARIUS_BLOCK,
    SEPARIUS_STEM,
    load_simclr_weights,
    load_supervised_weights,
)
from lt_core.models import build_backbone
from lt_core.paths import file_digest

SUPERVISED = "resnet101-63fe2227.pth"


@pytest.fixture(scope="module")
def state():
    """A ResNet101's state dict under torchvision's names."""
    torch.manual_seed(1)
    return build_backbone("resnet101").network.state_dict()


def separius(state: dict) -> dict:
    """The state as Separius's converter names it (blocks in ModuleLists, layers counted)."""
    stem = {theirs: name for name, theirs in SEPARIUS_STEM.items()}
    block = {theirs: name for name, theirs in SEPARIUS_BLOCK.items()}

    def renamed(name: str) -> str:
        place, _, kind = name.rpartition(".")
        if place in stem:
            return f"net.0.0.{kind}" if place == "conv1" else f"net.0.1.0.{kind}"
        stage, index, rest = re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", place).groups()
        return f"net.{stage}.blocks.{index}.{block[rest]}.{kind}"

    return {renamed(name): value for name, value in state.items()}


def below(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


HEAD = torch.zeros(128, 2048)
LAYOUTS = {
    "bare": (lambda s: s, True),
    "simclr-converter": (lambda s: {"state_dict": s | {"fc.weight": HEAD}}, True),
    "Separius": (
        lambda s: {"resnet": separius(s) | {"fc.weight": HEAD}, "head": {"layers.0.weight": HEAD}},
        True,
    ),
    "lightly": (
        lambda s: {"state_dict": below("backbone.", s) | {"projection_head.layers.0.weight": HEAD}},
        False,
    ),
    "solo-learn": (lambda s: {"state_dict": below("encoder.", s) | {"projector.0.weight": HEAD}}, False),
    "MoCo": (
        lambda s: {
            "state_dict": below("module.encoder_q.", s) | {"module.encoder_q.fc.0.weight": HEAD},
            "epoch": 9,
        },
        False,
    ),
    "VISSL": (
        lambda s: {
            "classy_state_dict": {
                "base_model": {
                    "model": {"trunk": below("_feature_blocks.", s), "heads": {"0.clf.0.weight": HEAD}}
                }
            }
        },
        False,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_network(tmp_path, state, layout):
    written, raw_pixels = LAYOUTS[layout]
    (tmp_path / "weights").mkdir()
    torch.save(written(state), tmp_path / "weights" / "simclr_resnet101.pth")
    torch.manual_seed(2)
    backbone = build_backbone("resnet101")
    load_simclr_weights(backbone, "resnet101", tmp_path)
    for name, value in backbone.network.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert backbone.std.flatten().tolist() == (
        [255.0] * 3 if raw_pixels else pytest.approx([58.395, 57.12, 57.375])
    )


def test_separius_names_are_those_of_its_code(state):
    names = separius(state)
    for literal in ("net.0.0.weight", "net.0.1.0.running_var", "net.3.blocks.22.net.5.0.weight"):
        assert literal in names
    assert names["net.2.blocks.0.projection.shortcut.weight"].shape == (512, 256, 1, 1)
    assert names["net.4.blocks.1.net.2.weight"].shape == (512, 512, 3, 3)


def wider(state: dict) -> dict:
    return state | {"layer4.2.conv3.weight": torch.zeros(4096, 512, 1, 1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            wider,
            r"does not fit resnet101: layer4.2.conv3.weight has shape \[4096, 512, 1, 1\], expected \[2048",
        ),
        (lambda s: {k: v for k, v in s.items() if "layer3.22" not in k}, "has no layer3.22.conv1.weight"),
        (
            lambda s: s | {"layer3.23.conv1.weight": HEAD},
            "another network than resnet101: it has layer3.23.conv1",
        ),
        (lambda s: {f"part{i}": s[name] for i, name in enumerate(s)}, "it has no conv1.weight"),
        (lambda s: {"epoch": 3}, "holds no state dict"),
        (lambda s: [1, 2], "holds no state dict"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, state, change, message):
    (tmp_path / "weights").mkdir()
    torch.save(change(state), tmp_path / "weights" / "simclr_resnet101.pth")
    with pytest.raises(DataError, match=message):
        load_simclr_weights(build_backbone("resnet101"), "resnet101", tmp_path)


def test_missing_and_hostile_files(tmp_path):
    backbone = build_backbone("resnet101")
    with pytest.raises(DataError, match="simclr_resnet101.pth are missing: convert the ImageNet checkpoint"):
        load_simclr_weights(backbone, "resnet101", tmp_path)

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    (tmp_path / "weights").mkdir()
    torch.save({"state_dict": Bomb()}, tmp_path / "weights" / "simclr_resnet101.pth")
    with pytest.raises(DataError, match="cannot be read as tensors alone"):
        load_simclr_weights(backbone, "resnet101", tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.fixture
def public(state, tmp_path, monkeypatch):
    """Where torchvision's weights come from in these tests, by their hash; nothing is at hand yet."""
    head = {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    torch.save(state | head, tmp_path / "public.pth")
    url = (tmp_path / f"resnet101-{file_digest(tmp_path / 'public.pth')[:8]}.pth").as_uri()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    known = {"IMAGENET1K_V1": SimpleNamespace(url=url)}
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: known)
    return tmp_path / "public.pth", Path(url.removeprefix("file://"))


def test_supervised_weights_of_the_data_root(tmp_path, state, public):
    (tmp_path / "weights").mkdir()
    whole, place = public
    shutil.copy(whole, tmp_path / "weights" / place.name)
    backbone = build_backbone("resnet101")
    load_supervised_weights(backbone, "resnet101", tmp_path)
    assert torch.equal(backbone.network.layer3[22].conv2.weight, state["layer3.22.conv2.weight"])
    assert not (tmp_path / "hub").exists()


def test_weights_that_are_not_those_of_their_hash_are_not_used(tmp_path, public):
    whole, place = public
    for folder in ("weights", "hub/checkpoints"):  # of the data root; downloaded before
        (tmp_path / folder).mkdir(parents=True)
        torch.save(
            torch.load(whole, weights_only=True) | {"x": torch.ones(1)}, tmp_path / folder / place.name
        )
        with pytest.raises(DataError, match=rf"{folder}.*its sha256 is not .*: delete it"):
            load_supervised_weights(None, "resnet101", tmp_path)
        (tmp_path / folder / place.name).unlink()


def test_a_download_is_whole_or_not_kept_and_the_next_run_tries_again(tmp_path, public, state):
    whole, place = public
    content = whole.read_bytes()
    for other in (b"<html>Log in to this network</html>", content[:-100], b""):
        place.write_bytes(other)
        with pytest.raises(DataError, match="cannot be downloaded .*fetch file://") as error:
            load_supervised_weights(None, "resnet101", tmp_path)
        assert "\n" not in str(error.value)
        assert list((tmp_path / "hub" / "checkpoints").iterdir()) == []
    place.write_bytes(content)
    backbone = build_backbone("resnet101")
    load_supervised_weights(backbone, "resnet101", tmp_path)
    assert torch.equal(backbone.network.layer3[22].conv2.weight, state["layer3.22.conv2.weight"])
    place.unlink()  # it is kept
    load_supervised_weights(backbone, "resnet101", tmp_path)


@pytest.mark.parametrize("problem", [OSError("no route to host"), IncompleteRead(b"")])
def test_without_network_the_error_names_the_file_and_its_place(tmp_path, monkeypatch, problem):
    def offline(*_: object, **__: object) -> None:
        raise problem

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(
        DataError, match=rf"fetch https://download.pytorch.org/.*{SUPERVISED} and put it at .*weights"
    ):
        load_supervised_weights(build_backbone("resnet101"), "resnet101", tmp_path)
