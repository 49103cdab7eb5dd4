"""The compared systems on a trained backbone's frozen features: each a function of a feature cache.

A first stage is a trained backbone (its features and own classifier); a second stage is fitted to its
training features here. Every function returns `logits(features [M, F]) -> [M, N]`; `lt_core.classifiers`
names them and chooses their settings on validation images.

    logits = lws(cache, learning_rate=0.2)
    predictions = logits(cache.features("test")).argmax(dim=1)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, normalize

from lt_core.cache import FeatureCache, kind_of, own_classifier
from lt_core.checks import InputError, check_counts, check_matrix
from lt_core.losses import CrossEntropy, Loss, WeightedCrossEntropy, build_loss, reweighting
from lt_core.metrics import group_of
from lt_core.models import build_classifier
from lt_core.samplers import epoch_batches
from lt_core.train import fit_head, lr_at, step_generator
from lt_core.transfer import prototypes

Logits = Callable[[Tensor], Tensor]
EPOCHS = 10  # of every second stage; the authors take 5 (LWS) to 20 (BALMS)
BATCH, LEAST_STEPS = 256, 20  # images a step, fewer where an epoch would have fewer steps than this
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
META_LEARNING_RATE = 1e-2  # of BALMS's sampler (Adam), as in the authors' CIFAR settings


# ---------------------------------------------------------------- nothing is trained


def adjust(logits: Tensor, counts: Tensor, strength: float) -> Tensor:
    """Logits [M, N] less strength times the log prior of counts [N] (Menon et al., ICLR 2021).

    Strength 1 (PC softmax in the LADE paper) is the theory for training on all images alike, 0.5 for
    square-root sampling, whose class mass is n^0.5. Log probabilities, as of an ensemble, are logits too.
    """
    counts = check_counts("counts", counts)
    logits = check_matrix("logits", logits, columns=len(counts))
    return logits - strength * (counts.double() / counts.sum()).log().to(logits)


def logit_adjustment(cache: FeatureCache, strength: float) -> Logits:
    """The backbone's own classifier with its logits adjusted."""
    own = own_classifier(cache)
    return lambda features: adjust(own(features), cache.counts, strength)


def tau_norm(cache: FeatureCache, tau: float) -> Logits:
    """Logits w_c . x / |w_c|^tau without the bias (Kang et al., ICLR 2020).

    tau = 0 is the first stage's classifier less its bias. Raises InputError for a cosine classifier, whose
    rows have no norm that counts.
    """
    if cache.bias is None:
        raise InputError("tau-normalisation does nothing to a cosine classifier: use a dot-product backbone")
    weights = check_matrix("weights", cache.weights)
    rows = weights / torch.linalg.vector_norm(weights, dim=1, keepdim=True) ** tau
    return lambda features: features @ rows.T


def ncm(cache: FeatureCache) -> Logits:
    """Nearest class mean (Kang et al., ICLR 2020): -|x - c|^2 of centred and normalised features.

    c: their class means, which are not normalised again, so this is not a nearest cosine.
    """
    features, labels = training(cache)
    mean = features.mean(0)
    centroids = prototypes(features - mean, labels, len(cache.counts))
    return lambda features: -(torch.cdist(normalize(features - mean, dim=1), centroids) ** 2)


def causal_norm(cache: FeatureCache, strength: float) -> Logits:
    """A backbone's causal norm classifier with a strength (alpha) of the total direct effect."""
    if cache.direction is None:
        raise InputError("causal norm needs a backbone that was trained with it: there is no direction")
    own = own_classifier(cache)
    own.strength = strength
    return own


# ---------------------------------------------------------------- second stages: a head is trained


def training(cache: FeatureCache) -> tuple[Tensor, Tensor]:
    """Training features [M, F] and labels [M]; raises InputError unless the counts are theirs."""
    features, labels = cache.features("train"), cache.labels("train")
    if not torch.equal(torch.bincount(labels, minlength=len(cache.counts)), cache.counts):
        raise InputError("counts must be those of the training labels, whatever the sampler was")
    return features, labels


def _fitted(
    head: nn.Module, cache: FeatureCache, loss: Loss, sampler: str, learning_rate: float, seed: int
) -> Logits:
    """The head trained on the cache's training features, without gradients."""
    features, labels = training(cache)
    size = _batch_size(len(labels))
    head = head.to(features.device)
    loss = loss.to(features.device)
    fit_head(head, features, labels, loss, sampler, learning_rate, EPOCHS, size, WEIGHT_DECAY, MOMENTUM, seed)
    return head.requires_grad_(False)


