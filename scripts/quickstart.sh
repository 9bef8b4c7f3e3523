#!/usr/bin/env bash
# usage: scripts/quickstart.sh [classification|detection|all]
# Sets up .venv if needed, makes the demo data, trains and evaluates on it, and says where everything is:
# DeiT with iRPE on handwritten digits, then DETR with iRPE on digits scattered over photographs (default: all).
# Run again, it resumes where it stopped, and only evaluates finished runs. DATA=DIR and OUT=DIR move the files.
set -euo pipefail
task=${1:-all}
case "$task" in
    classification | detection | all) ;;
    *) sed -n '2,5s/^# //p' "$0"; [ "$task" = -h ] || [ "$task" = --help ] || exit 2; exit ;;
esac

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" demo
PYTHON=$VENV/bin/python
DATA=${DATA:-demo_data}
OUT=${OUT:-outputs/demo}
export PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH}
# The models are small: on two cores, one core training and one reading images was measured faster than both training.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# train_and_evaluate MODULE CONFIG DATA_FLAG DATA OUTPUT [FLAG...]
train_and_evaluate() {
    local module=$1 config=$2 data_flag=$3 data=$4 output=$5
    shift 5
    say "$module: training with $config (its log: $output/log.txt)"
    "$PYTHON" -m "$module" --config "$config" "$data_flag" "$data" --output_dir "$output" --resume auto "$@"
    say "$module: evaluating $output/best.pth"
    "$PYTHON" -m "$module" --config "$config" "$data_flag" "$data" --output_dir "$output" --eval \
        --resume "$output/best.pth" "$@"
    "$PYTHON" -m irpe_lab.plots "$output" -o "$output/plot.png"
}

say "demo data in $DATA"
"$PYTHON" "$REPO/scripts/make_demo_data.py" --out "$DATA" --task "$task"

if [ "$task" != detection ]; then
    train_and_evaluate deit_irpe configs/deit/demo.yaml --data-path "$DATA/digits" "$OUT/deit"
fi

if [ "$task" != classification ]; then
    say "deit_irpe: training the detector's backbone as a classifier (DETR from scratch does not learn in minutes)"
    "$PYTHON" -m deit_irpe --config configs/detr/demo_backbone.yaml --data-path "$DATA/digits_on_photos" \
        --output_dir "$OUT/backbone" --resume auto
    train_and_evaluate detr_irpe configs/detr/demo.yaml --coco_path "$DATA/coco_digits" "$OUT/detr" \
        --backbone_weights "$OUT/backbone/checkpoint.pth"
    say "detr_irpe: drawing predictions"
    images=("$DATA"/coco_digits/val2017/*)
    "$PYTHON" -m detr_irpe.predict "${images[@]:0:6}" --resume "$OUT/detr/best.pth" \
        --annotations "$DATA/coco_digits/annotations/instances_val2017.json" --out "$OUT/detr/predictions"
fi

say "log.txt, plot.png, best.pth and pictures of each run are in $OUT; its best figure is shown after best.pth above"
