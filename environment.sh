# Makes or reuses the Python environment. Sourced by run_all.sh, run_tests.sh and .ci/run:
#
#     root=/path/to/checkout; source "$root/environment.sh"; prepare_environment
#     "$LT_PYTHON" -m lt_core ...
#
# An active conda or virtual environment that satisfies every pin of requirements.txt is used as it is.
# Otherwise .venv is made (or completed, or brought up to date). Nothing is downloaded when nothing is missing.
# Python reads code from this checkout and that environment alone: not from the current folder, the caller's
# PYTHONPATH or the home folder.
#
#     PYTHON      the Python, 3.11 to 3.14, to build .venv with (default: python3.11 to python3.14, python3, python)
#     LT_DISK_GB  free disk space asked for, in GB (default 7, for the default torch build)

unset PYTHONPATH PYTHONHOME PYTHONSTARTUP
export PYTHONSAFEPATH=1 PYTHONNOUSERSITE=1

say() { printf '%s\n' "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Pins that interpreter $1 does not satisfy, one a line; a local version (2.14.1+cpu) satisfies its pin.
unsatisfied_pins() {
    "$1" - "$root/requirements.txt" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version

if not (3, 11) <= sys.version_info[:2] <= (3, 14):
    print("python 3.11 to 3.14")
with open(sys.argv[1], encoding="utf-8") as file:
    pins = [line.split("#")[0].strip() for line in file]
for pin in filter(None, pins):
    name, _, wanted = pin.partition("==")
    try:
        found = version(name)
    except PackageNotFoundError:
        found = ""
    if found != wanted and found.split("+")[0] != wanted:
        print(pin)
PYTHON
}

satisfies_pins() {
    local missing
    missing="$(unsatisfied_pins "$1" 2>/dev/null)" && [ -z "$missing" ]
}

# The interpreter of an active environment, other than .venv, that satisfies the pins.
find_active() {
    local prefix missing
    for prefix in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
        [ -n "$prefix" ] && [ -x "$prefix/bin/python" ] && ! [ "$prefix" -ef "$root/.venv" ] || continue
        if satisfies_pins "$prefix/bin/python"; then
            say "$prefix/bin/python"
            return 0
        fi
        missing="$(unsatisfied_pins "$prefix/bin/python" 2>/dev/null | head -n 1)" || true
        say "the active environment $prefix lacks ${missing:-a working Python} (and maybe more): using .venv" >&2
    done
    return 1
}

is_right_python() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1; }

# A Python 3.11 to 3.14 that can make virtual environments.
find_python() {
    local candidate found=""
    if [ -n "${PYTHON:-}" ]; then
        is_right_python "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 to 3.14"
        found="$PYTHON"
    else
        for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do
            if is_right_python "$candidate"; then
                found="$candidate"
                break
            fi
        done
        [ -n "$found" ] || fail "no Python 3.11 to 3.14 found: install one, or name it with PYTHON=/path/to/python3.11," \
            "or use conda (environment.yml)"
    fi
    "$found" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        fail "$found cannot make environments: install its venv module (Debian, Ubuntu: the package python3-venv)"
    say "$found"
}

# Disk space, unless the big part (torch) is already there.
check_disk() {
    local needed="${LT_DISK_GB:-7}" free
    "$root/.venv/bin/python" -c 'import importlib.metadata as m; m.version("torch")' >/dev/null 2>&1 && return 0
    free="$("$1" -c 'import shutil, sys; print(shutil.disk_usage(sys.argv[1]).free // 10**9)' "$root")" ||
        fail "cannot read the free disk space of $root"
    [ "$free" -ge "$needed" ] ||
        fail "the environment needs about $needed GB of disk space and $root has $free GB free." \
            "A CPU build of torch needs about 2 GB: set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index" \
            "and LT_DISK_GB=2, or install the pinned versions of torch and torchvision from there" \
            "into an active environment first"
}

# What .venv/.complete must contain: it changes with the pins, the package's declaration and its place.
stamp() { { cat "$root/requirements.txt" "$root/pyproject.toml" && printf '%s' "$root"; } | cksum; }

is_complete() {
    [ -f "$root/.venv/.complete" ] && [ "$(cat "$root/.venv/.complete")" = "$(stamp)" ] &&
        is_right_python "$root/.venv/bin/python"
}

# An installation that was killed can leave a package that pip takes for installed: it has no RECORD yet.
forget_half_installed() {
    local info
    for info in "$root"/.venv/lib/python3.*/site-packages/*.dist-info; do
        if [ -d "$info" ] && ! [ -f "$info/RECORD" ]; then rm -rf "$info"; fi
    done
}

pip_install() {
    # </dev/null: no question can be asked; PIP_USER: not into the home folder; PIP_QUIET: errors alone.
    PIP_USER=0 PIP_QUIET=2 PIP_DISABLE_PIP_VERSION_CHECK=1 "$root/.venv/bin/python" -m pip install "$@" </dev/null ||
        fail "the installation failed, pip's message is above: repair that (network? disk?) and run this again;" \
            "it goes on where it stopped"
}

make_venv() {
    local python
    python="$(find_python)" || exit 1
    check_disk "$python"
    rm -f "$root/.venv/.complete"
    if ! "$root/.venv/bin/python" -m pip --version >/dev/null 2>&1; then
        say "making .venv with $("$python" --version 2>&1)"
        "$python" -m venv --clear "$root/.venv" || fail "cannot make $root/.venv"
    fi
    forget_half_installed
    if ! satisfies_pins "$root/.venv/bin/python"; then
        say "installing requirements.txt into .venv (5 to 7 GB with the default torch; some minutes, once, without a word)"
        pip_install -r "$root/requirements.txt"
    fi
    (cd "$root" && pip_install --no-deps --no-build-isolation -e .) || exit 1
    stamp >"$root/.venv/.complete"
    say "the environment .venv is ready"
}

# make_venv, one at a time: who comes second waits and then finds it done.
make_venv_locked() {
    [ -w "$root" ] || fail "cannot write to $root: .venv must be made there"
    if ! command -v flock >/dev/null 2>&1; then
        make_venv
        return
    fi
    (
        flock -n 9 || { say "another run is installing .venv: waiting for it"; flock 9; }
        is_complete || make_venv
    ) 9>>"$root/.venv.lock" || exit 1
}

# Sets LT_PYTHON; makes the package importable whatever environment is used.
prepare_environment() {
    if LT_PYTHON="$(find_active)"; then
        say "using the active environment: $LT_PYTHON"
    else
        is_complete || make_venv_locked
        LT_PYTHON="$root/.venv/bin/python"
    fi
    export PYTHONPATH="$root"
}
