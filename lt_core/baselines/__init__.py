"""The systems that the paper compares itself with, on a trained backbone's frozen features.

stage = Stage1.of(cache)
logits = lws(stage, learning_rate=0.2)(cache.features("test"))                      # [M, N]
tuned = tune("lws", stage, cache.features("val"), cache.labels("val"))              # as in the tables
"""

from lt_core.baselines.balms import balms
from lt_core.baselines.disalign import disalign
from lt_core.baselines.heads import retrained
from lt_core.baselines.inference import causal_norm, transfer_ensemble
from lt_core.baselines.logit_adjustment import adjust, adjusted
from lt_core.baselines.lws import lws
from lt_core.baselines.ncm import ncm
from lt_core.baselines.stage1 import Logits, Stage1
from lt_core.baselines.tau_norm import tau_norm
from lt_core.baselines.tuning import BASELINES, BUDGET, Tuned, tune

__all__ = [
    "BASELINES",
    "BUDGET",
    "Logits",
    "Stage1",
    "Tuned",
    "adjust",
    "adjusted",
    "balms",
    "causal_norm",
    "disalign",
    "lws",
    "ncm",
    "retrained",
    "tau_norm",
    "transfer_ensemble",
    "tune",
]
