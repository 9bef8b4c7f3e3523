"""Parameters and multiply-accumulates of a model, counted the way the published table counts them.

    python -m deit_irpe.model_stats [MODEL ...]
    python -m deit_irpe.model_stats --json FLAGS    what a command line of python -m deit_irpe builds, as JSON

The second form needs no data, so the classes are told with ``--num_classes``.

The rule (for one image, L tokens, P patches, width C, H heads of D, N buckets):

* patch embedding ``P * C * (in + 1)``, LayerNorm ``L * C``, linear layer ``L * out * (in + 1)``, classifier
  ``classes * (C + 1)`` on the class token (and again on a distillation token);
* attention: scaling ``L * C``, scores ``H L L D``, softmax ``H L L``, weights times values ``H L L D``;
* encoding on keys or queries ``H L N (D + 1)``, and ``L * C`` more on queries, for scaling the keys;
* encoding on values ``H L L D + H L N``: a vector for every pair of tokens, as the published code computes it.

GELU, additions, dropout and lookups count nothing. The last column counts the value encoding as this package computes
it: weights are summed into buckets first, ``H L L`` additions, then multiplied by the table, ``H L N D``.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence

import torch
from timm.models import VisionTransformer

from deit_irpe.args import get_args_parser
from deit_irpe.models import DEMO_SIZES, RPE_MODELS, build_model, create_model
from irpe_ops.modules import buckets_of
from irpe_train.arguments import positive_int
from irpe_train.config import parse_args
from irpe_train.metrics import count_parameters


def macs(model: VisionTransformer, *, values_by_bucket: bool = False) -> int:
    """Multiply-accumulates for one image at the model's own input size, by the rule above.

    Args:
        values_by_bucket: count the value encoding as computed here, not as published.
    """
    width, patches = model.embed_dim, model.patch_embed.num_patches
    tokens = patches + model.num_prefix_tokens
    kernel = model.patch_embed.proj.weight[0].numel()
    norms = 2 * len(model.blocks) + 1
    heads = (model.head, getattr(model, "head_dist", None))
    total = patches * width * (kernel + 1) + norms * tokens * width
    total += sum(head.out_features * (width + 1) for head in heads if isinstance(head, torch.nn.Linear))
    for block in model.blocks:
        attn = block.attn
        for layer in (attn.qkv, attn.proj, block.mlp.fc1, block.mlp.fc2):
            total += tokens * layer.out_features * (layer.in_features + 1)
        total += tokens * width + attn.num_heads * tokens * tokens * (2 * attn.head_dim + 1)
        total += sum(_encoding_macs(attn, name, tokens, values_by_bucket) for name in ("rpe_q", "rpe_k", "rpe_v"))
    return total


def _encoding_macs(attn, name: str, tokens: int, values_by_bucket: bool) -> int:
    encoding = getattr(attn, name, None)
    if encoding is None:
        return 0
    total = 0
    for table in encoding.parts:
        rows = attn.num_heads * tokens
        if not table.uses_tokens:
            continue  # a lookup and an addition
        if name != "rpe_v":
            total += rows * table.num_buckets * (attn.head_dim + 1)
        elif values_by_bucket:
            total += rows * tokens + rows * table.num_buckets * attn.head_dim
        else:
            total += rows * tokens * attn.head_dim + rows * table.num_buckets
    return total + (tokens * attn.num_heads * attn.head_dim if name == "rpe_q" else 0)


def count(model: nn.Module) -> dict[str, float]:
    """``n_parameters``, ``buckets`` of one encoding, and ``macs_M`` where the rule above covers the model."""
    stats = {"n_parameters": count_parameters(model)}
    if isinstance(model, VisionTransformer):
        with contextlib.suppress(AttributeError):  # some of timm's have other layers
            stats["macs_M"] = macs(model) / 1e6
    return stats | {"buckets": buckets_of(model)}


def stats_of_flags(argv: Sequence[str]) -> dict[str, float]:
    """What the command line ``argv`` of ``python -m deit_irpe`` builds: ``n_parameters``, ``macs_M``, ``buckets``."""
    parser = get_args_parser()
    parser.add_argument("--num_classes", default=1000, type=positive_int)
    args = parse_args(parser, argv)
    with torch.device("meta"):  # shapes only: nothing is allocated
        return count(build_model(args, args.num_classes))


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--json"]:
        print(json.dumps(stats_of_flags(argv[1:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="default: every registered one and the plain DeiTs")
    parser.add_argument("--rpe", help="this encoding instead of the one in the name, e.g. rpe-2.0-product-ctx-1-k")
    args = parser.parse_args(argv)
    plain = [f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")]
    names = args.models or [*plain, *RPE_MODELS, *DEMO_SIZES]
    print(f"{'model':50} {'parameters':>11} {'MACs (M)':>10} {'computed here (M)':>18}")
    for name in names:
        with torch.device("meta"):  # shapes only: nothing is allocated
            model = create_model(name, args.rpe)
        ours = macs(model, values_by_bucket=True)
        print(f"{name:50} {count_parameters(model):>11,} {macs(model) / 1e6:>10.3f} {ours / 1e6:>18.3f}")


if __name__ == "__main__":
    main()
