"""Which training images a step sees (paper, Sec. 4.4): uniform, class-aware, square root.

A sampler is a function `(labels [M], length, generator) -> indices [length]`. The `MetaSampler` of BALMS
learns while it draws and stands apart.

    batches = epoch_batches("square_root", labels, batch_size=128, seed=0, epoch=3)   # [steps, 128]
"""

from lt_core.samplers.class_aware import class_aware
from lt_core.samplers.epoch import SAMPLERS, epoch_batches
from lt_core.samplers.meta import MetaSampler
from lt_core.samplers.square_root import square_root
from lt_core.samplers.uniform import uniform

__all__ = ["SAMPLERS", "MetaSampler", "class_aware", "epoch_batches", "square_root", "uniform"]
