#!/usr/bin/env bash
# usage: DATA=DIR scripts/ablate_modes.sh {deit|detr} [FLAGS of python -m irpe_lab.ablate ...]
#   Methods x modes x sharing x queries, keys, values: runs configs/ablation/{deit,detr}_modes.yaml, one run per GPU; start it again to resume.
#   --slurm runs them as SLURM jobs; DRY_RUN=1 prints the command of each run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
ablate modes "$@"
