"""Networks: a backbone gives features [B, F], a classifier gives logits [B, N] (paper, Sec. 3.1, Eq. 1-2).

Every network takes pixels 0..255 as float [B, C, H, W] and normalises them itself.

    model = Model(build_backbone("small_resnet"), CosineClassifier(256, num_classes=200))
    features = model.backbone(pixels)
    logits = model.classifier(features)
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize
from torch.nn.utils import fuse_conv_bn_eval

from lt_core.checks import InputError, unknown
from lt_core.data.distributed import mean_over_processes, whole_batch
from lt_core.data.image_files import SQUARE, Square
from lt_core.rsg import RSG
from lt_core.transfer import SCALE

# ---------------------------------------------------------------- classifiers


class CosineClassifier(nn.Module):
    """Eq. 1-2: logits s * cos(f, w_i), with a learnable scale s that starts at 16; no bias."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, num_features))
        self.scale = nn.Parameter(torch.tensor(SCALE))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # as nn.Linear

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * linear(normalize(features, dim=1), normalize(self.weight, dim=1))


class FixedScaleCosineClassifier(CosineClassifier):
    """Logits s * cos(f, w_i) with a fixed s, as the margins of LDAM presume (Cao et al., NeurIPS 2019)."""

    def __init__(self, num_features: int, num_classes: int, scale: float = 30.0) -> None:
        super().__init__(num_features, num_classes)
        del self.scale
        self.register_buffer("scale", torch.tensor(scale))


class DotProductClassifier(nn.Linear):
    """The usual linear layer w_i . f + b_i (Table 4a)."""


class CausalNormClassifier(nn.Module):
    """The de-confounded classifier of Tang, Huang and Zhang (NeurIPS 2020), "causal norm" in tables.

    Features and weights are split into K = 2 heads and normalised head by head. Training also follows the
    mean feature, blamed on the momentum of SGD (`direction` [F], d <- 0.9 d + batch mean; only its direction
    in each head matters). At test the part of a feature along it is taken away (total direct effect, Eq. 10):

        tau / K sum_k w_k / (|w_k| + gamma) . (x_k - strength * cos(x_k, d_k) d_k)

    strength (alpha): 1 takes the component along the direction away. The authors take 3 on ImageNet-LT, which
    turns features that are much alike upside down; validation data choose (`lt_core.baselines`).
    """

    HEADS, SCALE, DAMPING, MOMENTUM = 2, 16.0, 1 / 32, 0.9  # K, tau, gamma, and the momentum of d

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, num_features))
        self.register_buffer("direction", torch.zeros(num_features))
        self.register_buffer("scale", torch.tensor(self.SCALE))
        self.strength = 1.0
        nn.init.uniform_(self.weight, -(num_features**-0.5), num_features**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        if self.training:
            mean = features.detach().to(self.direction).mean(0)
            self.direction.mul_(self.MOMENTUM).add_(mean_over_processes(mean))
        strength = 0.0 if self.training else self.strength
        x = normalize(features.unflatten(1, (self.HEADS, -1)), dim=2)
        w = self.weight.unflatten(1, (self.HEADS, -1))
        w = w / (torch.linalg.vector_norm(w, dim=2, keepdim=True) + self.DAMPING)
        d = normalize(self.direction.unflatten(0, (self.HEADS, -1)), dim=1)
        x = x - strength * (x * d).sum(2, keepdim=True) * d
        return self.SCALE / self.HEADS * x.flatten(1) @ w.flatten(1).T


class ContrastiveHead(nn.Module):
    """SimCLR's projection head and similarities (Chen et al., ICML 2020); thrown away after pre-training.

    For features [2B, F] of two views of B images, views of the same image B rows apart: logits [2B, 2B], the
    cosines between projections over the temperature. Cross-entropy with `positives` as targets is NT-Xent.
    With several processes, 2B counts the views of all of them.
    """

    def __init__(self, num_features: int, projection: int = 128, temperature: float = 0.5) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.Linear(num_features, num_features),
            nn.ReLU(inplace=True),
            nn.Linear(num_features, projection),
        )
        self.temperature = temperature

    def forward(self, features: Tensor) -> Tensor:
        projected = self.project(features)
        projected = whole_batch(normalize(at_least_float32(projected), dim=1))
        itself = torch.eye(len(projected), dtype=torch.bool, device=projected.device)
        return (projected @ projected.T / self.temperature).masked_fill(itself, -torch.inf)


