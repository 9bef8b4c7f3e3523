# SPDX-License-Identifier: Apache-2.0
"""`rpe_attention` with PyTorch's fused attention and the encodings as its additive mask: any device, plain PyTorch.

The mask is a ``(B, H, L, L)`` tensor, so memory grows with L squared, but the definition holds several such tensors.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from irpe_ops.attention_call import AttentionCall, Encoding
from irpe_ops.rpe_index import has_kernel, rpe_index, rpe_index_adjoint, under_function_transform

# Rows start at multiples of this many elements: otherwise the memory-efficient kernel would copy the mask, and
# half-precision products would take longer.
ROW_MULTIPLE = 8


def missing() -> str | None:
    """None: this backend is available everywhere."""


def why_not(call: AttentionCall) -> str | None:
    """None if this call can run here, else the reason and what to do."""
    if call.rpe_v is not None:
        return "it has no encoding on values; use backend='eager', or leave v out of rpe_on"
    if under_function_transform():
        return "torch.func and forward-mode differentiation need plain PyTorch; use backend='eager'"
    return None


def attention(call: AttentionCall) -> Tensor:
    """`rpe_attention` for arguments that passed its checks and `why_not`. Returns ``(B, H, L, D)``.

    The mask has the dtype of q. Lookups, and sums of its gradient by bucket, are fp32 unless a kernel of rpe_ops_cuda
    sums half precision in fp32.
    """
    q, k, v, rpe_q, rpe_k, _, height, width, key_padding_mask, attn_mask, dropout_p, scale = call
    lookups = _lookups(q, rpe_k, height, width, scale)
    of_queries = len(lookups)
    lookups += _lookups(k, rpe_q, height, width, scale)
    boolean = attn_mask is not None and attn_mask.dtype == torch.bool
    added = None if attn_mask is None or boolean else attn_mask.to(q.dtype)
    excluded = attn_mask if boolean else None
    if key_padding_mask is not None:
        padding = key_padding_mask[:, None, None, :]
        excluded = padding if excluded is None else excluded | padding
    # Queries without a key get zeros, but fused kernels may give NaN or the mean of all values: show them every key.
    empty = None
    blocked = [x for x in (excluded, None if added is None else added == -math.inf) if x is not None]
    if blocked:
        empty = functools.reduce(torch.logical_or, blocked).all(-1, keepdim=True)  # broadcasts to (B, H, L, 1)
        added = None if added is None else added.masked_fill(empty, 0.0)
        excluded = None if excluded is None else excluded & ~empty
    mask = None
    if lookups or blocked:
        mask = _Mask.apply(q.dtype, of_queries, added, excluded, *(x for pair in lookups for x in pair))
        mask = mask.expand(*q.shape[:3], q.shape[2])
        if mask.requires_grad and not (q.shape[0] and (q.requires_grad or k.requires_grad or v.requires_grad)):
            # If only the tables need gradients, PyTorch's CUDA kernel would not save what its backward pass reads. An
            # empty batch gives the mask no gradient at all.
            link = mask[..., :1, :1]
            q = q + link.masked_fill(torch.ones_like(link, dtype=torch.bool), 0.0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    return out if empty is None else out.masked_fill(empty, 0.0)


def _lookups(
    x: Tensor, rpe: Encoding | None, height: int | None, width: int | None, scale: float
) -> list[tuple[Tensor, Tensor]]:
    """For each part of the encoding, what its buckets add to the scores, and the ids."""
    dtype = x.dtype if has_kernel(x) else torch.promote_types(x.dtype, torch.float32)
    parts = () if rpe is None else rpe.parts
    length = x.shape[2]
    return [(p.lookup(x, scale, dtype, ROW_MULTIPLE), p.bucket_ids(length, height, width, x.device)) for p in parts]


class _Mask(torch.autograd.Function):
    """The sum of all terms added to the scores. Its gradient is summed by bucket without a copy.

    Autograd would first copy it into rows of a multiple of `ROW_MULTIPLE`, and write zeros for masked weights, whose
    gradient is zero anyway.
    """

    @staticmethod
    def forward(ctx, *inputs: torch.dtype | int | Tensor | None) -> Tensor:
        # *inputs instead of named parameters: Dynamo drops ctx if there are as many parameters as arguments.
        dtype, of_queries, added, excluded, *lookups = inputs
        ctx.of_queries = of_queries
        ctx.kinds = [(x.shape, x.dtype) for x in lookups[::2]]
        ctx.added = None if added is None else added.shape
        ctx.save_for_backward(*lookups[1::2])
        mask = None
        for place, (lookup, ids) in enumerate(zip(lookups[::2], lookups[1::2], strict=True)):
            padded = F.pad(ids, (0, -len(ids) % ROW_MULTIPLE))
            found = rpe_index(lookup, padded).to(dtype)[..., : len(ids)]
            found = found if place < of_queries else found.transpose(2, 3)
            mask = found if mask is None else _in_place(mask, torch.Tensor.add_, found)
        if added is not None:
            mask = added.clone() if mask is None else _in_place(mask, torch.Tensor.add_, added)
        if excluded is not None:
            mask = torch.zeros((1,) * 4, dtype=dtype, device=excluded.device) if mask is None else mask
            mask = _in_place(mask, torch.Tensor.masked_fill_, excluded, -math.inf)
        return mask

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = []
        for place, ((shape, dtype), ids) in enumerate(zip(ctx.kinds, ctx.saved_tensors, strict=True)):
            wanted = None
            if ctx.needs_input_grad[4 + 2 * place]:
                of_part = grad if place < ctx.of_queries else grad.transpose(2, 3)
                of_part = of_part.sum_to_size(*shape[:3], len(ids)).to(dtype)
                wanted = rpe_index_adjoint(of_part, ids, shape[3])
            grads += [wanted, None]
        of_added = grad.sum_to_size(ctx.added) if ctx.needs_input_grad[2] else None
        return None, None, of_added, None, *grads


def _in_place(mask: Tensor, change: Callable, other: Tensor, *rest: float) -> Tensor:
    """``change(mask, other, *rest)``, in place (which keeps rows aligned) if the mask has the broadcast shape."""
    shape = torch.broadcast_shapes(mask.shape, other.shape)
    if shape != mask.shape:
        mask = mask.expand(shape).clone()
    return change(mask, other, *rest)
