"""Rows, counts and figures that compare backbones: Tables 3 to 9, Figures 4, 5, 7 and 8."""

from __future__ import annotations

from dataclasses import replace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from lt_core.errors import InputError
from lt_core.features import FeatureCache
from lt_core.metrics import cosine_matrix, group_accuracy, mismatches, within_group_accuracy
from lt_core.report import (
    SECOND_STAGES,
    TABLE6,
    TABLE7,
    TABLE9,
    backbone_rows,
    build_table,
    compared_rows,
    count_table,
    figure_style,
    fit_times,
    further_rows,
    method_rows,
    own_rows,
    predict,
    prototype_accuracy,
    prototype_panels,
    published,
    published_rows,
    quoted_rows,
    second_stage_rows,
    sharpness,
    show_table,
    similarity_curves,
    similarity_panels,
    within_group_rows,
)
from lt_core.report.rows import prototypes_from
from lt_core.transfer import cosine_logits, prototypes

matplotlib.use("Agg")

COUNTS = torch.tensor([150, 120, 60, 40, 15, 5])


def cache(backbone: str = "uniform", seed: int = 0, dot: bool = False, noise: float = 0.4) -> FeatureCache:
    """Six classes around the axes of a space of 8 dimensions; validation images lie a little elsewhere."""
    generator = torch.Generator().manual_seed(seed + len(backbone))
    centres = torch.eye(6, 8) + 0.3
    splits = {}
    for split, per_class in (("train", None), ("val", 4), ("test", 10)):
        labels = torch.repeat_interleave(torch.arange(6), COUNTS if per_class is None else per_class)
        shift = 0.2 if split == "val" else 0.0
        features = centres[labels] + shift + noise * torch.randn(len(labels), 8, generator=generator)
        splits[split] = (features, labels)
    return FeatureCache(
        weights=centres + 0.1 * torch.randn(6, 8, generator=generator),
        scale=16.0,
        counts=COUNTS,
        prototypes=prototypes(*splits["train"], 6),
        splits=splits,
        meta={"backbone": backbone, "seed": seed, "class_names": list("abcdef")},
        bias=torch.zeros(6) if dot else None,
    )


def test_mismatches_by_hand():
    weights = torch.eye(3)
    assert mismatches(weights, weights) == 0
    assert mismatches(torch.tensor([[1.0, 0, 0], [0.9, 0.8, 0], [0, 2, 1]]), weights) == 2
    with pytest.raises(InputError, match="keys must have 3 rows"):
        mismatches(torch.eye(3), torch.eye(4)[:, :3])


def test_cosine_matrix_ignores_norms():
    queries, keys = torch.tensor([[3.0, 4], [1, 0]]), torch.tensor([[0.0, 2], [5, 0]])
    np.testing.assert_allclose(cosine_matrix(queries, keys), [[0.8, 0.6], [0, 1]])


def test_table_4_uses_the_classifier_that_was_learned():
    dot, cosine = cache("uniform_dot", dot=True), cache()
    rows = backbone_rows({"Dot product": [dot], "Cosine": [cosine]}, printed="T4a")
    assert [row.name for row in rows] == published_rows("T4a")
    assert rows[0].reference is None and rows[1].reference == "Dot product"
    np.testing.assert_array_equal(rows[0].predictions[0], predict(dot, "dot_product"))
    np.testing.assert_array_equal(rows[1].predictions[0], predict(cosine, "cosine"))


def test_table_5_restricts_the_candidates_and_takes_both_sources():
    whole, extra = cache(), cache(seed=1)
    extra = replace(extra, splits={"test": extra.splits["test"]})
    backbones = {
        "Uniform": [whole, extra],
        "Square root": [cache("sqrt")],
        "Class aware": [cache("class_aware")],
    }
    rows = within_group_rows(backbones)
    assert [row.name for row in rows] == published_rows("T5")
    assert [list(row.seeds) for row in rows] == [[0, 1], [0], [0], [0], [0], [0]]
    table = build_table("T5", rows, whole.labels("test"), COUNTS, replicates=20)
    assert set(table.loc[table["reproduced"].notna(), "group"]) == {"many", "medium", "few"}
    for source, name in (("train", "Training set / Square root"), ("val", "Validation set / Square root")):
        one = backbones["Square root"][0]
        scores = cosine_logits(one.features("test"), prototypes_from(one, source))
        expected = within_group_accuracy(scores, one.labels("test"), COUNTS)["few"]
        here = (table["row"] == name) & (table["group"] == "few") & (table["rule"] == "paper")
        assert table.loc[here, "reproduced"].item() == pytest.approx(expected, abs=0.01)


