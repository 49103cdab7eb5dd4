"""Rows of tables from feature caches, and where these come from.

caches = load_seeds("embedded", "sqrt")
rows = method_rows(caches, TABLE1, "Ours*", printed="T1") + quoted_rows("T1", "Ours* / Cosine classifier")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from lt_core.errors import InputError
from lt_core.features import FeatureCache
from lt_core.groups import GROUPS, RULES
from lt_core.methods import learned, predict
from lt_core.metrics import COLUMNS, within_group_predictions
from lt_core.report.published import published_rows, published_rule
from lt_core.report.tables import Row
from lt_core.transfer import cosine_logits, prototypes

# Label in print -> method of `lt_core.methods`; the first is the reference row of its block.
TABLE1 = {
    "Cosine classifier": "cosine",
    "Prototypes": "prototypes",
    "Prototypes + classifier": "prototypes+cosine",
    "w^h(20)": "wh20",
    "w^h(100)": "wh100",
    "ensemble(w^h(0), w^h(20), w^h(100))": "ensemble_wh_0_20_100",
}
TABLE2 = {
    "Cosine classifier": "cosine",
    "Prototypes": "prototypes",
    "w^hc(20)": "whc20",
    "w^hc(100)": "whc100",
    "ensemble(prototypes, w^hc(20), w^hc(100))": "ensemble_proto_whc_20_100",
}
TABLE6 = {
    "p → w": "attention_p2w",
    "w → p": "attention_w2p",
    "w → w": "attention_w2w",
    "p → p": "attention_p2p",
}
TABLE7 = {
    "Cosine classifier": "cosine",
    "ensemble(w^h(0), w^h(20), w^h(100))": "ensemble_wh_0_20_100",
}
TABLE9 = {
    "Cosine classifier": "cosine",
    "Prototypes": "prototypes",
    "Classifier + prototypes": "prototypes+cosine",
    "w^h(20)": "wh20",
    "w^h(100)": "wh100",
    "ensemble(w^hc(20), w^hc(100)) (continual)": "ensemble_whc_20_100",
    "ensemble(w^h(0), w^h(20), w^h(100))": "ensemble_wh_0_20_100",
}


def method_rows(
    caches: Sequence[FeatureCache],
    methods: Mapping[str, str],
    block: str = "",
    printed: str = "",
    printed_block: str = "",
    note: str = "",
) -> list[Row]:
    """A row a method on one backbone, its seeds together, named `block / label`; effects against the first.

    printed: the table of `published.csv` with these rows, in the block of the same name or `printed_block`.
    A learned classifier that was not trained on the few-shot classes has no few-shot and no total value.
    Raises InputError without caches.
    """
    if not caches:
        raise InputError("caches must hold the feature cache of one seed at least")
    names = {label: f"{block} / {label}" if block else label for label in methods}
    reference, above = next(iter(names.values())), printed_block or block
    rows = []
    for label, method in methods.items():
        partial = method == "cosine" and not caches[0].trained.all()
        rows.append(
            Row(
                name=names[label],
                predictions=[predict(cache, method) for cache in caches],
                published=(printed, f"{above} / {label}" if above else label) if printed else None,
                reference=None if names[label] == reference else reference,
                backbone=caches[0].meta["backbone"],
                seeds=[cache.meta["seed"] for cache in caches],
                groups=GROUPS[:2] if partial else COLUMNS,
                note=note,
            )
        )
    return rows


def own_rows(
    caches: Sequence[FeatureCache], name: str, printed: str, cosine_printed: str | None = None
) -> list[Row]:
    """Table 3's row `name`, the ensemble on one backbone, after its cosine classifier, the reference.

    cosine_printed: the block of Table 9 that has this cosine classifier; None where print has none.
    """
    reference = f"{name}, cosine classifier"
    seeds, backbone = [cache.meta["seed"] for cache in caches], caches[0].meta["backbone"]
    cosine = [predict(cache, "cosine") for cache in caches]
    ensemble = [predict(cache, "ensemble_wh_0_20_100") for cache in caches]
    beside = ("T9", f"{cosine_printed} / Cosine classifier") if cosine_printed else None
    return [
        Row(reference, cosine, beside, backbone=backbone, seeds=seeds),
        Row(name, ensemble, (printed, name), reference, backbone=backbone, seeds=seeds),
    ]


def backbone_rows(backbones: Mapping[str, Sequence[FeatureCache]], printed: str) -> list[Row]:
    """A row a backbone (its label in print -> its seeds), each with its learned classifier (Table 4).

    Effects are taken against the first.
    """
    reference = next(iter(backbones))
    return [
        Row(
            name=label,
            predictions=[predict(cache, learned(cache)) for cache in caches],
            published=(printed, label),
            reference=None if label == reference else reference,
            backbone=caches[0].meta["backbone"],
            seeds=[cache.meta["seed"] for cache in caches],
        )
        for label, caches in backbones.items()
    ]


def within_group_rows(backbones: Mapping[str, Sequence[FeatureCache]], printed: str = "T5") -> list[Row]:
    """Prototype classifiers among the classes of each test image's own group, a row a backbone (Table 5).

    One block with prototypes of the training images, one of the validation images (seeds that store these).
    Effects are taken against the first backbone of the block.
    """
    rows = []
    for block, source in (("Training set", "train"), ("Validation set", "val")):
        reference = f"{block} / {next(iter(backbones))}"
        for label, caches in backbones.items():
            usable = [cache for cache in caches if source == "train" or source in cache.splits]
            name = f"{block} / {label}"
            rows.append(
                Row(
                    name=name,
                    predictions={rule: [_within_group(c, source, rule) for c in usable] for rule in RULES},
                    published=(printed, name),
                    reference=None if name == reference else reference,
                    backbone=usable[0].meta["backbone"],
                    seeds=[cache.meta["seed"] for cache in usable],
                    groups=GROUPS,
                )
            )
    return rows


def prototypes_from(cache: FeatureCache, source: str) -> Tensor:
    """Prototypes [N, F] (Eq. 3) of the `train` images, as stored, or of those of another split."""
    if source == "train":
        return cache.prototypes
    return prototypes(cache.features(source), cache.labels(source), len(cache.counts))


def _within_group(cache: FeatureCache, source: str, rule: str) -> np.ndarray:
    scores = cosine_logits(cache.features("test"), prototypes_from(cache, source))
    return within_group_predictions(scores, cache.labels("test"), cache.counts, rule)


def quoted_rows(table: str, reference: str, block: str = "") -> list[Row]:
    """The systems that a printed table (or one block of it) quotes from other papers, in its order."""
    names = [
        name
        for name in published_rows(table)
        if published_rule(table, name) == "common" and name.startswith(block)
    ]
    return [Row(name, published=(table, name), reference=reference) for name in names]


def provenance(caches: Sequence[FeatureCache]) -> str:
    """How the backbone of these caches was trained: one Markdown paragraph from their `meta.json`."""
    meta = caches[0].meta
    recipe = meta["recipe"]
    frozen = recipe["learning_rate"] == 0
    seeds = ", ".join(str(cache.meta["seed"]) for cache in caches)
    minutes = sum(cache.meta.get("seconds", 0) for cache in caches) / len(caches) / 60
    rates = f"{recipe['classifier_learning_rate']:g}" + (
        " (classifier only, backbone frozen)" if frozen else f" (backbone {recipe['learning_rate']:g})"
    )
    left_out = "; few-shot classes left out of training" if meta["leave_out"] == "few" else ""
    where = f"{minutes:.1f} min a seed on {meta['hardware']}"
    return (
        f"**Backbone `{meta['backbone']}`** on {meta['dataset']}: {meta['network']}, start {meta['start']}, "
        f"{meta['classifier']} classifier, {meta['loss']}, sampler {meta['sampler']}{left_out}. "
        f"{recipe['epochs']} epochs, batch {recipe['batch_size']}, learning rate {rates}, weight decay "
        f"{recipe['weight_decay']:g}, last epoch. Seeds {seeds}; {where}; "
        f"code {meta['code_version']}."
    )
