# SPDX-License-Identifier: Apache-2.0
"""Attention with relative position encoding: checks the arguments and hands them to a backend."""

import torch
from torch import Tensor

from irpe_ops.attention_call import AttentionCall, Encoding
from irpe_ops.backends import NAMES, module_of
from irpe_ops.backends.choice import choose
from irpe_ops.modules import IRPE, IRPESum, autocast_dtype, resolve_grid
from irpe_ops.rpe_index import DTYPES, not_dense

BACKENDS = ("auto", *NAMES)


def rpe_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpe_q: Encoding | None = None,
    rpe_k: Encoding | None = None,
    rpe_v: Encoding | None = None,
    *,
    height: int | None = None,
    width: int | None = None,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Self-attention over a grid of tokens, ``softmax(q k^T + encodings) v + encoding``.

    Args:
        q, k, v: ``(B, H, L, D)`` of one floating-point dtype; ``q`` is not yet scaled.
        rpe_q, rpe_k, rpe_v: from `build_rpe`; None leaves that term out.
        height, width: of the token grid; None means the square grid of ``L - skip`` tokens.
        key_padding_mask: ``(B, L)`` bool, True = this key is ignored.
        attn_mask: broadcasts to ``(B, H, L, L)``; float is added to the scores, bool True = excluded.
        dropout_p: probability of dropping an attention weight, in ``[0, 1)``; pass 0 when evaluating.
        scale: factor on the queries; None means ``D ** -0.5``.
        backend: ``auto`` (see `irpe_ops.backends.choice`), ``eager`` (the definition), ``sdpa`` (PyTorch's fused
            attention), ``compiled`` (CPU; on CUDA DeiT's calls in half precision) or ``triton`` (CUDA).
    Returns: ``(B, H, L, D)``. A query whose keys are all masked gets zeros. Under autocast, inputs are cast to its
        dtype and the softmax is fp32. Lookups and sums over buckets are fp32 in ``eager``, and in ``compiled`` on
        CPUs; on a GPU the others accumulate in fp32 and round to that dtype, as a linear layer does. The gradient of
        an fp32 table is summed in fp32 and stays fp32 in every backend.
    Raises: ValueError: for inconsistent arguments, or a call that the named backend cannot run;
        ImportError: for a named backend that is not available here.
    """
    for name, x in (("q", q), ("k", k), ("v", v), ("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if kind := None if x is None and name.endswith("mask") else not_dense(x):
            shape = " (B, H, L, D)" if name in "qkv" else ""
            raise ValueError(f"rpe_attention: {name} must be a dense tensor{shape}, not {kind}")
    dtype = autocast_dtype(q.device)
    if dtype is not None and q.dtype != torch.float64:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check_tensors(q, k, v)
    _check_masks(q, key_padding_mask, attn_mask)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"rpe_attention: dropout_p is a probability in [0, 1), not {dropout_p!r}")
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise ValueError("rpe_attention: scale is a number and gets no gradient; multiply q by a learned one")
    if backend not in BACKENDS:
        raise ValueError(f"rpe_attention: unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    height, width = _resolve_encodings(q, height, width, rpe_q, rpe_k, rpe_v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    call = AttentionCall(
        q, k, v, rpe_q, rpe_k, rpe_v, height, width, key_padding_mask, attn_mask, dropout_p, scale
    )  # fmt: skip
    if backend == "auto":
        return module_of(choose(call)).attention(call)
    if reason := module_of(backend).missing():
        raise ImportError(f"backend={backend!r} is not available here: {reason} (python -m irpe_ops.info says more)")
    if reason := module_of(backend).why_not(call):
        raise ValueError(f"backend={backend!r} cannot run this call: {reason} (backend='auto' picks one that can)")
    return module_of(backend).attention(call)


def _resolve_encodings(
    q: Tensor, height: int | None, width: int | None, *encodings: Encoding | None
) -> tuple[int | None, int | None]:
    """Check the encodings against q and each other. Returns: the grid they agree on."""
    for role, rpe in zip("qkv", encodings, strict=True):
        if rpe is None:
            continue
        if not isinstance(rpe, (IRPE, IRPESum)):
            raise ValueError(f"rpe_attention: rpe_{role} must come from build_rpe, got {type(rpe).__name__}")
        if rpe.role != role:
            raise ValueError(f"rpe_attention: rpe_{role} was given an encoding built as rpe_{rpe.role}")
        for part in rpe.parts:
            part.check_fits(q, tokens=part.uses_tokens)
            height, width = resolve_grid(q.shape[2], height, width, part.skip, f"rpe_{role}")
    return height, width


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or q.shape[3] == 0:
        raise ValueError(f"rpe_attention: expected q, k, v of shape (B, H, L, D), got q {tuple(q.shape)}")
    if q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"rpe_attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} differ; queries and keys "
            "must be the same tokens of one grid (see docs/equip.md on cross-attention)"
        )
    if q.dtype not in DTYPES or q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(
            f"rpe_attention: q, k, v must share one floating-point dtype, got {q.dtype}, {k.dtype}, {v.dtype}; "
            f"expected {' or '.join(map(str, DTYPES))}"
        )
    if q.device != k.device or q.device != v.device:
        raise ValueError(f"rpe_attention: q, k, v must share one device, got {q.device}, {k.device}, {v.device}")


def _check_masks(q: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> None:
    batch, heads, length, _ = q.shape
    if key_padding_mask is not None:
        shape, dtype = tuple(key_padding_mask.shape), key_padding_mask.dtype
        if dtype != torch.bool:
            raise ValueError(f"rpe_attention: key_padding_mask must be bool (True = ignored), not {dtype}")
        if shape != (batch, length):
            raise ValueError(f"rpe_attention: key_padding_mask must be (B, L) = ({batch}, {length}), got {shape}")
    if attn_mask is not None:
        shape, dtype, wanted = tuple(attn_mask.shape), attn_mask.dtype, (batch, heads, length, length)
        if dtype != torch.bool and not dtype.is_floating_point:
            raise ValueError(f"rpe_attention: attn_mask must be bool (True = excluded) or floating point, not {dtype}")
        if len(shape) > 4 or any(m not in (1, w) for m, w in zip(shape[::-1], wanted[::-1], strict=False)):
            raise ValueError(f"rpe_attention: attn_mask must broadcast to (B, H, L, L) = {wanted}, got {shape}")
    for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and mask.device != q.device:
            raise ValueError(f"rpe_attention: {name} is on {mask.device} and q on {q.device}; move one of them")
