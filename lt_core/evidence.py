"""Evidence of the stored training images beside a linear classifier: not in the paper, nothing is trained.

    evidence = Evidence(cache)                                    # once a backbone
    logits = image_evidence(evidence, share=0.4, strength=0.25)   # features [M, F] -> [M, N]

Of unit vectors x, w_i, p_i, with n_i training images of N classes and the learned scale s:

1. Transfer   h_i = norm(w_i + norm(p_i) / 2 + norm(t_i) / 2), t_i the transfer from classes with n_j > 20
              (Eq. 4-6); Eq. 7 with two of its three parts halved.
2. Density    g_i(x) = log of the mean over images x_m of class i of exp(20 cos(T x, T x_m) - 20), where T
              subtracts the mean of the class means and whitens by the pooled covariance within classes:
              every training image is a prototype.
3. Votes      r(x): class-balanced ridge regression of one-hot labels on 1500 random ReLU features.
4. Balance    b_i = -3 log(N pi_i), pi the share that each class gets of the training images when all
              classes weigh alike, every image left out of its own evidence.

    z_i(x) = s h_i . x + share (g_i(x) + 8 r_i(x)) + b_i - strength log(n_i / sum n)

The constants were chosen on validation images of nine backbones and stay as they are (notebook 14). Only
directions of features count. Votes and balance cost as much as the number of training images; the density
costs its square, so that above `MOST` images it reads as many of each class as fit (`inducing`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lt_core.baselines import Logits, adjust, training
from lt_core.cache import FeatureCache, own_classifier
from lt_core.checks import InputError, check_matrix
from lt_core.transfer import knowledge_transfer, normalize

PARTS = ("transfer", "density", "votes", "balance")
K, HALF = 20, 0.5  # transfer: from classes with more images (if there are none, all); weight of p, t beside w
SHARPNESS, SHRINKAGE = 20.0, 0.1  # density: of the kernel; of the covariance towards a multiple of 1
WIDTH, RIDGE, VOTES = 1500, 0.1, 8.0  # votes: random features; ridge in mean eigenvalues; weight beside g
TEMPERATURE = 3.0  # of the balance
LEAST_DENSITY, LEAST_REST = 1e-30, 0.02  # what logarithms and leave-one-out divisions are kept above
MOST = 20_000  # training images that the density reads
BLOCK = 2**10  # images at once: 82 MB of kernel to 20,000


# ---------------------------------------------------------------- density: every image a prototype


class Density:
    """Log density [M, N] of unit features [M, F] under each class, from its training images (2.)."""

    def __init__(self, x: Tensor, labels: Tensor, counts: Tensor) -> None:
        """x [M, F] unit training features, labels [M], counts [N].

        Raises InputError where no class has two different images: there is then no covariance.
        """
        num_features = x.shape[1]
        means = x.new_zeros(len(counts), num_features, dtype=torch.float64)
        scatter = x.new_zeros(num_features, num_features, dtype=torch.float64)
        for rows in torch.arange(len(x), device=x.device).split(BLOCK):
            block = x[rows].double()
            means.index_add_(0, labels[rows], block)
            scatter += block.T @ block
        means /= counts[:, None]
        scatter -= means.T @ (counts[:, None] * means)
        values, vectors = torch.linalg.eigh(scatter / max(1, len(x) - len(counts)))
        values = values.clamp(min=0)
        if not values.mean() > torch.finfo(x.dtype).eps ** 2:
            raise InputError("train features: the images of a class are all alike, a density needs a spread")
        values = (1 - SHRINKAGE) * values + SHRINKAGE * values.mean()
        self.whitening, self.centre = (vectors * values.rsqrt() @ vectors.T).to(x), means.mean(0).to(x)
        self.kept = inducing(labels.cpu(), counts.cpu()).to(x.device)
        self.labels, self.images = labels[self.kept], self.whitened(x[self.kept])  # [K], [K, F]
        self.counts = torch.bincount(self.labels, minlength=len(counts))

    def __call__(self, x: Tensor) -> Tensor:
        parts = [self._sums(self._kernel(self.whitened(part))) / self.counts for part in x.split(BLOCK)]
        return torch.cat(parts).clamp(min=LEAST_DENSITY).log()

    def leave_one_out(self) -> Tensor:
        """The same [K, N] of the images that are kept, each without itself."""
        found = []
        for rows in torch.arange(len(self.images), device=self.images.device).split(BLOCK):
            kernel = self._kernel(self.images[rows])
            kernel[rows, rows - rows[0]] = 0
            others = self.counts - one_hot(self.labels[rows], len(self.counts))
            found.append(self._sums(kernel) / others.clamp(min=1))
        return torch.cat(found).clamp(min=LEAST_DENSITY).log()

    def _kernel(self, white: Tensor) -> Tensor:
        """exp(20 cos - 20) [K, B] of the images with whitened ones [B, F]."""
        return (self.images @ white.T).sub_(1).mul_(SHARPNESS).exp_()

    def _sums(self, kernel: Tensor) -> Tensor:
        """Sums [B, N] over the images of each class; adding up rows is far cheaper than a product."""
        return kernel.new_zeros(len(self.counts), kernel.shape[1]).index_add_(0, self.labels, kernel).T

    def whitened(self, x: Tensor) -> Tensor:
        """norm(T x) [M, F]."""
        return torch.nn.functional.normalize((x - self.centre) @ self.whitening, dim=1)


def inducing(labels: Tensor, counts: Tensor, most: int = MOST) -> Tensor:
    """Which training images the density reads [K]: all, or above `most` a random draw of each class.

    Every class keeps the same number, as large as fits, or all that it has; so rare classes stay whole.
    """
    if len(labels) <= most:
        return torch.arange(len(labels))
    fits = (number for number in range(int(counts.max()), 1, -1) if counts.clamp(max=number).sum() <= most)
    each = next(fits, 1)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = order[labels[order].argsort(stable=True)]
    first = (counts.cumsum(0) - counts)[labels[order]]
    return order[torch.arange(len(order)) - first < each].sort().values


# ---------------------------------------------------------------- votes: a ridge regression


class Votes:
    """One-hot labels regressed on random ReLU features of unit features [M, F] -> [M, N] (3.)."""

    def __init__(self, x: Tensor, labels: Tensor, counts: Tensor) -> None:
        """x [M, F] unit training features, labels [M], counts [N]; an image weighs 1 / (N n_y)."""
        generator = torch.Generator().manual_seed(0)
        self.random = torch.randn(x.shape[1], WIDTH, generator=generator).to(x)
        self.per_image = 1 / (len(counts) * counts.double())
        gram = x.new_zeros(WIDTH, WIDTH, dtype=torch.float64)
        means = x.new_zeros(len(counts), WIDTH, dtype=torch.float64)
        for rows in torch.arange(len(x), device=x.device).split(BLOCK):
            hidden, weight = self._hidden(x[rows]), self.per_image[labels[rows], None]
            gram += hidden.T @ (hidden * weight)
            means.index_add_(0, labels[rows], hidden * weight)
        means *= len(counts)
        self.mean = means.mean(0)
        gram -= torch.outer(self.mean, self.mean)
        gram.diagonal().add_(RIDGE * gram.trace() / WIDTH)
        self.factor = torch.linalg.cholesky(gram)
        self.readout = torch.cholesky_solve((means - self.mean).T / len(counts), self.factor)  # [WIDTH, N]

    def __call__(self, x: Tensor) -> Tensor:
        parts = [(self._hidden(part) - self.mean) @ self.readout for part in x.split(BLOCK)]
        return torch.cat(parts).to(x)

    def leave_one_out(self, x: Tensor, labels: Tensor) -> Tensor:
        """What training images [K, F] with labels [K] get from the regression on all others [K, N].

        In closed form, with the centre of the random features and the size of the ridge as they are.
        """
        found = []
        for part, own in zip(x.split(BLOCK), labels.split(BLOCK), strict=True):
            hidden = self._hidden(part) - self.mean
            solved = torch.linalg.solve_triangular(self.factor, hidden.T, upper=False)
            leverage = (solved.square().sum(0) * self.per_image[own])[:, None]
            hot = one_hot(own, len(self.per_image))
            votes = (hidden @ self.readout - leverage * hot) / (1 - leverage).clamp(min=LEAST_REST)
            found.append(votes.to(x))
        return torch.cat(found)

    def _hidden(self, x: Tensor) -> Tensor:
        return (x @ self.random).relu().double()


# ---------------------------------------------------------------- the classifiers


def last_only(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """The function with its last value remembered: settings are tried in turn on the very same features."""
    last: tuple[Tensor | None, Any] = None, None

    def remembered(features: Tensor) -> Any:
        nonlocal last
        if last[0] is not features:
            last = features, function(features)
        return last[1]

    return remembered


class Evidence:
    """What all settings of `image_evidence` share: rows, density, votes, and the training images' own."""

    def __init__(self, cache: FeatureCache) -> None:
        """Raises CacheError without training features, InputError for bad ones or classes without weights."""
        features, labels = training(cache)
        weights = check_matrix("weights", cache.weights)
        k = K if cache.counts.max() > K else 0
        transfer = knowledge_transfer(cache.prototypes, weights, cache.counts, k)
        self.weights = normalize("weights", weights)
        borrowed = normalize("prototypes", cache.prototypes) + normalize("transfer", transfer)
        self.rows = normalize("rows", self.weights + HALF * borrowed)
        self.scale, self.counts = cache.scale, cache.counts
        x = normalize("train features", check_matrix("train features", features))
        self.density, self.votes = Density(x, labels, self.counts), Votes(x, labels, self.counts)
        kept = self.density.kept
        self.x, self.labels = x[kept], labels[kept]
        self.own = {
            "density": self.density.leave_one_out(),
            "votes": VOTES * self.votes.leave_one_out(self.x, self.labels),
        }
        self.of = last_only(self._of)

    def _of(self, features: Tensor) -> dict[str, Tensor]:
        """Unit features `x` and both kinds of evidence [M, N] of features [M, F]."""
        x = normalize("features", check_matrix("features", features, columns=self.x.shape[1]))
        return {"x": x, "density": self.density(x), "votes": VOTES * self.votes(x)}

    def logits(self, parts: dict[str, Tensor], share: float, without: Collection[str] = ()) -> Tensor:
        """s h . x + share (g + 8 r) [M, N] without some of `PARTS`."""
        rows = self.weights if "transfer" in without else self.rows
        evidence = [parts[name] for name in ("density", "votes") if name not in without]
        return self.scale * parts["x"] @ rows.T + share * sum(evidence)

    def balance(self, share: float, without: Collection[str] = ()) -> Tensor:
        """b [N] (4.)."""
        shares = (self.logits({"x": self.x, **self.own}, share, without) / TEMPERATURE).softmax(1)
        return -TEMPERATURE * (self.density.counts.reciprocal()[self.labels] @ shares).log()


