# SPDX-License-Identifier: Apache-2.0
"""`rpe_attention` on CUDA in one pass over the scores: the backend ``triton``.

Small products stay in PyTorch, so that autograd sums the gradients of the tables in a fixed order: ``lookup_k =
scale * q @ table_k`` and ``lookup_q = scale * k @ table_q``, both ``(B, H, L, N)``, go into the kernels of
`triton_kernels`; sums of attention weights by bucket, ``(B, H, L, N)`` again, come out and meet ``table_v``. Of every
part N is rounded up to a multiple of `COLUMN_MULTIPLE`.
"""

import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from irpe_ops.attention_call import AttentionCall, Encoding
from irpe_ops.buckets import count_buckets
from irpe_ops.modes import product
from irpe_ops.modules import IRPE, autocast_dtype
from irpe_ops.rpe_index import under_function_transform

# Triton's interpreter runs the kernels on the CPU, for tests without a GPU. Triton reads this when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# A row of lookups and a row of q are held in registers.
MAX_BUCKETS, MAX_HEAD_DIM = 256, {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}
COLUMN_MULTIPLE = 8  # rows of halves then start at multiples of 16 bytes, which loads and products want
CHUNK_BYTES = 64 << 20  # of weights, or gradients of scores, that wait to be summed by bucket; at least one tile a head


def _find_missing() -> str | None:
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


_MISSING = _find_missing()


def missing() -> str | None:
    """Why this backend does not exist on this machine; None where it does."""
    return _MISSING


def why_not(call: AttentionCall) -> str | None:
    """Why these arguments of `rpe_attention` cannot run here, with the remedy; None where they can."""
    q, attn_mask, encodings = call.q, call.attn_mask, call.encodings
    if q.device.type != "cuda" and not INTERPRETED:
        return f"it runs on CUDA tensors, q is on {q.device}"
    if not INTERPRETED and _generation(q.device) < 8:
        return "it needs a GPU of compute capability 8.0 (Ampere) or later; use backend='sdpa' or 'eager'"
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
    for rpe in encodings:
        for part in rpe.parts:
            if part.table.device != q.device:
                return f"the encoding's table is on {part.table.device} and q on {q.device}; move one of them"
            if part.table.dtype != q.dtype and autocast_dtype(q.device) is None:
                return f"the encoding's table is {part.table.dtype} and q {q.dtype}; cast one or use torch.autocast"
    return None


def attention(call: AttentionCall) -> Tensor:
    """`rpe_attention` for arguments that it has checked and `why_not` has let pass; ``(B, H, L, D)``.

    Lookups, sums by bucket and their gradients are computed in fp32 and rounded to the dtype of q, as the products of a
    linear layer are; everything between them is fp32, but for what is summed by bucket, which is rounded too.
    """
    q, k, v, rpe_q, rpe_k, rpe_v, height, width, key_padding_mask, attn_mask, dropout_p, scale = call
    if call.encodings:
        name, skip = _map_of(call.encodings[0])
        offsets = _offsets(call.encodings[0].parts, height, width, q.device)
    else:
        name, skip, height, width, offsets = "", 0, 1, q.shape[2], None
    with torch.autocast(q.device.type, enabled=False):
        lookup_k = None if rpe_k is None else _lookup(q, rpe_k, scale)
        lookup_q = None if rpe_q is None else _lookup(k, rpe_q, scale)
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*q.shape[:3], q.shape[2])
        # On the device and from PyTorch's generator: torch.manual_seed decides, and nothing waits.
        seed = torch.randint(2**62, (1,), device=q.device) if dropout_p > 0 else None
        out, sums, _ = fused_attention(
            q, k, v, lookup_k, lookup_q, key_padding_mask, attn_mask, seed, offsets,
            name, height, width, skip, rpe_v is not None, dropout_p, scale,
        )  # fmt: skip
        if rpe_v is not None:
            tables = [F.pad(part.table, (0, 0, 0, -part.num_buckets % COLUMN_MULTIPLE)) for part in rpe_v.parts]
            out = out + product(sums, torch.cat(tables, 1))  # (H or 1, N, D)
    return out


def _map_of(rpe: Encoding) -> tuple[str, int]:
    """What ids depend on, besides the grid: methods and ratio as one string, which no compiler takes for a symbol."""
    part = rpe.parts[0]
    return ",".join(part.method for part in rpe.parts) + ":" + repr(part.ratio), part.skip


