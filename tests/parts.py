"""ImageNet-LT and Places-LT in small: every class, the real counts scaled down, tiny generated JPEGs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from lt_core.data.official import OFFICIAL, official_counts
from lt_core.data.wordnet import corpus

MANY, MEDIUM = (5, 130), (15, 40)  # so many of the largest classes keep so many training images


def part_counts(name: str, divisor: int) -> list[int]:
    """Training images a class: the official ones over `divisor`, but for some large classes."""
    official = np.array(official_counts(name))
    counts, order = np.maximum(1, official // divisor), np.argsort(-official, kind="stable")
    counts[order[: MANY[0]]] = MANY[1]
    counts[order[MANY[0] :][: MEDIUM[0]]] = MEDIUM[1]
    return counts.tolist()


def class_folders(name: str, number: int) -> list[str]:
    """Real WordNet 3.0 nouns for ImageNet, made-up places for Places."""
    if name == "imagenet_lt":
        synsets = list(corpus().all_synsets("n"))
        return sorted(f"n{synset.offset():08d}" for synset in synsets[1000 : 1000 + number])
    return [f"place_{label:03d}" + ("-indoor" if label % 5 == 0 else "") for label in range(number)]


def write_part(root: Path, name: str, divisor: int = 40, held_out: int = 1, size: int = 40) -> dict[str, int]:
    """Lists and images below `root` as the data set `<name>_part` reads them; images of each split.

    A class's images share a colour and a stripe, so that a network can learn something.
    """
    official, counts = OFFICIAL[name], part_counts(name, divisor)
    folders = class_folders(name, len(counts))
    generator = np.random.default_rng(0)
    colours = generator.integers(40, 216, (len(counts), 2, 3))
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    number = 0
    for label, (folder, count) in enumerate(zip(folders, counts, strict=True)):
        for split, images in (("train", count), ("val", held_out), ("test", held_out)):
            for _ in range(images):
                number += 1
                origin = "val" if split == "test" else "train"
                suffix = "JPEG" if name == "imagenet_lt" else "jpg"
                path = f"{origin}/{folder}/{number:08d}.{suffix}"
                pixels = np.empty((size, size + 8, 3), dtype=np.int64)
                pixels[:], pixels[:, label % size :: 7] = colours[label]
                pixels += generator.integers(-30, 31, (*pixels.shape[:2], 1))
                target = root / official.folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(target, "JPEG", quality=80)
                lists[split].append(f"{path} {label}")
    for split, lines in lists.items():
        (root / f"{official.prefix}_{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {split: len(lines) for split, lines in lists.items()}
