#!/usr/bin/env bash
# usage: scripts/test.sh [--all] [PYTEST ARGUMENTS...]
# Sets up .venv if needed, then checks style and runs the tests. --all adds the tests marked slow.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then sed -n '2,3s/^# //p' scripts/test.sh; exit; fi

IRPE_EXTENSION=require
source scripts/setup.sh demo dev completion docs fast-eval submitit export hugging-face wandb

selection=()
if [ "${1:-}" = --all ]; then
    shift
    selection=(-m "slow or not slow")
fi

say "which backends are here"
"$VENV/bin/python" -m irpe_ops.info --check

say "style"
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .

say "tests"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$VENV/bin/python" -m pytest --numprocesses=auto --dist=worksteal ${selection[@]+"${selection[@]}"} "$@"
