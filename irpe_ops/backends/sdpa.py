# SPDX-License-Identifier: Apache-2.0
"""`rpe_attention` by PyTorch's own fused attention, with the encodings as its additive mask: any device, plain PyTorch.

The mask is a ``(B, H, L, L)`` tensor, so memory grows with L squared, once, where the definition has several of them.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from irpe_ops.attention_call import AttentionCall, Encoding
from irpe_ops.rpe_index import has_kernel, rpe_index, under_function_transform

# The memory-efficient kernel wants rows of the mask to start at a multiple of so many elements, or it copies the mask.
ROW_MULTIPLE = 8


def missing() -> str | None:
    """Why this backend does not exist here: it always does."""
    return None


def why_not(call: AttentionCall) -> str | None:
    """None if this call can run here, else the reason and what to do."""
    if call.rpe_v is not None:
        return "it has no encoding on values; use backend='eager', or leave v out of rpe_on"
    if under_function_transform():
        return "torch.func and forward-mode differentiation need plain PyTorch; use backend='eager'"
    return None


def attention(call: AttentionCall) -> Tensor:
    """`rpe_attention` for arguments that passed its checks and `why_not`. Returns ``(B, H, L, D)``.

    The mask has the dtype of q. Lookups, and sums of its gradient by bucket, are fp32 where no kernel of rpe_ops_cuda
    sums half precision in fp32.
    """
    q, k, v, rpe_q, rpe_k, _, height, width, key_padding_mask, attn_mask, dropout_p, scale = call
    mask = None
    if rpe_k is not None:
        mask = _added_to_scores(q, rpe_k, height, width, scale)
    if rpe_q is not None:
        of_keys = _added_to_scores(k, rpe_q, height, width, scale).transpose(2, 3)
        mask = of_keys if mask is None else _in_place(mask, torch.Tensor.add_, of_keys)
    ours = mask is not None
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        added = attn_mask.to(q.dtype)
        mask = _in_place(mask, torch.Tensor.add_, added) if ours else added
    excluded = attn_mask if attn_mask is not None and attn_mask.dtype == torch.bool else None
    if key_padding_mask is not None:
        padding = key_padding_mask[:, None, None, :]
        excluded = padding if excluded is None else excluded | padding
    if excluded is not None:
        mask = q.new_zeros((1,) * 4) if mask is None else mask
        mask = _in_place(mask, torch.Tensor.masked_fill_, excluded, -math.inf, ours=ours)
    empty = None  # queries without a key get zeros; kernels give NaN, zeros or the mean of all values
    if attn_mask is not None:
        empty = mask.detach().amax(-1, keepdim=True) == -math.inf  # (B, H, L, 1), or what broadcasts to it
    elif key_padding_mask is not None:
        empty = padding.all(-1, keepdim=True)
    if empty is not None:
        mask = _in_place(mask, torch.Tensor.masked_fill_, empty, 0.0, ours=ours)
    if mask is not None:
        mask = mask.expand(*q.shape[:3], q.shape[2])
        if mask.requires_grad and not (q.requires_grad or k.requires_grad or v.requires_grad):
            # Frozen before the tables: PyTorch's CUDA kernel would not keep what its backward pass reads.
            link = mask[..., :1, :1]
            q = q + link.masked_fill(torch.ones_like(link, dtype=torch.bool), 0.0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    return out if empty is None else out.masked_fill(empty, 0.0)


def _in_place(mask: Tensor, change: Callable, other: Tensor, *rest: float, ours: bool = True) -> Tensor:
    """``change(mask, other, *rest)``: in place, which keeps rows aligned, if the mask is ours and as large as both."""
    shape = torch.broadcast_shapes(mask.shape, other.shape)
    if not ours or shape != mask.shape:
        mask = mask.expand(shape).clone()
    return change(mask, other, *rest)


def _added_to_scores(x: Tensor, rpe: Encoding, height: int | None, width: int | None, scale: float) -> Tensor:
    """``(B or 1, H or 1, L, L)`` in the dtype of x; its rows start at multiples of `ROW_MULTIPLE`."""
    length = x.shape[2]
    dtype = x.dtype if has_kernel(x) else torch.promote_types(x.dtype, torch.float32)
    total = None
    for part in rpe.parts:
        ids = F.pad(part.bucket_ids(length, height, width, x.device), (0, -length % ROW_MULTIPLE))
        found = rpe_index(part.lookup(x, scale, dtype), ids).to(x.dtype)
        total = found if total is None else total + found
    return total[..., :length]