def test_validation_prototypes_are_those_of_the_validation_images():
    one = cache()
    assert prototypes_from(one, "train") is one.prototypes
    torch.testing.assert_close(prototypes_from(one, "val"), prototypes(*one.splits["val"], 6))


def test_rows_of_tables_3_6_7_and_9_stand_in_print():
    one = cache()
    assert [row.name for row in method_rows([one], TABLE6, printed="T6")] == published_rows("T6")
    table7 = [
        r for b in ("Uniform sampling", "Balanced softmax") for r in method_rows([one], TABLE7, b, "T7")
    ]
    assert [row.name for row in table7] == published_rows("T7")
    block = "Supervised initialisation, square root"
    table9 = method_rows([one], TABLE9, block, "T9")
    assert {row.name for row in table9} == {name for name in published_rows("T9") if name.startswith(block)}
    cosine, ours = own_rows([one], "ResNet101 backbone / Ours* - supervised init", "T3", block)
    assert ours.reference == cosine.name and ours.printed("total", "paper") == 39.3
    assert cosine.printed("total", "paper") == 36.3
    assert np.isnan(
        own_rows([one], "ResNet152 backbone / Ours* - supervised init", "T3")[0].printed("few", "paper")
    )
    assert len(quoted_rows("T3", cosine.name, "ResNet152 backbone")) == 5


def test_table_8_counts_classes_without_interval():
    table = count_table(
        "T8", {"Uniform, Supervised": [cache(), cache(seed=1)]}, lambda c: 2 + 4 * c.meta["seed"]
    )
    line = table.iloc[0]
    assert (line["group"], line["published"], line["reproduced"], line["n"]) == ("count", 39, 4, 6)
    assert np.isnan(line["ci_low"]) and line["seeds"] == "0 1"
    for shown in (repr(show_table(table)), show_table(table)._repr_html_()):
        assert "39 → 4" in shown and "nan" not in shown and "±" not in shown and "of 6" in shown


def test_prototype_accuracies_have_all_panels_and_are_right():
    one = cache()
    data = prototype_accuracy({"uniform": one, "sqrt": cache("sqrt")})
    assert len(data) == 2 * 2 * 2 * 4
    found = data.set_index(["series", "prototypes", "images", "group"])["accuracy"]
    predictions = cosine_logits(one.features("test"), prototypes_from(one, "val")).argmax(1)
    expected = group_accuracy(predictions, one.labels("test"), COUNTS)
    assert found["uniform", "val", "test", "few"] == pytest.approx(expected["few"])
    with figure_style():
        fig = prototype_panels(data)
    assert [ax.get_title() for ax in fig.axes] == [
        "Training prototypes, training images",
        "Validation prototypes, training images",
        "Training prototypes, test images",
        "Validation prototypes, test images",
    ]
    heights = [bar.get_height() for bar in fig.axes[3].containers[0]]
    assert heights == pytest.approx([expected[group] for group in ("many", "medium", "few")])
    plt.close(fig)


