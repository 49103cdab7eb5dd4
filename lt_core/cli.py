"""The command line: `python -m lt_core COMMAND`. Errors are one line; tracebacks are for bugs.

python -m lt_core notebooks --profile digits --only 01
python -m lt_core train --profile small --backbone sqrt --data-root DIR
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Imported inside the functions: torch and the rest take seconds, and --help needs none of it.

EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


def parser() -> argparse.ArgumentParser:
    """All commands and their options. Abbreviated options are refused: `--profil` is no `--profile`."""
    top = argparse.ArgumentParser(
        prog="lt_core", description="Compositional knowledge transfer, reproduced.", allow_abbrev=False
    )
    try:
        known = version("lt_core")
    except PackageNotFoundError:
        known = "from the checkout"
    top.add_argument("--version", action="version", version=f"lt_core {known}")
    commands = top.add_subparsers(metavar="COMMAND")

    one = _command(commands, "notebooks", notebooks, "run the notebooks: every table, figure and report")
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
    one.add_argument("--seed", type=int, metavar="N", help="one training seed (default: all of the profile)")
    one.add_argument("-p", action="append", default=[], metavar="NAME=VALUE", help="set a notebook parameter")
    _data_root(one)

    one = _command(commands, "train", train, "train backbones and write their feature caches")
    one.add_argument("--profile", type=_profile, required=True, metavar="NAME", help="scale to train at")
    one.add_argument(
        "--backbone", required=True, metavar="NAME|all", help="which to train; all: every one and seed"
    )
    one.add_argument("--seed", type=int, metavar="N", help="seed (default: the profile's)")
    one.add_argument(
        "--share",
        type=_share,
        default=(1, 1),
        metavar="I/N",
        help="the I-th of N parts of `all`, a GPU each",
    )
    one.add_argument("--out", type=Path, metavar="DIR", help="where the cache goes (default: caches/)")
    _data_root(one)
    _workers(one)
    one.add_argument(
        "--micro-batch", type=int, default=0, metavar="N", help="images of a process at once (default: all)"
    )
    one.add_argument("--compile", action="store_true", help="use torch.compile")

    one = _command(commands, "extract", extract, "write the feature cache of a checkpoint")
    one.add_argument(
        "--profile", type=_profile, required=True, metavar="NAME", help="scale it was trained at"
    )
    one.add_argument("--backbone", required=True, metavar="NAME", help="which backbone it is")
    one.add_argument("--checkpoint", required=True, type=Path, metavar="FILE", help="checkpoint of `train`")
    one.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the cache goes")
    _data_root(one)
    _workers(one)

    one = _command(commands, "study", study, "your own images or features: a report for them")
    one.add_argument(
        "images",
        nargs="?",
        metavar="DIR",
        help="folder with train/<class>/*, val/ and test/, or a data set's name (digits)",
    )
    one.add_argument("--features", type=Path, metavar="FILE.npz", help="arrays in place of images")
    one.add_argument("--network", metavar="NAME", help="timm:NAME, or one of this package")
    one.add_argument(
        "--weights", metavar="FILE|none", help="its weights (default: the public ones of the network)"
    )
    one.add_argument("--size", type=int, metavar="N", help="pixels (default: what the network was made for)")
    one.add_argument("--fine-tune", type=int, default=0, metavar="N", help="train the network, too, N epochs")
    for split in ("train", "val", "test"):
        text = f"list of {split} images, `path label` lines with paths below DIR"
        one.add_argument(f"--{split}", type=Path, metavar="LIST", help=text)
    one.add_argument("--out", type=Path, metavar="DIR", help="where all goes (default: studies/NAME)")
    _data_root(one)
    _workers(one)

    one = _command(commands, "compare", compare, "your own predictions beside the rows of Table 1")
    one.add_argument(
        "--predictions",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help=".npz with `predictions` or `scores` of the test images, one file for each training seed",
    )
    one.add_argument("--backbone", required=True, metavar="NAME", help="whose test images they are of")
    one.add_argument("--profile", type=_profile, default="embedded", metavar="NAME", help="default: embedded")
    one.add_argument("--name", default="mine", help="what the row is called (default: mine)")
    one.add_argument("--out", type=Path, metavar="FILE.csv", help="write the table, too")

    one = _command(commands, "export", export, "a trained network with its classifiers as a file")
    one.add_argument(
        "--profile", type=_profile, required=True, metavar="NAME", help="scale it was trained at"
    )
    one.add_argument("--backbone", required=True, metavar="NAME", help="which backbone it is")
    one.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    one.add_argument("--checkpoint", type=Path, metavar="FILE", help="default: the last one of its run")
    one.add_argument("--classifier", default="ensemble", metavar="NAME", help="default: ensemble")
    one.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the model goes")
    _data_root(one)

    one = _command(commands, "check-data", check_data, "check that a profile's images or caches are whole")
    one.add_argument("--profile", type=_profile, required=True, metavar="NAME", help="whose data sets")
    one.add_argument("--deep", action="store_true", help="decode every image, too")
    _data_root(one)
    return top


def _command(commands, name, function, text) -> argparse.ArgumentParser:
    one = commands.add_parser(name, help=text, allow_abbrev=False)
    one.set_defaults(command=function)
    return one


def _data_root(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="folder of the image data sets (or the variable LT_DATA_ROOT)",
    )


def _workers(command: argparse.ArgumentParser) -> None:
    """How a run of image files uses its computer; results do not depend on it."""
    command.add_argument(
        "--workers", type=int, metavar="N", help="processes that decode images (default: all cores for a GPU)"
    )


def _share(text: str) -> tuple[int, int]:
    """`2/8` as (2, 8): the second of eight parts."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"a share reads I/N with I from 1 to N, as in 2/8, found {text!r}")
    return int(part), int(parts)


