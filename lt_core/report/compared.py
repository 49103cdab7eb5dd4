"""Rows of the compared systems: the published value of each beside our own run of it.

rows = method_rows(caches, TABLE1, "Ours*", printed="T1")
rows += compared_rows(caches[0], "T1", reference=rows[0].name, trained={"rsg": load_seeds("embedded", "rsg")})
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from lt_core.baselines import Stage1, adjusted, transfer_ensemble
from lt_core.baselines.stage1 import Logits
from lt_core.features import FeatureCache
from lt_core.methods import learned, predict
from lt_core.report.rows import quoted_rows
from lt_core.report.systems import NAMES, Run, system_of
from lt_core.report.tables import Row

# Label -> method of `lt_core.baselines`: second stages of the compared systems and further ones.
SECOND_STAGES = {
    "LWS": "lws",
    "BALMS": "balms",
    "DisAlign": "disalign",
    "tau-norm": "tau_norm",  # does nothing on a cosine classifier
}
FURTHER = {
    "cRT": "crt",
    "NCM": "ncm",
    "Balanced softmax": "balanced_softmax_head",
    "LADE": "lade_head",
    "Class-balanced loss": "class_balanced_head",
    "Focal loss": "focal_head",
}
LEARNED = {"cosine": "the cosine classifier", "dot_product": "the dot-product classifier"}
STRENGTHS = (0.5, 1.0)  # of logit adjustment: the theory for square-root and for uniform sampling


def compared_rows(
    cache: FeatureCache,
    table: str,
    reference: str,
    trained: Mapping[str, Sequence[FeatureCache]] | None = None,
    block: str = "",
) -> list[Row]:
    """The systems that a table (or one block of it) quotes, each beside our run where there is one.

    What the authors do on a frozen backbone is done here on the features of `cache` (training and validation
    features are needed), with settings chosen on validation data (`lt_core.baselines.tune`). `trained` has
    the caches of the backbones that other systems train end to end, one a seed, by the names of
    `systems.NAMES`; those that the table does not quote come after it, and last our ensemble on the features
    of each, with the system itself as its reference. A system with neither keeps its published value alone.
    """
    trained = dict(trained or {})
    rows, own_names = [], {}
    for quoted in quoted_rows(table, reference, block):
        system = system_of(quoted.name)
        if system in trained:
            own_names[system] = f"{quoted.name} (own backbone)"
            rows.append(_own_row(own_names[system], trained[system], reference, quoted.published))
        elif system in SECOND_STAGES.values():
            name = f"{quoted.name} (frozen features)"
            rows.append(_tuned_row(cache, name, system, reference, quoted.published))
        else:
            rows.append(quoted)
    for system in [system for system in trained if system not in own_names]:
        own_names[system] = f"{_beyond_print(block)} / {NAMES[system]} (own backbone)"
        rows.append(_own_row(own_names[system], trained[system], reference))
    for system, caches in trained.items():
        name = f"{_beyond_print(block)} / our ensemble on the backbone of {NAMES[system]}"
        predictions = [predict(one, "ensemble_wh_0_20_100") for one in caches]
        rows.append(Row(name, predictions, reference=own_names[system], **_origin(caches)))
    return rows


def second_stage_rows(
    cache: FeatureCache, reference: str, methods: Mapping[str, str], block: str = ""
) -> list[Row]:
    """Methods of `lt_core.baselines` (label -> name) on frozen features, set on validation data."""
    place = f"{block} / " if block else ""
    return [
        _tuned_row(cache, f"{place}{label} (frozen features)", method, reference)
        for label, method in methods.items()
    ]


def further_rows(cache: FeatureCache, reference: str, block: str = "") -> list[Row]:
    """Classifiers on the same features that the paper does not show: post-hoc and second-stage ones.

    They stand in a block of their own, after `block` where there is one.

    Logit adjustment (Menon et al., ICLR 2021) with strength t = 0.5, 1 and as chosen on validation data, on
    the classifier that the backbone was trained with and on top of the paper's ensemble.
    """
    stage = Stage1.of(cache)
    place = _beyond_print(block)
    rows = []
    for name, classifier, method in (
        (LEARNED[learned(cache)], stage.logits, "logit_adjustment"),
        ("the ensemble", transfer_ensemble(stage), "ensemble+logit_adjustment"),
    ):
        start = f"{place} / logit adjustment of {name}, t"
        for t in STRENGTHS:
            rows.append(_row(cache, f"{start} = {t:g}", adjusted(classifier, stage.counts, t), reference))
        rows.append(_tuned_row(cache, f"{start} chosen", method, reference))
    rows.append(_tuned_row(cache, f"{place} / ensemble, temperature chosen", "ensemble", reference))
    return rows + second_stage_rows(cache, reference, FURTHER, place)


def fit_times(rows: Sequence[Row]) -> pd.DataFrame:
    """Seconds that fitting took, all settings together, for each row that was fitted here."""
    fitted = [(row.name, row.backbone, round(row.seconds, 1)) for row in rows if not math.isnan(row.seconds)]
    return pd.DataFrame(fitted, columns=["row", "backbone", "seconds"])


def _beyond_print(block: str) -> str:
    return f"{block}, not in print" if block else "Not in print"


def _tuned_row(
    cache: FeatureCache, name: str, method: str, reference: str, published: tuple[str, str] | None = None
) -> Row:
    run = Run.of(method, cache)
    origin = _origin([cache])
    return Row(
        name, [run.predictions], published, reference, note=_chosen(run), seconds=run.seconds, **origin
    )


def _own_row(
    name: str, caches: Sequence[FeatureCache], reference: str, published: tuple[str, str] | None = None
) -> Row:
    runs = [Run.own(cache) for cache in caches]
    predictions = [run.predictions for run in runs]
    return Row(name, predictions, published, reference, note=_chosen(runs[0]), **_origin(caches))


def _row(cache: FeatureCache, name: str, classifier: Logits, reference: str) -> Row:
    predictions = [classifier(cache.features("test")).argmax(dim=1)]
    return Row(name, predictions, reference=reference, **_origin([cache]))


def _chosen(run: Run) -> str:
    chosen = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in run.setting.items())
    return f"chosen on validation images: {chosen}" if chosen else ""


def _origin(caches: Sequence[FeatureCache]) -> dict[str, object]:
    return {"backbone": caches[0].meta["backbone"], "seeds": [cache.meta["seed"] for cache in caches]}
