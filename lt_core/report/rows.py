"""Rows of tables from feature caches, and where these come from.

caches = load_seeds("embedded", "sqrt")
rows = method_rows(caches, TABLE1, "Ours*", printed="T1") + quoted_rows("T1", "Ours* / Cosine classifier")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lt_core.errors import InputError
from lt_core.features import FeatureCache
from lt_core.groups import GROUPS
from lt_core.methods import predict
from lt_core.metrics import COLUMNS
from lt_core.report.published import published_rows, published_rule
from lt_core.report.tables import Row

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
    reference = next(iter(names.values()))
    rows = []
    for label, method in methods.items():
        partial = method == "cosine" and not caches[0].trained.all()
        rows.append(
            Row(
                name=names[label],
                predictions=[predict(cache, method) for cache in caches],
                published=(printed, f"{printed_block or block} / {label}") if printed else None,
                reference=None if names[label] == reference else reference,
                backbone=caches[0].meta["backbone"],
                seeds=[cache.meta["seed"] for cache in caches],
                groups=GROUPS[:2] if partial else COLUMNS,
                note=note,
            )
        )
    return rows


def quoted_rows(table: str, reference: str) -> list[Row]:
    """The systems that a printed table quotes from other papers, in its order."""
    names = [name for name in published_rows(table) if published_rule(table, name) == "common"]
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