def _profile(name: str) -> str:
    """A profile's name as it is, the path of a profile's file made independent of the working directory."""
    return str(Path(name).expanduser().resolve()) if name.endswith(".toml") else name


# ---------------------------------------------------------------- the commands


def notebooks(arguments: argparse.Namespace) -> int:
    from lt_core import runner

    if arguments.list:
        print(runner.listing(arguments.profile))
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
    """One backbone, or `all` of the profile, skipping what is done."""
    from lt_core import backbones, paths
    from lt_core.checks import DataError, check_seed
    from lt_core.data.profiles import load_profile

    chosen = load_profile(arguments.profile)
    if not chosen.trains:
        raise DataError(
            f"profile {chosen.name} ships its caches and trains nothing; `small` trains what it ships"
        )
    check_seed(arguments.seed)
    every = [name for name in chosen.backbones if name not in chosen.aliases]
    names = every if arguments.backbone == "all" else [arguments.backbone]
    seeds = {n: chosen.backbone(n).seeds if arguments.seed is None else [arguments.seed] for n in names}
    jobs = sorted(((seed, name) for name in names for seed in seeds[name]), key=lambda job: job[0])
    part, parts = arguments.share
    jobs = jobs[part - 1 :: parts]
    options = {
        "workers": arguments.workers,
        "micro_batch": arguments.micro_batch,
        "compiles": arguments.compile,
    }
    target = arguments.out.resolve() if arguments.out else paths.caches()
    started, done = time.monotonic(), 0
    for number, (seed, name) in enumerate(jobs, start=1):
        folder = target / backbones.cache_place(chosen, name, seed)
        if backbones.is_made(folder, chosen, name, seed):
            log.info("[%d/%d] %s seed %d: done already, %s", number, len(jobs), name, seed, folder)
            continue
        log.info("[%d/%d] %s seed %d", number, len(jobs), name, seed)
        backbones.train_backbone(chosen, name, seed, arguments.data_root, target, options)
        done += 1
        minutes = (time.monotonic() - started) / 60
        left = minutes / done * (len(jobs) - number)
        log.info("%.1f min so far, about %.0f min left", minutes, left)
    return EXIT_OK


def extract(arguments: argparse.Namespace) -> int:
    """A feature cache from a run's last.pt or best.pt."""
    from lt_core import backbones
    from lt_core.checks import CacheError
    from lt_core.data.profiles import load_profile
    from lt_core.train import load_checkpoint

    saved = load_checkpoint(arguments.checkpoint)
    profile, options = load_profile(arguments.profile), {"workers": arguments.workers}
    seed = saved.get("seed", 0)
    job = backbones.prepare(profile, arguments.backbone, seed, arguments.data_root, options)
    try:
        job.model.load_state_dict(saved["model"])
    except (KeyError, RuntimeError, TypeError):
        raise CacheError(
            f"{arguments.checkpoint} is not a checkpoint of {profile.name}/{arguments.backbone}"
        ) from None
    backbones.write_cache(job, arguments.out, history=saved.get("history"))
    log.info("%s; cache in %s", backbones.summary_line(arguments.out), arguments.out)
    return EXIT_OK


