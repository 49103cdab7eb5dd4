"""Rows of the compared systems: the published value of each beside our own run of it.

rows = method_rows(caches, TABLE1, "Ours*", printed="T1")
rows += compared_rows(caches[0], "T1", reference=rows[0].name)
"""

from __future__ import annotations

from lt_core.baselines import Stage1, adjusted, transfer_ensemble, tune
from lt_core.baselines.stage1 import Logits
from lt_core.features import FeatureCache
from lt_core.report.rows import quoted_rows
from lt_core.report.tables import Row

# System in print -> method of `lt_core.baselines` that its authors apply to a frozen backbone.
ON_FROZEN_FEATURES = {"LWS": "lws", "BALMS": "balms", "Disalign": "disalign"}
FURTHER = {  # not in print
    "cRT": "crt",
    "NCM": "ncm",
    "Balanced softmax": "balanced_softmax_head",
    "Class-balanced loss": "class_balanced_head",
    "Focal loss": "focal_head",
}
STRENGTHS = (0.5, 1.0)  # of logit adjustment: the theory for square-root and for uniform sampling


def compared_rows(cache: FeatureCache, table: str, reference: str, block: str = "") -> list[Row]:
    """The systems that a table (or one block of it) quotes, run on this cache's features where that can be.

    What the authors do on a frozen backbone is done here on the same features as ours, with settings chosen
    on validation data (`lt_core.baselines.tune`). Systems that train a backbone keep their published value
    alone. The cache needs training and validation features.
    """
    rows = []
    for quoted in quoted_rows(table, reference, block):
        system = quoted.name.rpartition(" / ")[2].partition(" ")[0].rstrip("*")
        method = ON_FROZEN_FEATURES.get(system)
        name = f"{quoted.name} (frozen features)"
        rows.append(_tuned_row(cache, name, method, reference, quoted.published) if method else quoted)
    return rows


def further_rows(cache: FeatureCache, reference: str, block: str = "") -> list[Row]:
    """Classifiers on the same features that the paper does not show: post-hoc and second-stage ones.

    They stand in a block of their own, after `block` where there is one.

    Logit adjustment (Menon et al., ICLR 2021) with strength t = 0.5, 1 and as chosen on validation data, the
    last also on top of the paper's ensemble.
    """
    stage = Stage1.of(cache)
    place = f"{block}, not in print" if block else "Not in print"
    cosine = "logit adjustment of the cosine classifier"
    rows = [
        _row(cache, f"{place} / {cosine}, t = {t:g}", adjusted(stage.logits, stage.counts, t), reference)
        for t in STRENGTHS
    ]
    rows.append(_tuned_row(cache, f"{place} / {cosine}, t chosen", "logit_adjustment", reference))
    rows += [
        _row(
            cache,
            f"{place} / logit adjustment of the ensemble, t = {t:g}",
            adjusted(transfer_ensemble(stage), stage.counts, t),
            reference,
        )
        for t in STRENGTHS
    ]
    name = f"{place} / logit adjustment of the ensemble, t chosen"
    rows.append(_tuned_row(cache, name, "ensemble+logit_adjustment", reference))
    rows.append(_tuned_row(cache, f"{place} / ensemble, temperature chosen", "ensemble", reference))
    for label, method in FURTHER.items():
        rows.append(_tuned_row(cache, f"{place} / {label} (frozen features)", method, reference))
    return rows


def _tuned_row(
    cache: FeatureCache, name: str, method: str, reference: str, published: tuple[str, str] | None = None
) -> Row:
    seed = cache.meta["seed"]
    tuned = tune(method, Stage1.of(cache), cache.features("val"), cache.labels("val"), seed)
    chosen = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in tuned.setting.items())
    note = f"chosen on validation images: {chosen}" if chosen else ""
    return _row(cache, name, tuned.logits, reference, published, note)


def _row(
    cache: FeatureCache,
    name: str,
    classifier: Logits,
    reference: str,
    published: tuple[str, str] | None = None,
    note: str = "",
) -> Row:
    return Row(
        name=name,
        predictions=[classifier(cache.features("test")).argmax(dim=1)],
        published=published,
        reference=reference,
        backbone=cache.meta["backbone"],
        seeds=[cache.meta["seed"]],
        note=note,
    )
