"""Whole runs of the command line, tiny: two blocks of width 32 on 32-pixel images."""

from pathlib import Path

from deit_irpe.args import get_args_parser
from deit_irpe.train import main
from tests.helpers.processes import Ended, run_ranks

MODEL = [
    "--model",
    "deit_tiny_patch16_224",
    "--model-kwargs",
    "patch_size=8",
    "embed_dim=32",
    "depth=2",
    "num_heads=2",
    "--rpe",
    "rpe-1.9-product-ctx-1-qkv",
    "--input-size",
    "32",
    "--drop-path",
    "0.1",
]
QUICK = ["--device", "cpu", "--num_workers", "0", "--no-tensorboard", "--batch-size", "8", "--warmup-epochs", "0"]
PLAIN = ["--aa", "none", "--reprob", "0", "--mixup", "0", "--cutmix", "0", "--hflip", "0", "--no-repeated-aug"]


def deit(
    data: Path, output_dir: Path, *flags, world_size: int = 1, model=MODEL, main=main, timeout: float = 120
) -> list[Ended]:
    """``python -m deit_irpe`` in fresh processes; returns each exit and output."""
    argv = ["--data-path", str(data), "--output_dir", str(output_dir), *QUICK, *model, *map(str, flags)]
    outputs = output_dir.parent / "outputs"
    return run_ranks(main, get_args_parser, argv, outputs, world_size=world_size, timeout=timeout)


def deit_ok(data: Path, output_dir: Path, *flags, **options) -> str:
    """The same for one process that must succeed; returns its output."""
    (ended,) = deit(data, output_dir, *flags, **options)
    assert ended.code == 0, ended.text
    return ended.text
