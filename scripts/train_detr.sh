#!/usr/bin/env bash
# usage: DATA=DIR scripts/train_detr.sh CONFIG [FLAGS of python -m detr_irpe ...]
#   CONFIG: a file, or a name from configs/detr/ (rpe-2.0-product-ctx-1-k). DIR: COCO layout (folders or zip files).
#   Writes outputs/NAME/ (OUTPUT=DIR), logs/log_NAME.txt and logs/detail_NAME.log (LOGS=DIR).
#   GPUS NNODES NODE_RANK MASTER_ADDR MASTER_PORT DRY_RUN: see scripts/launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
train detr_irpe detr --coco_path "$@"
