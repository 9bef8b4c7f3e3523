# SPDX-License-Identifier: Apache-2.0
"""A model in numbers, for tables and reproduction cards. Parameters are the trainable ones, as in the logs."""

from collections.abc import Sequence

import torch
from torch import nn

from detr_irpe.args import get_args_parser
from detr_irpe.models import build_model
from irpe_ops.modules import buckets_of
from irpe_train.config import parse_args
from irpe_train.metrics import count_parameters


def stats_of_flags(argv: Sequence[str]) -> dict[str, int]:
    """Counts for the command line ``argv`` of ``python -m detr_irpe``; needs no data or weights."""
    args = parse_args(get_args_parser(), argv)
    args.backbone_weights = "none"
    with torch.device("meta"):  # shapes only: nothing is allocated
        return count(build_model(args)[0])


def count(model: nn.Module) -> dict[str, int]:
    """``n_parameters``, and ``buckets`` of one encoding."""
    return {"n_parameters": count_parameters(model), "buckets": buckets_of(model)}
