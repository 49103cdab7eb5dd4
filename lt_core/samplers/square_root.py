"""Square-root sampling (paper, Sec. 4.4): class j with probability sqrt(n_j) / sum_i sqrt(n_i)."""

import numpy as np


def square_root(labels: np.ndarray, length: int, generator: np.random.Generator) -> np.ndarray:
    """`length` images with replacement: a class by the square root of its count, then any image of it."""
    counts = np.bincount(labels)
    class_mass = np.sqrt(counts) / np.sqrt(counts).sum()
    image_mass = class_mass[labels] / counts[labels]
    cumulative = np.cumsum(image_mass)
    return np.searchsorted(cumulative, generator.random(length) * cumulative[-1], side="right")
