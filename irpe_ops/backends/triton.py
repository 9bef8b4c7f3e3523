"""`rpe_attention` on CUDA in one pass over the scores: the backend ``triton``.

Small products stay in PyTorch, so that autograd sums the gradients of the tables in a fixed order: ``lookup_k =
scale * q @ table_k`` and ``lookup_q = scale * k @ table_q``, both ``(B, H, L, N)``, go into the kernels of
`triton_kernels`; sums of attention weights by bucket, ``(B, H, L, N)`` again, come out and meet ``table_v``.
"""

import functools
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from irpe_ops.attention_call import AttentionCall, Encoding
from irpe_ops.buckets import count_buckets
from irpe_ops.methods import bucket_map_named, offset_ids
from irpe_ops.modules import autocast_dtype
from irpe_ops.rpe_index import under_function_transform

# Triton's interpreter runs the kernels on the CPU, for tests without a GPU. Triton reads this when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_BUCKETS, MAX_HEAD_DIM = 256, 128  # a row of lookups and a row of q are held in registers


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
    if under_function_transform():
        return "torch.func and forward-mode differentiation need plain PyTorch; use backend='eager'"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"it holds heads of up to {MAX_HEAD_DIM} dimensions, got D={q.shape[-1]}"
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

    Lookups, sums by bucket and their gradients have the dtype of q; everything between them is fp32.
    """
    q, k, v, rpe_q, rpe_k, rpe_v, height, width, key_padding_mask, attn_mask, dropout_p, scale = call
    if call.encodings:
        name, skip = _map_of(call.encodings[0])
    else:
        name, skip, height, width = "", 0, 1, q.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        lookup_k = None if rpe_k is None else _lookup(q, rpe_k, scale)
        lookup_q = None if rpe_q is None else _lookup(k, rpe_q, scale)
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*q.shape[:3], q.shape[2])
        # On the device and from PyTorch's generator: torch.manual_seed decides, and nothing waits.
        seed = torch.randint(2**62, (1,), device=q.device) if dropout_p > 0 else None
        out, sums, _ = fused_attention(
            q, k, v, lookup_k, lookup_q, key_padding_mask, attn_mask, seed,
            name, height, width, skip, rpe_v is not None, dropout_p, scale,
        )  # fmt: skip
        if rpe_v is not None:
            tables = torch.cat([part.table for part in rpe_v.parts], 1).to(q.dtype)  # (H or 1, N, D)
            out = out + sums @ (tables[0] if tables.shape[0] == 1 else tables)
    return out


def _map_of(rpe: Encoding) -> tuple[str, int]:
    """What ids depend on, besides the grid: methods and ratio as one string, which no compiler takes for a symbol."""
    part = rpe.parts[0]
    return ",".join(part.method for part in rpe.parts) + ":" + repr(part.ratio), part.skip


def _lookup(x: Tensor, rpe: Encoding, scale: float) -> Tensor:
    """What every bucket would add to the scores of every token, ``(B, H, L, N)``; ``cross``: rows, then columns."""
    lookups = [part.lookup(x, scale, x.dtype) for part in rpe.parts]
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
        q, k, v, lookup_k, lookup_q, key_padding_mask, attn_mask, seed, name, height, width, skip, on_values,
        dropout_p, scale,
    )  # fmt: skip
    launch(triton_kernels.forward_kernel, launch.query_tiles, out, sums, log_sums)
    return out, sums, log_sums


@fused_attention.register_fake
def _(q, k, v, lookup_k, lookup_q, key_padding_mask, attn_mask, seed, name, height, width, skip, on_values,
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
        q, k, v, lookup_k, lookup_q, key_padding_mask, attn_mask, seed, name, height, width, skip, on_values,
        dropout_p, scale, grad_out,
    )  # fmt: skip
    deltas = torch.empty_like(log_sums)
    grad_out, grad_sums = launch.grad_out, grad_sums.contiguous()
    launch(triton_kernels.query_gradient_kernel, launch.query_tiles, out, sums, log_sums, grad_out, grad_sums,
           grad_q, grad_lookup_k, deltas)  # fmt: skip
    launch(triton_kernels.key_gradient_kernel, launch.key_tiles, log_sums, deltas, grad_out, grad_sums,
           grad_k, grad_v, grad_lookup_q)  # fmt: skip
    return grads


@fused_attention_backward.register_fake
def _(grad_out, grad_sums, out, sums, log_sums, q, k, v, lookup_k, lookup_q, *rest):
    return _gradients(q, lookup_k, lookup_q)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output, *inputs[:8])
    ctx.options = inputs[8:]


def _backward(ctx, grad_out: Tensor, grad_sums: Tensor, _):
    saved = ctx.saved_tensors
    grads = fused_attention_backward(grad_out, grad_sums, *saved, *ctx.options)
    absent = (False, False, False, saved[6] is None, saved[7] is None)
    return *(None if no else grad for grad, no in zip(grads, absent, strict=True)), *[None] * 10


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
    methods, ratio = name.split(":")
    return sum(count_buckets(method, 2 * float(ratio), skip) for method in methods.split(","))


@functools.lru_cache(maxsize=64)
def _offset_table(name: str, height: int, width: int, skip: int, device: torch.device) -> Tensor:
    """``(parts, offsets)`` uint8: the bucket of every offset between two tokens, at the place `positions` gives it.

    An offset (rows, columns) is at ``rows * (2 width - 1) + columns``, counted from the smallest one; entries beyond
    the largest one are for pairs with a leading token.
    """
    methods, ratio = name.split(":")[0].split(","), float(name.split(":")[1])
    # One row of offsets after the other. Between two rows `positions` jumps by their length, so none is left out.
    leading = 2 * ((height - 1) * (2 * width - 1) + width - 1) + 2
    table = []
    for method in methods:
        ids = offset_ids(bucket_map_named(method), ratio, height, width, f"method {method!r}")
        table.append(F.pad(ids.flatten(), (0, leading), value=count_buckets(method, 2 * ratio, skip=0)))
    return torch.stack(table).to(torch.uint8).to(device)


class _Launch:
    """The arguments that all kernels share, taken apart, and the shape of the launch."""

    def __init__(
        self, q, k, v, lookup_k, lookup_q, key_padding_mask, attn_mask, seed, name, height, width, skip, on_values,
        dropout_p, scale, grad_out=None,
    ):  # fmt: skip
        q, k, v = (_rows_adjacent(x) for x in (q, k, v))
        self.q = q
        batch, heads, length, head_dim = q.shape
        on_k, on_q = lookup_k is not None, lookup_q is not None
        lookup_k, lookup_q = (q if x is None else _rows_adjacent(x) for x in (lookup_k, lookup_q))
        encoded = on_k or on_q or on_values
        table = _offset_table(name, height, width, skip, q.device) if encoded else q
        parts = table.shape[0] if encoded else 1
        buckets = _columns(name, skip) // parts if encoded else 1
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.contiguous().view(torch.uint8)
        kind = "none" if attn_mask is None else "bool" if attn_mask.dtype == torch.bool else "float"
        mask = q if attn_mask is None else attn_mask.view(torch.uint8) if kind == "bool" else attn_mask
        self.tensors = (q, k, v, lookup_k, lookup_q, table, q if key_padding_mask is None else key_padding_mask, mask)
        self.seed = q if seed is None else seed
        self.strides = [stride for x in (q, k, v, lookup_k, lookup_q) for stride in x.stride()[:3]]
        self.strides += mask.stride() if attn_mask is not None else [0] * 4
        if grad_out is not None:
            self.grad_out = _rows_adjacent(grad_out)
            self.strides += self.grad_out.stride()[:3]
        self.sizes = (heads, length, height, width, skip, table.shape[1] if encoded else 0, scale, dropout_p)
        self.constants = constants(q.dtype, head_dim, buckets) | {
            "ON_K": on_k, "ON_Q": on_q, "ON_V": on_values, "PADDING": key_padding_mask is not None, "MASK": kind,
            "DROPOUT": dropout_p > 0, "LEADING": skip > 0, "PARTS": parts,
        }  # fmt: skip
        self.query_tiles = batch * heads * -(-length // self.constants["BLOCK_M"])
        self.key_tiles = batch * heads * -(-length // self.constants["BLOCK_N"])

    def __call__(self, kernel, programs: int, *tensors: Tensor) -> None:
        if self.q.numel() == 0:
            return
        with torch.cuda.device_of(self.q):
            kernel[(programs,)](*self.tensors, self.seed, *tensors, *self.strides, *self.sizes, **self.constants)


def constants(dtype: torch.dtype, head_dim: int, buckets: int) -> dict:
    """How a kernel is compiled for these sizes."""
    columns = max(16, 1 << (buckets - 1).bit_length())
    # Eight warps share a tile, or its lookups, bucket sums and gradients do not fit the registers of a thread.
    small = dtype == torch.float32 or columns > 64
    # fp32 products are exact to fp32 unless the user has allowed TF32, as everywhere in PyTorch.
    precise = torch.get_float32_matmul_precision() == "highest"
    return {
        "BUCKETS": buckets,
        "COLUMNS": columns,
        "HEAD_DIM": head_dim,
        "HEAD": max(16, 1 << (head_dim - 1).bit_length()),
        "BLOCK_M": 32 if small else 64,
        "BLOCK_N": 32,
        "PRECISION": "ieee" if precise else "tf32",
        "INTERPRETED": INTERPRETED,
        "num_warps": 8,
        "num_stages": 1 if dtype == torch.float32 else 2,
    }


def _rows_adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
