"""Cost of knowledge transfer as ratios from one run: against bare matrix products, and its memory.

    python benchmarks/transfer.py [--repeats 7] [--classes 100000]

build_vs_gemm    seconds to build the three hybrid classifiers of the ensemble (1,000 classes x 2,048
                 features, ImageNet-LT's groups) over the two products that cannot be avoided: similarities
                 [N, N] and their weighted sums [N, F]. Aim at most 1.5.
score_vs_gemm    seconds to score images with that ensemble over one product of the features with all its
                 classifiers stacked. Aim at most 1.2.
extra_gib_100k   peak memory beyond inputs and outputs, in GiB, of building them for 100,000 classes x 512
                 features, in a process of its own. Aim below 1.
evidence_gib_100k  peak memory beyond inputs, in GiB, of `image_evidence` on 100,000 training images x 256.

The two of a pair are interleaved and their medians compared. Also shown: how the cost grows with the number
of classes (up to 8,142, as in iNaturalist 2018, and the largest), how far float32 is from float64, and what a
sparse attention to the m nearest classes would save and cost. Last, time and memory of `image_evidence`,
which reads the training images themselves, against their number (above `lt_core.evidence.MOST` its density
reads some of each class). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable

import psutil
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from lt_core.cache import FeatureCache
from lt_core.evidence import Evidence, image_evidence
from lt_core.transfer import (
    TEMPERATURE,
    ensemble_probabilities,
    hybrid_classifiers,
    knowledge_transfer,
    prototypes,
)

GROUPS = (0.391, 0.463, 0.146)  # many, medium and few in ImageNet-LT: shares of the classes
CURVE = (500, 1000, 2000, 4000, 8142)
TRAINING_IMAGES = (5_000, 10_000, 20_000, 50_000, 100_000)


def long_tail(classes: int, dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prototypes [N, F], weights [N, F] that resemble them, and counts [N] in no order."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(classes, dims, generator=generator)
    weights = torch.randn(classes, dims, generator=generator).add_(prototypes)
    ranks = torch.randperm(classes, generator=generator) / classes
    many, medium = GROUPS[0], GROUPS[0] + GROUPS[1]
    counts = torch.where(ranks < many, 300, torch.where(ranks < medium, 50, 10))
    return prototypes, weights, counts


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def interleaved(one: Callable[[], object], two: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of each, measured in turn after one uncounted round."""
    times = [(seconds(one), seconds(two)) for _ in range(repeats + 1)][1:]
    return statistics.median(t for t, _ in times), statistics.median(t for _, t in times)


def two_products(queries: Tensor, keys: Tensor) -> Callable[[], Tensor]:
    """Similarities and weighted sums, with nothing done to them."""
    return lambda: (queries @ keys.T) @ keys


def peak_gib() -> float:
    scale = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def large_build(classes: int, dims: int) -> tuple[float, float]:
    """Seconds to build the ensemble, and GiB that it takes beyond its inputs and outputs."""
    inputs = long_tail(classes, dims)
    hybrid_classifiers(*(part[:1000] for part in inputs))  # loads the libraries of the products
    before = psutil.Process().memory_info().rss / 2**30
    started = time.perf_counter()
    outputs = hybrid_classifiers(*inputs)
    taken = time.perf_counter() - started
    return taken, peak_gib() - before - sum(one.nbytes for one in outputs) / 2**30


def nearest_only(queries: Tensor, keys: Tensor, m: int) -> Tensor:
    """Eq. 4 with attention to the m nearest classes alone [N, F]; all of them when m is N."""
    keys = normalize(keys, dim=1)
    cosines, nearest = (normalize(queries, dim=1) @ keys.T).topk(m, dim=1)
    return embedding_bag(nearest, keys, per_sample_weights=(TEMPERATURE * cosines).softmax(dim=1), mode="sum")


def show_sparse(prototypes: Tensor, weights: Tensor, counts: Tensor, repeats: int) -> None:
    print(f"\n{'attention to the m nearest':28}{'of the cost':>12}{'largest error of a direction':>30}")
    exact = normalize(knowledge_transfer(prototypes, weights, counts), dim=1)
    for m in (16, 64, 256, len(counts)):
        sparse_s, dense_s = interleaved(
            lambda m=m: nearest_only(prototypes, weights, m),
            lambda: knowledge_transfer(prototypes, weights, counts),
            repeats,
        )
        error = (normalize(nearest_only(prototypes, weights, m), dim=1) - exact).norm(dim=1).max()
        print(f"{f'm = {m}':28}{sparse_s / dense_s:12.2f}{error:30.5f}")


