"""Whole runs of the command line, tiny: a micro backbone and two layers of width 16 on 40-pixel images."""

import json
from pathlib import Path

from detr_irpe.args import get_args_parser
from detr_irpe.train import main
from tests.helpers.processes import Ended, run_ranks

TINY = [
    "--backbone",
    "resnet_micro",
    "--backbone_weights",
    "none",
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
    "--enc_rpe2d",
    "rpe-2.0-product-ctx-1-k",
    "--lr",
    "1e-3",
    "--epochs",
    "2",
]
QUICK = ["--device", "cpu", "--num_workers", "0", "--no-tensorboard"]


def detr(data: Path, output_dir: Path, *flags, world_size: int = 1, main=main, timeout: float = 120) -> list[Ended]:
    """``python -m detr_irpe`` in fresh processes; returns each exit and output."""
    argv = ["--coco_path", str(data), "--output_dir", str(output_dir), *QUICK, *TINY, *map(str, flags)]
    outputs = output_dir.parent / "outputs"
    return run_ranks(main, get_args_parser, argv, outputs, world_size=world_size, timeout=timeout)


def detr_ok(data: Path, output_dir: Path, *flags, **options) -> str:
    """The same, but every process must succeed; returns the output of the first."""
    ended = detr(data, output_dir, *flags, **options)
    for one in ended:
        assert one.code == 0, one.text
    return ended[0].text


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