def at_least_float32(values: Tensor) -> Tensor:
    """Values in float32 where they come in less, as under autocast."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def positives(views: int, device: torch.device) -> Tensor:
    """Row of the other view of the same image, for each of the 2B views [2B]."""
    return torch.arange(views, device=device).roll(views // 2)


CLASSIFIERS: dict[str, type[nn.Module]] = {
    "cosine": CosineClassifier,
    "cosine_fixed": FixedScaleCosineClassifier,
    "dot_product": DotProductClassifier,
    "causal_norm": CausalNormClassifier,
}


class Model(nn.Module):
    """A backbone (features [B, F] after pooling), a classifier (logits [B, N]) and RSG where it is used."""

    def __init__(self, backbone: nn.Module, classifier: nn.Module, rsg: RSG | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier
        self.rsg = rsg

    def begin_epoch(self, progress: float) -> None:
        """Told before every epoch of training which share of the epochs is done."""
        if self.rsg is not None:
            self.rsg.begin_epoch(progress)

    def forward(self, inputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """A training step: logits [B', N], targets [B'] and a loss to add, all of them over all processes.

        inputs [B, ...], target [B]: this process's share. B' counts all processes' images and what RSG makes.
        """
        if isinstance(self.classifier, ContrastiveHead):
            logits = self.classifier(self.backbone(inputs))
            return logits, positives(len(logits), logits.device), 0.0
        if self.rsg is None:
            return whole_batch(self.classifier(self.backbone(inputs))), whole_batch(target), 0.0
        with self.rsg.before(self.backbone.last_stage, target) as made:
            features = self.backbone(inputs)
        images, generated = self.classifier(features).tensor_split([len(inputs)])
        images = whole_batch(images)
        generated = whole_batch(generated, len(made.target) - len(images))
        return torch.cat([images, generated]), made.target, made.loss


# ---------------------------------------------------------------- backbones


class Normalised(nn.Module):
    """(pixel - mean) / std per channel, then the network.

    input_size: side in pixels of the images that the network was made for; square: what a test image is cut
    to. last_stage: name of the part that halves the resolution last, which RSG needs; empty: not known.
    """

    def __init__(
        self,
        network: nn.Module,
        num_features: int,
        last_stage: str,
        mean: list[float],
        std: list[float],
        input_size: int,
        square: Square = SQUARE,
    ) -> None:
        super().__init__()
        self.network = network
        self.num_features = num_features
        self.input_size, self.square = input_size, square
        self._last_stage = last_stage
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network((pixels - self.mean).div_(self.std))

    @property
    def last_stage(self) -> nn.Module:
        """Where the resolution is halved for the last time; raises InputError where that is not known."""
        if not self._last_stage:
            raise InputError("rsg needs to know a network's last stage: use one that is not timm's")
        return self.network.get_submodule(self._last_stage)

    @property
    def last_stage_channels(self) -> int:
        """Channels of the maps that the last stage receives."""
        return next(m for m in self.last_stage.modules() if isinstance(m, nn.Conv2d)).in_channels


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with a shortcut (He et al., CVPR 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _conv(inputs, outputs, 3, stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            _conv(outputs, outputs, 3),
            nn.BatchNorm2d(outputs),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _projection(inputs, outputs, stride)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(self.residual(inputs) + self.shortcut(inputs))


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class SmallResNet(nn.Sequential):
    """One basic block a stage; widths 32-64-128-256 give 1.2 M parameters. Stem stride 2: 64 px, 1: 32 px."""

    def __init__(
        self, widths: tuple[int, ...] = (32, 64, 128, 256), stem_stride: int = 2, channels: int = 3
    ) -> None:
        stem = [_conv(channels, widths[0], 3, stem_stride), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)]
        strides = [1] + [2] * (len(widths) - 1)
        inputs = (widths[0], *widths)
        blocks = [BasicBlock(i, o, s) for i, o, s in zip(inputs, widths, strides, strict=False)]
        super().__init__(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _small_resnet() -> nn.Module:
    return Normalised(SmallResNet(), 256, "6", [127.5] * 3, [64.0] * 3, 64)


def _small_resnet_32() -> nn.Module:
    return Normalised(SmallResNet(stem_stride=1), 256, "6", [127.5] * 3, [64.0] * 3, 32)


def _digits_net() -> nn.Module:
    network = SmallResNet(widths=(16, 32, 64), stem_stride=1, channels=1)
    return Normalised(network, 64, "5", [78.0], [96.0], 8)


def _torchvision(name: str) -> nn.Module:
    import torchvision.models

    network = torchvision.models.get_model(name, weights=None)
    num_features = network.fc.in_features
    network.fc = nn.Identity()
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    return Normalised(network, num_features, "layer4", mean, std, 224)


def _efficientnet_lite(name: str) -> nn.Module:
    import timm

    network = timm.create_model(f"tf_{name}", pretrained=False, num_classes=0)
    size = network.pretrained_cfg["input_size"][1]
    return Normalised(network, network.num_features, "blocks.5", [127.0] * 3, [128.0] * 3, size)


TIMM = "timm:"  # what a network of timm is called: `timm:vit_small_patch14_dinov2.lvd142m`


def _timm(name: str) -> nn.Module:
    """A network of timm with random weights: mean, deviation, size and test square as timm states them."""
    import timm

    if name.partition(".")[0] not in timm.list_models():
        known = timm.list_models(f"*{name.partition('.')[0]}*")[:8] or ["timm.list_models() lists them"]
        raise InputError(unknown("network of timm", name, known))
    try:  # a vision transformer takes images of other sizes only when it is asked to
        network = timm.create_model(name, num_classes=0, dynamic_img_size=True)
    except TypeError:  # the others have no such option
        network = timm.create_model(name, num_classes=0)
    known = timm.data.resolve_model_data_config(network)
    mean, std = ([255 * value for value in known[which]] for which in ("mean", "std"))
    num_features = getattr(network, "head_hidden_size", network.num_features)
    square = Square(known["crop_pct"], known["interpolation"])
    return Normalised(network, num_features, "", mean, std, known["input_size"][1], square)


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "small_resnet": _small_resnet,
    "small_resnet_32": _small_resnet_32,
    "digits_net": _digits_net,
    "resnext50_32x4d": lambda: _torchvision("resnext50_32x4d"),
    "resnet101": lambda: _torchvision("resnet101"),
    "resnet152": lambda: _torchvision("resnet152"),
    "efficientnet_lite0": lambda: _efficientnet_lite("efficientnet_lite0"),
    "efficientnet_lite2": lambda: _efficientnet_lite("efficientnet_lite2"),
}


def build_backbone(name: str) -> nn.Module:
    """The backbone of that name, or `timm:NAME`, randomly initialised, with `num_features` and `input_size`.

    Raises InputError for an unknown name.
    """
    if name.startswith(TIMM):
        return _timm(name.removeprefix(TIMM))
    if name not in BACKBONES:
        raise InputError(unknown("network", name, [*BACKBONES, f"{TIMM}NAME"]))
    return BACKBONES[name]()


SAME = 1e-3  # largest difference of folded features, of the largest feature; rounding stays below 1e-4


@torch.inference_mode()
def fold_batch_norm(network: nn.Module, pixels: Tensor) -> nn.Module:
    """A copy of a network whose batch norms are parts of the convolutions before them, for evaluation.

    Features are the same but for rounding, and take less time (`benchmarks/training.py`).
    pixels [B, C, H, W]: of a few images, on which both are compared. The network itself is returned where
    they differ (something else reads a convolution's result) and where there is nothing to fold.
    """
    # One forward pass tells which batch norm receives the result of which convolution.
    names = {module: name for name, module in network.named_modules()}
    results: list[tuple[Tensor, str]] = []
    pairs: list[tuple[str, str]] = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            results.append((result, names[module]))
        elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            pairs.extend((name, names[module]) for made, name in results if made is inputs[0])

    with ExitStack() as hooks:
        for module in names:
            hooks.enter_context(module.register_forward_hook(watch))
        expected = network(pixels)
    calls = Counter(name for pair in pairs for name in pair)
    if not calls or max(calls.values()) > 1:  # nothing to fold, or something is called twice
        return network

    folded = copy.deepcopy(network)
    for convolution, norm in pairs:
        module = folded.get_submodule(norm)
        folded.set_submodule(convolution, fuse_conv_bn_eval(folded.get_submodule(convolution), module))
        folded.set_submodule(norm, nn.Sequential(*module.children()))  # timm's hold their activation
    same = (folded(pixels) - expected).abs().max() <= SAME * expected.abs().max()
    return folded if same else network


def build_classifier(name: str, num_features: int, num_classes: int, **options: float) -> nn.Module:
    """A fresh classifier of that name, options as of its class; raises InputError listing the known ones."""
    if name not in CLASSIFIERS:
        raise InputError(unknown("classifier", name, list(CLASSIFIERS)))
    return CLASSIFIERS[name](num_features, num_classes, **options)
