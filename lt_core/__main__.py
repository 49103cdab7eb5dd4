"""`python -m lt_core`."""

import os
import sys

if not sys.flags.safe_path:  # `-m` looks for code in the current folder: this checkout stands in its place
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from lt_core.cli import main

if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # progress appears at once in a pipe, too
    sys.exit(main())
