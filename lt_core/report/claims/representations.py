"""Claims 49 to 68: geometry, Places-LT backbones, stated limits (sections I to K)."""

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
    part,
    with_interval,
)
from lt_core.report.claims.entries import (
    ALL,
    COMPARED_SMALL,
    GROUPS,
    PLACES,
    SPLITS,
    TABLE9_METHODS,
    cos,
    ens,
    proto,
)
from lt_core.report.claims.study import Entry, Study

STARTS, SAMPLERS = ("supervised", "simclr"), ("sqrt", "uniform")


def no_group_below(entry: Entry, rival: Entry) -> Test:
    """No group in which the interval of the difference lies below 0."""

    @part
    def test(study: Study) -> Part:
        found = {group: study.accuracy(entry, group) - study.accuracy(rival, group) for group in GROUPS}
        numbers = ", ".join(f"{group} {with_interval(difference)}" for group, difference in found.items())
        text = f"{entry.what}, `{entry.backbone}` less `{rival.backbone}`: {numbers}"
        return Part(text, all(difference.high >= 0 for difference in found.values()))

    return test


CLAIMS = [
    Claim(
        49,
        "Attention selects semantically close classes.",
        "plot",
        "All classes, k = 0: the ten other classes with the highest attention have a higher mean "
        "Leacock-Chodorow similarity than random ones; interval over classes.",
        [geometry.attention_follows_meaning],
    ),
    Claim(
        50,
        "Transfer moves the few-shot representation towards its prototype.",
        "plot",
        "Few-shot, `sqrt`, mean over classes: cos(w^h(20), p) is above cos(w, p). The sum p + w without "
        "transfer is reported as a control and does not decide.",
        [geometry.few_shot_towards_prototype],
    ),
    Claim(
        51,
        "Common-class representations stay near their learned weights.",
        "plot",
        "Many-shot, `sqrt`, mean over classes: cos(w^h(20), w) is at least 0.8 and above cos(w^h(20), p).",
        [geometry.many_shot_stays_high, geometry.many_shot_nearer_to_weight],
    ),
    Claim(
        52,
        "Prototype and weight of the same class can differ.",
        "plot",
        "`sqrt`: at least 10 % of the classes have cos(p, w) below 0.71, an angle above 45 degrees.",
        [geometry.prototype_and_weight_differ],
    ),
    Claim(
        53,
        "Sampling has little effect on prototype quality.",
        "partly",
        "Training and validation prototypes on test images, both initialisations, each group and total: "
        "square root is within 1.5 points of uniform.",
        [
            level(
                proto(f"{start}_sqrt", source=source),
                proto(f"{start}_uniform", source=source),
                *ALL,
                margin=COMPARABLE,
            )
            for start in STARTS
            for source in SPLITS
        ],
    ),
    Claim(
        54,
        "With supervised initialisation, square root gives the better prototypes.",
        "no",
        "Training and validation prototypes on test images: square root is above uniform in total and below "
        "it in no group.",
        [
            test(proto("supervised_sqrt", source=source), proto("supervised_uniform", source=source))
            for source in SPLITS
            for test in (lambda one, other: beats(one, other, "total"), no_group_below)
        ],
    ),
    Claim(
        55,
        "With unsupervised initialisation, uniform is very slightly ahead.",
        "yes",
        "Training and validation prototypes on test images: uniform is above square root in total, by at "
        "most 1.5 points.",
        [
            test(proto("simclr_uniform", source=source), proto("simclr_sqrt", source=source))
            for source in SPLITS
            for test in (
                lambda one, other: beats(one, other, "total"),
                lambda one, other: level(one, other, "total", margin=COMPARABLE),
            )
        ],
    ),
    Claim(
        56,
        "Supervised initialisation gives the higher training accuracy.",
        "plot",
        "Training and validation prototypes on training images, total, both samplers: supervised is above "
        "SimCLR.",
        [
            beats(
                proto(f"supervised_{sampler}", images="train", source=source),
                proto(f"simclr_{sampler}", images="train", source=source),
                "total",
            )
            for sampler in SAMPLERS
            for source in SPLITS
        ],
    ),
    Claim(
        57,
        "Supervised is better with enough data, unsupervised for few-shot.",
        "yes",
        "Training prototypes on test images, both samplers: supervised is above SimCLR in many-shot and "
        "below it in few-shot.",
        [
            test
            for sampler in SAMPLERS
            for test in (
                beats(proto(f"supervised_{sampler}"), proto(f"simclr_{sampler}"), "many"),
                beats(proto(f"simclr_{sampler}"), proto(f"supervised_{sampler}"), "few"),
            )
        ],
    ),
    Claim(
        58,
        "Square-root models have better prototype-weight agreement: no mismatches.",
        "yes",
        "Each initialisation: with square root no prototype is nearest to another class's weight, and there "
        "are fewer such classes than with uniform; interval over classes.",
        [
            test
            for start in STARTS
            for test in (
                geometry.no_mismatch(f"{start}_sqrt"),
                geometry.fewer_mismatches(f"{start}_sqrt", f"{start}_uniform"),
            )
        ],
    ),
    Claim(
        59,
        "The supervised model has the worst agreement.",
        "partly",
        "Each sampler: SimCLR has fewer classes whose prototype is nearest to another class's weight; "
        "interval over classes.",
        [geometry.fewer_mismatches(f"simclr_{s}", f"supervised_{s}") for s in SAMPLERS],
    ),
    Claim(
        60,
        "Unsupervised initialisation gives sharper similarity curves.",
        "plot",
        "Each sampler: SimCLR has the larger gap between rank 1 and ranks 2 to 20 and the smaller entropy of "
        "softmax(10 cos(p, w)); intervals over classes.",
        [geometry.sharper(f"simclr_{s}", f"supervised_{s}") for s in SAMPLERS],
    ),
    Claim(
        61,
        "Uniform gives slightly sharper curves than square root.",
        "plot",
        "Each initialisation: uniform has the larger gap and the smaller entropy (as claim 60).",
        [geometry.sharper(f"{start}_uniform", f"{start}_sqrt") for start in STARTS],
    ),
    Claim(
        62,
        "Better compatibility makes unsupervised initialisation stronger in the end.",
        "partly",
        "Total, each classifier of Table 9 with each sampler: SimCLR is above supervised.",
        [
            beats(Entry(f"simclr_{sampler}", method), Entry(f"supervised_{sampler}", method), "total")
            for method in TABLE9_METHODS
            for sampler in SAMPLERS
        ],
    ),
    Claim(
        63,
        "With unsupervised initialisation both samplers end equal at 40.2.",
        "yes",
        "Total, ensemble, SimCLR: the samplers are within 1 point of each other (the level belongs to the "
        "data).",
        [level(ens("simclr_sqrt"), ens("simclr_uniform"), "total", margin=EQUAL)],
    ),
    Claim(
        64,
        "Supervised + uniform is weakest in almost all settings.",
        "partly",
        "It is the lowest of the four backbones in at least 90 % of the 28 cells of Table 9, counted by "
        "their values.",
        [
            geometry.weakest_in_most(
                "supervised_uniform", [b for b in PLACES if b != "supervised_uniform"], TABLE9_METHODS
            )
        ],
    ),
    Claim(
        65,
        "Every ResNet101 backbone beats DisAlign R101.",
        "yes",
        "Total: the ensemble on each of the four backbones of Table 9 is above our run of DisAlign on "
        "`supervised_sqrt`.",
        [beats(ens(backbone), COMPARED_SMALL, "total") for backbone in PLACES],
    ),
    Claim(
        66,
        "Mismatches foretell final accuracy.",
        "partly",
        "Of each two backbones of Table 9 with different counts of mismatched classes, that with more has "
        "the lower ensemble total.",
        [geometry.mismatches_foretell(PLACES, "ensemble_wh_0_20_100")],
    ),
    Claim(
        67,
        "Transfer needs visually similar classes and may fail without them.",
        "plot",
        "Few-shot classes, `sqrt`: the gain of w^h(20) over prototypes has a positive rank correlation with "
        "the highest cosine between the prototype and the weight of a class that it takes from; interval "
        "over classes.",
        [geometry.gain_follows_similarity],
    ),
    Claim(
        68,
        "Prototypes are less precise than learned classifiers.",
        "yes",
        "Many-shot, `sqrt`: prototypes are below the cosine classifier.",
        [beats(cos("sqrt"), proto("sqrt"), "many")],
    ),
]
