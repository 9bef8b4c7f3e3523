"""What a command line builds, as JSON: ``python -m deit_irpe.facts`` with the flags of ``python -m deit_irpe``.

    {"n_parameters": 22089064, "macs_M": 4658.819776, "buckets": 50}

For tables and reproduction cards; needs no data, so the classes are told with ``--num_classes``.
"""

import json
from argparse import Namespace
from collections.abc import Sequence

import torch
from timm.models import VisionTransformer
from torch import nn

from deit_irpe.args import get_args_parser, image_size
from deit_irpe.complexity import macs, parameters
from deit_irpe.models import create_model
from deit_irpe.train import model_options
from irpe_ops.modules import IRPE, IRPECross
from irpe_train.arguments import positive_int
from irpe_train.config import parse_args


def build_model(args: Namespace) -> nn.Module:
    """The untrained model of a run's flags as its checkpoint has them, the published ones included."""
    flags = Namespace(**vars(get_args_parser().parse_args([])) | vars(args))
    return create_model(flags.model, flags.rpe, **model_options(flags, image_size(flags.input_size), flags.nb_classes))


def main(argv: Sequence[str] | None = None) -> None:
    parser = get_args_parser()
    parser.add_argument("--num_classes", default=1000, type=positive_int)
    args = parse_args(parser, argv)
    args.nb_classes = args.num_classes
    with torch.device("meta"):  # shapes only: nothing is allocated
        model = build_model(args)
    facts = {"n_parameters": parameters(model)}
    if isinstance(model, VisionTransformer):  # the counting rule is for those
        facts["macs_M"] = macs(model) / 1e6
    encodings = [module for module in model.modules() if isinstance(module, IRPE | IRPECross)]
    facts["buckets"] = sum(part.num_buckets for part in encodings[0].parts) if encodings else 0
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
