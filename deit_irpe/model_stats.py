# SPDX-License-Identifier: Apache-2.0
"""Parameters and multiply-accumulates of a model, counted the way the published table counts them.

    python -m deit_irpe.model_stats [MODEL ...]

The rule (for one image, L tokens, P patches, width C, H heads of D, N buckets):

* patch embedding ``P * C * (in + 1)``, LayerNorm ``L * C``, linear layer ``L * out * (in + 1)``, classifier
  ``classes * (C + 1)`` on the class token (and again on a distillation token);
* attention: scaling ``L * C``, scores ``H L L D``, softmax ``H L L``, weights times values ``H L L D``;
* encoding on keys or queries ``H L N (D + 1)``, and ``L * C`` more on queries, for scaling the keys;
* encoding on values ``H L L D + H L N``: a vector for every pair of tokens, as the published code computes it.

GELU, additions, dropout and lookups count zero. A hybrid's convolutions count as in PyTorch's FLOP counter. Models
with other parts are refused.
"""

import contextlib
import copy
from collections.abc import Sequence

import torch
from timm.models import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deit_irpe.args import get_args_parser
from deit_irpe.models import DEMO_SIZES, RPE_MODELS, build_model, create_model
from irpe_ops.modules import buckets_of
from irpe_train.config import parse_args
from irpe_train.errors import reported_by
from irpe_train.flags import FlagParser
from irpe_train.metrics import count_parameters


def macs(model: VisionTransformer) -> int:
    """Multiply-accumulates for one image at the model's own input size, by the rule above.

    Raises: ValueError: the rule does not cover this model.
    """
    try:
        return _macs(model)
    except AttributeError as error:
        raise ValueError(f"the rule does not cover every part of this {type(model).__name__}: {error}") from error


def _macs(model: VisionTransformer) -> int:
    width, patches = model.embed_dim, model.patch_embed.num_patches
    tokens = patches + model.num_prefix_tokens
    kernel = model.patch_embed.proj.weight[0].numel()
    norms = 2 * len(model.blocks) + 1
    heads = (model.head, getattr(model, "head_dist", None))
    total = patches * width * (kernel + 1) + norms * tokens * width + _backbone_macs(model.patch_embed)
    if getattr(model, "attn_pool", None) is not None:
        raise AttributeError("attention pooling")
    total += sum(head.out_features * (width + 1) for head in heads if isinstance(head, torch.nn.Linear))
    for block in model.blocks:
        attn = block.attn
        if attn.qkv.out_features != 3 * attn.num_heads * attn.head_dim:
            raise AttributeError(type(attn).__name__)
        for layer in (attn.qkv, attn.proj, block.mlp.fc1, block.mlp.fc2):
            total += tokens * layer.out_features * (layer.in_features + 1)
        total += tokens * width + attn.num_heads * tokens * tokens * (2 * attn.head_dim + 1)
        total += sum(_encoding_macs(attn, name, tokens) for name in ("rpe_q", "rpe_k", "rpe_v"))
    return total


def _backbone_macs(patch_embed: nn.Module) -> int:
    """The convolutions in front of a hybrid's patch embedding."""
    if not hasattr(patch_embed, "backbone"):
        return 0
    backbone = copy.deepcopy(patch_embed.backbone).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.zeros(1, 3, *patch_embed.img_size, device="meta"))
    return counter.get_total_flops() // 2


def _encoding_macs(attn, name: str, tokens: int) -> int:
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
        else:
            total += rows * tokens * attn.head_dim + rows * table.num_buckets
    return total + (tokens * attn.num_heads * attn.head_dim if name == "rpe_q" else 0)


def count(model: nn.Module) -> dict[str, float]:
    """``n_parameters``, ``buckets`` of one encoding, and ``macs_M`` if the rule above covers the model."""
    stats = {"n_parameters": count_parameters(model)}
    with contextlib.suppress(ValueError):
        stats["macs_M"] = macs(model) / 1e6
    return stats | {"buckets": buckets_of(model)}


def stats_of_flags(argv: Sequence[str]) -> dict[str, float]:
    """Counts of the model that the command line ``argv`` of ``python -m deit_irpe`` builds, with 1000 classes."""
    with torch.device("meta"):  # shapes only: nothing is allocated
        return count(build_model(parse_args(get_args_parser(), argv), 1000))


def main(argv: Sequence[str] | None = None) -> None:
    parser = FlagParser("python -m deit_irpe.model_stats", description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="default: every registered one and the plain DeiTs")
    parser.add_argument("--rpe", help="this encoding instead of the one in the name, e.g. rpe-2.0-product-ctx-1-k")
    with reported_by(parser.prog):
        print_table(**vars(parser.parse_args(argv)))


def print_table(models: Sequence[str], rpe: str | None) -> None:
    """One line per model; the registered ones and the plain DeiTs if none are named."""
    plain = [f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")]
    print(f"{'model':50} {'parameters':>11} {'MACs (M)':>10}")
    for name in models or [*plain, *RPE_MODELS, *DEMO_SIZES]:
        with torch.device("meta"):  # shapes only: nothing is allocated
            model = create_model(name, rpe)
        try:
            counted = macs(model) / 1e6
        except ValueError as error:
            raise ValueError(f"model {name!r}: {error}") from error
        print(f"{name:50} {count_parameters(model):>11,} {counted:>10.3f}")


if __name__ == "__main__":
    main()
