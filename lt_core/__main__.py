"""`python -m lt_core`."""

import sys

from lt_core.cli import main

if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # progress appears at once in a pipe, too
    sys.exit(main())
