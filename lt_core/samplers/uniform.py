"""Instance-uniform sampling: every image once, in random order."""

import numpy as np


def uniform(labels: np.ndarray, length: int, generator: np.random.Generator) -> np.ndarray:
    """The first `length` entries of a random permutation of the images (further permutations if longer)."""
    rounds = -(-length // len(labels))
    return np.concatenate([generator.permutation(len(labels)) for _ in range(rounds)])[:length]
