#!/usr/bin/env bash
# usage: scripts/download_zoo.sh [NAME ...|all] [--folder DIR]
#   Fetches published checkpoints into torch hub's cache, resuming broken downloads; without a NAME it lists them.
#   DRY_RUN=1 prints the command.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
[[ "${1:-}" != -h && "${1:-}" != --help ]] || usage
start "$PYTHON" -m irpe_train.zoo "$@"