def show_precision(prototypes: Tensor, weights: Tensor, counts: Tensor) -> None:
    single = hybrid_classifiers(prototypes, weights, counts)
    double = hybrid_classifiers(prototypes.double(), weights.double(), counts)
    rows = max((a - b).abs().max().item() for a, b in zip(single, double, strict=True))
    scores = ensemble_probabilities(prototypes, single) - ensemble_probabilities(prototypes.double(), double)
    print(f"\nfloat32 against float64, largest difference: {rows:.1e} in a classifier, ", end="")
    print(f"{scores.abs().max():.1e} in a probability")


def evidence_cost(images: int, classes: int, dims: int) -> tuple[int, int, float, float, float]:
    """Training images, those the density reads, seconds to prepare `image_evidence` and to score, GiB."""
    generator = torch.Generator().manual_seed(0)
    counts = (1000 * 0.977 ** torch.arange(classes)).clamp(min=5)  # as long a tail as Tiny-ImageNet-LT's
    counts = (counts * images / counts.sum()).ceil().long()
    labels = torch.arange(classes).repeat_interleave(counts)
    centres = torch.randn(classes, dims, generator=generator)
    features = centres[labels] + torch.randn(len(labels), dims, generator=generator)
    asked = centres[torch.arange(1000) % classes] + torch.randn(1000, dims, generator=generator)
    means = prototypes(features, labels, classes)
    cache = FeatureCache(centres, 16.0, counts, means, {"train": (features, labels)}, meta={})
    before = psutil.Process().memory_info().rss / 2**30
    started = time.perf_counter()
    evidence = Evidence(cache)
    classify = image_evidence(evidence, share=0.4, strength=0.25)
    prepared = time.perf_counter() - started
    scored = seconds(lambda: classify(asked))
    return len(labels), len(evidence.density.kept), prepared, scored, peak_gib() - before


def show_evidence(classes: int = 200, dims: int = 256) -> float:
    """A line for each number of training images; gives the GiB of the largest."""
    words = ("training images", "read by the density", "prepare, s", "score 1,000, s", "GiB")
    print(f"\nimage_evidence, {classes} classes x {dims}\n" + "".join(f"{word:>21}" for word in words))
    for images in TRAINING_IMAGES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            images, kept, prepared, scored, gib = pool.apply(evidence_cost, (images, classes, dims))
        print(f"{images:21,}{kept:21,}{prepared:21.1f}{scored:21.2f}{gib:21.2f}")
    return gib


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each")
    parser.add_argument("--classes", type=int, default=100_000, help="of the largest case")
    parser.add_argument("--images", type=int, default=10_000, help="images scored")
    options = parser.parse_args()
    print(f"CPU, {torch.get_num_threads()} threads, float32; {options.repeats} repeats")

    inputs = long_tail(1000, 2048)
    prototypes, weights, _ = inputs
    build_s, bare_build_s = interleaved(
        lambda: hybrid_classifiers(*inputs), two_products(prototypes, weights), options.repeats
    )
    classifiers = hybrid_classifiers(*inputs)
    stacked, features = torch.cat(classifiers), torch.randn(options.images, 2048)
    score_s, bare_score_s = interleaved(
        lambda: ensemble_probabilities(features, classifiers),
        lambda: features @ stacked.T,
        options.repeats,
    )
    print(f"\n{'seconds, 1,000 x 2,048':28}{'ours':>10}{'products':>10}{'ratio':>8}")
    for name, ours, bare in (
        ("building three classifiers", build_s, bare_build_s),
        (f"scoring {options.images:,} images", score_s, bare_score_s),
    ):
        print(f"{name:28}{ours:10.3f}{bare:10.3f}{ours / bare:8.2f}")

    print(f"\n{'classes x 512':>14}{'seconds':>10}{'GFLOP/s of the two products':>30}")
    curve = []
    for classes in CURVE:
        case = long_tail(classes, 512)
        curve.append(
            (classes, statistics.median(seconds(lambda c=case: hybrid_classifiers(*c)) for _ in range(3)))
        )
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        large_s, extra_gib = pool.apply(large_build, (options.classes, 512))
    for classes, taken in [*curve, (options.classes, large_s)]:
        print(f"{classes:14,}{taken:10.2f}{4 * classes**2 * 512 / taken / 1e9:30.1f}")
    print(f"{options.classes:,} classes: {extra_gib:.2f} GiB beyond inputs and outputs")

    show_precision(*inputs)
    show_sparse(*inputs, options.repeats)
    evidence_gib = show_evidence()
    ratios = {
        "build_vs_gemm": build_s / bare_build_s,
        "score_vs_gemm": score_s / bare_score_s,
        "extra_gib_100k": extra_gib,
        "evidence_gib_100k": evidence_gib,
    }
    print(json.dumps({name: round(value, 3) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
