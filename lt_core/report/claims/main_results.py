"""Claims 1 to 26: the headline, the classifiers of Table 1, Places-LT, unseen classes (sections A to D)."""

from __future__ import annotations

from collections.abc import Sequence

from lt_core.report.claims import cost, geometry
from lt_core.report.claims.decisions import (
    COMPARABLE,
    Claim,
    Part,
    Side,
    Test,
    beats,
    level,
    minus,
    part,
    parts,
    with_interval,
)
from lt_core.report.claims.entries import (
    ALL,
    COMPARED,
    COMPARED_R101,
    COMPARED_R152,
    R101,
    R152,
    SETTINGS,
    SIMCLR,
    cos,
    ens,
    own_rows,
    pc,
    proto,
    wh20,
    wh100,
    whc20,
    whc100,
    whc_ens,
)
from lt_core.report.claims.study import Entry, Estimate, Study
from lt_core.report.claims.untestable import Untestable
from lt_core.report.rendering import MINUS

KEPT = 0.9  # share of the total accuracy that "still does well" keeps
SQRT = "sqrt"


def spread_smaller(entry: Entry, rival: Entry) -> Test:
    """The best and the worst group lie closer together; the interval of the difference below 0."""

    @part
    def test(study: Study) -> Part:
        difference = study.spread(entry) - study.spread(rival)
        text = f"best less worst group: {minus(entry, rival)} {with_interval(difference)}"
        return Part(text, difference.high < 0, open=difference.open)

    return test


def keeps_total(entry: Entry, full: Entry) -> Test:
    """At least 90 % of the total accuracy of the model trained on all classes."""

    @part
    def test(study: Study) -> Part:
        one, other = study.accuracy(entry, "total"), study.accuracy(full, "total")
        share = one.value / other.value
        text = f"total: {minus(entry, full)} {with_interval(one - other)}, keeps {100 * share:.0f} %"
        return Part(text, share >= KEPT)

    return test


def beats_almost_all(entry: Entry, rivals: Sequence[Side], group: str) -> Test:
    """Above all rivals but one at most, by intervals."""

    @part
    def test(study: Study) -> Part:
        own = study.accuracy(entry, group)
        gains, needs = [], []
        for rival in rivals:
            try:
                gains.append((rival.what, own - study.accuracy(rival, group)))
            except Untestable as missing:
                needs.append(str(missing))
        missed = [f"{MINUS} {name} {with_interval(gain)}" for name, gain in gains if gain.low <= 0]
        above = f"above {len(gains) - len(missed)} of {len(gains)} systems"
        text = f"{group}: {entry.what} on `{entry.backbone}` {above}"
        text += "".join(f"; {one}" for one in missed)
        if len(missed) > 1 or not needs:
            return Part(text, len(missed) <= 1)
        return Part(text, None, "; ".join(needs))

    return test


def few_gains_most(backbone: str, rivals: Sequence[Side]) -> Test:
    """The gain over the best rival of each group is largest in the few-shot group, by intervals."""

    @parts
    def test(study: Study) -> list[Part]:
        gain = {group: _gain(study, ens(backbone), rivals, group) for group in ("many", "medium", "few")}
        found = []
        for group in ("many", "medium"):
            difference = gain["few"] - gain[group]
            text = f"`{backbone}`: gain over the best system, few less {group} {with_interval(difference)}"
            found.append(Part(text, difference.low > 0, open=difference.open))
        return found

    return test


def _gain(study: Study, entry: Entry, rivals: Sequence[Side], group: str) -> Estimate:
    """Accuracy less that of the best rival; raises Untestable unless all rivals exist."""
    own = study.accuracy(entry, group)
    return min((own - study.accuracy(rival, group) for rival in rivals), key=lambda gain: gain.value)


def if_one_network(one: str, other: str, test: Test) -> Test:
    """The test, where both backbones are the same network; else what it would take."""

    @parts
    def guarded(study: Study) -> list[Part]:
        networks = [study.caches(backbone)[0].meta["network"] for backbone in (one, other)]
        if len(set(networks)) > 1:
            raise Untestable(
                f"`{one}` on the network of `{other}` ({networks[1]}; here {networks[0]}), with SimCLR "
                "weights from as many images as the supervised ones"
            )
        return test(study)

    return guarded


