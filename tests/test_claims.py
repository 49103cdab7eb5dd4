"""The claims of the paper: all there, and decided as their rules say on caches made for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from lt_core import cli, paths
from lt_core.errors import InputError
from lt_core.features import FeatureCache
from lt_core.metrics import mismatches
from lt_core.report import figure_style, save_figure, sharpness
from lt_core.report.claims import (
    CLAIMS,
    Claim,
    Entry,
    Part,
    Study,
    System,
    Untestable,
    claims_page,
    cost,
    evaluate_claims,
    geometry,
    main_results,
    page_data,
    representations,
    save_claims,
    section_of,
    section_table,
    summary,
    training,
    verdict,
)
from lt_core.report.claims.decisions import beats, level, lowest
from lt_core.report.claims.entries import cos, proto
from lt_core.report.claims.verdicts import COLUMNS, PRINT, SECTIONS, evidence
from lt_core.report.rows import quoted_rows
from lt_core.report.systems import IMAGENET, PLACES, system_of

matplotlib.use("Agg")

COUNTS = torch.tensor([150, 120, 60, 40, 15, 5])
GROUP_OF_CLASS = ["many", "many", "medium", "medium", "few", "few"]
IN_PRINT = "ypypyp--yypyyyypyyyyy-pyy-y---y--yyy-yyyyppyyyyp----pny-yyp--pypyp-y"


def cache(right: float | dict[str, float] = 0.5, backbone: str = "a", images: int = 40) -> FeatureCache:
    """Six classes; this share of the images of a class lies on its own axis, the others near the next one's.

    right: share, or a share a group. Prototypes and weights are the axes themselves.
    """
    labels = torch.repeat_interleave(torch.arange(6), images)
    share = [right[group] if isinstance(right, dict) else right for group in GROUP_OF_CLASS]
    correct = torch.cat([torch.arange(images) < round(images * one) for one in share])
    axes = torch.eye(6)
    features = axes[torch.where(correct, labels, (labels + 1) % 6)] + 0.3 * axes[labels]
    return FeatureCache(
        weights=torch.eye(6),
        scale=16.0,
        counts=COUNTS,
        prototypes=torch.eye(6),
        splits={split: (features, labels) for split in ("train", "val", "test")},
        meta={
            "backbone": backbone,
            "network": "digits_net",
            "dataset": "digits",
            "recipe": {"input_size": 0},
            "seed": 0,
            "class_names": list("abcdef"),
            "wnids": None,
            "history": [],
        },
    )


def whole(right: float) -> FeatureCache:
    """The same with as many training images as the counts say, each on its own axis."""
    one = cache(right)
    labels = torch.repeat_interleave(torch.arange(6), COUNTS)
    one.splits["train"] = (torch.eye(6)[labels], labels)
    return one


def study(**caches: FeatureCache | list[FeatureCache]) -> Study:
    """A study of these backbones; others do not exist."""

    def load(backbone: str) -> list[FeatureCache]:
        if backbone not in caches:
            raise Untestable(f"a backbone `{backbone}`")
        found = caches[backbone]
        return found if isinstance(found, list) else [found]

    return Study(load, replicates=200)


def outcome(test, of: Study) -> str:
    return verdict(test(of))


A, B, C = cos("a"), cos("b"), cos("c")


# ---------------------------------------------------------------- the declarations


def test_all_68_claims_are_there_in_order():
    assert [claim.number for claim in CLAIMS] == list(range(1, 69))
    assert len({claim.statement for claim in CLAIMS}) == 68
    for claim in CLAIMS:
        assert claim.tests and claim.rule.endswith(".") and claim.statement.endswith(".")
        assert claim.in_print in PRINT


def test_what_print_says_is_carried_over():
    assert "".join("-" if claim.in_print == "plot" else claim.in_print[0] for claim in CLAIMS) == IN_PRINT
    assert Counter(claim.in_print for claim in CLAIMS) == {"yes": 35, "partly": 14, "no": 1, "plot": 18}


def test_sections_are_those_of_the_paper_s_claims():
    assert [title[0] for title in SECTIONS.values()] == list("ABCDEFGHIJK")
    firsts = {first: section_of(first)[0] for first in SECTIONS}
    assert firsts == dict(zip((1, 9, 17, 23, 27, 31, 42, 44, 49, 53, 67), "ABCDEFGHIJK", strict=True))
    assert section_of(8)[0] == "A" and section_of(68)[0] == "K"


def test_every_claim_says_what_it_takes_when_nothing_exists():
    found = evaluate_claims(study())
    assert list(found.columns) == list(COLUMNS)
    assert set(found["verdict"]) == {"untestable"}
    assert found["evidence"].str.contains("untestable: it takes a backbone").all()


# ---------------------------------------------------------------- decisions


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([True, True], "holds"),
        ([True, False], "fails"),
        ([True, None], "untestable"),
        ([False, None], "fails"),
        ([], "untestable"),
    ],
)
def test_a_claim_holds_only_if_every_part_does(found, expected):
    assert verdict([Part("", holds) for holds in found]) == expected


def test_a_difference_needs_an_interval_without_0():
    of = study(a=cache(0.9), b=cache(0.5), c=cache(0.9))
    assert outcome(beats(A, B, "many", "total"), of) == "holds"
    assert outcome(beats(B, A, "few"), of) == "fails"
    (equal,) = beats(A, C, "total")(of)
    assert (equal.holds, equal.open) == (False, True)
    (worse,) = beats(B, A, "total")(of)
    assert (worse.holds, worse.open) == (False, False)
    assert "total: cosine classifier, `b` − `a` −40.0 [" in worse.text


def test_a_small_difference_is_not_shown():
    of = study(a=cache(0.55, images=20), b=cache(0.5, images=20))
    (part,) = beats(A, B, "few")(of)
    assert (part.holds, part.open) == (False, True)
    assert evidence([part]).startswith("not shown (interval contains 0): few: ")


def test_every_rival_must_be_beaten_and_the_closest_is_named():
    of = study(a=cache(0.9), b=cache(0.5), c=cache(0.7))
    (part,) = beats(A, [B, C], "total")(of)
    assert part.holds and "`a` − `c` +20.0" in part.text and "closest of 2" in part.text
    assert outcome(beats(C, [A, B], "total"), of) == "fails"
    assert outcome(lowest(B, [A, C], "total", "few"), of) == "holds"
    assert outcome(lowest(C, [A, B], "total"), of) == "fails"


def test_a_least_difference_may_be_asked_for_or_allowed():
    of = study(a=cache(0.9), b=cache(0.5), c=cache(0.875))
    assert outcome(beats(A, B, "total", by=39.9), of) == "holds"
    assert outcome(beats(A, B, "total", by=41), of) == "fails"
    assert outcome(beats(C, A, "total", by=-2.6), of) == "holds"
    assert outcome(beats(C, A, "total", by=-2.4), of) == "fails"


def test_equal_has_a_margin_on_both_sides():
    of = study(a=cache(0.9), b=cache(0.5), c=cache(0.875))
    for one, other in ((A, C), (C, A)):
        assert outcome(level(one, other, "total", margin=2.6), of) == "holds"
        assert outcome(level(one, other, "total", margin=2.4), of) == "fails"
    assert outcome(level(C, [A, B], "total", margin=2.6), of) == "holds"  # the best of several counts


def test_a_missing_rival_leaves_open_what_the_others_do_not_decide():
    of = study(a=cache(0.9), b=cache(0.5))
    (part,) = beats(A, [B, C], "total")(of)
    assert part.holds is None and part.needs == "a backbone `c`"
    assert outcome(beats(B, [A, C], "total"), of) == "fails"
    assert outcome(level(A, [B, C], "total"), of) == "untestable"
    assert outcome(level(B, [A, C], "total"), of) == "fails"
    assert outcome(beats(A, C, "total"), of) == "untestable"


def test_a_group_without_classes_is_untestable():
    few = replace(cache(), counts=torch.full((6,), 5))
    (part,) = beats(A, B, "many")(study(a=few, b=few))
    assert part.holds is None and "`many`" in part.needs


def test_a_missing_split_is_untestable():
    one = cache()
    one = replace(one, splits={"test": one.splits["test"]})
    of = study(a=one)
    assert of.accuracy(A, "total").value == 50
    with pytest.raises(Untestable, match="the val features of `a`"):
        of.accuracy(proto("a", source="val"), "total")


def test_accuracy_is_averaged_over_seeds_and_computed_once():
    calls = []

    def load(backbone: str) -> list[FeatureCache]:
        calls.append(backbone)
        return [cache(0.4), cache(0.6)]

    of = Study(load, replicates=100)
    first = of.accuracy(A, "few")
    assert first.value == 50 and first.low < 45 and first.high > 55  # seeds are drawn, too
    np.testing.assert_array_equal(of.accuracy(A, "few").samples, first.samples)
    assert calls == ["a"]


def test_within_group_and_validation_prototypes_are_what_they_say():
    one = cache(0.5)
    one.splits["val"] = (torch.eye(6).roll(1, dims=1), torch.arange(6))  # each on the next class's axis
    of = study(a=one)
    assert of.accuracy(proto("a"), "few").value == 50
    # Errors go to the next class, which for the second class of a group lies outside it.
    assert of.accuracy(proto("a", within=True), "few").value == 75
    assert of.accuracy(proto("a", source="val"), "few").value == 50  # right where the weights are wrong
    with pytest.raises(InputError, match="only prototypes"):
        of.accuracy(replace(A, within=True), "few")


def test_spread_and_share_of_the_total():
    even, steep = cache(0.6), cache({"many": 1.0, "medium": 0.6, "few": 0.2})
    of = study(a=even, b=steep)
    assert of.spread(B).value == pytest.approx(80)
    assert outcome(main_results.spread_smaller(A, B), of) == "holds"
    assert outcome(main_results.spread_smaller(B, A), of) == "fails"
    of = study(a=cache(0.5), b=cache(0.55), c=cache(0.9))
    assert outcome(main_results.keeps_total(A, B), of) == "holds"
    assert outcome(main_results.keeps_total(A, C), of) == "fails"


def test_almost_all_allows_one_exception():
    rivals = [B, C]
    of = study(a=cache(0.7), b=cache(0.5), c=cache(0.9))
    assert outcome(main_results.beats_almost_all(A, rivals, "few"), of) == "holds"
    assert outcome(main_results.beats_almost_all(B, [A, C], "few"), of) == "fails"
    assert outcome(main_results.beats_almost_all(A, [*rivals, cos("d")], "few"), of) == "untestable"


def test_range_of_a_set_and_reaching_a_level():
    of = study(a=cache(0.9), b=cache(0.5), c=cache(0.975))
    assert outcome(training.differ([A, B, C], "total", by=1.5), of) == "holds"
    assert outcome(training.differ([A, A], "total"), of) == "fails"
    assert outcome(training.reaches(C, 95, "few"), of) == "holds"
    assert outcome(training.reaches(A, 95, "few"), of) == "fails"
    assert outcome(training.loses_a_little(A, C, "total"), of) == "fails"  # 7.5 points are more than a little


def test_a_group_may_be_below_only_by_chance():
    of = study(a=cache({"many": 0.9, "medium": 0.9, "few": 0.3}), b=cache(0.6))
    assert outcome(representations.no_group_below(A, B), of) == "fails"
    assert outcome(representations.no_group_below(A, A), of) == "holds"


# ---------------------------------------------------------------- compared systems


def test_systems_without_a_run_are_untestable_and_become_testable_by_themselves():
    lade = System("lade", "imagenet_lt", "a")
    assert outcome(beats(A, lade, "total"), study(a=cache(0.9))) == "untestable"
    assert outcome(beats(A, lade, "total"), study(a=cache(0.9), lade=whole(0.5))) == "holds"
    assert outcome(beats(A, lade, "total"), study(a=cache(0.5), lade=whole(0.9))) == "fails"


def test_systems_on_frozen_features_are_fitted_to_them():
    of = study(a=[whole(0.5)])
    for name in ("lws", "disalign"):
        estimate = of.accuracy(System(name, "imagenet_lt", "a"), "total")
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 100
    bare = whole(0.5)
    found = beats(A, System("lws", "imagenet_lt", "a"), "total")(
        study(a=replace(bare, splits={"test": bare.splits["test"]}))
    )
    assert verdict(found) == "untestable" and "train and val features of `a`" in found[0].needs


def test_systems_are_compared_on_the_same_network_only():
    other = cache(0.5)
    other.meta["network"] = "another"
    found = beats(A, System("rsg", "places_lt", "a"), "total")(study(a=cache(0.9), places_rsg=other))
    assert verdict(found) == "untestable" and "RSG trained on digits_net" in found[0].needs


def test_every_compared_system_is_one_that_its_table_quotes():
    for table, names in (("T1", IMAGENET), ("T3", PLACES)):
        quoted = [system_of(row.name) for row in quoted_rows(table, "the reference")]
        assert set(quoted) == set(names)
    with pytest.raises(InputError, match="unknown quoted system"):
        system_of("Ours* / Prototypes")


def test_a_backbone_that_the_profile_does_not_have_is_untestable():
    with pytest.raises(Untestable, match="a backbone `no_such` in the profile digits"):
        Study.of_profile("digits").caches("no_such")


# ---------------------------------------------------------------- cost and construction


def test_multiply_adds_are_those_of_the_literature():
    # torchvision's model pages, in 10^9, the classifier of 1000 classes included
    assert cost.forward_cost("resnext50_32x4d", (3, 224, 224)) / 1e9 == pytest.approx(4.23, abs=0.02)
    assert cost.forward_cost("resnet152", (3, 224, 224)) / 1e9 == pytest.approx(11.51, abs=0.02)


def test_cost_of_the_classifiers_by_hand():
    assert cost.scoring_cost(cache()) == 6 * 6
    # k = 0: all 6 classes are keys; k = 20: 4; k = 100: 2
    assert cost.building_cost(cache()) == 2 * 6 * 6 * (6 + 4 + 2)
    assert cost.image_shape(cache()) == (1, 8, 8)
    sized = cache()
    sized.meta["recipe"] = {"input_size": 96}
    assert cost.image_shape(sized) == (1, 96, 96)
    sized.meta["dataset"] = "none"
    with pytest.raises(InputError, match="unknown data set"):
        cost.image_shape(sized)


def test_constructions_hold():
    weights = torch.eye(6)
    weights[4:] = float("nan")
    of = study(sqrt=cache(), continual=replace(cache(), weights=weights))
    assert outcome(cost.new_classes, of) == "holds"
    saved = whole(1.0)
    assert outcome(cost.closed_form, study(sqrt=saved)) == "holds"
    assert outcome(cost.closed_form, study(sqrt=replace(saved, prototypes=-torch.eye(6)))) == "fails"


# ---------------------------------------------------------------- geometry, curves, counts


def turned(degrees: float) -> FeatureCache:
    """Prototypes turned away from their weights, towards the next class's."""
    angle = np.deg2rad(degrees)
    prototypes = np.cos(angle) * torch.eye(6) + np.sin(angle) * torch.eye(6).roll(1, dims=1)
    return replace(cache(), prototypes=prototypes)


