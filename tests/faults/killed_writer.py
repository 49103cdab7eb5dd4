"""Runs the command line and dies as by SIGKILL at a chosen moment of the first write of a chosen file.

    python killed_writer.py FILE MOMENT WORDS...

MOMENT: `opened` (an empty temporary file is there), `half` (half of it is written), `written` (all of it, not
yet in place) or `replaced` (in place, nothing after it done). A file of that name that is never written lets
the command end as usual.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lt_core import cli, paths

MOMENTS = ("opened", "half", "written", "replaced")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying_at(file: str, moment: str) -> None:
    """Make `paths.atomic` end this process at that moment."""
    whole = paths.atomic

    @contextmanager
    def atomic(target: Path) -> Iterator[Path]:
        with whole(target) as temporary:
            hit = target.name == file
            if hit and moment == "opened":
                die()
            yield temporary
            if hit and moment == "half":
                os.truncate(temporary, temporary.stat().st_size // 2)
            if hit and moment in ("half", "written"):
                die()
        if hit and moment == "replaced":
            die()

    paths.atomic = atomic


if __name__ == "__main__":
    assert sys.argv[2] in MOMENTS
    dying_at(sys.argv[1], sys.argv[2])
    if notebooks := os.environ.get("FAULTS_NOTEBOOKS"):
        paths.NOTEBOOKS = Path(notebooks)
    sys.exit(cli.main(sys.argv[3:]))