CLAIMS = [
    Claim(
        1,
        "The method lifts rare classes strongly.",
        "yes",
        "Few-shot, `sqrt`: the ensemble is above the cosine classifier and above every compared system.",
        [beats(ens(SQRT), cos(SQRT), "few"), beats(ens(SQRT), COMPARED, "few")],
    ),
    Claim(
        2,
        "Common classes keep robust accuracy.",
        "partly",
        "Many- and medium-shot, `sqrt`: the ensemble is at most 1 point below the cosine classifier and at "
        "most 1 point below the best compared system.",
        [
            beats(ens(SQRT), cos(SQRT), "many", "medium", by=-1),
            beats(ens(SQRT), COMPARED, "many", "medium", by=-1),
        ],
    ),
    Claim(
        3,
        "Rare-class gains of up to 5%.",
        "yes",
        "Few-shot, `sqrt`: the ensemble is at least 4.5 points (5 when rounded) above the best compared "
        "system.",
        [beats(ens(SQRT), COMPARED, "few", by=4.5)],
    ),
    Claim(
        4,
        "Gain on few-shot is at least 5% and as much as 16% over competitors.",
        "partly",
        "Few-shot, `sqrt`: above the best compared system by at least 4.5 points (ensemble) and 15.5 points "
        "(w^h(20)): 5 and 16 when rounded.",
        [beats(ens(SQRT), COMPARED, "few", by=4.5), beats(wh20(SQRT), COMPARED, "few", by=15.5)],
    ),
    Claim(
        5,
        "The ensemble matches or beats the state of the art in every group.",
        "yes",
        "Many-, medium-, few-shot and total, `sqrt`: the ensemble is at most 1 point below the best compared "
        "system of that group.",
        [beats(ens(SQRT), COMPARED, *ALL, by=-1)],
    ),
    Claim(
        6,
        "It outperforms directly comparable models.",
        "partly",
        "Total: the ensemble is above every compared system on `sqrt` (Table 1), on `imagenet_deep_sqrt` "
        "and on `imagenet_sqrt` (Table 3; there those that act on a trained backbone).",
        [
            beats(ens(SQRT), COMPARED, "total"),
            beats(ens(R152), COMPARED_R152, "total"),
            beats(ens(R101), COMPARED_R101, "total"),
        ],
    ),
    Claim(
        7,
        "No additional training is needed; the transfer step is closed-form.",
        "plot",
        "The ensemble, rebuilt from the saved features, labels and weights alone, gives at least 99 % of "
        "the test images the class that it has in the table (stored features are rounded).",
        [cost.closed_form],
    ),
    Claim(
        8,
        "The ensemble costs almost nothing extra.",
        "plot",
        "Multiply-adds: two more classifiers to score with add at most 1 % to the forward pass of an image, "
        "and building all three costs at most 1 % of one forward pass over the training images.",
        [cost.cheap],
    ),
    Claim(
        9,
        "Prototypes beat the learned cosine classifier on rare classes.",
        "yes",
        "Few-shot, `sqrt`: prototypes are above the cosine classifier on test images and, as in Figure 2, on "
        "validation images.",
        [
            beats(proto(SQRT), cos(SQRT), "few"),
            beats(proto(SQRT, images="val"), cos(SQRT, images="val"), "few"),
        ],
    ),
    Claim(
        10,
        "The learned cosine classifier is strongest on common classes.",
        "yes",
        "Many-shot, `sqrt`: the cosine classifier is above every other own row of Table 1.",
        [beats(cos(SQRT), own_rows(cos(SQRT)), "many")],
    ),
    Claim(
        11,
        "Prototypes and weights favour different groups and so complement each other.",
        "partly",
        "`sqrt`: prototypes are above the cosine classifier in few-shot and below it in many-shot; "
        "prototypes + classifier is above both in total.",
        [
            beats(proto(SQRT), cos(SQRT), "few"),
            beats(cos(SQRT), proto(SQRT), "many"),
            beats(pc(SQRT), [cos(SQRT), proto(SQRT)], "total"),
        ],
    ),
    Claim(
        12,
        "A low k makes a classifier for few-shot classes.",
        "yes",
        "Few-shot, `sqrt`: w^h(20) is above every other own row of Table 1.",
        [beats(wh20(SQRT), own_rows(wh20(SQRT)), "few")],
    ),
    Claim(
        13,
        "A higher k moves the focus to medium classes.",
        "yes",
        "Medium-shot, `sqrt`: w^h(100) is above every other own row of Table 1.",
        [beats(wh100(SQRT), own_rows(wh100(SQRT)), "medium")],
    ),
    Claim(
        14,
        "Transfer can lower common-class accuracy.",
        "yes",
        "Many-shot, `sqrt`: w^h(20) and w^h(100) are both below the cosine classifier.",
        [beats(cos(SQRT), wh20(SQRT), "many"), beats(cos(SQRT), wh100(SQRT), "many")],
    ),
    Claim(
        15,
        "The ensemble is the most robust of the own classifiers.",
        "yes",
        "`sqrt`: the ensemble is above every other own row in total, and its best and worst group lie closer "
        "together than those of w^h(20) and of w^h(100).",
        [
            beats(ens(SQRT), own_rows(ens(SQRT)), "total"),
            spread_smaller(ens(SQRT), wh20(SQRT)),
            spread_smaller(ens(SQRT), wh100(SQRT)),
        ],
    ),
    Claim(
        16,
        "Ensembling restores what single-k classifiers lose while keeping the rare-class gain.",
        "partly",
        "`sqrt`: the ensemble is above w^h(100) in many-shot and above prototypes in few-shot.",
        [beats(ens(SQRT), wh100(SQRT), "many"), beats(ens(SQRT), proto(SQRT), "few")],
    ),
    Claim(
        17,
        "Results are stronger on ResNet101 than on ResNet152.",
        "yes",
        "Total, ensemble, both with supervised weights: `imagenet_sqrt` is above `imagenet_deep_sqrt`.",
        [beats(ens(R101), ens(R152), "total")],
    ),
    Claim(
        18,
        "On ResNet152 the total is on a par with the state of the art.",
        "yes",
        "Total, `imagenet_deep_sqrt`: the ensemble is within 1 point of the best compared system.",
        [level(ens(R152), COMPARED_R152, "total")],
    ),
    Claim(
        19,
        "The unsupervised ResNet101 beats every method, ResNet152 ones included.",
        "yes",
        "Total: the ensemble on the SimCLR-initialised network is above every compared system and own row of "
        "Table 3, where it is the same network as the supervised one.",
        [
            if_one_network(
                SIMCLR,
                R101,
                beats(ens(SIMCLR), [ens(R101), ens(R152), *COMPARED_R101, *COMPARED_R152], "total"),
            )
        ],
    ),
    Claim(
        20,
        "The few-shot margin over the state of the art is at least 2.8% in every setting.",
        "yes",
        "Few-shot, each own row of Table 3: the ensemble is at least 2.8 points above the best compared "
        "system on that network; beside SimCLR stands DisAlign on supervised features, as in print.",
        [beats(ens(backbone), rivals, "few", by=2.8) for backbone, rivals in SETTINGS.items()],
    ),
    Claim(
        21,
        "As on ImageNet-LT, few-shot gains most.",
        "yes",
        "Each own row of Table 3, with the rivals of claim 20: the gain over the best compared system of a "
        "group is larger in few-shot than in many-shot and in medium-shot.",
        [few_gains_most(backbone, rivals) for backbone, rivals in SETTINGS.items()],
    ),
    Claim(
        22,
        "The larger backbone overfits, in part through square-root sampling.",
        "plot",
        "Training less test accuracy is larger on `imagenet_deep_sqrt` than on `imagenet_sqrt` (training "
        "accuracy of the last epoch) and larger than on `imagenet_deep_uniform` (class-balanced, from "
        "training features).",
        [geometry.deeper_overfits, geometry.square_root_overfits],
    ),
    Claim(
        23,
        "With 146 classes left out of training the model still does well.",
        "partly",
        "Total: without few-shot classes in training, each of prototypes, w^hc(20), w^hc(100) and their "
        "ensemble keeps at least 90 % of its accuracy with them.",
        [keeps_total(row("continual"), row(SQRT)) for row in (proto, whc20, whc100, whc_ens)],
    ),
    Claim(
        24,
        "Rare classes never trained on are recognised better than by almost all trained baselines.",
        "yes",
        "Few-shot, without few-shot classes in training: the ensemble and w^hc(20) are each above all "
        "compared systems but one at most.",
        [beats_almost_all(row("continual"), COMPARED, "few") for row in (whc_ens, whc20)],
    ),
    Claim(
        25,
        "The classifier without own learned weights is competitive.",
        "yes",
        "Total, `sqrt`: the ensemble of prototypes, w^hc(20) and w^hc(100) is at most 1.5 points below the "
        "ensemble of w^h and at most 1.5 points below the best compared system.",
        [
            beats(whc_ens(SQRT), ens(SQRT), "total", by=-COMPARABLE),
            beats(whc_ens(SQRT), COMPARED, "total", by=-COMPARABLE),
        ],
    ),
    Claim(
        26,
        "New classes join with no further training.",
        "plot",
        "For each class left out of training, w^hc(20) computed from the trained classes and its prototype "
        "alone equals the rows of the table, old and new, within 0.00001.",
        [cost.new_classes],
    ),
]