def test_mismatches_are_counted_as_in_table_8():
    good, bad = turned(0), turned(60)
    assert mismatches(bad.prototypes, bad.weights) == 6
    of = study(a=good, b=bad)
    assert outcome(geometry.no_mismatch("a"), of) == "holds"
    assert outcome(geometry.no_mismatch("b"), of) == "fails"
    assert outcome(geometry.fewer_mismatches("a", "b"), of) == "holds"
    assert outcome(geometry.fewer_mismatches("a", "a"), of) == "fails"


def test_sharpness_is_that_of_figure_8():
    sharp, flat = turned(0), turned(45)
    of = study(a=sharp, b=flat)
    assert outcome(geometry.sharper("a", "b"), of) == "holds"
    assert outcome(geometry.sharper("b", "a"), of) == "fails"
    table = sharpness({"supervised_sqrt": sharp}).iloc[0]
    assert table["gap"] == pytest.approx(of.per_class("a", geometry._gap).mean())
    assert table["effective classes"] == pytest.approx(np.exp(of.per_class("a", geometry._entropy).mean()))


def test_angles_between_prototype_weight_and_classifier():
    far, near = study(sqrt=turned(60)), study(sqrt=turned(10))
    assert outcome(geometry.few_shot_towards_prototype, far) == "holds"
    assert outcome(geometry.prototype_and_weight_differ, far) == "holds"
    assert outcome(geometry.prototype_and_weight_differ, near) == "fails"
    assert outcome(geometry.many_shot_stays_high, near) == "holds"


