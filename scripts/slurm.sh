#!/usr/bin/env bash
# usage: DATA=DIR scripts/slurm.sh {train_deit|train_detr|eval_deit|eval_detr} CONFIG [FLAGS ...]
#   Submits that script as a SLURM job: one task per node, each starting its own processes.
#   NNODES=N (1), GPUS=N per node (8), SBATCH="--partition=gpu --time=72:00:00": more options for sbatch.
#   DRY_RUN=1 prints the sbatch command, then the command of the first node.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
[[ "${1:-}" != -h && "${1:-}" != --help ]] || usage
(($# >= 2)) || usage 2 >&2
script="$ROOT/scripts/$1.sh"
[[ "$1" =~ ^(train|eval)_(deit|detr)$ ]] || fail "$1: expected train_deit, train_detr, eval_deit or eval_detr"
config="$(find_config "${1#*_}" "$2")"
export NNODES="${NNODES:-1}" GPUS="${GPUS:-8}"
name="$(basename "${config%.yaml}")"
shift 2
read -r -a more <<<"${SBATCH:-}"
start sbatch "--job-name=$name" "--nodes=$NNODES" --ntasks-per-node=1 "--gpus-per-node=$GPUS" --export=ALL \
    "--output=slurm_%j_$name.txt" ${more[@]+"${more[@]}"} --wrap "srun --kill-on-bad-exit=1 $(printf '%q ' "$script" "$config" "$@")"
if [[ -n "${DRY_RUN:-}" ]]; then NODE_RANK=0 MASTER_ADDR="${MASTER_ADDR:-FIRST_NODE}" "$script" "$config" "$@"; fi
