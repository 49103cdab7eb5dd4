"""One way of choosing hyper-parameters, the same for every method.

Each method has at most eight settings. All are tried with one seed, and the one with the best total accuracy
on the validation split is kept, the first of equals. The test split plays no part.

    stage = Stage1.of(cache)
    tuned = tune("lws", stage, cache.features("val"), cache.labels("val"), seed=0)
    predictions = tuned.logits(cache.features("test")).argmax(1)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

from torch import Tensor

from lt_core.baselines.balms import balms
from lt_core.baselines.disalign import disalign
from lt_core.baselines.heads import retrained
from lt_core.baselines.inference import causal_norm, transfer_ensemble
from lt_core.baselines.logit_adjustment import adjusted
from lt_core.baselines.lws import lws
from lt_core.baselines.ncm import ncm
from lt_core.baselines.stage1 import Logits, Stage1
from lt_core.baselines.tau_norm import tau_norm
from lt_core.errors import InputError, TrainingError, check_labels, unknown

BUDGET = 8  # settings a method
Setting = dict[str, float]


@dataclass(frozen=True)
class Baseline:
    """How a method is fitted, `fit(stage, **setting)` or for the seeded `fit(stage, seed=..., **setting)`."""

    fit: Callable[..., Logits]
    settings: Sequence[Setting] = ({},)
    seeded: bool = False


@dataclass(frozen=True)
class Tuned:
    """A fitted method, the setting that validation chose, and the record of all that were tried."""

    logits: Logits
    setting: Setting
    tried: list[tuple[Setting, float]]  # with validation accuracy in percent; NaN: training diverged
    seconds: float  # of all fits together


def _grid(**values: Sequence[float]) -> list[Setting]:
    return [dict(zip(values, point, strict=True)) for point in product(*values.values())]


RATES = _grid(learning_rate=(10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003))
STRENGTHS = _grid(strength=(0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0))


def _head(loss: str, sampler: str) -> Baseline:
    return Baseline(partial(retrained, loss=loss, sampler=sampler), RATES, seeded=True)


def _adjusted_stage(stage: Stage1, strength: float) -> Logits:
    return adjusted(stage.logits, stage.counts, strength)


def _adjusted_ensemble(stage: Stage1, strength: float) -> Logits:
    return adjusted(transfer_ensemble(stage), stage.counts, strength)


BASELINES: dict[str, Baseline] = {
    "logit_adjustment": Baseline(_adjusted_stage, STRENGTHS),
    "tau_norm": Baseline(tau_norm, _grid(tau=(0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0))),
    "ncm": Baseline(ncm),
    "crt": _head("cross_entropy", "class_aware"),
    "lws": Baseline(lws, RATES, seeded=True),
    "disalign": Baseline(disalign, _grid(rho=(0.8, 1.2, 1.6, 2.0), learning_rate=(0.1, 1.0)), seeded=True),
    "balms": Baseline(balms, _grid(init_power=(0.1, 0.3), learning_rate=(3.0, 0.5, 0.1, 0.03)), seeded=True),
    "balanced_softmax_head": _head("balanced_softmax", "uniform"),
    "class_balanced_head": _head("class_balanced", "uniform"),
    "focal_head": _head("focal", "uniform"),
    "lade_head": _head("lade", "uniform"),
    "causal_norm": Baseline(causal_norm, _grid(strength=(0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0))),
    "ensemble": Baseline(transfer_ensemble, _grid(temperature=(1, 2, 5, 10, 20, 30, 50, 100))),
    "ensemble+logit_adjustment": Baseline(_adjusted_ensemble, STRENGTHS),
}


def tune(name: str, stage: Stage1, features: Tensor, labels: Tensor, seed: int = 0) -> Tuned:
    """The named method with the setting that does best on validation features [M, F] and labels [M].

    Raises InputError for an unknown name and TrainingError when no setting could be trained.
    """
    if name not in BASELINES:
        raise InputError(unknown("baseline", name, list(BASELINES)))
    baseline = BASELINES[name]
    labels = check_labels("labels", labels, len(stage.counts), len(features))
    started = time.monotonic()
    best, tried = None, []
    for setting in baseline.settings:
        try:
            logits = baseline.fit(stage, **setting, **({"seed": seed} if baseline.seeded else {}))
        except TrainingError:
            tried.append((setting, float("nan")))
            continue
        accuracy = 100 * (logits(features).argmax(1) == labels).double().mean().item()
        if best is None or accuracy > best[0]:
            best = accuracy, logits, setting
        tried.append((setting, accuracy))
    if best is None:
        raise TrainingError(f"{name}: no setting could be trained")
    return Tuned(best[1], best[2], tried, time.monotonic() - started)