def test_mismatches_foretell_by_pairs():
    bad, good = replace(turned(60), splits=cache(0.5).splits), cache(0.9)
    test = geometry.mismatches_foretell(["a", "b"], "cosine")
    assert outcome(test, study(a=bad, b=good)) == "holds"
    assert outcome(test, study(a=replace(bad, splits=good.splits), b=cache(0.5))) == "fails"
    assert outcome(test, study(a=good, b=good)) == "untestable"


def test_convergence_is_counted_in_epochs():
    def with_history(*accuracies: float) -> FeatureCache:
        one = cache()
        one.meta["history"] = [{"train_accuracy": a, "val_accuracy": a} for a in accuracies]
        return one

    of = study(a=with_history(20, 75, 80), b=with_history(10, 40, 80))
    assert outcome(geometry.converges_faster("a", "b"), of) == "holds"
    assert outcome(geometry.converges_faster("b", "a"), of) == "fails"
    assert outcome(geometry.converges_faster("a", "a"), of) == "fails"


def test_weakest_cells_are_counted():
    of = study(a=cache(0.3), b=cache(0.6), c=cache(0.9))
    (part,) = geometry.weakest_in_most("a", ["b", "c"], ["cosine", "prototypes"])(of)
    assert part.holds and "8 [8, 8] of 8 cells" in part.text
    assert outcome(geometry.weakest_in_most("b", ["a", "c"], ["cosine"]), of) == "fails"


