"""Where things lie. Nothing depends on the working directory.

`ROOT` is the checkout (or, for an installed package, the current folder). Two environment variables move
things: `LT_DATA_ROOT` (image data sets, never written to) and `LT_OUTPUT_ROOT` (everything that is written;
default: the checkout).

    out = paths.figures(profile, seed=seed)     # figures/embedded, or figures/embedded+seed=1
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lt_core.checks import DataError, InputError, check_name

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent if (PACKAGE.parent / "notebooks").is_dir() else Path.cwd()
NOTEBOOKS = ROOT / "notebooks"
SHIPPED_CACHES = ROOT / "caches"
STAGED = "LT_STAGED_FIGURES"  # environment variable: where a notebook writes that the runner runs


def output_root() -> Path:
    return Path(os.environ.get("LT_OUTPUT_ROOT") or ROOT).resolve()


def caches() -> Path:
    """Feature caches that training writes: caches/<dataset>/<backbone>/seed<N>/."""
    return output_root() / "caches"


def runs() -> Path:
    """Checkpoints and logs of training runs."""
    return output_root() / "runs"


def decoded() -> Path:
    """Decoded image arrays and other things that can be made again."""
    return output_root() / ".cache"


def figures(profile: str, **parameters: object) -> Path:
    """Tables and figures of a profile (its name, or the path of its file).

    Parameters that are not None have a folder of their own, named by them (figures/embedded+seed=1), so that
    they never overwrite the committed results. Raises InputError for a value that cannot be part of a name.
    """
    staged = os.environ.get(STAGED)
    return (Path(staged) if staged else output_root() / "figures") / _named(profile, parameters)


def reports(profile: str, **parameters: object) -> Path:
    """Executed notebooks and HTML of a profile; parameters as in `figures`."""
    return output_root() / "reports" / _named(profile, parameters)


def _named(profile: str, parameters: dict[str, object]) -> str:
    chosen = {name: str(value) for name, value in sorted(parameters.items()) if value is not None}
    parts = [f"{name}={check_name(name, value)}" for name, value in chosen.items()]
    return "+".join([check_name("profile", Path(profile).stem), *parts])


def data_root(given: str | Path | None = None) -> Path:
    """The folder of the image data sets: `given`, else LT_DATA_ROOT. Raises DataError where there is none."""
    named = given or os.environ.get("LT_DATA_ROOT")
    if not named:
        raise DataError(
            "this needs images: name their folder with --data-root DIR or the variable LT_DATA_ROOT"
        )
    folder = Path(named).expanduser().resolve()
    if not folder.is_dir():
        raise DataError(f"the data root {folder} is not a folder")
    return folder


@contextmanager
def atomic(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that replaces it only when the block ends without an error.

    A killed process leaves at most a file named `.<name>.*.tmp`, which nothing reads. An OSError (disk full)
    names the target. Write plain bytes: libraries that write files themselves report a full disk in ways of
    their own.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode  # that the umask leaves, whatever the writer makes of it
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, target)
    except OSError as error:
        if error.filename is None:  # a failed write does not say where
            raise OSError(error.errno, error.strerror or str(error), str(target)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """sha256 of a file, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


SUMS = "SHA256SUMS"  # of the tables of its folder that are read again, as `sha256sum -c` takes it


def sums_of(folder: Path) -> dict[str, str]:
    """File name -> sha256, as the folder's SHA256SUMS has them."""
    sums = folder / SUMS
    lines = sums.read_text(encoding="utf-8", errors="replace").splitlines() if sums.is_file() else []
    return {name: value for value, _, name in (line.partition("  ") for line in lines)}


def add_sum(file: Path) -> None:
    """Note a file's hash in its folder's SHA256SUMS."""
    sums = sums_of(file.parent) | {file.name: file_digest(file)}
    with atomic(file.with_name(SUMS)) as temporary:
        temporary.write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)), encoding="utf-8")


def check_sum(file: Path) -> None:
    """Raise InputError for a file that is another one than its folder's SHA256SUMS names."""
    if sums_of(file.parent).get(file.name, (found := file_digest(file))) != found:
        raise InputError(f"{file} is not the one that {SUMS} names: run its notebook again")


SEAL = hashlib.sha256().digest_size  # bytes


def write_sealed(target: Path, content: bytes) -> None:
    """Write a file that can be made again, with the hash of its content at the end."""
    with atomic(target) as temporary:
        temporary.write_bytes(content + hashlib.sha256(content).digest())


def read_sealed(path: Path) -> bytes | None:
    """The content that `write_sealed` wrote; None where there is none that is whole: it is made again."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    content = stored[:-SEAL]
    return content if hashlib.sha256(content).digest() == stored[-SEAL:] else None
