"""Makes a documented command end in seconds: appended flags, and ``IRPE_EXTRA_FLAGS`` for training."""

import re

TINY_VIT = ["--input-size", "32", "--model-kwargs", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=2"]
DEIT = "--device cpu --num_workers 0 --epochs 1 --batch-size 8 --warmup-epochs 0"
DETR = "--device cpu --num_workers 0 --epochs 1 --batch_size 2"
TINY_DETR = (
    "--backbone resnet_micro --dilation --hidden_dim 16 --nheads 2 --enc_layers 1 --dec_layers 2 "
    "--dim_feedforward 24 --num_queries 5 --image_size 40"
)
TRAINS = (
    r"-m (?:deit|detr)_irpe(?= |$)|irpe (?:classify|detect) (?:train|eval) |scripts/(?:train|eval)_(?:deit|detr)\.sh|"
    r"(?:irpe_lab\.|irpe )ablate \S*/demo\.yaml"
)
BEHIND = {  # by program
    "ablate": "--dry-run",  # the others need GPUs or SLURM
    "ablate configs/ablation/demo.yaml": "--only rpe-1.9-euc-ctx-1-k --seeds 0 --gpus-per-run 1",
    "irpe_train.card": "deit_tiny_patch16_224_ctx_product_50_shared_k",
    "scripts/benchmark_ops.py": "--quick --only 'DeiT-S B16'",
    "scripts/benchmark_models.py": "--quick --model deit_tiny_patch16_224",
    "scripts/benchmark_memory.py": "--grids 12x12",
    # Each writes some formats; tests/deit/test_export.py and tests/detr/test_export.py write all.
    "irpe classify export": "--formats onnx",
    "irpe classify export --resume outputs/small_k/best.pth": "--formats pt2 safetensors",
    "irpe detect export": "--formats safetensors",
    "scripts/make_demo_data.py": "--task classification",  # detection takes longer and has its own test
}


def extra_flags(command: str) -> str:
    """``IRPE_EXTRA_FLAGS`` for ``command``: empty if nothing is trained or evaluated."""
    started = re.search(TRAINS, command)
    if started is None:
        return ""
    if "detr" in started[0] or "detect" in started[0]:
        return f"{DETR} {TINY_DETR}" + ("" if "--backbone_weights" in command else " --backbone_weights none")
    return DEIT if "demo_backbone" in command else f"{DEIT} {' '.join(TINY_VIT)}"


def smaller(command: str) -> str:
    """``command`` without its comment, with flags appended: the last of a repeated flag wins."""
    command = command.partition("  #")[0]
    for program, flags in reversed(BEHIND.items()):
        if f"{program} " in f"{command} ":
            return f"{command} {flags}"
    return command