def study(arguments: argparse.Namespace) -> int:
    """Own images with a network, or own features: notebook 15 on them."""
    from lt_core import study
    from lt_core.checks import InputError

    if (arguments.images is None) == (arguments.features is None):
        raise InputError("study needs a folder of images or --features FILE.npz, and not both")
    options = study.Options(
        arguments.out,
        arguments.weights,
        arguments.size,
        arguments.fine_tune,
        arguments.data_root,
        arguments.workers,
    )
    if min(arguments.size or 0, arguments.fine_tune) < 0:
        raise InputError("--size and --fine-tune must be 0 or above")
    lists = {name: getattr(arguments, name) for name in ("train", "val", "test") if getattr(arguments, name)}
    if lists and ("train" not in lists or arguments.features):
        raise InputError("lists of images need --train, and DIR for the images that they name")
    if arguments.features is not None:
        if arguments.network:
            raise InputError("--features come from a network already: leave --network out")
        return study.study_features(arguments.features, options)
    if not arguments.network:
        raise InputError("study needs --network NAME, such as efficientnet_lite0 or timm:resnet50.a1_in1k")
    return study.study_images(arguments.images, arguments.network, options, lists)


def compare(arguments: argparse.Namespace) -> int:
    """A row for own predictions, with its difference to each other row."""
    from lt_core import compare, paths

    asked = arguments.profile, arguments.backbone, arguments.name
    table = compare.compare(compare.own_values(arguments.predictions, *asked), *asked)
    for kind, text in (("accuracy", "Top-1 accuracy, %"), ("difference", f"{arguments.name} less the row")):
        print(f"{text} [95 % interval]\n{table[kind].fillna('').to_string()}\n")
    if arguments.out:
        with paths.atomic(arguments.out) as temporary:
            table.to_csv(temporary, lineterminator="\n")
    return EXIT_OK


def export(arguments: argparse.Namespace) -> int:
    """model.safetensors and config.json."""
    from lt_core.export import export_backbone

    export_backbone(
        arguments.profile,
        arguments.backbone,
        arguments.seed,
        arguments.out,
        arguments.classifier,
        arguments.data_root,
        arguments.checkpoint,
    )
    log.info("model in %s", arguments.out)
    return EXIT_OK


def check_data(arguments: argparse.Namespace) -> int:
    """The images of a profile; of one that trains nothing, its feature caches."""
    from lt_core import backbones
    from lt_core.data import datasets
    from lt_core.data.profiles import load_profile

    profile = load_profile(arguments.profile)
    if profile.trains:
        for line in datasets.check_data(arguments.profile, arguments.data_root, arguments.deep):
            print(line, flush=True)
        return EXIT_OK
    checked = [backbones.load(arguments.profile, n, s) for n, b in profile.backbones.items() for s in b.seeds]
    print(f"{profile.name}: all {len(checked)} feature caches are there and whole; it needs no images")
    return EXIT_OK


# ---------------------------------------------------------------- around them


log = logging.getLogger("lt_core")


def main(words: list[str] | None = None) -> int:
    """Runs one command; the exit status is 0, 1 (a run failed), 2 (bad input) or 130 (interrupted)."""
    arguments = parser().parse_args(words)
    if not hasattr(arguments, "command"):
        parser().print_help()
        return EXIT_OK
    from lt_core.checks import LTError, TrainingError

    try:
        show_progress()
        signal.signal(signal.SIGTERM, _interrupt)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup does
            signal.signal(signal.SIGHUP, _interrupt)
        return arguments.command(arguments)
    except TrainingError as error:
        return _report(error, EXIT_FAILED)
    except LTError as error:
        return _report(error, EXIT_BAD_INPUT)
    except (OSError, MemoryError) as error:  # disk full, no permission: the message names the file
        return _report(error, EXIT_FAILED)
    except RuntimeError as error:
        if "start new thread" not in str(error):
            raise
        return _report(RuntimeError("no more threads may be started: raise `ulimit -u`"), EXIT_FAILED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def show_progress() -> None:
    """Progress of training on standard output, from the first of torchrun's processes alone."""
    from lt_core.checks import number_in_environment

    log.handlers = [logging.StreamHandler(sys.stdout)] if number_in_environment("RANK", 0) == 0 else []
    log.propagate = False
    log.setLevel(logging.INFO)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _report(error: Exception, status: int) -> int:
    from lt_core.checks import printable

    print(f"error: {printable(str(error) or type(error).__name__)}", file=sys.stderr)
    return status
