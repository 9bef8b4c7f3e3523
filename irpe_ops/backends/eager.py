# SPDX-License-Identifier: Apache-2.0
"""The definition of `rpe_attention`, in plain PyTorch: every other backend is tested against it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from irpe_ops.attention_call import AttentionCall
from irpe_ops.modules import autocast_dtype


def missing() -> None:
    """It is available everywhere."""


def why_not(call: AttentionCall) -> None:
    """It runs any call."""


def attention(call: AttentionCall) -> Tensor:
    """`rpe_attention` for checked arguments. Returns ``(B, H, L, D)``."""
    weights, v = attention_weights(call), call.v
    if call.dropout_p > 0:
        weights = F.dropout(weights, call.dropout_p)
    out = weights.to(v.dtype) @ v  # (B, H, L, D)
    return out if call.rpe_v is None else out + call.rpe_v(weights, call.height, call.width).to(out.dtype)


def attention_weights(call: AttentionCall) -> Tensor:
    """How much each token attends to each, ``(B, H, L, L)``, before dropout: rows sum to one, or are zero."""
    q, k, _, rpe_q, rpe_k, _, height, width, key_padding_mask, attn_mask, _, scale = call
    q = q * scale
    scores = q @ k.transpose(2, 3)  # (B, H, L, L)
    if rpe_k is not None:
        scores = scores + rpe_k(q, height, width)
    if rpe_q is not None:
        scores = scores + rpe_q(k * scale, height, width).transpose(2, 3)
    if autocast_dtype(q.device) is not None:
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(attn_mask, -math.inf)
        else:
            scores = scores + attn_mask.to(scores.dtype)
    if key_padding_mask is not None:
        scores = scores.masked_fill(key_padding_mask[:, None, None, :], -math.inf)
    if attn_mask is None and key_padding_mask is None:
        return scores.softmax(-1)
    # The softmax of an all -inf row is NaN, and so is its gradient: mask such rows before and after.
    empty = scores.amax(-1, keepdim=True) == -math.inf  # (B, H, L, 1)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
