"""Claims 27 to 48: classifier type, sampling, roles in attention, other backbones (sections E to H)."""

from __future__ import annotations

from lt_core.report.claims import geometry
from lt_core.report.claims.decisions import (
    COMPARABLE,
    EQUAL,
    Claim,
    Part,
    Test,
    beats,
    level,
    lowest,
    part,
    plain,
    signed,
    with_interval,
)
from lt_core.report.claims.entries import (
    ALL,
    GROUPS,
    SPLITS,
    cos,
    dot,
    ens,
    p2p,
    p2w,
    proto,
    w2p,
    w2w,
)
from lt_core.report.claims.study import Entry, Estimate, Study, System

NEAR_ALL = 95.0  # percent
A_LITTLE = 2.0  # points
UNIFORM, SQRT, AWARE, BALANCED = "uniform", "sqrt", "class_aware", "balanced_softmax"
PANELS = [{"images": images, "source": source} for images in ("train", "test") for source in SPLITS]
TEST_PANELS = [{"source": source} for source in SPLITS]
WITHIN = [{"source": source, "within": True} for source in SPLITS]  # Table 5


def reaches(entry: Entry, least: float, group: str) -> Test:
    """An accuracy of at least so many percent."""

    @part
    def test(study: Study) -> Part:
        found = study.accuracy(entry, group)
        return Part(f"{group}: {entry.what}, `{entry.backbone}` {plain(found)} %", found.value >= least)

    return test


def loses_a_little(entry: Entry, rival: Entry, group: str) -> Test:
    """Below the rival, by 2 points at most; the interval below 0."""

    @part
    def test(study: Study) -> Part:
        lost = study.accuracy(entry, group) - study.accuracy(rival, group)
        text = f"{group}: {entry.what}, `{entry.backbone}` less `{rival.backbone}` {with_interval(lost)}"
        return Part(text, lost.high < 0 and lost.value >= -A_LITTLE, open=lost.open)

    return test


def differ(entries: list[Entry], group: str, by: float = 0.0) -> Test:
    """The best and the worst of these differ by more than `by` points: the interval lies above."""

    @part
    def test(study: Study) -> Part:
        ordered = sorted(entries, key=lambda entry: study.accuracy(entry, group).value)
        (worst, low), (best, high) = ((e, study.accuracy(e, group)) for e in (ordered[0], ordered[-1]))
        difference = high - low
        text = f"{group}: {best.what}, `{best.backbone}` less `{worst.backbone}` {with_interval(difference)}"
        return Part(text, difference.low > by, open=difference.open)

    return test


def sampler_matters_elsewhere(start: str) -> Test:
    """The gain of square-root over uniform sampling differs between the two data sets."""

    @part
    def test(study: Study) -> Part:
        here, there = _sampling_gain(study, ""), _sampling_gain(study, f"{start}_")
        difference = here - there
        text = (
            f"total, ensemble, square root less uniform: ImageNet-LT role {signed(here.value)}, Places-LT "
            f"role ({start}) {signed(there.value)}, difference {with_interval(difference)}"
        )
        return Part(text, not difference.open, open=difference.open)

    return test


def _sampling_gain(study: Study, prefix: str) -> Estimate:
    return study.accuracy(ens(f"{prefix}sqrt"), "total") - study.accuracy(ens(f"{prefix}uniform"), "total")


