#!/usr/bin/env bash
# usage: DATA=DIR scripts/train_deit.sh CONFIG [FLAGS of python -m deit_irpe ...]
#   CONFIG: a file, or a name from configs/deit/ (small_k). DIR: ImageNet layout (train/ and val/, or the tar files).
#   Writes outputs/NAME/ (OUTPUT=DIR), logs/log_NAME.txt and logs/detail_NAME.log (LOGS=DIR).
#   GPUS NNODES NODE_RANK MASTER_ADDR MASTER_PORT DRY_RUN: see scripts/launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
train deit_irpe deit --data-path "$@"
