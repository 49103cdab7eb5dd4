"""Tables: the paper's value, the reproduced value with its interval, and the effect against a reference row.

    rows = [Row("Cosine classifier", [p0, p1], ("T1", "Ours* / Cosine classifier"), seeds=(0, 1)),
            Row("w^h(20)", [q0, q1], ("T1", "Ours* / w^h(20)"), reference="Cosine classifier", seeds=(0, 1))]
    frame = build_table("T1", rows, labels, counts)
    save_table(frame, "embedded", per_class_table("T1", rows, labels, counts))
    show_table(frame)

Accuracies are top-1 in percent, effects are differences in percentage points. Intervals are 95 %: test images
are resampled within each class, and training seeds where there are several; effects are paired.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from filelock import FileLock

from lt_core import paths
from lt_core.errors import DataError, InputError, check_counts, check_labels, unknown
from lt_core.features import FeatureCache
from lt_core.groups import RULES, group_of
from lt_core.metrics import COLUMNS as GROUPS
from lt_core.metrics import bootstrap_accuracies, group_accuracy, interval, per_class_accuracy
from lt_core.report.published import published, published_notes, published_rule
from lt_core.report.rendering import TableView, in_words, markdown_document, typeset

TEXT = ("table", "row", "group", "rule", "split", "checkpoint", "backbone", "seeds", "note")
COLUMNS = (
    *("table", "row", "group", "published", "reproduced", "ci_low", "ci_high"),
    *("published_effect", "reproduced_effect", "effect_ci_low", "effect_ci_high"),
    *("rule", "split", "n", "checkpoint", "backbone", "seeds", "note"),
)
PER_CLASS_COLUMNS = (
    *("table", "row", "backbone", "seed", "class", "class_name", "count", "split", "n", "accuracy"),
)
Count = Callable[[FeatureCache], int]
QUOTED = "published under the common grouping rule, so only the total is compared"
NAN = float("nan")


@dataclass(frozen=True)
class Row:
    """One row of a table.

    name: unique in the table.
    predictions: one [M] a training seed; or, where they depend on the grouping rule (Table 5),
        {rule: [one a seed]}; empty for a system that is only quoted.
    published: (table, printed row) of `published.csv`.
    reference: name of the row that effects are taken against.
    groups: those that have a value; the others stay empty, also in print.
    backbone, seeds, checkpoint: where the predictions come from.
    seconds: that fitting took, for a classifier that was fitted to frozen features.
    """

    name: str
    predictions: Sequence[object] | Mapping[str, Sequence[object]] = ()
    published: tuple[str, str] | None = None
    reference: str | None = None
    backbone: str = ""
    seeds: Sequence[int] = ()
    checkpoint: str = "last"
    groups: Sequence[str] = GROUPS
    note: str = ""
    seconds: float = NAN

    def __post_init__(self) -> None:
        if not len(self.predictions) and self.published is None:
            raise InputError(f"row {self.name!r} has neither predictions nor a published value")
        if set(self.groups) - set(GROUPS):
            raise InputError(f"row {self.name!r}: groups must be among {', '.join(GROUPS)}")
        for rule in RULES if len(self.predictions) else ():
            if len(self.predicted(rule)) != len(self.seeds):
                found = f"{len(self.predicted(rule))} predictions for {len(self.seeds)} seeds"
                raise InputError(f"row {self.name!r} has {found}; give one [M] a seed and name the seeds")

    def predicted(self, rule: str) -> Sequence[object]:
        """Predictions [M], one a seed."""
        return self.predictions[rule] if isinstance(self.predictions, Mapping) else self.predictions

    def shown_under(self, rule: str) -> bool:
        """Rows with predictions appear under every rule, quoted ones under the rule of their publication."""
        return len(self.predictions) > 0 or published_rule(*self.published) == rule

    def printed(self, group: str, rule: str) -> float:
        """The published value if it belongs to this rule (totals belong to every rule), else NaN."""
        if self.published is None or group not in self.groups:
            return NAN
        fits = group == "total" or published_rule(*self.published) == rule
        return published(*self.published).get(group, NAN) if fits else NAN


@dataclass(frozen=True)
class _Result:
    """Accuracies [4] over test images and seeds, and their bootstrap samples [replicates, 4], in percent."""

    accuracy: np.ndarray
    samples: np.ndarray

    def minus(self, other: _Result) -> _Result:
        return _Result(self.accuracy - other.accuracy, self.samples - other.samples)

    def columns(self, group: str, prefix: str = "") -> list[float]:
        low, high = interval(self.samples[:, GROUPS.index(group)])
        return [self.accuracy[GROUPS.index(group)], low, high]


def build_table(
    table: str,
    rows: Sequence[Row],
    labels: object,
    counts: object,
    split: str = "test",
    replicates: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """The table in long form: a line for each row, group and grouping rule, with the columns of `COLUMNS`.

    labels [M]: classes of the images of `split`; counts [N]: training images a class; replicates and seed: of
    the bootstrap. Percent, rounded to 0.01, empty (NaN) where a value does not exist. Published group values
    stand under the rule that they were computed with, published totals under both; a quoted system without
    predictions appears under its own rule only.
    """
    counts = check_counts("counts", counts).cpu().numpy()
    labels = check_labels("labels", labels, len(counts)).cpu().numpy()
    by_name = _check_rows(rows)
    records = []
    for rule in RULES:
        results = _results(rows, labels, counts, rule, replicates, seed)
        images = {group: int(mask[labels].sum()) for group, mask in group_of(counts, rule).items()}
        images["total"] = len(labels)
        for row in (row for row in rows if row.shown_under(rule)):
            reference = by_name.get(row.reference)
            for group in GROUPS:
                values = _values(row, reference, group, rule, results)
                records.append(
                    [table, row.name, group, *values, rule, *_origin(row, group, images, split, rule)]
                )
    return _rounded(pd.DataFrame(records, columns=list(COLUMNS)))


def count_table(table: str, counted: Mapping[str, Sequence[FeatureCache]], count: Count) -> pd.DataFrame:
    """A table of counts of classes (Table 8), with the columns of `COLUMNS` and the one group `count`.

    counted: row in print -> the backbone's seeds; count: gives the number for one cache. Mean over seeds, no
    interval.
    """
    records = []
    for row, caches in counted.items():
        numbers, meta = [count(cache) for cache in caches], caches[0].meta
        seeds = " ".join(str(cache.meta["seed"]) for cache in caches)
        values = [published(table, row)["count"], float(np.mean(numbers)), *[NAN] * 6]
        origin = ["paper", "train", len(caches[0].counts), "last", meta["backbone"], seeds, ""]
        records.append([table, row, "count", *values, *origin])
    return _rounded(pd.DataFrame(records, columns=list(COLUMNS)))


def per_class_table(
    table: str,
    rows: Sequence[Row],
    labels: object,
    counts: object,
    class_names: Sequence[str] | None = None,
    split: str = "test",
) -> pd.DataFrame:
    """Accuracy of every class in percent, for each row with predictions and each seed (`PER_CLASS_COLUMNS`).

    Rows whose predictions depend on the grouping rule are taken under `paper`.
    """
    counts = check_counts("counts", counts).cpu().numpy()
    labels = check_labels("labels", labels, len(counts)).cpu().numpy()
    names = [str(c) for c in range(len(counts))] if class_names is None else list(class_names)
    if len(names) != len(counts):
        raise InputError(f"class_names must have {len(counts)} entries, found {len(names)}")
    images = np.bincount(labels, minlength=len(counts))
    records = []
    for row in (row for row in rows if len(row.predictions)):
        for seed, predictions in zip(row.seeds, row.predicted("paper"), strict=True):
            accuracy = per_class_accuracy(predictions, labels, len(counts)).round(2)
            columns = zip(range(len(counts)), names, counts, images, accuracy, strict=True)
            start = (table, row.name, row.backbone, seed)
            records += [(*start, c, name, count, split, n, value) for c, name, count, n, value in columns]
    return pd.DataFrame(records, columns=list(PER_CLASS_COLUMNS))


def save_table(frame: pd.DataFrame, profile: str, per_class: pd.DataFrame | None = None) -> None:
    """Writes <table>.csv and <table>.md, and puts `per_class` into per_class.csv, under figures/<profile>/.

    Files appear whole or not at all; notebooks that run side by side may call this at the same time.
    """
    table = _name_of(frame)
    folder = paths.figures(profile)
    _write(folder / f"{table}.csv", frame.to_csv(index=False, lineterminator="\n"))
    _write(folder / f"{table}.md", markdown_document(frame))
    if per_class is not None:
        _upsert_per_class(per_class, table, profile)


def load_table(table: str, profile: str) -> pd.DataFrame:
    """A table as save_table wrote it; raises DataError when it is missing."""
    file = paths.figures(profile) / f"{table}.csv"
    if not file.is_file():
        raise DataError(f"{file} is missing: run the notebook that makes table {table}")
    text = {name: str for name in TEXT}
    frame = pd.read_csv(file, dtype=text | {"n": "Int64"}, keep_default_na=False, na_values=_numeric_gaps())
    return frame.astype({name: object for name in TEXT})


def show_table(frame: pd.DataFrame, rule: str = "paper") -> TableView:
    """The table under one grouping rule, for display in a notebook: print, here, effects, caption."""
    _name_of(frame)
    return TableView(frame, rule)


def effect_in_words(frame: pd.DataFrame, row: str, group: str) -> str:
    """One Markdown line: the effect of a row on a group in print and here, and whether they agree."""
    _name_of(frame)
    here = frame[(frame["row"] == row) & (frame["group"] == group) & (frame["rule"] == "paper")]
    if here.empty:
        raise InputError(unknown("row", row, list(dict.fromkeys(frame["row"]))))
    return f"- {typeset(row.rpartition(' / ')[2])}, {group}: {in_words(here.iloc[0])}"


def _check_rows(rows: Sequence[Row]) -> dict[str | None, Row]:
    by_name: dict[str | None, Row] = {row.name: row for row in rows}
    if len(by_name) != len(rows) or not rows:
        raise InputError("rows must have different names and there must be one at least")
    for row in rows:
        if row.reference is not None and row.reference not in by_name:
            raise InputError(f"row {row.name!r}: its reference {row.reference!r} is no row of this table")
    return by_name


def _results(
    rows: Sequence[Row], labels: np.ndarray, counts: np.ndarray, rule: str, replicates: int, seed: int
) -> dict[str, _Result]:
    """Accuracies of the rows with predictions; all see the same draw of test images, and rows with as many
    seeds the same draw of seeds."""
    results = {}
    own = [row for row in rows if len(row.predictions)]
    for seeds in sorted({len(row.seeds) for row in own}):
        alike = [row for row in own if len(row.seeds) == seeds]
        predicted = [_predictions(row, labels, counts, rule) for row in alike]
        correct = (np.stack(predicted) == labels).swapaxes(0, 1)
        samples = bootstrap_accuracies(correct, labels, counts, rule, replicates, seed)
        for index, row in enumerate(alike):
            one = [list(group_accuracy(p, labels, counts, rule).values()) for p in predicted[index]]
            results[row.name] = _Result(np.mean(one, axis=0), samples[:, index])
    return results


def _predictions(row: Row, labels: np.ndarray, counts: np.ndarray, rule: str) -> np.ndarray:
    """Predictions [S, M] of a row, checked."""
    name = f"predictions of row {row.name!r}"
    checked = [check_labels(name, p, len(counts), len(labels)) for p in row.predicted(rule)]
    return np.stack([p.cpu().numpy() for p in checked])


def _values(
    row: Row, reference: Row | None, group: str, rule: str, results: dict[str, _Result]
) -> list[float]:
    """published, reproduced, ci_low, ci_high, then the same four for the effect."""
    empty = [NAN] * 3
    own = results.get(row.name) if group in row.groups else None
    accuracy = own.columns(group) if own else empty
    if reference is None:
        return [row.printed(group, rule), *accuracy, NAN, *empty]
    other = results.get(reference.name) if group in reference.groups else None
    effect = own.minus(other).columns(group) if own and other else empty
    printed_effect = row.printed(group, rule) - reference.printed(group, rule)
    return [row.printed(group, rule), *accuracy, printed_effect, *effect]


def _origin(row: Row, group: str, images: dict[str, int], split: str, rule: str) -> list[object]:
    """split, n, checkpoint, backbone, seeds (empty without a reproduced value) and note."""
    reproduced = len(row.predictions) > 0 and group in row.groups and images[group] > 0
    seeds = " ".join(str(seed) for seed in row.seeds)
    where = [split, images[group], row.checkpoint, row.backbone, seeds]
    return [*(where if reproduced else ["", None, "", "", ""]), _note(row, group, rule)]


def _note(row: Row, group: str, rule: str) -> str:
    parts = [row.note]
    if not np.isnan(row.printed(group, rule)):
        parts.append(published_notes(*row.published).get(group, ""))
        if published_rule(*row.published) == "common":
            parts.append(QUOTED)
    return "; ".join(part for part in parts if part)


def _rounded(frame: pd.DataFrame) -> pd.DataFrame:
    numbers = [name for name in COLUMNS if name not in (*TEXT, "n")]
    frame[numbers] = frame[numbers].astype(float).round(2) + 0.0  # no negative zero
    frame["n"] = frame["n"].astype("Int64")
    return frame.astype({name: object for name in TEXT})


def _numeric_gaps() -> dict[str, list[str]]:
    return {name: [""] for name in COLUMNS if name not in TEXT}


def _name_of(frame: pd.DataFrame) -> str:
    """The one table that a frame holds; raises InputError for another kind of frame."""
    if list(frame.columns) != list(COLUMNS) or frame["table"].nunique() != 1:
        raise InputError("frame must be one table as build_table makes it")
    return str(frame["table"].iloc[0])


def _write(target: paths.Path, text: str) -> None:
    with paths.atomic(target) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _upsert_per_class(new: pd.DataFrame, table: str, profile: str) -> None:
    """Replaces the rows of `table`, under a lock; the file does not depend on the order of the calls."""
    if list(new.columns) != list(PER_CLASS_COLUMNS) or set(new["table"]) - {table}:
        raise InputError(f"per_class must be the per_class_table of {table}")
    target = paths.figures(profile) / "per_class.csv"
    paths.decoded().mkdir(parents=True, exist_ok=True)
    with FileLock(paths.decoded() / f"per_class-{target.parent.name}.lock"):
        merged = _as_text(new.to_csv(index=False))
        if target.is_file():
            old = _as_text(target.read_text(encoding="utf-8"))
            if list(old.columns) != list(PER_CLASS_COLUMNS):
                raise DataError(f"{target} has other columns than expected: delete it and run again")
            merged = pd.concat([old[old["table"] != table], merged], ignore_index=True)
        keys = merged.assign(seed=merged["seed"].astype(int), order=merged["class"].astype(int))
        order = keys.sort_values(["table", "row", "backbone", "seed", "order", "split"], kind="stable").index
        _write(target, merged.loc[order].to_csv(index=False, lineterminator="\n"))


def _as_text(csv: str) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(csv), dtype=str, keep_default_na=False)
