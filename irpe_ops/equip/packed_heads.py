# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and values from the one linear layer that computes all three."""

import torch
from torch import Tensor

from irpe_ops.rpe_index import is_plain, under_function_transform


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(B, L, 3 * H * D)`` to views of queries, keys and values, ``(B, H, L, D)``."""
    packed = qkv.unflatten(-1, (3, num_heads, -1))  # (B, L, 3, H, D)
    ordinary = is_plain(packed) and packed.requires_grad and not under_function_transform()
    q, k, v = _Split.apply(packed) if ordinary else packed.unbind(2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class _Split(torch.autograd.Function):
    """As ``unbind(2)``, but if the three gradients lie side by side, as a backend may write them, nothing is copied."""

    @staticmethod
    def forward(ctx, packed: Tensor) -> tuple[Tensor, ...]:
        return packed.unbind(2)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        first, (batch, length, heads, dim) = grads[0], grads[0].shape
        step = heads * dim
        wanted = [((3 * length * step, 3 * step, dim, 1), first.storage_offset() + i * step) for i in range(3)]
        adjacent = [(grad.stride(), grad.storage_offset()) for grad in grads] == wanted
        if adjacent and all(torch._C._is_alias_of(first, grad) for grad in grads) and not torch.is_grad_enabled():
            return first.as_strided((batch, length, 3, heads, dim), (3 * length * step, 3 * step, step, dim, 1))
        return torch.stack(grads, 2)