def test_rank_correlation_is_spearman_s():
    from scipy.stats import spearmanr

    generator = np.random.default_rng(1)
    x = generator.integers(0, 5, 40).astype(float)
    y = x + generator.normal(size=40)
    found = geometry.spearman(x, y)
    assert found.value == pytest.approx(spearmanr(x, y).statistic)
    assert 0 < found.low < found.value < found.high
    assert geometry.spearman(np.ones(12), np.arange(12.0)).value == 0


def test_too_few_classes_for_a_correlation_are_untestable():
    assert outcome(geometry.gain_follows_similarity, study(sqrt=cache())) == "untestable"


# ---------------------------------------------------------------- files, page, notebook


def three_claims() -> pd.DataFrame:
    of = study(a=cache(0.9), b=cache(0.5))
    claims = [
        Claim(1, "A beats | B.", "yes", "Total: a above b.", [beats(A, B, "total")]),
        Claim(9, "B beats A.", "partly", "Total: b above a.", [beats(B, A, "total", "few")]),
        Claim(67, "C is there.", "plot", "Total: c above a.", [beats(C, A, "total")]),
    ]
    return evaluate_claims(of, claims)


def test_files_are_complete_and_byte_stable(tmp_path, monkeypatch):
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path))
    found = three_claims()
    save_claims(found, "digits")
    folder = paths.figures("digits")
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert set(first) == {"claims.csv", "claims.md"}
    save_claims(three_claims(), "digits")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == first
    read = pd.read_csv(folder / "claims.csv")
    assert list(read.columns) == list(COLUMNS)
    assert read["verdict"].tolist() == ["holds", "fails", "untestable"]
    text = first["claims.md"].decode()
    assert "## A. Headline" in text and "A beats \\| B." in text and "**fails**" in text