def _batch_size(images: int) -> int:
    """Images a step of a second stage on so many training images."""
    return max(1, min(BATCH, images // LEAST_STEPS))


def linear_kind(cache: FeatureCache) -> str:
    """What a second stage starts from, `cosine` or `dot_product`; raises InputError for causal norm."""
    if cache.direction is not None:
        raise InputError("a second stage starts from a cosine or dot-product classifier, not causal norm")
    return kind_of(cache)


def new_head(cache: FeatureCache, seed: int) -> nn.Module:
    """A fresh classifier of the first stage's kind; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_classifier(linear_kind(cache), cache.weights.shape[1], len(cache.weights))


def old_head(cache: FeatureCache) -> nn.Module:
    """The first stage's classifier, frozen; raises InputError where a class has no row of it."""
    linear_kind(cache)
    check_matrix("weights", cache.weights)
    return own_classifier(cache)


def retrained(cache: FeatureCache, loss: str, sampler: str, learning_rate: float, seed: int = 0) -> Logits:
    """A new classifier on the frozen features, trained with a named loss and sampler.

    `cross_entropy` with `class_aware` is cRT (Kang et al., ICLR 2020), `balanced_softmax` with `uniform` the
    second stage of Ren et al. without their sampler; `focal`, `class_balanced` and `lade` are heads of losses
    that their authors train end to end.
    """
    built = build_loss(loss, cache.counts)
    return _fitted(new_head(cache, seed), cache, built, sampler, learning_rate, seed)


class WeightScaling(nn.Module):
    """s_c (w_c . x + b_c), s = 1 at the start: the authors' code scales the bias too, unlike their text."""

    def __init__(self, cache: FeatureCache) -> None:
        super().__init__()
        self.own = old_head(cache)
        self.scales = nn.Parameter(torch.ones(len(cache.weights)))

    def forward(self, features: Tensor) -> Tensor:
        return self.scales * self.own(features)


def lws(cache: FeatureCache, learning_rate: float, seed: int = 0) -> Logits:
    """Learnable weight scaling (Kang et al., ICLR 2020): one factor a class on the frozen logits.

    Cross-entropy and class-aware sampling; all else is frozen.
    """
    loss = CrossEntropy(cache.counts)
    return _fitted(WeightScaling(cache), cache, loss, "class_aware", learning_rate, seed)


class Alignment(nn.Module):
    """z + k (s z + o) with the confidence k = sigmoid(v . norm(x) + v0), from the authors' s = 1, o = 0.

    The paper's k (a z + o) + (1 - k) z is the same with a = 1 + s. The confidence reads the direction of the
    feature as the authors' cosine version does; raw features after a ReLU would hold it at 1.
    """

    def __init__(self, cache: FeatureCache) -> None:
        super().__init__()
        num_classes, num_features = cache.weights.shape
        self.own = old_head(cache)
        self.scales = nn.Parameter(torch.ones(num_classes))
        self.offsets = nn.Parameter(torch.zeros(num_classes))
        self.confidence = nn.utils.skip_init(nn.Linear, num_features, 1)
        nn.init.constant_(self.confidence.weight, 0.1)
        nn.init.zeros_(self.confidence.bias)

    def forward(self, features: Tensor) -> Tensor:
        z = self.own(features)
        k = self.confidence(normalize(features, dim=1)).sigmoid()
        return z + k * (self.scales * z + self.offsets)


def disalign(cache: FeatureCache, rho: float, learning_rate: float, seed: int = 0) -> Logits:
    """DisAlign (Zhang et al., CVPR 2021): frozen logits, calibrated where the input asks for it.

    2 N + F + 1 numbers learn with instance-uniform sampling and generalised re-weighting (rho); all else is
    frozen.
    """
    loss = WeightedCrossEntropy(cache.counts, reweighting(cache.counts, rho))
    return _fitted(Alignment(cache), cache, loss, "uniform", learning_rate, seed)


# ---------------------------------------------------------------- BALMS


class MetaSampler(nn.Module):
    """Draws class c with probability proportional to n_c q_c, q_c = sigmoid(v_c), v [N] learned.

    A class is drawn and then any image of it, which gives the same images as the paper's draw among all
    images but another straight-through estimate of the gradient (the relaxation is over classes).
    """

    def __init__(self, counts: Tensor, init_power: float) -> None:
        """counts [N]; q starts proportional to p^-init_power: at 0 all images are alike, at 1 all classes."""
        super().__init__()
        counts = counts.double()
        wanted = (counts / counts.sum()) ** -init_power
        start = wanted / (wanted.min() + wanted.max())
        self.register_buffer("log_counts", counts.log().float())
        self.v = nn.Parameter(start.logit().float())

    @property
    def log_rates(self) -> Tensor:
        """Log probability of each class [N]."""
        return (self.log_counts + nn.functional.logsigmoid(self.v)).log_softmax(0)

    def share_of(self, classes: Tensor) -> float:
        """Percent of the draws that fall on some classes, bool [N]."""
        return 100 * self.log_rates.exp()[classes].sum().item()

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Classes [B] by straight-through Gumbel-softmax; weights [B], all 1, carry the draw's gradient."""
        gumbel = -torch.empty(batch, len(self.v)).exponential_(generator=generator).log().to(self.v)
        relaxed = (self.log_rates + gumbel).softmax(1)
        classes = relaxed.argmax(1)
        chosen = relaxed.gather(1, classes[:, None]).flatten()
        return classes, 1 + (chosen - chosen.detach())


def balms(cache: FeatureCache, learning_rate: float, init_power: float = 0.1, seed: int = 0) -> Logits:
    """BALMS (Ren et al., NeurIPS 2020): balanced softmax on frozen features and a sampler that learns.

    The class-balanced batches that the sampler learns from are training images, as in the authors' CIFAR
    settings; theirs for ImageNet-LT and Places-LT learn it from validation labels, which no other method here
    sees. `note` of the result says what the sampler learned.
    """
    features, labels = training(cache)
    head = new_head(cache, seed).to(features.device)
    sampler = MetaSampler(cache.counts, init_power)
    meta_optimiser = torch.optim.Adam(sampler.parameters(), META_LEARNING_RATE)
    velocity = {name: torch.zeros_like(weight) for name, weight in head.named_parameters()}
    few = torch.from_numpy(group_of(cache.counts)["few"]).to(features.device)
    start = sampler.share_of(few)
    log_counts = cache.counts.double().log().float()
    by_class = labels.argsort(stable=True)
    batch = _batch_size(len(labels))
    total = len(labels) // batch * EPOCHS
    step = 0
    for epoch in range(EPOCHS):
        for rows in epoch_batches("class_aware", labels, batch, seed, epoch).to(features.device):
            # A copy of the classifier takes the step that the sampler's batch asks for ...
            classes, ones = sampler.draw(batch, generator := step_generator(seed, epoch, step))
            drawn = images_of(classes, by_class, cache.counts, generator)
            losses = cross_entropy(head(features[drawn]) + log_counts, classes, reduction="none")
            rate = learning_rate * lr_at(step, total)
            stepped, moved = sgd_step(head, velocity, (losses * ones).mean(), rate)

            # ... the sampler moves to where the copy does better on a class-balanced batch ...
            after = cross_entropy(functional_call(head, stepped, (features[rows],)), labels[rows])
            meta_optimiser.zero_grad()
            after.backward(inputs=list(sampler.parameters()))
            meta_optimiser.step()

            # ... and the classifier takes its step. All weights of the draw are 1, so it is the copy's.
            with torch.no_grad():
                for name, weight in head.named_parameters():
                    weight.copy_(stepped[name])
                    velocity[name] = moved[name].detach()
            step += 1
    learned = sampler.share_of(few)
    head.note = f"few-shot share of the sampler's draws {start:.1f} % at the start, {learned:.1f} % learned"
    return head.requires_grad_(False)


def sgd_step(
    head: nn.Module, velocity: dict[str, Tensor], loss: Tensor, rate: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The head's weights and velocity after a step of SGD, as functions of what the loss depends on."""
    weights = dict(head.named_parameters())
    gradients = torch.autograd.grad(loss, weights.values(), create_graph=True)
    moved = {
        name: MOMENTUM * velocity[name] + gradient + WEIGHT_DECAY * weights[name]
        for name, gradient in zip(weights, gradients, strict=True)
    }
    return {name: weight - rate * moved[name] for name, weight in weights.items()}, moved


def images_of(classes: Tensor, by_class: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """A random image [B] of each of the classes [B]; by_class [M]: all images, class after class."""
    first = counts.cumsum(0) - counts
    place = (torch.rand(len(classes), generator=generator).to(counts.device) * counts[classes]).long()
    return by_class[first[classes] + place]
