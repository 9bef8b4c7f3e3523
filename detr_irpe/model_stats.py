# SPDX-License-Identifier: Apache-2.0
"""What a command line builds, as JSON: ``python -m detr_irpe.model_stats --json`` with the flags of ``detr_irpe``.

    {"n_parameters": 41317920, "buckets": 81}

For tables and reproduction cards; needs neither data nor weights. Parameters are the trainable ones, as in the logs.
"""

import json
import sys
from collections.abc import Sequence

import torch
from torch import nn

from detr_irpe.args import get_args_parser
from detr_irpe.models import build_model
from irpe_ops.modules import buckets_of
from irpe_train.config import parse_args
from irpe_train.errors import RunError
from irpe_train.metrics import count_parameters


def stats_of_flags(argv: Sequence[str]) -> dict[str, int]:
    """What the command line ``argv`` of ``python -m detr_irpe`` builds: ``n_parameters`` and ``buckets``."""
    args = parse_args(get_args_parser(), argv)
    args.backbone_weights = "none"
    with torch.device("meta"):  # shapes only: nothing is allocated
        return count(build_model(args)[0])


def count(model: nn.Module) -> dict[str, int]:
    """``n_parameters``, and ``buckets`` of one encoding."""
    return {"n_parameters": count_parameters(model), "buckets": buckets_of(model)}


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        print(json.dumps(stats_of_flags(argv[1:] if argv[:1] == ["--json"] else argv)))
    except (RunError, ValueError) as error:
        sys.exit(f"detr_irpe.model_stats: {error}")


if __name__ == "__main__":
    main()
