# SPDX-License-Identifier: Apache-2.0
"""Image relative position encoding (iRPE; Wu et al., ICCV 2021) for any PyTorch attention over a grid of tokens."""

from irpe_ops.attention import rpe_attention
from irpe_ops.buckets import get_bucket_ids_2d
from irpe_ops.config import get_rpe_config, parse_rpe_spec
from irpe_ops.equip import equip
from irpe_ops.methods import register_bucket_method
from irpe_ops.modules import build_rpe
from irpe_ops.rpe_index import rpe_index

__all__ = [
    "build_rpe",
    "equip",
    "get_bucket_ids_2d",
    "get_rpe_config",
    "parse_rpe_spec",
    "register_bucket_method",
    "rpe_attention",
    "rpe_index",
]