def _lookup(x: Tensor, rpe: Encoding, scale: float) -> Tensor:
    """What every bucket would add to the scores of every token, ``(B, H, L, N)``; ``cross``: rows, then columns."""
    lookups = [part.lookup(x, scale, x.dtype, COLUMN_MULTIPLE) for part in rpe.parts]
    found = lookups[0] if len(lookups) == 1 else torch.cat(lookups, -1)
    return found.expand(*x.shape[:3], -1)


@torch.library.custom_op("irpe_triton::fused_attention", mutates_args=())
def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lookup_k: Tensor | None,
    lookup_q: Tensor | None,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    offsets: Tensor | None,
    name: str,
    height: int,
    width: int,
    skip: int,
    on_values: bool,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Result ``(B, H, L, D)``; weights summed by bucket, ``(B, H, L, N)`` or empty; log2 of the softmax's divisors."""
    from irpe_ops.backends import triton_kernels

    out, sums, log_sums = _results(q, name, skip, on_values)
    launch = _Launch(
        q, k, v, lookup_k, lookup_q, key_padding_mask, attn_mask, seed, offsets, name, height, width, skip, on_values,
        dropout_p, scale,
    )  # fmt: skip
    for chunk in launch.chunks("BLOCK_M", kept=on_values):
        peaks = log_sums.new_empty(chunk.peaks if on_values else 0)
        launch(triton_kernels.forward_kernel, chunk, out, chunk.kept, peaks, log_sums)
        if on_values:
            launch.sum(chunk, sums, peaks, log_sums)
    return out, sums, log_sums


@fused_attention.register_fake
def _(q, k, v, lookup_k, lookup_q, key_padding_mask, attn_mask, seed, offsets, name, height, width, skip, on_values,
      dropout_p, scale):  # fmt: skip
    return _results(q, name, skip, on_values)


