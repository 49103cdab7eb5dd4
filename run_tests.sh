#!/usr/bin/env bash
# Runs the tests; makes the environment first if need be. Needs no GPU and no data set.
#
#     ./run_tests.sh                      all but the tests marked slow
#     ./run_tests.sh --slow               those, too
#     ./run_tests.sh tests/test_site.py   any pytest arguments
#
# Tests that read image data sets run where LT_DATA_ROOT names their folder, and are skipped elsewhere.

set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"

selection="not slow"
arguments=()
for argument in "$@"; do
    case "$argument" in
    -h | --help)
        sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    --slow) selection="" ;;
    *) arguments+=("$argument") ;;
    esac
done

source "$root/environment.sh"
prepare_environment
cd "$root"
exec "$LT_PYTHON" -m pytest -m "$selection" ${arguments[@]+"${arguments[@]}"}
