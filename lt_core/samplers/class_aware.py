"""Class-aware sampling ("class uniform" in the paper's text, Sec. 4.4): every class equally often."""

import numpy as np

IMAGES_PER_TURN = 4  # "common practice is 4 samples" (Sec. 4.4)


def class_aware(labels: np.ndarray, length: int, generator: np.random.Generator) -> np.ndarray:
    """`length` images: classes in shuffled cycles, 4 in a row of each from its own shuffled cycle.

    Any 4 N images aligned with a cycle hold each of the N classes exactly 4 times.
    """
    classes = np.unique(labels)
    cycles = -(-length // (IMAGES_PER_TURN * len(classes)))
    order = np.concatenate([generator.permutation(len(classes)) for _ in range(cycles)])
    drawn = np.empty((len(order), IMAGES_PER_TURN), dtype=np.int64)
    for position, label in enumerate(classes):
        images = np.flatnonzero(labels == label)
        rounds = -(-cycles * IMAGES_PER_TURN // len(images))
        stream = np.concatenate([generator.permutation(images) for _ in range(rounds)])
        drawn[order == position] = stream[: cycles * IMAGES_PER_TURN].reshape(cycles, IMAGES_PER_TURN)
    return drawn.reshape(-1)[:length]