@torch.library.custom_op("irpe_triton::fused_attention_backward", mutates_args=())
def fused_attention_backward(
    grad_out: Tensor,
    grad_sums: Tensor,
    out: Tensor,
    sums: Tensor,
    log_sums: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lookup_k: Tensor | None,
    lookup_q: Tensor | None,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    offsets: Tensor | None,
    name: str,
    height: int,
    width: int,
    skip: int,
    on_values: bool,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, lookup_k and lookup_q (empty where there is none), with all weights computed again."""
    from irpe_ops.backends import triton_kernels

    grad_q, grad_k, grad_v, grad_lookup_k, grad_lookup_q = grads = _gradients(q, lookup_k, lookup_q)
    launch = _Launch(
        q, k, v, lookup_k, lookup_q, key_padding_mask, attn_mask, seed, offsets, name, height, width, skip, on_values,
        dropout_p, scale, grad_out,
    )  # fmt: skip
    deltas = torch.empty_like(log_sums)
    grad_out, grad_sums = launch.grad_out, grad_sums.contiguous()
    for chunk in launch.chunks("BLOCK_M", kept=lookup_k is not None):
        launch(triton_kernels.query_gradient_kernel, chunk, out, sums, log_sums, grad_out, grad_sums, grad_q,
               chunk.kept, deltas)  # fmt: skip
        if lookup_k is not None:
            launch.sum(chunk, grad_lookup_k)
    for chunk in launch.chunks("BLOCK_N", kept=lookup_q is not None):
        launch(triton_kernels.key_gradient_kernel, chunk, log_sums, deltas, grad_out, grad_sums, grad_k, grad_v,
               chunk.kept)  # fmt: skip
        if lookup_q is not None:
            launch.sum(chunk, grad_lookup_q)
    return grads


@fused_attention_backward.register_fake
def _(grad_out, grad_sums, out, sums, log_sums, q, k, v, lookup_k, lookup_q, *rest):
    return _gradients(q, lookup_k, lookup_q)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output, *inputs[:9])
    ctx.options = inputs[9:]


def _backward(ctx, grad_out: Tensor, grad_sums: Tensor, _):
    saved = ctx.saved_tensors
    grads = fused_attention_backward(grad_out, grad_sums, *saved, *ctx.options)
    absent = (False, False, False, saved[6] is None, saved[7] is None)
    return *(None if no else grad for grad, no in zip(grads, absent, strict=True)), *[None] * 11


fused_attention.register_autograd(_backward, setup_context=_save)


def _results(q: Tensor, name: str, skip: int, on_values: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    sums = q.new_empty(batch, heads, length, _columns(name, skip)) if on_values else q.new_empty(0)
    return _heads_inside(q), sums, q.new_empty(batch, heads, length, dtype=torch.float32)


def _gradients(q: Tensor, *lookups: Tensor | None) -> tuple[Tensor, ...]:
    sizes = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in lookups]
    return *(_heads_inside(q) for _ in range(3)), *(q.new_empty(0) if x is None else x for x in sizes)


def _heads_inside(q: Tensor) -> Tensor:
    """``(B, H, L, D)``, in memory ``(B, L, H, D)``: merging the heads afterwards copies nothing."""
    batch, heads, length, head_dim = q.shape
    return q.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def _columns(name: str, skip: int) -> int:
    """Of a lookup, all parts together."""
    methods, ratio = name.split(":")
    counts = [count_buckets(method, 2 * float(ratio), skip) for method in methods.split(",")]
    return sum(n + -n % COLUMN_MULTIPLE for n in counts)


def _offsets(parts: tuple[IRPE, ...], height: int, width: int, device: torch.device) -> Tensor:
    """``(parts, offsets)`` uint8: the bucket of every offset between two tokens, at the place `positions` gives it.

    An offset (rows, columns) is at ``rows * (2 width - 1) + columns``, counted from the smallest one; entries beyond
    the largest one are for pairs with a leading token.
    """
    table = []
    for part in parts:
        # One row of offsets after the other. Between two rows `positions` jumps by their length, so none is left out.
        ids = part.offset_ids(height, width, device).flatten()
        leading = 2 * ((height - 1) * (2 * width - 1) + width - 1) + 2
        table.append(F.pad(ids, (0, leading), value=count_buckets(part.method, 2 * part.ratio, skip=0)))
    return torch.stack(table)


class _Chunk(NamedTuple):
    """Tokens ``first`` to ``first + rows`` of every head, and room for what is summed by bucket of theirs."""

    first: int
    rows: int
    programs: int
    kept: Tensor  # (B * H, rows, kept_row), empty where nothing is summed
    peaks: int  # (B * H, rows, tiles) fp32 numbers


class _Launch:
    """The arguments that all kernels share, taken apart, and the shape of the launch."""

    def __init__(
        self, q, k, v, lookup_k, lookup_q, key_padding_mask, attn_mask, seed, offsets, name, height, width, skip,
        on_values, dropout_p, scale, grad_out=None,
    ):  # fmt: skip
        q, k, v = (_rows_adjacent(x) for x in (q, k, v))
        self.q = q
        batch, heads, length, head_dim = q.shape
        on_k, on_q = lookup_k is not None, lookup_q is not None
        lookup_k, lookup_q = (q if x is None else _rows_adjacent(x) for x in (lookup_k, lookup_q))
        parts, table_size = (1, 0) if offsets is None else offsets.shape
        padded = COLUMN_MULTIPLE if offsets is None else _columns(name, skip) // parts
        self.table = q if offsets is None else offsets
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.contiguous().view(torch.uint8)
        kind = "none" if attn_mask is None else "bool" if attn_mask.dtype == torch.bool else "float"
        mask = q if attn_mask is None else attn_mask.view(torch.uint8) if kind == "bool" else attn_mask
        padding = q if key_padding_mask is None else key_padding_mask
        self.tensors = (q, k, v, lookup_k, lookup_q, self.table, padding, mask)
        self.seed = q if seed is None else seed
        self.strides = [stride for x in (q, k, v, lookup_k, lookup_q) for stride in x.stride()[:3]]
        self.strides += mask.stride() if attn_mask is not None else [0] * 4
        if grad_out is not None:
            self.grad_out = _rows_adjacent(grad_out)
            self.strides += self.grad_out.stride()[:3]
        self.grid = (length, height, width, skip, table_size)
        self.sizes = (heads, *self.grid, scale, dropout_p)
        self.planes, self.length, self.kept_row = batch * heads, length, length + -length % COLUMN_MULTIPLE
        self.constants = constants(q.dtype, head_dim, padded, _generation(q.device)) | {
            "ON_K": on_k, "ON_Q": on_q, "ON_V": on_values, "PADDING": key_padding_mask is not None, "MASK": kind,
            "DROPOUT": dropout_p > 0, "PARTS": parts,
        }  # fmt: skip

    def chunks(self, block: str, *, kept: bool) -> Iterator[_Chunk]:
        """All tokens in tiles of the constant ``block``, at once unless too much would be kept."""
        tile, rows = self.constants[block], self.length
        if kept and self.q.numel():
            row_bytes = self.planes * self.kept_row * self.q.element_size()
            rows = min(rows, max(1, CHUNK_BYTES // (row_bytes * tile)) * tile)
        room = self.q.new_empty(self.planes * rows * self.kept_row if kept else 0)
        for first in range(0, self.length, rows):
            here = min(rows, self.length - first)
            peaks = self.planes * here * -(-self.length // self.constants["BLOCK_N"])
            yield _Chunk(first, here, self.planes * -(-here // tile), room, peaks)

    def __call__(self, kernel, chunk: _Chunk, *tensors: Tensor) -> None:
        if self.q.numel():
            with torch.cuda.device_of(self.q):
                kernel[(chunk.programs,)](
                    *self.tensors, self.seed, *tensors, *self.strides, *self.sizes, chunk.first, chunk.rows,
                    self.kept_row, **self.constants,
                )  # fmt: skip

    def sum(self, chunk: _Chunk, sums: Tensor, peaks: Tensor | None = None, log_sums: Tensor | None = None) -> None:
        """What the chunk has kept, by bucket, into ``sums``; with ``peaks`` and ``log_sums`` it is weights."""
        from irpe_ops.backends import triton_kernels

        if not self.q.numel():
            return
        relative, parts, padded = peaks is not None, self.constants["PARTS"], self.constants["PADDED"]
        columns = max(16, _power_of_two(parts * padded))
        planes = min(max(16, _power_of_two(self.planes)), 64 if columns <= 128 else 32)
        with torch.cuda.device_of(self.q):
            triton_kernels.sum_kernel[(chunk.rows, -(-self.planes // planes))](
                chunk.kept, peaks if relative else chunk.kept, log_sums if relative else chunk.kept, self.table, sums,
                self.planes, *self.grid, chunk.first, chunk.rows, self.kept_row,
                RELATIVE=relative, PARTS=parts, PADDED=padded, BLOCK_P=planes, BLOCK_N=self.constants["BLOCK_N"],
                ALL_COLUMNS=columns, INTERPRETED=INTERPRETED, num_warps=4, num_stages=3,
            )  # fmt: skip


def _power_of_two(n: int) -> int:
    """The least one that is not below ``n``."""
    return 1 << (n - 1).bit_length()


@functools.lru_cache
def _generation(device: torch.device) -> int:
    """The first number of the GPU's compute capability: 8 is Ampere and Ada, 9 Hopper, 10 and 12 Blackwell."""
    return 9 if INTERPRETED else torch.cuda.get_device_capability(device)[0]


_generation._dynamo_marked_constant = True  # asked while torch.compile traces


def constants(dtype: torch.dtype, head_dim: int, padded: int, generation: int) -> dict:
    """How a kernel is compiled for these sizes: docs/benchmarks/README.md counts what other tiles cost."""
    columns, head = max(16, _power_of_two(padded)), max(16, _power_of_two(head_dim))
    # Four warps of 16 rows each divide a tile of 64 without computing anything twice. A wider tile is worth its
    # registers where Hopper's matrix instructions read both factors from shared memory. fp32 needs twice the registers.
    wide = dtype != torch.float32
    return {
        "PADDED": padded,
        "COLUMNS": columns,
        "HEAD_DIM": head_dim,
        "HEAD": head,
        "BLOCK_M": 64 if wide and columns <= 128 else 32,
        "BLOCK_N": 64 if wide and columns <= 128 and head <= 64 and generation == 9 else 32,
        "PRECISION": "ieee" if dtype != torch.float32 else fp32_products(),
        "INTERPRETED": INTERPRETED,
        "num_warps": 4 if wide else 8,
        "num_stages": 2 if wide else 1,
    }


def fp32_products() -> str:
    """``ieee``, exact to fp32, unless the user has allowed ``tf32`` by any of PyTorch's switches."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # the older question raises once the newer switch has been used
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


def _rows_adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