CLAIMS = [
    Claim(
        27,
        "Cosine classifiers raise accuracy clearly in every group.",
        "yes",
        "Uniform sampling, own training of both: the cosine classifier is above the dot-product classifier "
        "in many-, medium-, few-shot and total.",
        [beats(cos(UNIFORM), dot("uniform_dot"), *ALL)],
    ),
    Claim(
        28,
        "Cosine training gives better-separated features, by prototype accuracy.",
        "plot",
        "Many- and medium-shot, each panel of Figure 4 (training or validation prototypes, training or test "
        "images): prototypes of the cosine model are above those of the dot-product model.",
        [beats(proto(UNIFORM, **p), proto("uniform_dot", **p), "many", "medium") for p in PANELS],
    ),
    Claim(
        29,
        "For few-shot the two are equal in prototype accuracy.",
        "plot",
        "Few-shot, each panel of Figure 4: the two differ by at most 1 point.",
        [level(proto(UNIFORM, **p), proto("uniform_dot", **p), "few", margin=EQUAL) for p in PANELS],
    ),
    Claim(
        30,
        "Cosine classifiers converge faster.",
        "plot",
        "`uniform` reaches 90 % of the lower of the two final accuracies in fewer epochs than "
        "`uniform_dot`, in training and in validation accuracy.",
        [geometry.converges_faster(UNIFORM, "uniform_dot")],
    ),
    Claim(
        31,
        "Class-aware is the worst sampler, for learned classifiers and for prototypes.",
        "yes",
        "Class-aware is below uniform and square root in all columns of Table 4b, all cells of Table 5 "
        "(many, few; both kinds of prototypes) and all groups of Figure 5's test panels.",
        [
            lowest(cos(AWARE), [cos(UNIFORM), cos(SQRT)], *ALL),
            *[
                lowest(proto(AWARE, **p), [proto(UNIFORM, **p), proto(SQRT, **p)], "many", "few")
                for p in WITHIN
            ],
            *[
                lowest(proto(AWARE, **p), [proto(UNIFORM, **p), proto(SQRT, **p)], *GROUPS)
                for p in TEST_PANELS
            ],
        ],
    ),
    Claim(
        32,
        "Class-aware reaches near 100% training accuracy on few and medium (overfitting).",
        "plot",
        "Few- and medium-shot: training prototypes of the class-aware model classify at least 95 % of the "
        "training images correctly.",
        [reaches(proto(AWARE, images="train"), NEAR_ALL, group) for group in ("few", "medium")],
    ),
    Claim(
        33,
        "Class-aware with cosine does worse than published dot-product results with it.",
        "plot",
        "Total, own training of both with class-aware sampling: the cosine classifier is below the "
        "dot-product classifier.",
        [beats(dot("class_aware_dot"), cos(AWARE), "total")],
    ),
    Claim(
        34,
        "Square root gives the best learned-classifier accuracy.",
        "yes",
        "Total, cosine classifiers: square root is above uniform and class-aware.",
        [beats(cos(SQRT), [cos(UNIFORM), cos(AWARE)], "total")],
    ),
    Claim(
        35,
        "Square root costs a little on many-shot.",
        "yes",
        "Many-shot, cosine classifiers: square root is below uniform, by at most 2 points.",
        [loses_a_little(cos(SQRT), cos(UNIFORM), "many")],
    ),
    Claim(
        36,
        "With training prototypes, square root and uniform are comparable.",
        "yes",
        "Training prototypes, within 1.5 points of each other: each group on training and on test images "
        "(Figure 5, left), many- and few-shot within the group (Table 5).",
        [
            *[
                level(proto(SQRT, images=images), proto(UNIFORM, images=images), *GROUPS, margin=COMPARABLE)
                for images in ("train", "test")
            ],
            level(proto(SQRT, within=True), proto(UNIFORM, within=True), "many", "few", margin=COMPARABLE),
        ],
    ),
    Claim(
        37,
        "With validation prototypes, square root separates medium and few better than uniform.",
        "plot",
        "Medium- and few-shot, validation prototypes on test images: square root is above uniform.",
        [beats(proto(SQRT, source="val"), proto(UNIFORM, source="val"), "medium", "few")],
    ),
    Claim(
        38,
        "Within the few-shot group, square root is best.",
        "yes",
        "Few-shot within the group, training and validation prototypes: square root is above uniform and "
        "class-aware.",
        [beats(proto(SQRT, **p), [proto(UNIFORM, **p), proto(AWARE, **p)], "few") for p in WITHIN],
    ),
    Claim(
        39,
        "Uniform is best within many-shot.",
        "yes",
        "Many-shot within the group, training and validation prototypes: uniform is above square root and "
        "class-aware.",
        [beats(proto(UNIFORM, **p), [proto(SQRT, **p), proto(AWARE, **p)], "many") for p in WITHIN],
    ),
    Claim(
        40,
        "Sampling strategy changes model quality substantially.",
        "yes",
        "Total, cosine classifiers of the three samplers: the best less the worst is above 1.5 points (what "
        "counts as comparable), its interval included.",
        [differ([cos(UNIFORM), cos(SQRT), cos(AWARE)], "total", by=COMPARABLE)],
    ),
    Claim(
        41,
        "The best sampler depends on the data's distribution.",
        "yes",
        "Total, ensemble: the gain of square root over uniform on the ImageNet-LT role differs from that on "
        "the Places-LT role, with either initialisation.",
        [sampler_matters_elsewhere(start) for start in ("supervised", "simclr")],
    ),
    Claim(
        42,
        "Prototype queries over classifier weights (p to w) is the best arrangement.",
        "partly",
        "Ensemble on `sqrt`, many-, medium-, few-shot and total: p to w is above the three other "
        "arrangements.",
        [beats(p2w(SQRT), [w2p(SQRT), w2w(SQRT), p2p(SQRT)], *ALL)],
    ),
    Claim(
        43,
        "The others fall because they lean on weak few-shot weights or on weak many-shot prototypes.",
        "partly",
        "Ensemble on `sqrt`: below p to w are, in few-shot, those that query with weights (w to p, w to w) "
        "and, in many-shot, those that recompose prototypes (w to p, p to p).",
        [
            *[beats(p2w(SQRT), rival(SQRT), "few") for rival in (w2p, w2w)],
            *[beats(p2w(SQRT), rival(SQRT), "many") for rival in (w2p, p2p)],
        ],
    ),
    Claim(
        44,
        "The method improves rare classes with uniform sampling and with balanced softmax.",
        "yes",
        "Few-shot: the ensemble is above the cosine classifier on `uniform` and on `balanced_softmax`.",
        [beats(ens(backbone), cos(backbone), "few") for backbone in (UNIFORM, BALANCED)],
    ),
    Claim(
        45,
        "Few-shot accuracy is highest with balanced softmax.",
        "yes",
        "Few-shot, ensemble: `balanced_softmax` is above `sqrt` and `uniform`.",
        [beats(ens(BALANCED), [ens(SQRT), ens(UNIFORM)], "few")],
    ),
    Claim(
        46,
        "Own balanced softmax with cosine is above the published number.",
        "yes",
        "Total: the cosine classifier of `balanced_softmax` is above our run of BALMS.",
        [beats(cos(BALANCED), System("balms", "imagenet_lt", SQRT), "total")],
    ),
    Claim(
        47,
        "The backbone influences the final total (uniform against square root).",
        "yes",
        "Total, ensemble: `sqrt` and `uniform` differ, in either direction.",
        [differ([ens(SQRT), ens(UNIFORM)], "total")],
    ),
    Claim(
        48,
        "Better representation learning and this method add up.",
        "partly",
        "Total: the ensemble is above the cosine classifier on `sqrt`, `uniform` and `balanced_softmax`.",
        [beats(ens(backbone), cos(backbone), "total") for backbone in (SQRT, UNIFORM, BALANCED)],
    ),
]
