# SPDX-License-Identifier: Apache-2.0
"""Fake kernel and autograd of ``torch.ops.irpe.attention``; the schema is in csrc/attention.cpp."""

import torch
from torch import Tensor

_ops = torch.ops.irpe
_MOST_BUCKETS = 56  # kMostBuckets of csrc/cuda/attention_kernels.h


def _rounded_up(n: int, step: int = 16) -> int:
    return (n + step - 1) // step * step


@torch.library.register_fake("irpe::attention")
def _(q, k, v, table_q, table_k, table_v, index_q, index_k, index_v, key_padding_mask, attn_mask, seed,
      scale, dropout_p, keep, keep_probs):  # fmt: skip
    batch, heads, length, head_dim = q.shape
    rows = batch * heads * length
    on_v = keep and table_v is not None
    out = q.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    if q.device.type == "cuda":
        stats, probs = (q.new_empty(n, dtype=torch.float32) for n in (rows, 0))
        return out, stats, probs, q.new_empty((batch, length, heads, _MOST_BUCKETS) if on_v else 0)
    stats = q.new_empty(2 * rows if keep else 0, dtype=torch.float32)
    probs = q.new_empty(rows * _rounded_up(length) + 16 if keep and keep_probs else 0, dtype=torch.float32)
    sums = q.new_empty(rows * _rounded_up(table_v.shape[1]) if on_v else 0, dtype=torch.float32)
    return out, stats, probs, sums


@torch.library.register_fake("irpe::attention_backward")
def _(grad_out, out, stats, probs, sums, q, k, v, table_q, table_k, table_v, *rest):
    batch, heads, length, head_dim = q.shape
    absent = q.new_empty(0, dtype=torch.float32)
    tables = [absent.clone() if t is None else t.new_empty(t.shape) for t in (table_q, table_k, table_v)]
    return (q.new_empty(batch, length, 3, heads, head_dim), *tables)


def _save(ctx, inputs, output) -> None:
    *tensors, index_q, index_k, index_v, padding, mask, seed, scale, dropout_p, _, _ = inputs
    ctx.set_materialize_grads(False)  # else every backward makes zeros as large as all outputs
    ctx.save_for_backward(*output, *tensors, padding, mask, seed, *index_q, *index_k, *index_v)
    ctx.parts = len(index_q), len(index_k), len(index_v)
    ctx.settings = scale, dropout_p


def _gradients(ctx, grad_out: Tensor | None) -> list[Tensor | None]:
    """Of q, k, v and the three tables."""
    out, stats, probs, sums, q, k, v, table_q, table_k, table_v, padding, mask, seed, *index = ctx.saved_tensors
    first, second, _ = ctx.parts
    grad_out = torch.zeros_like(q) if grad_out is None else grad_out
    grad_qkv, *of_tables = _ops.attention_backward(
        grad_out, out, stats, probs, sums, q, k, v, table_q, table_k, table_v, index[:first],
        index[first : first + second], index[first + second :], padding, mask, seed, *ctx.settings,
    )  # fmt: skip
    tables = zip((table_q, table_k, table_v), of_tables, strict=True)
    return [*grad_qkv.transpose(1, 3).unbind(2), *(None if table is None else grad for table, grad in tables)]


class Attention(torch.autograd.Function):
    """The operator's first result, for ordinary calls: less than half the overhead of registered operators."""

    @staticmethod
    def forward(ctx, *inputs):
        output = below_autograd(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, grad_out: Tensor | None):
        if torch.is_grad_enabled():  # the registered operator refuses to be differentiated again
            grads = _gradients(ctx, grad_out)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                grads = _gradients(ctx, grad_out)
        return *grads, *[None] * 10


def below_autograd(*inputs) -> tuple[Tensor, ...]:
    """The operator without gradients, even where they are enabled."""
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.attention(*inputs)


def _context(ctx, inputs, output) -> None:
    if not inputs[-2]:
        raise RuntimeError("irpe::attention: keep=True is needed for gradients")
    ctx.mark_non_differentiable(*output[1:])
    _save(ctx, inputs, output)


def _backward(ctx, grad_out: Tensor | None, *_):
    return *_gradients(ctx, grad_out), *([None] * parts for parts in ctx.parts), *[None] * 7


def _no_second_backward(ctx, *_):
    raise NotImplementedError(
        "irpe::attention cannot be differentiated twice; use rpe_attention(..., backend='eager') for second derivatives"
    )


torch.library.register_autograd("irpe::attention", _backward, setup_context=_context)
torch.library.register_autograd("irpe::attention_backward", _no_second_backward)
