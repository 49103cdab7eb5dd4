"""Forked processes that die, or meet a full disk, at a chosen moment of a write."""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.chmod", "os.mkdir", "tempfile.mkstemp"}


def at_file_use(folder: Path, number: int, action: Callable[[], None], word: str = "") -> None:
    """Call `action` at this process's number-th use of a file in `folder` that has `word` in its name."""
    left, inside = number, str(folder.resolve())

    def watch(event: str, arguments: tuple) -> None:
        nonlocal left
        if event not in FILE_EVENTS or not isinstance(arguments[0], str | os.PathLike):
            return
        name = os.fspath(arguments[0])
        if isinstance(name, str) and name.startswith(inside) and word in os.path.basename(name):
            left -= 1
            if left == 0:
                action()

    sys.addaudithook(watch)


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def forked(work: Callable[[], None]) -> int:
    """Run `work` in a forked process: 0 if all was well, 3 after an OSError, 4 after another error, or -9."""
    child = os.fork()
    if not child:
        status = 4
        try:
            torch.set_num_threads(1)  # threads of the parent's pools do not live here
            work()
            status = 0
        except OSError as error:
            status = 3 if error.filename else 4  # it must say which file
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def limit_files(size: int) -> None:
    """From here on no file of this process can grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
