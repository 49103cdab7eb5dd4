"""`python -m lt_core`."""

import sys
from pathlib import Path

if (
    not sys.flags.safe_path
):  # `-m` looks for code in the current folder first: this checkout stands in its place
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lt_core.cli import main

if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # progress appears at once in a pipe, too
    sys.exit(main())
