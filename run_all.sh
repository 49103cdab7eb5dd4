#!/usr/bin/env bash
# Regenerates every table, figure and report of the paper. One command, from a fresh clone:
#
#     ./run_all.sh
#
# Needs     Linux or macOS with Python 3.11 to 3.14 (or conda) and about 7 GB of disk. Two CPU cores and 4 GB of memory
#           are enough; no GPU, no data set. The network is used once, to install requirements.txt into .venv
#           (an active environment that satisfies the pins is used instead).
# Takes     two minutes or more for the installation, once, and about eight for the notebooks. A second run with
#           nothing changed takes seconds.
# Leaves    figures/PROFILE/   tables (CSV, Markdown) and figures (PNG, SVG, and the plotted numbers)
#           reports/PROFILE/   index.html, one HTML report a notebook, and the executed notebooks
# Exits     0 if all went well, 1 if a notebook failed (the others still run), 2 for a wrong argument.
#
# Options
#   --profile NAME      embedded (default: the feature caches that come with the repository), digits (everything
#                       trained live in minutes), small (trained from images), paper (full scale, on GPUs)
#   --only 01,08        only these notebooks, by number or name
#   --jobs N            notebooks side by side (default: 2, or 1 on a single core)
#   --force             run what is up to date, too
#   --list              show the notebooks and what they produce, run nothing
#   --dry-run           show what would run and why, run nothing
#   --data-root DIR     folder of the image data sets (or the variable LT_DATA_ROOT)
#   --seed N            one training seed (default: all of the profile); writes to a folder of its own
#   -p NAME=VALUE       set a notebook parameter (a folder of its own, too); may be repeated
#   --help              this text
#
# Variables: LT_OUTPUT_ROOT (write elsewhere), PYTHON (the Python to use), LT_DISK_GB (see environment.sh).
# A smaller CPU build of torch: set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index, and LT_DISK_GB=2.

set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"

for argument in "$@"; do
    if [ "$argument" = --help ] || [ "$argument" = -h ]; then
        sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
    fi
done

source "$root/environment.sh"
prepare_environment
exec "$LT_PYTHON" -m lt_core notebooks "$@"
