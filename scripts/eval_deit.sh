#!/usr/bin/env bash
# usage: DATA=DIR scripts/eval_deit.sh CONFIG [CHECKPOINT] [FLAGS of python -m deit_irpe ...]
#   CONFIG: a file, or a name from configs/deit/ (small_k). Without CHECKPOINT: the published one, downloaded if needed.
#   --expect compares with the published row and ends in PASS or FAIL.
#   GPUS NNODES NODE_RANK MASTER_ADDR MASTER_PORT DRY_RUN: see scripts/launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
evaluate deit_irpe deit --data-path "$@"