def test_similarity_curves_fall_and_sharpness_tells_sharp_from_flat():
    sharp = replace(cache(), prototypes=torch.eye(6), weights=torch.eye(6))
    flat = replace(sharp, prototypes=torch.eye(6) + 5)
    curves = similarity_curves({"supervised_sqrt": sharp, "simclr_sqrt": flat})
    first = curves[curves["series"] == "supervised_sqrt"]["similarity"]
    assert first.tolist() == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-7)
    table = sharpness({"supervised_sqrt": sharp, "simclr_sqrt": flat}).set_index("series")
    assert table.loc["supervised_sqrt", "gap"] == pytest.approx(1)
    assert table.loc["simclr_sqrt", "gap"] < 0.2
    shares = np.exp([10, 0, 0, 0, 0, 0]) / np.exp([10, 0, 0, 0, 0, 0]).sum()
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert table.loc["supervised_sqrt", "effective classes"] == pytest.approx(expected)
    assert table.loc["simclr_sqrt", "effective classes"] > 5
    with figure_style():
        fig = similarity_panels(curves)
    assert [len(ax.lines) for ax in fig.axes] == [2, 2]
    plt.close(fig)


def test_systems_that_act_on_frozen_features_are_run_beside_their_published_value():
    one = cache()
    rows = compared_rows(one, "T1", "Cosine classifier")
    run = [row.name for row in rows if len(row.predictions)]
    assert run == [f"{name} (frozen features)" for name in ("LWS [16]", "BALMS [25]", "Disalign* [34]")]
    assert [row.published[1] for row in rows] == [row.name for row in quoted_rows("T1", "Cosine classifier")]
    lws = rows[0]
    assert "learning rate" in lws.note
    assert lws.printed("total", "paper") == published("T1", "LWS [16]")["total"]
    assert (lws.predictions[0] == one.labels("test")).double().mean() > 0.5


def test_systems_that_train_a_backbone_stand_beside_their_published_value_with_our_ensemble_on_theirs():
    own = {"rsg": [cache("rsg"), cache("rsg", seed=1)], "ldam_drw": [cache("ldam_drw")]}
    rows = {row.name: row for row in compared_rows(cache(), "T1", "Cosine classifier", own)}
    rsg = rows["RSG* [31] (own backbone)"]
    assert (rsg.backbone, list(rsg.seeds), rsg.reference) == ("rsg", [0, 1], "Cosine classifier")
    assert rsg.printed("total", "paper") == published("T1", "RSG* [31]")["total"]
    for one, predictions in zip(own["rsg"], rsg.predictions, strict=True):
        assert torch.equal(predictions, torch.from_numpy(predict(one, "cosine")))
    assert list(rows)[-3:] == [
        "Not in print / LDAM-DRW (own backbone)",
        "Not in print / our ensemble on the backbone of RSG",
        "Not in print / our ensemble on the backbone of LDAM-DRW",
    ]
    ours = rows["Not in print / our ensemble on the backbone of RSG"]
    assert ours.reference == rsg.name
    np.testing.assert_array_equal(ours.predictions[1], predict(own["rsg"][1], "ensemble_wh_0_20_100"))
    assert not len(rows["LADE [14]"].predictions)


def test_second_stages_on_a_dot_product_classifier_and_their_times():
    dot = cache("uniform_dot", dot=True)
    rows = method_rows([dot], {"Dot product": "dot_product"})
    rows += second_stage_rows(dot, "Dot product", SECOND_STAGES) + further_rows(dot, "Dot product")
    names = [row.name for row in rows]
    assert "tau-norm (frozen features)" in names
    assert "Not in print / logit adjustment of the dot-product classifier, t = 1" in names
    times = fit_times(rows)
    assert set(times["row"]) == {n for n in names if "(frozen" in n or "chosen" in n}
    assert (times["seconds"] >= 0).all() and set(times["backbone"]) == {"uniform_dot"}


def test_further_rows_are_what_their_names_say():
    one = cache()
    further = further_rows(one, "Cosine classifier", "ResNet101")
    assert {row.name.partition(" / ")[0] for row in further} == {"ResNet101, not in print"}
    rows = {row.name.partition(" / ")[2]: row for row in further}
    assert len(rows) == len(further) == 13
    logits = cosine_logits(one.features("test"), one.weights, one.scale)
    adjusted = (logits - 0.5 * COUNTS.double().log()).argmax(1)
    assert torch.equal(rows["logit adjustment of the cosine classifier, t = 0.5"].predictions[0], adjusted)
    assert "strength" in rows["logit adjustment of the cosine classifier, t chosen"].note
