# SPDX-License-Identifier: Apache-2.0
"""Compiled operators of image Relative Position Encoding, under ``torch.ops.irpe``, with fake kernels and autograd.

``rpe_index`` and ``rpe_index_adjoint`` are each other's gradients, so they have derivatives of every order.
"""

import torch
from torch import Tensor

from rpe_ops_cuda import _C, attention  # noqa: F401  registers the operators, and fake kernel and autograd of attention

_ops = torch.ops.irpe


@torch.library.register_fake("irpe::rpe_index")
def _(input: Tensor, index: Tensor) -> Tensor:
    return input.new_empty(*input.shape[:3], index.shape[1])


@torch.library.register_fake("irpe::rpe_index_adjoint")
def _(grad: Tensor, index: Tensor, num_buckets: int) -> Tensor:
    return grad.new_empty(*grad.shape[:3], num_buckets)


def _lookup_context(ctx, inputs, output) -> None:
    input, index = inputs
    ctx.save_for_backward(index)
    ctx.num_buckets = input.shape[-1]


def _lookup_backward(ctx, grad: Tensor):
    (index,) = ctx.saved_tensors
    return _ops.rpe_index_adjoint(grad, index, ctx.num_buckets), None


def _adjoint_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _adjoint_backward(ctx, grad: Tensor):
    (index,) = ctx.saved_tensors
    return _ops.rpe_index(grad, index), None, None


torch.library.register_autograd("irpe::rpe_index", _lookup_backward, setup_context=_lookup_context)
torch.library.register_autograd("irpe::rpe_index_adjoint", _adjoint_backward, setup_context=_adjoint_context)
