#!/usr/bin/env bash
# usage: source scripts/setup.sh [EXTRA...]
# Makes .venv in the repository (VENV=DIR for another place), installs this project with the named extras into it and
# builds the compiled extension. Safe to run again: finished, unchanged steps are skipped.
# PYTHON=... picks the interpreter; IRPE_EXTENSION=require makes a failed extension build an error instead of a warning.
# These scripts run in macOS's bash 3.2: no mapfile, and no "${array[@]}" of an empty array.

case "${1:-}" in -h | --help) sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}"; return 0 2>/dev/null || exit 0 ;; esac
REPO=$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$REPO/.venv}

say() { printf '\n== %s\n' "$*"; }
die() { printf '\nERROR: %s\n' "$*" >&2; exit 1; }

make_environment() {
    local python=${PYTHON:-python3}
    [ -x "$VENV/bin/python" ] && [ -x "$VENV/bin/pip" ] && return
    command -v "$python" >/dev/null || die "no $python here. Install Python 3.10 or newer, or name one: PYTHON=/path/to/python3"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "$($python --version) is too old: expected Python 3.10 or newer. Name one: PYTHON=/path/to/python3"
    say "making the virtual environment $VENV"
    "$python" -m venv "$VENV" || die "python -m venv failed. On Debian and Ubuntu: apt install python3-venv"
}

# install_once NAME FILE... -- COMMAND...: run COMMAND unless it last succeeded with exactly these files
install_once() {
    local name=$1 files=()
    shift
    while [ "$1" != -- ]; do files+=("$1"); shift; done
    shift
    local stamp=$VENV/.irpe_$name now
    now=$( (printf '%s\n' "$*"; cat "${files[@]}") | cksum)
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$now" ] && return
    "$@" || return 1
    printf '%s\n' "$now" >"$stamp"
}

install_project() {
    local extras
    extras=$(IFS=,; echo "$*")
    say "installing torch, torchvision, timm and the rest (minutes the first time)"
    install_once project "$REPO/requirements.txt" "$REPO/pyproject.toml" -- \
        "$VENV/bin/pip" install --quiet --disable-pip-version-check --editable "$REPO${extras:+[$extras]}" ||
        die "pip could not install the requirements: see its message above"
}

build_extension() {
    local sources=() file
    while IFS= read -r file; do sources+=("$file"); done < <(find "$REPO/rpe_ops_cuda" -type f \
        \( -name '*.py' -o -name '*.toml' -o -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu*' \) -not -path '*/build/*' | sort)
    say "building the compiled extension rpe_ops_cuda (minutes the first time)"
    if ! install_once extension "$REPO/requirements.txt" "${sources[@]}" -- \
        "$VENV/bin/pip" install --quiet --disable-pip-version-check --force-reinstall --no-deps "$REPO/rpe_ops_cuda"; then
        [ "${IRPE_EXTENSION:-}" = require ] && die "rpe_ops_cuda did not build: see the compiler's message above"
        echo "WARNING: rpe_ops_cuda did not build (see above). Everything runs without it, in plain PyTorch, only slower." >&2
    else
        "$VENV/bin/python" -m irpe_ops.info  # pip is quiet, even about a CPU-only build
    fi
    return 0
}

make_environment
install_project "$@"
build_extension
