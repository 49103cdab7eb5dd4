"""The command line: `python -m lt_core COMMAND`. Errors are one line; tracebacks are for bugs.

python -m lt_core notebooks --profile digits --only 01
python -m lt_core train --profile small --backbone sqrt --data-root /data
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

# Imported inside the functions: torch and the rest take seconds, and --help needs none of it.

EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="lt_core", description="Compositional knowledge transfer, reproduced.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("notebooks", help="run the notebooks: every table, figure and report")
    one.add_argument(
        "--profile",
        type=_profile,
        default="embedded",
        metavar="NAME",
        help="scale to run at, or a profile's FILE.toml (default: embedded)",
    )
    one.add_argument("--only", metavar="01,08", help="only these notebooks, by number or name")
    one.add_argument(
        "--jobs", type=int, metavar="N", help="notebooks side by side (default: 2, or 1 on a single core)"
    )
    one.add_argument("--force", action="store_true", help="run what is up to date, too")
    one.add_argument("--list", action="store_true", help="show the notebooks, run nothing")
    one.add_argument("--dry-run", action="store_true", help="show what would run and why, run nothing")
    one.add_argument("--seed", type=int, default=0, metavar="N", help="seed (default: 0)")
    one.add_argument("-p", action="append", default=[], metavar="NAME=VALUE", help="set a notebook parameter")
    _add_data_root(one)
    one.set_defaults(command=notebooks)

    one = commands.add_parser("train", help="train backbones and write their feature caches")
    one.add_argument("--profile", type=_profile, required=True, metavar="NAME", help="scale to train at")
    one.add_argument(
        "--backbone", required=True, metavar="NAME|all", help="which to train; all: every one and seed"
    )
    one.add_argument("--seed", type=int, metavar="N", help="seed (default: the profile's)")
    one.add_argument("--out", type=Path, metavar="DIR", help="where the cache goes (default: caches/)")
    _add_data_root(one)
    _add_machine_options(one)
    one.add_argument(
        "--micro-batch", type=int, default=0, metavar="N", help="images of a process at once (default: all)"
    )
    one.add_argument("--compile", action="store_true", help="use torch.compile")
    one.set_defaults(command=train)

    one = commands.add_parser("extract", help="write the feature cache of a checkpoint")
    one.add_argument(
        "--profile", type=_profile, required=True, metavar="NAME", help="scale it was trained at"
    )
    one.add_argument("--backbone", required=True, metavar="NAME", help="which backbone it is")
    one.add_argument("--checkpoint", required=True, type=Path, metavar="FILE", help="checkpoint of `train`")
    one.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the cache goes")
    _add_data_root(one)
    _add_machine_options(one)
    one.set_defaults(command=extract)

    one = commands.add_parser("check-data", help="check that a profile's images are there and whole")
    one.add_argument("--profile", type=_profile, required=True, metavar="NAME", help="whose data sets")
    one.add_argument("--deep", action="store_true", help="decode every image, too")
    _add_data_root(one)
    one.set_defaults(command=check_data)
    return top


def _add_data_root(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="folder of the image data sets (or the variable LT_DATA_ROOT)",
    )


def _add_machine_options(command: argparse.ArgumentParser) -> None:
    """How a run of image files uses its computer; results do not depend on it."""
    command.add_argument(
        "--workers", type=int, metavar="N", help="processes that decode images (default: all cores, shared)"
    )
    command.add_argument("--gpu-decode", action="store_true", help="decode JPEG files on the GPU")


def _profile(name: str) -> str:
    """A profile's name as it is, the path of a profile's file made independent of the working directory."""
    return str(Path(name).expanduser().resolve()) if name.endswith(".toml") else name


def notebooks(arguments: argparse.Namespace) -> int:
    from lt_core import runner

    if arguments.list:
        print(runner.listing())
        return EXIT_OK
    options = runner.Options(
        profile=arguments.profile,
        only=arguments.only,
        jobs=arguments.jobs,
        force=arguments.force,
        data_root=arguments.data_root,
        seed=arguments.seed,
        assignments=arguments.p,
    )
    if arguments.dry_run:
        print(runner.dry_run(options))
        return EXIT_OK
    return runner.run(options)


def train(arguments: argparse.Namespace) -> int:
    from lt_core import backbones

    options = {
        "workers": arguments.workers,
        "decodes_on_device": arguments.gpu_decode,
        "micro_batch": arguments.micro_batch,
        "compiles": arguments.compile,
    }
    backbones.train_command(
        arguments.profile, arguments.backbone, arguments.seed, arguments.data_root, arguments.out, options
    )
    return EXIT_OK


def extract(arguments: argparse.Namespace) -> int:
    from lt_core import backbones

    options = {"workers": arguments.workers, "decodes_on_device": arguments.gpu_decode}
    backbones.extract_command(
        arguments.profile,
        arguments.backbone,
        arguments.checkpoint,
        arguments.out,
        arguments.data_root,
        options,
    )
    return EXIT_OK


def check_data(arguments: argparse.Namespace) -> int:
    from lt_core import datasets

    for line in datasets.check_data(arguments.profile, arguments.data_root, arguments.deep):
        print(line, flush=True)
    return EXIT_OK


def main(words: list[str] | None = None) -> int:
    """Runs one command; the exit status is 0, 1 (a run failed), 2 (bad input) or 130 (interrupted)."""
    arguments = parser().parse_args(words)
    from lt_core.errors import LTError, TrainingError

    try:
        signal.signal(signal.SIGTERM, _interrupt)
        return arguments.command(arguments)
    except TrainingError as error:
        return _report(error, EXIT_FAILED)
    except LTError as error:
        return _report(error, EXIT_BAD_INPUT)
    except OSError as error:  # disk full, no permission: the message names the file
        return _report(error, EXIT_FAILED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _report(error: Exception, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status
