# SPDX-License-Identifier: Apache-2.0
"""`rpe_attention` with the kernels of rpe_ops_cuda.

On CPU: every encoding and mask, in fp32, and no (L, L) tensor unless it is small enough to keep. On CUDA: DeiT's calls,
in half precision, and an (L, L) tensor in backward only, for some heads at a time; see `why_not`.
"""

import torch
from torch import Tensor

from irpe_ops.attention_call import AttentionCall, Encoding
from irpe_ops.buckets import ids_by_lane
from irpe_ops.rpe_index import constant_of_graphs, is_plain, missing_kernels, under_function_transform

try:
    from rpe_ops_cuda.attention import Attention, below_autograd
except ImportError:
    Attention = None

# Attention weights up to this size are kept for backward; larger ones are recomputed, which is then cheaper than fresh
# memory: the C library returns larger blocks to the system, and each step would fault their pages in again.
KEPT_BYTES = 30 << 20
MODES = ("ctx", "bias")  # the kernels do their own lookups, inside their tiles
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The kernels for CUDA are compiled for one head dimension, and hold a row of buckets in registers and shared memory.
HEAD_DIM, MAX_BUCKETS = 64, 56


def missing() -> str | None:
    """Why this backend is not available here, with the remedy; None if it is."""
    if not (reason := missing_kernels("cpu")) and Attention is None:
        return "rpe_ops_cuda is older than this irpe_ops; rebuild it: pip install ./rpe_ops_cuda"
    return reason


@constant_of_graphs
def missing_on_cuda(device: int) -> str | None:
    """Why there are no kernels for this GPU, with the remedy; None if there are."""
    reason = missing_kernels("cuda", device)
    if reason is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "on CUDA it needs a GPU of compute capability 8.0 (Ampere) or later; use backend='sdpa' or 'eager'"
    return f"{reason}; or use backend='triton'" if reason and torch.cuda.is_available() else reason


def why_not(call: AttentionCall) -> str | None:
    """None if this call can run here, else the reason and what to do."""
    q = call.q
    if under_function_transform():
        return "torch.func and forward-mode differentiation need plain PyTorch; use backend='eager'"
    if q.device.type == "cuda":
        return _why_not_on_cuda(call)
    if q.device.type != "cpu":
        return f"it runs on CPU and CUDA tensors, and q is on {q.device}; use backend='eager'"
    if q.dtype not in _DTYPES:
        return f"it computes in float32, and q is {q.dtype}; use backend='eager'"
    if call.attn_mask is not None and call.attn_mask.requires_grad:
        return "it has no gradient for attn_mask; use backend='eager'"
    for rpe in call.encodings:
        for part in rpe.parts:
            if part.mode not in MODES:
                return f"it supports the modes {' and '.join(MODES)}, not {part.mode!r}; use backend='eager'"
            if part.table.dtype == torch.float64:
                return "it computes in float32, and a table is float64; use backend='eager'"
    return None


def _why_not_on_cuda(call: AttentionCall) -> str | None:
    q, otherwise = call.q, "; use backend='triton'"
    if reason := missing_on_cuda(q.device.index):
        return reason
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"on CUDA it takes float16 and bfloat16, and q is {q.dtype}; use autocast, or backend='sdpa' or 'eager'"
    if q.shape[3] != HEAD_DIM:
        return f"on CUDA it has kernels for D={HEAD_DIM}, got D={q.shape[3]}{otherwise}"
    if call.key_padding_mask is not None or call.attn_mask is not None or call.dropout_p > 0:
        return f"on CUDA it takes no masks and no dropout{otherwise}"
    if call.rpe_k is None or (call.rpe_v is not None and call.rpe_q is None):
        return f"on CUDA it encodes keys, queries and keys, or all three{otherwise}"
    if not call.scale > 0:
        return f"on CUDA its scale must be positive, got {call.scale}{otherwise}"
    first, *others = [part for rpe in call.encodings for part in rpe.parts]
    if first.mode != "ctx" or len(call.rpe_k.parts) > 1:
        return f"on CUDA it supports encodings of mode ctx with one map, not cross or bias{otherwise}"
    if first.num_buckets > MAX_BUCKETS:
        return f"on CUDA it holds up to {MAX_BUCKETS} buckets, ratio={first.ratio:g} has {first.num_buckets}{otherwise}"
    for part in others:
        if (part.mode, part.method, part.ratio, part.skip) != (first.mode, first.method, first.ratio, first.skip):
            return "on CUDA rpe_q, rpe_k and rpe_v must share mode, method, ratio and skip; build them from one config"
    return None


def attention(call: AttentionCall) -> Tensor:
    """`rpe_attention` for arguments that passed its checks and `why_not`. Returns ``(B, H, L, D)``."""
    q, k, v, rpe_q, rpe_k, rpe_v, height, width, key_padding_mask, attn_mask, dropout_p, scale = call
    batch, heads, length, _ = q.shape
    if q.device.type == "cuda":
        tables = [None if rpe is None else rpe.parts[0].table for rpe in (rpe_q, rpe_k, rpe_v)]
        maps = [], [ids_by_lane(rpe_k.parts[0].bucket_ids(length, height, width, q.device))], []
    else:
        of_roles = [_table_and_maps(rpe, length, height, width, q.device) for rpe in (rpe_q, rpe_k, rpe_v)]
        tables, maps = zip(*of_roles, strict=True)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, *tables))
    keep_probs = keep and 4 * batch * heads * length * length <= KEPT_BYTES
    seed = torch.randint(2**62, (1,), device=q.device) if dropout_p > 0 else None
    inputs = q, k, v, *tables, *maps, key_padding_mask, attn_mask, seed, scale, dropout_p, keep, keep_probs
    if not is_plain(q):
        return torch.ops.irpe.attention(*inputs)[0]
    return Attention.apply(*inputs) if keep else below_autograd(*inputs)[0]


def _table_and_maps(
    rpe: Encoding | None, length: int, height: int | None, width: int | None, device: torch.device
) -> tuple[Tensor | None, list[Tensor]]:
    """The tables of all parts, concatenated along the buckets, and their maps."""
    if rpe is None:
        return None, []
    maps = [part.bucket_ids(length, height, width, device) for part in rpe.parts]
    if len(rpe.parts) == 1:
        return rpe.parts[0].table, maps
    return torch.cat([part.table for part in rpe.parts], -2 if rpe.role == "v" else -1), maps
