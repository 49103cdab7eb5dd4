"""Public ImageNet weights that a backbone starts from (paper, App. A): supervised, or SimCLR's.

Supervised weights of the ResNets are torchvision's, those that the field's repositories start from. A SimCLR
checkpoint is renamed to torchvision's names from any of these layouts; projection heads and classifiers are
dropped, every name and shape of the network must be found, and nothing but tensors is unpickled:

- torchvision's names, bare or below a prefix that ends in one of `PREFIXES` (tonylins/simclr-converter,
  lightly, solo-learn, VISSL, MoCo);
- the names of Separius/SimCLRv2-Pytorch, which converts google-research/simclr (r101_1x_sk0 and others).

    load_supervised_weights(backbone, "resnet101", data_root)       # of the data root, else downloaded
    load_simclr_weights(backbone, "resnet101", data_root)           # weights/simclr_resnet101.pth
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lt_core import paths
from lt_core.errors import DataError
from lt_core.models import load_imagenet_weights

TORCHVISION = ("resnext50_32x4d", "resnet101", "resnet152")
WEIGHTS = "weights"  # folder of the data root
# Keys below which a checkpoint holds the network's state; the last four are VISSL's.
CONTAINERS = ("state_dict", "model_state_dict", "resnet", "classy_state_dict", "base_model", "model", "trunk")
PREFIXES = ("backbone.", "encoder.", "encoder_q.", "trunk.", "_feature_blocks.", "resnet.", "module.")
HEADS = ("fc.", "projector.", "head.", "heads.", "projection_head.", "classifier.", "contrastive_head.")
SEPARIUS_BLOCK = {  # its place in a bottleneck -> torchvision's
    "projection.shortcut": "downsample.0",
    "projection.bn.0": "downsample.1",
    "net.0": "conv1",
    "net.1.0": "bn1",
    "net.2": "conv2",
    "net.3.0": "bn2",
    "net.4": "conv3",
    "net.5.0": "bn3",
}
SEPARIUS_STEM = {"net.0.0": "conv1", "net.0.1.0": "bn1"}
FC = ("fc.weight", "fc.bias")


def load_supervised_weights(backbone: nn.Module, name: str, data_root: str | Path | None = None) -> None:
    """Fill a backbone with the supervised ImageNet-1k weights of that network.

    A ResNet's are torchvision's IMAGENET1K_V1, out of `weights/` in the data root or else downloaded.
    Raises DataError when they are missing or do not fit, InputError for a network without public weights.
    """
    if name not in TORCHVISION:
        load_imagenet_weights(backbone, name)
        return
    from torchvision.models import get_model_weights

    url = get_model_weights(name)["IMAGENET1K_V1"].url
    path = paths.data_root(data_root) / WEIGHTS / url.rpartition("/")[2]
    if path.is_file():
        state = read_state(path)
    else:
        try:
            state = torch.hub.load_state_dict_from_url(
                url, map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
        except (OSError, RuntimeError) as error:  # no network; a download with another hash
            raise DataError(
                f"the ImageNet weights of {name} are missing and cannot be downloaded ({error}): fetch {url} "
                f"and put it at {path}"
            ) from None
    _fill(backbone.network, {key: value for key, value in state.items() if key not in FC}, name, path)


def load_simclr_weights(backbone: nn.Module, name: str, data_root: str | Path | None = None) -> None:
    """Fill a ResNet backbone with the SimCLR checkpoint `weights/simclr_<name>.pth` of the data root.

    Raises DataError when the file is missing, cannot be read safely or does not fit the network.
    The TensorFlow models saw pixels in 0..1 without mean and standard deviation; a file in Separius's layout
    or, as simclr-converter writes it, without a prefix, sets that. The others keep torchvision's.
    """
    path = paths.data_root(data_root) / WEIGHTS / f"simclr_{name}.pth"
    if not path.is_file():
        raise DataError(
            f"the SimCLR weights {path} are missing: convert the ImageNet checkpoint of {name} of "
            "github.com/google-research/simclr (SimCLRv2, pretrained, width 1, sk 0) with "
            "github.com/Separius/SimCLRv2-Pytorch, or take any SimCLR checkpoint in PyTorch, and put it there"
        )
    state, raw_pixels = torchvision_state(read_state(path))
    _fill(backbone.network, state, name, path)
    if raw_pixels:
        backbone.mean.fill_(0.0)
        backbone.std.fill_(255.0)


def _fill(network: nn.Module, state: dict[str, Tensor], name: str, path: Path) -> None:
    """Load a state that must have every entry of the network, old files' counters of batches excepted."""
    own = network.state_dict()
    for key, value in own.items():
        if key.endswith("num_batches_tracked"):
            continue
        if key not in state:
            raise DataError(f"{path} does not hold the weights of {name}: it has no {key}")
        if state[key].shape != value.shape:
            found, expected = list(state[key].shape), list(value.shape)
            raise DataError(f"{path} does not fit {name}: {key} has shape {found}, expected {expected}")
    if further := [key for key in state if key not in own]:
        raise DataError(f"{path} is of another network than {name}: it has {further[0]}, too")
    network.load_state_dict({key: state.get(key, value) for key, value in own.items()})


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, out of whatever dictionaries hold them; raises DataError."""
    try:
        saved: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or a pickled file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path} cannot be read as tensors alone ({reason}): load it where it comes from and save its "
            "state_dict with torch.save"
        ) from None
    while isinstance(saved, dict) and (inner := _inner(saved)) is not None:
        saved = inner
    tensors = {k: v for k, v in saved.items() if isinstance(v, Tensor)} if isinstance(saved, dict) else {}
    if not tensors:
        raise DataError(f"{path} holds no state dict")
    return tensors


def _inner(saved: dict[str, Any]) -> dict[str, Any] | None:
    """The dictionary one level down that holds the network, if there is one."""
    for key in CONTAINERS:
        if isinstance(saved.get(key), dict):
            return saved[key]
    return None


def torchvision_state(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """The state under torchvision's names without heads, and whether its input is pixels in 0..1.

    Names that are in none of the known layouts are left out.
    """
    if any("net.1.blocks.0." in key for key in state):
        renamed = {_from_separius(key): value for key, value in state.items()}
        return {key: value for key, value in renamed.items() if key}, True
    found = [key for key in state if key.endswith("layer1.0.conv1.weight")]
    prefix = min(found, key=len).removesuffix("layer1.0.conv1.weight") if found else ""
    if prefix and not prefix.endswith(PREFIXES):
        return {}, False
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    own = {key: value for key, value in own.items() if not key.startswith(HEADS)}
    return own, not prefix.removeprefix("module.")


def _from_separius(name: str) -> str:
    """torchvision's name for one of Separius's; empty for heads and for parts that ResNets lack."""
    name = name.removeprefix("module.")
    place, _, kind = name.rpartition(".")
    if place in SEPARIUS_STEM:
        return f"{SEPARIUS_STEM[place]}.{kind}"
    match = re.fullmatch(r"net\.([1-4])\.blocks\.(\d+)\.(.+)", place)
    if match and match[3] in SEPARIUS_BLOCK:
        return f"layer{match[1]}.{match[2]}.{SEPARIUS_BLOCK[match[3]]}.{kind}"
    return ""
