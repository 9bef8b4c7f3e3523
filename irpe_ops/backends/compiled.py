# SPDX-License-Identifier: Apache-2.0
"""`rpe_attention` on CPU by the kernels of rpe_ops_cuda: no (L, L) tensor unless it is small enough to keep."""

import torch
from torch import Tensor

from irpe_ops.attention_call import AttentionCall, Encoding
from irpe_ops.rpe_index import extension_error, under_function_transform

# Attention weights up to this size are kept for backward; larger ones are recomputed, which is then cheaper than fresh
# memory: the C library returns larger blocks to the system, and each step would fault their pages in again.
KEPT_BYTES = 30 << 20
MODES = ("ctx", "bias")  # the kernels do their own lookups, inside their tiles
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def missing() -> str | None:
    """Why this backend does not exist here, with the remedy; None if it does."""
    if extension_error:
        return f"rpe_ops_cuda does not load ({extension_error}); build it with: pip install ./rpe_ops_cuda"
    if not hasattr(torch.ops.irpe, "attention"):
        return "rpe_ops_cuda is an older version without fused attention; rebuild it: pip install ./rpe_ops_cuda"
    return None


def why_not(call: AttentionCall) -> str | None:
    """None if this call can run here, else the reason and what to do."""
    q, attn_mask = call.q, call.attn_mask
    if q.device.type != "cpu":
        return f"it runs on CPU tensors, and q is on {q.device}; use backend='triton'"
    if q.dtype not in _DTYPES:
        return f"it computes in float32, and q is {q.dtype}; use backend='eager'"
    if under_function_transform():
        return "torch.func and forward-mode differentiation need plain PyTorch; use backend='eager'"
    if attn_mask is not None and attn_mask.requires_grad:
        return "it has no gradient for attn_mask; use backend='eager'"
    for rpe in call.encodings:
        for part in rpe.parts:
            if part.mode not in MODES:
                return f"it knows the modes {' and '.join(MODES)}, not {part.mode!r}; use backend='eager'"
            if part.table.dtype == torch.float64:
                return "it computes in float32, and a table is float64; use backend='eager'"
    return None


def attention(call: AttentionCall) -> Tensor:
    """`rpe_attention` for arguments that passed its checks and `why_not`. Returns ``(B, H, L, D)``."""
    q, k, v, rpe_q, rpe_k, rpe_v, height, width, key_padding_mask, attn_mask, dropout_p, scale = call
    batch, heads, length, _ = q.shape
    tables, maps = [], []
    for rpe in (rpe_q, rpe_k, rpe_v):
        table, index = _table_and_maps(rpe, length, height, width, q.device)
        tables.append(table)
        maps.append(index)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, *tables))
    keep_probs = keep and 4 * batch * heads * length * length <= KEPT_BYTES
    seed = torch.randint(2**62, (1,), device=q.device) if dropout_p > 0 else None
    return torch.ops.irpe.attention(
        q, k, v, *tables, *maps, key_padding_mask, attn_mask, seed, scale, dropout_p, keep, keep_probs
    )[0]


def _table_and_maps(
    rpe: Encoding | None, length: int, height: int | None, width: int | None, device: torch.device
) -> tuple[Tensor | None, list[Tensor]]:
    """The tables of all parts, concatenated along the buckets, and their maps."""
    if rpe is None:
        return None, []
    maps = [part.bucket_ids(length, height, width, device) for part in rpe.parts]
    if len(rpe.parts) == 1:
        return rpe.parts[0].table, maps
    return torch.cat([part.table for part in rpe.parts], -2 if rpe.on_values else -1), maps
