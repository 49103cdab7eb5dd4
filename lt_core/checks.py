"""Every error a user can cause, and the checks that raise them.

One clear sentence says what is wrong and what to do; the command line prints it without a traceback.

    check_matrix("features", features)
"""

from __future__ import annotations

import os
import re
from pathlib import PurePosixPath

import numpy as np
import torch


class LTError(Exception):
    """Base of all errors caused by input: the command line prints it and exits with status 2."""


class InputError(LTError, ValueError):
    """An argument of a public function has a wrong shape, value or type."""


class DataError(LTError):
    """Images, lists or archives are missing, unreadable or do not fit together."""


class CacheError(LTError):
    """A feature cache or checkpoint is missing, corrupt, of another version or of another run."""


class ProfileError(LTError):
    """A profile, backbone or notebook name is unknown, or a profile file is wrong."""


class TrainingError(LTError):
    """A training run went wrong (loss not finite, accuracy at chance)."""


def unknown(kind: str, name: str, known: list[str]) -> str:
    """One sentence for an unknown name that lists the known ones."""
    return f"unknown {kind} {name!r}: choose one of {', '.join(sorted(known))}"


def first_line(error: Exception) -> str:
    """What a library's error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def printable(text: str) -> str:
    """Text from anywhere as one line that controls nothing: newlines, escapes and such are spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


def check_name(kind: str, name: str) -> str:
    """A name that becomes part of a path: letters, digits and . _ - only. Raises InputError for any other."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", name):
        raise InputError(f"{kind} {name!r} cannot name a folder: use letters, digits and . _ - only")
    return name


def is_below(place: object) -> bool:
    """Whether a relative path from a file is one, and stays below the folder that it is read from."""
    parts = PurePosixPath(place).parts if isinstance(place, str) and place.isprintable() else ()
    return bool(parts) and parts[0] != "/" and ".." not in parts


def check_label(name: str, value: object) -> None:
    """The name of a class: a line of text, without what Markdown, HTML and formulas read as markup.

    Raises InputError for any other.
    """
    markup = r"[<>\\`$*|{}\[\]]|^[=+@-]"
    if not isinstance(value, str) or not value.isprintable() or re.search(markup, value):
        raise InputError(f"{name} must be plain text without markup, found {printable(str(value))[:80]!r}")


def number_in_environment(name: str, default: int) -> int:
    """A whole number, 0 or above, of the environment; unset or empty: the default. Raises InputError."""
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdecimal()):
        raise InputError(f"the environment variable {name} must be a whole number, found {text!r}: unset it")
    return int(text)


def check_seed(seed: int | None) -> None:
    """Raises InputError for a seed that NumPy's generators do not take."""
    if seed is not None and not 0 <= seed < 2**32:
        raise InputError(f"--seed must be 0 or above, found {seed} (and below 2**32)")


def as_tensor(name: str, value: object) -> torch.Tensor:
    """`value` as a tensor (NumPy arrays, lists and tensors accepted); raises InputError otherwise."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.ndarray):
        native = value.astype(value.dtype.newbyteorder("="), copy=False)
        shareable = native.flags.writeable and min(native.strides, default=0) >= 0
        value = native if shareable else native.copy()
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be a tensor or array of numbers: {error}") from None


def check_matrix(
    name: str,
    value: object,
    rows: int | None = None,
    columns: int | None = None,
    read: torch.Tensor | None = None,
) -> torch.Tensor:
    """A finite floating-point matrix [rows, columns]; integers and halves become float32.

    read: indices of the rows that are selected; the others are never looked at and may be NaN.
    Raises InputError for another shape, an empty matrix, NaN or infinity.
    """
    matrix = as_tensor(name, value)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise InputError(f"{name} must be a non-empty matrix, found shape {list(matrix.shape)}")
    if rows is not None and matrix.shape[0] != rows:
        raise InputError(f"{name} must have {rows} rows, found shape {list(matrix.shape)}")
    if columns is not None and matrix.shape[1] != columns:
        raise InputError(f"{name} must have {columns} columns, found shape {list(matrix.shape)}")
    if matrix.is_complex():
        raise InputError(f"{name} must be real numbers, found {matrix.dtype}")
    if read is not None:
        matrix = matrix[read.to(matrix.device)]
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.to(torch.float32)
    # One sum is a fast pass over all values; only where it is not finite is there anything to look for.
    if not matrix.sum().isfinite() and not (finite := torch.isfinite(matrix).all(dim=1)).all():
        row = int((~finite).nonzero()[0, 0])
        row = row if read is None else int(read[row])
        raise InputError(
            f"{name} has NaN or infinite values (first in row {row}): remove or repair these rows"
        )
    return matrix


def check_labels(name: str, value: object, num_classes: int, length: int | None = None) -> torch.Tensor:
    """Class indices [M] as int64 within 0..num_classes-1; raises InputError otherwise."""
    labels = as_tensor(name, value)
    if labels.ndim != 1 or labels.numel() == 0:
        raise InputError(f"{name} must be a non-empty vector, found shape {list(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"{name} must be integers, found {labels.dtype}")
    if length is not None and labels.numel() != length:
        raise InputError(f"{name} must have {length} entries, found {labels.numel()}")
    labels = labels.to(torch.int64)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise InputError(f"{name} must lie in 0..{num_classes - 1}, found {low if low < 0 else high}")
    return labels


def check_counts(name: str, value: object, num_classes: int | None = None) -> torch.Tensor:
    """Training images per class [N] as int64, each at least 1; raises InputError otherwise."""
    counts = as_tensor(name, value)
    if counts.ndim != 1 or counts.numel() == 0:
        raise InputError(f"{name} must be a non-empty vector, found shape {list(counts.shape)}")
    if num_classes is not None and counts.numel() != num_classes:
        raise InputError(f"{name} must have {num_classes} entries (one a class), found {counts.numel()}")
    if counts.is_floating_point() and not torch.equal(counts, counts.round()):
        raise InputError(f"{name} must be whole numbers of training images")
    if counts.is_complex() or counts.dtype == torch.bool:
        raise InputError(f"{name} must be integers, found {counts.dtype}")
    counts = counts.to(torch.int64)
    empty = (counts < 1).nonzero().flatten()
    if len(empty):
        raise InputError(
            f"{name}: class {int(empty[0])} has {int(counts[empty[0]])} samples; each class needs one"
        )
    return counts


def check_positive(name: str, value: float, dtype: torch.dtype | None = None) -> float:
    """A finite number above 0, at most the largest of `dtype`; raises InputError otherwise."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be a number above 0, found {value!r}") from None
    if not 0 < number < float("inf"):
        raise InputError(f"{name} must be a finite number above 0, found {number}")
    return number if dtype is None else min(number, torch.finfo(dtype).max)
