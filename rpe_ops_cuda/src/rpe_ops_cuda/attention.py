# SPDX-License-Identifier: Apache-2.0
"""Fake kernel and autograd of ``torch.ops.irpe.attention``; the schema is in csrc/attention.cpp."""

import torch
from torch import Tensor

_ops = torch.ops.irpe


def _rounded_up(n: int, step: int = 16) -> int:
    return (n + step - 1) // step * step


@torch.library.register_fake("irpe::attention")
def _(q, k, v, table_q, table_k, table_v, index_q, index_k, index_v, key_padding_mask, attn_mask, seed,
      scale, dropout_p, keep, keep_probs):  # fmt: skip
    batch, heads, length, head_dim = q.shape
    rows = batch * heads * length
    out = q.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    stats = q.new_empty(2 * rows if keep else 0, dtype=torch.float32)
    probs = q.new_empty(rows * _rounded_up(length) + 16 if keep and keep_probs else 0, dtype=torch.float32)
    sums = q.new_empty(rows * _rounded_up(table_v.shape[1]) if keep and table_v is not None else 0, dtype=torch.float32)
    return out, stats, probs, sums


@torch.library.register_fake("irpe::attention_backward")
def _(grad_out, stats, probs, sums, q, k, v, table_q, table_k, table_v, *rest):
    batch, heads, length, head_dim = q.shape
    grads = [q.new_empty(batch, length, heads, head_dim).transpose(1, 2) for _ in "qkv"]
    absent = q.new_empty(0, dtype=torch.float32)
    tables = [absent.clone() if t is None else t.new_empty(t.shape) for t in (table_q, table_k, table_v)]
    return (*grads, *tables)


def _context(ctx, inputs, output) -> None:
    q, k, v, table_q, table_k, table_v, index_q, index_k, index_v, padding, mask, seed, *settings = inputs
    scale, dropout_p, keep, _ = settings
    if not keep:
        raise RuntimeError("irpe::attention: keep=True is needed for gradients")
    _, stats, probs, sums = output
    ctx.mark_non_differentiable(stats, probs, sums)
    ctx.set_materialize_grads(False)  # else every backward makes zeros as large as these three
    ctx.save_for_backward(
        stats, probs, sums, q, k, v, table_q, table_k, table_v, padding, mask, seed, *index_q, *index_k, *index_v
    )
    ctx.parts = len(index_q), len(index_k), len(index_v)
    ctx.settings = scale, dropout_p


def _backward(ctx, grad_out: Tensor, *_):
    stats, probs, sums, q, k, v, table_q, table_k, table_v, padding, mask, seed, *index = ctx.saved_tensors
    first, second, _ = ctx.parts
    grad_out = torch.zeros_like(q) if grad_out is None else grad_out
    index_q, index_k, index_v = index[:first], index[first : first + second], index[first + second :]
    grads = _ops.attention_backward(
        grad_out, stats, probs, sums, q, k, v, table_q, table_k, table_v, index_q, index_k, index_v,
        padding, mask, seed, *ctx.settings,
    )  # fmt: skip
    tables = [g if t is not None else None for g, t in zip(grads[3:], (table_q, table_k, table_v), strict=True)]
    indices = [[None] * parts for parts in ctx.parts]
    return *grads[:3], *tables, *indices, None, None, None, None, None, None, None


def _no_second_backward(ctx, *_):
    raise NotImplementedError(
        "irpe::attention cannot be differentiated twice; use rpe_attention(..., backend='eager') for second derivatives"
    )


torch.library.register_autograd("irpe::attention", _backward, setup_context=_context)
torch.library.register_autograd("irpe::attention_backward", _no_second_backward)
