# SPDX-License-Identifier: Apache-2.0
"""`rpe_attention` on CUDA: the backend ``triton``.

Small products stay in PyTorch, so that autograd sums the gradients of the tables in a fixed order: ``lookup_k =
scale * q @ table_k`` and ``lookup_q = scale * k @ table_q``, both ``(B, H, L, N)``, go into the kernels of
`triton_kernels`, which spread them over pairs of tokens, for some heads at a time; sums of attention weights by bucket,
again ``(B, H, L, N)``, come out and are multiplied with ``table_v``. N of every part is padded to `COLUMN_MULTIPLE`.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from irpe_ops.attention_call import AttentionCall, Encoding
from irpe_ops.backends.triton_launch import COLUMN_MULTIPLE, INTERPRETED, Arguments, Launch, generation
from irpe_ops.modes import product, without_autocast
from irpe_ops.rpe_index import constant_of_graphs, is_plain, under_function_transform

# `sum_kernel` holds a row of buckets in registers, the other kernels a row of q.
MAX_BUCKETS, MAX_HEAD_DIM = 256, {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}


@constant_of_graphs
def missing() -> str | None:
    """Why this backend is not available here; None if it is."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install triton"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if torch.version.hip is not None:
        return "it is written for NVIDIA GPUs"
    return None


def too_old(device: torch.device) -> str | None:
    """Why the kernels cannot run on this GPU; None if they can."""
    return "it needs a GPU of compute capability 8.0 (Ampere) or later" if generation(device) < 8 else None


def why_not(call: AttentionCall) -> str | None:
    """Why these arguments of `rpe_attention` cannot run here, with the remedy; None if they can."""
    q, attn_mask, encodings = call.q, call.attn_mask, call.encodings
    if q.device.type != "cuda" and not INTERPRETED:
        return f"it runs on CUDA tensors, q is on {q.device}"
    if old := too_old(q.device):
        return f"{old}; use backend='sdpa' or 'eager'"
    if under_function_transform():
        return "torch.func and forward-mode differentiation need plain PyTorch; use backend='eager'"
    if q.dtype not in MAX_HEAD_DIM:
        return f"it takes float32, bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] > MAX_HEAD_DIM[q.dtype]:
        return f"it holds heads of up to {MAX_HEAD_DIM[q.dtype]} dimensions in {q.dtype}, got D={q.shape[-1]}"
    if attn_mask is not None and attn_mask.requires_grad:
        return "it has no gradient for attn_mask; detach the mask or use backend='eager'"
    if any(_map_of(rpe) != _map_of(encodings[0]) for rpe in encodings):
        return "rpe_q, rpe_k and rpe_v must share method, ratio and skip; build them from one config"
    for part in encodings[0].parts if encodings else ():
        if part.num_buckets > MAX_BUCKETS:
            return f"it holds up to {MAX_BUCKETS} buckets, ratio={part.ratio:g} has {part.num_buckets}"
    return None


def attention(call: AttentionCall) -> Tensor:
    """`rpe_attention` for arguments that passed its checks and `why_not`. Returns ``(B, H, L, D)``.

    Lookups, sums by bucket and their gradients are computed in fp32 and rounded to the dtype of q, as in linear layers;
    everything between them is fp32, except the terms summed by bucket, which are rounded too.
    """
    q, k, v, rpe_q, rpe_k, rpe_v, height, width, key_padding_mask, attn_mask, dropout_p, scale = call
    if call.encodings:
        name, skip = _map_of(call.encodings[0])
        maps = [part.offset_ids(height, width, q.device) for part in call.encodings[0].parts]
        offsets = maps[0][None] if len(maps) == 1 else torch.stack(maps)
    else:
        name, skip, height, width, offsets = "", 0, 1, q.shape[2], None
    with without_autocast(q.device):
        lookup_k = None if rpe_k is None else _lookup(q, rpe_k, scale)
        lookup_q = None if rpe_q is None else _lookup(k, rpe_q, scale)
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*q.shape[:3], q.shape[2])
        # On the device and from PyTorch's generator: it follows torch.manual_seed without a synchronization.
        seed = torch.randint(2**62, (1,), device=q.device) if dropout_p > 0 else None
        operator = _Attention.apply if is_plain(q) else fused_attention
        out, sums, _ = operator(
            q, k, v, lookup_k, lookup_q, key_padding_mask, attn_mask, seed, offsets,
            name, height, width, skip, rpe_v is not None, dropout_p, scale,
        )  # fmt: skip
        if rpe_v is not None:
            tables = [F.pad(part.table, (0, 0, 0, -part.num_buckets % COLUMN_MULTIPLE)) for part in rpe_v.parts]
            out = out + product(sums, torch.cat(tables, 1))  # (H or 1, N, D)
    return out