def image_evidence(
    evidence: Evidence, share: float, strength: float, without: Collection[str] = ()
) -> Logits:
    """The classifier of the module's head; without: of `PARTS`, those to take away."""
    bias = 0.0 if "balance" in without else evidence.balance(share, without)

    def logits(features: Tensor) -> Tensor:
        found = evidence.logits(evidence.of(features), share, without) + bias
        return adjust(found, evidence.counts, strength)

    return logits


class WithDensity:
    """What all settings of `image_density` share: the backbone's own classifier and the density."""

    def __init__(self, cache: FeatureCache) -> None:
        """Raises as `Evidence`."""
        features, labels = training(cache)
        check_matrix("weights", cache.weights)
        self.own, self.counts = own_classifier(cache), cache.counts
        x = normalize("train features", check_matrix("train features", features))
        self.density = Density(x, labels, self.counts)
        self.of = last_only(self._of)

    def _of(self, features: Tensor) -> Tensor:
        """Log density [M, N] of features [M, F]."""
        features = check_matrix("features", features, columns=len(self.density.centre))
        return self.density(normalize("features", features))


def image_density(prepared: WithDensity, share: float, strength: float) -> Logits:
    """Its simplest useful form: the backbone's own logits + share g(x), then logit adjustment."""

    def logits(features: Tensor) -> Tensor:
        density = prepared.of(features)
        return adjust(prepared.own(features) + share * density, prepared.counts, strength)

    return logits
