"""Appends flags to the programs that the pages of the documentation start, so that each ends in seconds.

A flag that comes again wins, so a documented command line is read as it stands and then made small. Python imports this
module at its start where its folder is on PYTHONPATH, and so reaches what a shell script or ``torchrun`` starts.
"""

import sys

DEIT = ["--device", "cpu", "--num_workers", "0", "--epochs", "1", "--batch-size", "8", "--warmup-epochs", "0"]
TINY_VIT = ["--input-size", "32", "--model-kwargs", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=2"]
DETR = ["--device", "cpu", "--num_workers", "0", "--epochs", "1", "--batch_size", "2"]
TINY_DETR = [
    "--backbone",
    "resnet_micro",
    "--dilation",
    "--hidden_dim",
    "16",
    "--nheads",
    "2",
    "--enc_layers",
    "1",
    "--dec_layers",
    "2",
    "--dim_feedforward",
    "24",
    "--num_queries",
    "5",
    "--image_size",
    "40",
]
ONE_RUN = ["--only", "rpe-1.9-euc-ctx-1-k", "--seeds", "0", "--gpus-per-run", "1"]


def smaller(words: list[str]) -> list[str]:
    """What is appended to the command line ``words``, which is without its interpreter."""
    program, flags = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    line = " ".join(flags)
    vit = [] if "demo_backbone" in line else TINY_VIT
    pretrained = [] if "--backbone_weights" in line else ["--backbone_weights", "none"]
    return {
        "deit_irpe": DEIT + vit,
        "detr_irpe": [*DETR, *TINY_DETR, *pretrained],
        "irpe_lab.ablate": ONE_RUN if "demo.yaml" in line else ["--dry-run"],  # the others want GPUs or SLURM
        "irpe_train.card": ["deit_tiny_patch16_224_ctx_product_50_shared_k"],
        "scripts/benchmark_ops.py": ["--quick", "--only", "DeiT-S B16"],
        "scripts/benchmark_models.py": ["--quick", "--model", "deit_tiny_patch16_224"],
        "scripts/benchmark_memory.py": ["--side", "12"],
        "scripts/make_demo_data.py": ["--task", "classification"],  # detection takes longer; a test of its own has it
        "examples/finetune_digits.py": ["--epochs", "1"],
    }.get(program, [])


def _program(words: list[str]) -> list[str]:
    """``sys.orig_argv`` from its ``-m MODULE`` or script on."""
    for number, word in enumerate(words[1:], 1):
        if not word.startswith("-") or word in ("-m", "-c"):
            return words[number:]
    return ["-"]


sys.argv += smaller(_program(sys.orig_argv))