def test_a_failing_part_comes_first_and_many_are_cut():
    parts = [Part(f"part {number}", number != 7) for number in range(9)]
    text = evidence(parts)
    assert text.startswith("8 of 9 parts hold. fails: part 7; holds: part 0") and text.endswith("and 3 more")


def test_the_summary_is_made_of_the_verdicts():
    lines = summary(three_claims())
    assert lines[0] == "Of 3 claims, 1 hold, 1 fail and 1 cannot be tested here."
    assert "Of the 1 that fail, the numbers contradict 1 in at least one part" in "\n".join(lines)
    assert lines[-1] == "Untestable here: 67."
    assert section_table(three_claims()).count("\n") == 4


def test_the_page_shows_every_claim_beside_print(tmp_path, monkeypatch):
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path))
    found = three_claims()
    with figure_style():
        fig = claims_page(found)
        written = {text.get_text() for text in fig.axes[0].texts}
        assert {"A beats | B.", "B beats A.", "C is there.", "1", "9", "67", "◐", "?"} <= written
        assert "1 hold, 1 fail, 1 untestable" in written
        save_figure(fig, "S_claims", "digits", page_data(found), alt="claims")
    assert len(pd.read_csv(paths.figures("digits") / "S_claims.csv")) == 3
    plt.close("all")


@pytest.mark.slow
def test_the_notebook_runs_on_digits(tmp_path, monkeypatch):
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path))
    assert cli.main(["notebooks", "--profile", "digits", "--only", "99"]) == 0
    found = pd.read_csv(paths.figures("digits") / "claims.csv")
    assert found["claim"].tolist() == list(range(1, 69))
    assert set(found["verdict"]) <= {"holds", "fails", "untestable"}
    assert Entry("sqrt", "cosine").what in " ".join(found["evidence"])
