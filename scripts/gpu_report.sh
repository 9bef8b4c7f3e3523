#!/usr/bin/env bash
# usage: scripts/gpu_report.sh [DIR]
# For anyone with an NVIDIA GPU: runs the GPU tests, short trainings on the demo data (with scikit-learn), the check of
# all backends and the benchmarks, and writes DIR/report.md (what ran, how it ended, its output) beside the CSV files.
# DIR: gpu_report by default. Takes about 30 minutes.
# BATCH=N: batch size of DeiT's training step (256 needs about 40 GB of GPU memory; use less on smaller GPUs).
# DRY_RUN=1 prints the commands. PYTHON=FILE is the interpreter (default: as in scripts/launch.sh).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
case "${1:-}" in -h | --help) usage ;; esac
OUT=${1:-gpu_report}
REPORT=$OUT/report.md
failed=0

# step TITLE COMMAND...: run it, keep its output in the report, continue even if it fails
step() {
    local title=$1 status=0
    shift
    if [[ -n "${DRY_RUN:-}" ]]; then echo "$*"; return; fi
    echo "== $title"
    printf '\n## %s\n\n```\n$ %s\n' "$title" "$*" >>"$REPORT"
    "$@" 2>&1 | tee -a "$REPORT" || status=$?
    printf '```\n\nexit status %s\n' "$status" >>"$REPORT"
    [[ "$status" == 0 ]] || failed=$((failed + 1))
}

if [[ -z "${DRY_RUN:-}" ]]; then
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        fail "PyTorch finds no GPU here ($PYTHON); see what nvidia-smi says"
    mkdir -p "$OUT"
    printf '# GPU report, %s\n' "$(date -u +%F)" >"$REPORT"
fi
step "The machine" nvidia-smi
step "GPU tests" "$PYTHON" -m pytest -q -m gpu "$ROOT/tests/extension"
DEIT=(--config "$ROOT/configs/deit/demo.yaml" --data-path "$OUT/data/digits" --epochs 3)
DETR=(--config "$ROOT/configs/detr/demo.yaml" --coco_path "$OUT/data/coco_digits" --backbone_weights none --epochs 1)
step "Data to train on" "$PYTHON" "$ROOT/scripts/make_demo_data.py" --out "$OUT/data"
step "DeiT, fp16" "$PYTHON" -m deit_irpe "${DEIT[@]}" --output_dir "$OUT/deit"
step "DeiT, bf16, compiled" "$PYTHON" -m deit_irpe "${DEIT[@]}" --amp bf16 --compile --output_dir "$OUT/deit_compiled"
step "DETR, fp32, deterministic" "$PYTHON" -m detr_irpe "${DETR[@]}" --deterministic --output_dir "$OUT/detr"
set_launcher deit_irpe
step "DeiT, on all GPUs" "${LAUNCH[@]}" "${DEIT[@]}" --output_dir "$OUT/deit_all_gpus"
step "Every backend against fp64, and times" "$PYTHON" -m irpe_ops.info --check
step "Attention, every candidate" "$PYTHON" -m irpe_ops.info --benchmark "$OUT"
for dtype in bf16 fp32; do
    step "One layer, $dtype" "$PYTHON" "$ROOT/scripts/benchmark_ops.py" --device cuda --dtype "$dtype" --output "$OUT"
done
step "DeiT-S, a whole step" "$PYTHON" "$ROOT/scripts/benchmark_models.py" --device cuda --dtype bf16 --batch-size "${BATCH:-256}" \
    --output "$OUT"
step "DETR, a whole step" "$PYTHON" "$ROOT/scripts/benchmark_models.py" --device cuda --dtype bf16 \
    --model detr_resnet50 --batch-size 2 --output "$OUT"
[[ -n "${DRY_RUN:-}" ]] || echo "$failed of the steps failed; everything is in $REPORT"
exit "$((failed > 0))"
