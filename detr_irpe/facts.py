"""What a command line builds, as JSON: ``python -m detr_irpe.facts`` with the flags of ``python -m detr_irpe``.

    {"n_parameters": 41317920, "buckets": 81}

For tables and reproduction cards; needs neither data nor weights. Parameters are the trainable ones, as in the logs.
"""

import json
from collections.abc import Sequence

import torch

from detr_irpe.args import get_args_parser
from detr_irpe.models import build_model
from irpe_ops.modules import IRPE, IRPECross
from irpe_train.config import parse_args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(get_args_parser(), argv)
    args.backbone_weights = "none"
    with torch.device("meta"):  # shapes only: nothing is allocated
        model = build_model(args)[0]
    encodings = [module for module in model.modules() if isinstance(module, IRPE | IRPECross)]
    buckets = sum(part.num_buckets for part in encodings[0].parts) if encodings else 0
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(json.dumps({"n_parameters": parameters, "buckets": buckets}))


if __name__ == "__main__":
    main()