def _map_of(rpe: Encoding) -> tuple[str, int]:
    """What ids depend on, besides the grid: methods and ratio as one string, which no compiler makes symbolic."""
    part = rpe.parts[0]
    return ",".join(part.method for part in rpe.parts) + ":" + repr(part.ratio), part.skip


def _lookup(x: Tensor, rpe: Encoding, scale: float) -> Tensor:
    """What every bucket would add to the scores of every token, ``(B, H, L, N)``; ``cross``: rows, then columns."""
    lookups = [part.lookup(x, scale, x.dtype, COLUMN_MULTIPLE) for part in rpe.parts]
    found = lookups[0] if len(lookups) == 1 else torch.cat(lookups, -1)
    return found.expand(*x.shape[:3], -1)


def _attend(*arguments):
    """Result ``(B, H, L, D)``; weights summed by bucket, ``(B, H, L, N)`` or empty; log2 of the softmax's divisors."""
    out, sums, log_sums = _results(*arguments)
    launch = Launch(call := Arguments(*arguments))
    on_k, on_q, on_v = call.lookup_k is not None, call.lookup_q is not None, call.on_values
    for chunk in launch.chunks(on_q + (on_k or on_v)):
        pairs_k, pairs_q = launch.spread(chunk, call.lookup_k), launch.spread(chunk, call.lookup_q)
        kept = launch.room(chunk) if on_v and not on_k else pairs_k  # each pair is read before its place is overwritten
        tiles = -(-launch.length // launch.given["BLOCK_N"])
        peaks = log_sums.new_empty(chunk.planes, launch.length, tiles) if on_v else None
        launch.by_tile("forward_kernel", "BLOCK_M", chunk, pairs_k=pairs_k, pairs_q=pairs_q, kept=kept, peaks=peaks,
                       log_sums=log_sums, out=out)  # fmt: skip
        if on_v:
            launch.sum(chunk, kept, sums, peaks, log_sums)
        del pairs_k, pairs_q, kept, peaks  # freed before the next chunk needs room
    return out, sums, log_sums


def _results(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    call = Arguments(*arguments)
    sums = _side_by_side(call.q, call.columns if call.on_values else 0)
    return _side_by_side(call.q), sums, call.q.new_empty(call.q.shape[:3], dtype=torch.float32)


def _differentiate(grad_out, grad_sums, out, sums, log_sums, *arguments):
    """Gradients of q, k, v, lookup_k and lookup_q (empty if there is none), with all weights recomputed."""
    launch = Launch(call := Arguments(*arguments), grad_out=grad_out, grad_sums=grad_sums)
    grad_q, grad_k, grad_v, grad_lookup_k, grad_lookup_q = grads = _gradients(*[None] * 5, *arguments)
    own = {"deltas": torch.empty_like(log_sums), "log_sums": log_sums, "out": out, "sums": sums}
    for everything in launch.chunks(0):
        launch.by_tile("delta_kernel", "BLOCK_M", everything, **own)
    for chunk in launch.chunks(1 + (call.lookup_q is not None) + call.on_values):
        pairs_k, pairs_q = launch.spread(chunk, call.lookup_k), launch.spread(chunk, call.lookup_q)
        pairs_v = launch.spread(chunk, grad_sums if call.on_values else None)
        kept = launch.room(chunk) if pairs_k is None else pairs_k
        launch.by_tile("key_gradient_kernel", "BLOCK_N", chunk, pairs_k=pairs_k, pairs_q=pairs_q, pairs_v=pairs_v,
                       kept=kept, grad_k=grad_k, grad_v=grad_v, num_stages=launch.given["KEY_STAGES"],
                       **own)  # fmt: skip
        launch.by_tile("query_gradient_kernel", "BLOCK_M", chunk, kept=kept, grad_q=grad_q)
        if pairs_k is not None:
            launch.sum(chunk, kept, grad_lookup_k)
        if pairs_q is not None:
            launch.sum(chunk, pairs_q, grad_lookup_q)
        del pairs_k, pairs_q, pairs_v, kept  # freed before the next chunk needs room
    return grads


def _gradients(grad_out, grad_sums, out, sums, log_sums, *arguments) -> tuple[Tensor, ...]:
    call = Arguments(*arguments)
    lookups = (call.q.new_empty(0) if x is None else _rows_like(x) for x in (call.lookup_k, call.lookup_q))
    return *(_side_by_side(call.q) for _ in range(3)), *lookups


def _rows_like(x: Tensor) -> Tensor:
    """Empty, with the strides of ``x`` if its columns are adjacent in memory, as the result's must be."""
    return torch.empty_like(x) if x.stride(-1) == 1 else x.new_empty(x.shape)


# The dispatcher's names for the types in `Arguments`, which both operators share.
_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", str: "str", int: "SymInt", bool: "bool", float: "float"}
_SCHEMA = ", ".join(f"{_TYPES[type_]} {name}" for name, type_ in Arguments.__annotations__.items())
_GRADIENTS = ("grad_out", "grad_sums", "out", "sums", "log_sums")
_BACKWARD = f"({', '.join(f'Tensor {name}' for name in _GRADIENTS)}, {_SCHEMA}) -> ({', '.join(['Tensor'] * 5)})"
_operator = functools.partial(torch.library.custom_op, mutates_args=())
fused_attention = _operator("irpe_triton::fused_attention", _attend, schema=f"({_SCHEMA}) -> (Tensor, Tensor, Tensor)")
fused_attention.register_fake(_results)
fused_attention_backward = _operator("irpe_triton::fused_attention_backward", _differentiate, schema=_BACKWARD)
fused_attention_backward.register_fake(_gradients)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # no zeros for the gradient of the divisors, which nobody needs
    ctx.save_for_backward(*output, *inputs[:9])
    ctx.options = inputs[9:]


def _backward(ctx, *grads: Tensor | None, operator=fused_attention_backward):
    saved = ctx.saved_tensors
    given = (torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads[:2], saved, strict=False))
    grads = operator(*given, *saved, *ctx.options)
    absent = (False, False, False, saved[6] is None, saved[7] is None)
    return *(None if no else grad for grad, no in zip(grads, absent, strict=True)), *[None] * 11


fused_attention.register_autograd(_backward, setup_context=_save)


class _Attention(torch.autograd.Function):
    """The operator for ordinary calls: a third of the overhead of PyTorch's registered operators."""

    @staticmethod
    def forward(ctx, *arguments):
        results = _attend(*arguments)
        _save(ctx, arguments, results)
        return results

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        # The registered operator refuses to be differentiated again.
        return _backward(ctx, *grads, operator=fused_attention_backward if torch.is_grad_enabled() else _differentiate)


def _side_by_side(q: Tensor, columns: int | None = None) -> Tensor:
    """``(B, H, L, columns or D)``, in memory ``(B, L, H, ...)``: merging the heads afterwards copies nothing."""
    batch, heads, length, head_dim = q.shape
    return q.new_empty(batch, length, heads, head_dim if columns is None else columns).transpose(1, 2)
