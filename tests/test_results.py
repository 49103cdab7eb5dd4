"""The table of measured values: what a row holds, pairing over images and seeds, what is left out."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from study import COUNTS, accuracy, made_cache, study  # noqa: F401 (study is a fixture)

from lt_core import results
from lt_core.checks import InputError
from lt_core.classifiers import predict
from lt_core.metrics import cosine_matrix, mismatches
from lt_core.results import Subject, difference, estimates, measure, over_seeds, spread


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("sqrt/wh20", Subject("sqrt", "wh20")),
        ("sqrt/prototypes+cosine on val", Subject("sqrt", "prototypes+cosine", images="val")),
        ("sqrt/prototypes val-prototypes on train", Subject("sqrt", "prototypes", "train", "val")),
        ("sqrt/prototypes within val-prototypes", Subject("sqrt", "prototypes", "test", "val", True)),
        ("sqrt/cos(wh20, p)", Subject("sqrt", "cos(wh20, p)")),
    ],
)
def test_subjects_are_text(text, subject):
    assert Subject.parse(text) == subject


@pytest.mark.parametrize("text", ["sqrt", "sqrt/", "/wh20", ""])
def test_other_text_is_no_subject(text):
    with pytest.raises(InputError, match="BACKBONE/CLASSIFIER"):
        Subject.parse(text)


def test_a_row_is_a_subject_seed_and_group_with_its_draws(study):  # noqa: F811
    values = measure("made_up", ["sqrt/wh20", "sqrt/prototypes on val"])
    assert values.shape == (2 * 3 * 4, 1001) and list(values.index.names) == ["subject", "seed", "group"]
    cache = made_cache("sqrt", 2)
    assert values.loc["sqrt/wh20", 2, "total"][0] == pytest.approx(accuracy(cache, predict(cache, "wh20")))
    draws = values.loc["sqrt/wh20", 2, "total"].to_numpy()[1:]
    assert draws.std() > 0.5 and abs(draws.mean() - values.loc["sqrt/wh20", 2, "total"][0]) < 1


def test_draws_of_two_subjects_are_paired(study):  # noqa: F811
    values = measure("made_up", ["sqrt/prototypes", "sqrt/wh20", "uniform_dot/own"])
    again = measure("made_up", ["sqrt/wh20"])
    pd.testing.assert_frame_equal(again, values.loc[["sqrt/wh20"]])  # whatever else is measured
    paired = estimates(difference(values, "sqrt/wh20", "sqrt/prototypes"))
    one, other = (over_seeds(values.loc[s]).to_numpy()[-1, 1:] for s in ("sqrt/wh20", "sqrt/prototypes"))
    shuffled = one - np.random.default_rng(0).permutation(other)
    assert paired.loc["total", "high"] - paired.loc["total", "low"] < np.ptp(
        np.percentile(shuffled, [2.5, 97.5])
    )


def test_a_difference_is_over_the_seeds_that_both_have(study):  # noqa: F811
    values = measure("made_up", ["sqrt/ensemble", "lade/own"])
    found = difference(values, "sqrt/ensemble", "lade/own")
    assert found.attrs["seeds"] == [0]
    own, other = (values.loc[s].loc[(0, "total"), 0] for s in ("sqrt/ensemble", "lade/own"))
    assert found.loc["total", 0] == pytest.approx(own - other)
    assert over_seeds(values.loc["sqrt/ensemble"]).loc["total", 0] != pytest.approx(own)


def test_no_common_seed_is_refused(study):  # noqa: F811
    study.seeds["lade"] = [7]
    values = measure("made_up", ["sqrt/ensemble", "lade/own"])
    with pytest.raises(InputError, match="share no training seed"):
        difference(values, "sqrt/ensemble", "lade/own")


def test_a_subject_less_itself_is_zero(study):  # noqa: F811
    values = measure("made_up", ["sqrt/wh20"])
    assert (difference(values, "sqrt/wh20", "sqrt/wh20").to_numpy() == 0).all()


def test_seeds_are_resampled(study):  # noqa: F811
    """Three seeds that differ much: the interval of their mean is wider than that of test images alone."""
    rows = pd.DataFrame(
        np.repeat([[10.0], [50.0], [90.0]], 1001, axis=1),
        pd.MultiIndex.from_product([[0, 1, 2], ["total"]], names=["seed", "group"]),
    )
    found = estimates(over_seeds(rows)).loc["total"]
    assert found["value"] == 50 and found["low"] == pytest.approx(10) and found["high"] == pytest.approx(90)


def test_what_cannot_be_measured_is_named(study):  # noqa: F811
    for seed in (0, 1, 2):
        study.stored["sqrt", seed] = made_cache("sqrt", seed, ("test",) if seed else ("train", "val", "test"))
    study.stored["lade", 0] = made_cache("lade", 0, ("test",))
    values = measure("made_up", ["sqrt/prototypes on val", "lade/own on val", "nobody/cosine", "sqrt/cosine"])
    assert list(values.loc["sqrt/prototypes on val"].index.unique("seed")) == [0]
    assert set(values.attrs["missing"]) == {"lade/own on val", "nobody/cosine"}
    assert "no val features" in values.attrs["missing"]["lade/own on val"]
    with pytest.raises(InputError, match="nothing can be measured"):
        measure("made_up", ["nobody/cosine"])


def test_an_unknown_classifier_is_an_error_not_a_gap(study):  # noqa: F811
    with pytest.raises(InputError, match="unknown classifier"):
        measure("made_up", ["sqrt/wh7"])


def test_measures_are_means_over_classes(study):  # noqa: F811
    values = measure("made_up", ["sqrt/mismatches", "sqrt/cos(w, p)"])
    cache = made_cache("sqrt", 1)
    expected = mismatches(cache.prototypes, cache.weights)
    assert values.loc["sqrt/mismatches", 1, "total"][0] == pytest.approx(expected)
    own = cosine_matrix(cache.weights, cache.prototypes).diagonal()
    assert values.loc["sqrt/cos(w, p)", 1, "few"][0] == pytest.approx(own[(COUNTS <= 20).numpy()].mean())
    assert values.loc["sqrt/cos(w, p)", 1, "few"][1:].between(own.min(), own.max()).all()


def test_within_a_group_only_its_classes_are_candidates(study):  # noqa: F811
    values = measure("made_up", ["sqrt/prototypes within", "sqrt/prototypes"])
    gain = difference(values, "sqrt/prototypes within", "sqrt/prototypes")[0]
    assert (gain >= 0).all() and gain["total"] > 0


def test_the_grouping_rule_changes_groups_and_not_the_total(study):  # noqa: F811
    study.stored["sqrt", 0] = made_cache("sqrt", 0)
    paper, common = (measure("made_up", ["sqrt/wh20"], 0, rule) for rule in ("paper", "common"))
    pd.testing.assert_series_equal(
        paper.loc["sqrt/wh20", 0, "total"], common.loc["sqrt/wh20", 0, "total"], atol=1e-4
    )


def test_spread_is_the_best_less_the_worst_group(study):  # noqa: F811
    rows = measure("made_up", ["sqrt/wh20"]).loc["sqrt/wh20"]
    found = spread(rows)
    groups = [rows.loc[(1, group), 0] for group in ("many", "medium", "few")]
    assert found.loc[(1, "spread"), 0] == pytest.approx(max(groups) - min(groups))


def test_accuracies_of_predictions_of_ones_own_join_the_table(study):  # noqa: F811
    values = measure("made_up", ["sqrt/wh20"])
    cache = made_cache("sqrt", 0)
    labels, counts = cache.labels("test").numpy(), COUNTS.numpy()
    mine = results.accuracies([("mine/right", 0, labels)], labels, counts)
    values = pd.concat([values, mine])
    assert difference(values, "mine/right", "sqrt/wh20").loc["total", 0] > 0
    with pytest.raises(InputError, match="predictions of mine/wrong"):
        results.accuracies([("mine/wrong", 0, labels[:-1])], labels, counts)


def test_accuracy_of_every_class(study):  # noqa: F811
    table = results.per_class("made_up", ["sqrt/wh20", "sqrt/wh20", "lade/own"])
    assert len(table) == (3 + 1) * 6 and list(table["n"].unique()) == [30]
    cache = made_cache("sqrt", 0)
    own = table[(table["subject"] == "sqrt/wh20") & (table["seed"] == 0)]
    assert own["accuracy"].mean() == pytest.approx(accuracy(cache, predict(cache, "wh20")), abs=0.01)
