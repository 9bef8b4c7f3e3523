# SPDX-License-Identifier: Apache-2.0
"""Times the encoded attention and its lookup against their peers, side by side, after checking the answers.

Usage:
    python scripts/benchmark_ops.py [--device cpu] [--dtype fp32] [--threads 1] [--quick] [--output docs/benchmarks]

Peers: `clone()` of the lookup's output, `gather`, `scatter_add` for the lookup; for attention
`scaled_dot_product_attention` without encoding ("sdpa", the base of the ratios) and with the encoding as a float mask
("sdpa + mask", including making the mask, which each input needs), and plain PyTorch ("eager").
Every round runs each candidate once, so a slow moment of the machine affects all. It prints medians, and their ratio
beside that of the fastest rounds.
On a CPU with one thread the clock is the CPU time of this process, which other programs cannot stretch. The C library
keeps freed memory for every candidate, as in a trainer: otherwise one would fault in what another has freed.
On a GPU it is the device's own time: calls wait in its queue behind a pause, which hides Python's launch time, as in a
training step that keeps the GPU busy. DeiT's batch is 256 there.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from irpe_ops import build_rpe, get_bucket_ids_2d, info, parse_rpe_spec, rpe_attention, rpe_index
from irpe_ops.attention_call import AttentionCall
from irpe_ops.backends.choice import can_run
from irpe_ops.backends.measure import gpu_milliseconds, wait
from irpe_ops.rpe_index import rpe_index_adjoint
from irpe_train.freed_memory import keep_freed_memory
from irpe_train.run_log import processor_name

SHAPES = {  # batch, heads, height, width, skip, head_dim, spec
    "DeiT-S B16 H6 L197 D64": (16, 6, 14, 14, 1, 64, "rpe-1.9-product-ctx-1-"),
    "DeiT-S euc B16 H6 L197 D64": (16, 6, 14, 14, 1, 64, "rpe-20-euc-ctx-1-"),
    "DETR encoder B2 H8 L850 D32": (2, 8, 25, 34, 0, 32, "rpe-2.0-product-ctx-1-"),
}
GPU_SHAPES = {  # a GPU needs more work than a core; DETR's encoder has two images there too
    name.replace("B16", "B256"): (256 if sizes[0] == 16 else sizes[0], *sizes[1:]) for name, sizes in SHAPES.items()
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FIELDS = ["operation", "shape", "dtype", "candidate", "median_ms", "fastest_ms", "base", "ratio", "ratio_of_fastest"]
LAUNCHED_WITHIN = 20  # milliseconds: longer than Python takes to launch one call on a GPU


class Bench:
    """Collects rows and times candidates in turns; on a GPU by its own clock if ``queued``, else by the host's."""

    def __init__(self, device: torch.device, rounds: int, queued: bool = False) -> None:
        self.queued = queued and device.type == "cuda"
        self.device, self.rounds, self.rows = device, rounds, []
        self.warm_up = min(rounds, 2)  # rounds that are not timed
        self.keeps_memory = device.type == "cpu" and keep_freed_memory()
        self.clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def compare(self, operation: str, shape: str, dtype: str, base: str, candidates: dict[str, Callable]) -> None:
        """Time every candidate, print its median and the ratios to ``base``, of medians and of the fastest rounds."""
        times = {name: [] for name in candidates}
        for round_ in range(self.warm_up + self.rounds):
            for name, run in candidates.items():
                milliseconds = gpu_milliseconds(run, LAUNCHED_WITHIN, rounds=1) if self.queued else self._host_time(run)
                if round_ >= self.warm_up:
                    times[name].append(milliseconds)
        medians = {name: statistics.median(t) for name, t in times.items()}
        for name, median in medians.items():
            ratio, fastest = median / medians[base], min(times[name]) / min(times[base])
            figures = [f"{median:.3f}", f"{min(times[name]):.3f}", base, f"{ratio:.2f}", f"{fastest:.2f}"]
            self.rows.append([operation, shape, dtype, name, *figures])
            ratios = f"{ratio:5.2f} ({fastest:.2f}) x {base}"
            print(f"{operation:28} {shape:28} {dtype:5} {name:15} {median:9.2f} ms   {ratios}", flush=True)

    def _host_time(self, run: Callable) -> float:
        # As in GPU training, Python launches one step while another runs.
        repeats = 3 if self.device.type == "cuda" else 1
        wait(self.device)
        start = self.clock()
        for _ in range(repeats):
            run()
        wait(self.device)
        return 1e3 * (self.clock() - start) / repeats


def check(name: str, ours: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise unless the answers agree: a fast wrong answer is not a benchmark."""
    ours, expected = ours.detach().double(), expected.detach().double()
    error = float((ours - expected).abs().max() / expected.abs().max())
    if not error <= tolerance:
        raise SystemExit(f"{name}: differs from plain PyTorch by {error:.1e} of its largest value, not {tolerance:.0e}")


def benchmark_lookup(bench: Bench, shape: str, sizes: tuple, dtype_name: str) -> None:
    """`rpe_index` and its adjoint at the shape of one attention layer."""
    batch, heads, height, width, skip, _, spec = sizes
    dtype, config = DTYPES[dtype_name], parse_rpe_spec(spec + "k", skip=skip)
    where = (config.alpha, config.beta, config.gamma)
    ids, buckets = get_bucket_ids_2d(config.method, height, width, skip, *where)
    ids = ids.to(bench.device)
    length = ids.shape[0]
    input = torch.randn(batch, heads, length, buckets, device=bench.device).to(dtype)
    expanded = ids.expand(batch, heads, -1, -1)
    output = input.gather(-1, expanded)
    check("rpe_index", rpe_index(input, ids), output, 0.0)
    sums = torch.zeros_like(input, dtype=torch.float64).scatter_add_(-1, expanded, output.double())
    check("rpe_index_adjoint", rpe_index_adjoint(output, ids, buckets), sums, 32 * torch.finfo(dtype).eps)
    with torch.no_grad():
        forward = {"ours": lambda: rpe_index(input, ids), "clone": output.clone}
        forward["gather"] = lambda: input.gather(-1, expanded)
        bench.compare("lookup forward", shape, dtype_name, "clone", forward)
        backward = {"ours": lambda: rpe_index_adjoint(output, ids, buckets)}
        backward["scatter_add"] = lambda: torch.zeros_like(input).scatter_add(-1, expanded, output)
        bench.compare("lookup backward", shape, dtype_name, "scatter_add", backward)


def benchmark_attention(bench: Bench, shape: str, sizes: tuple, dtype_name: str) -> None:
    """One attention layer, forward only and forward + backward."""
    batch, heads, height, width, skip, head_dim, spec = sizes
    dtype, length = DTYPES[dtype_name], height * width + skip
    q, k, v, grad = (
        torch.randn(batch, length, heads, head_dim, device=bench.device).to(dtype).transpose(1, 2) for _ in range(4)
    )
    leaves = [t.requires_grad_() for t in (q, k, v)]
    if bench.device.type == "cpu":
        fast = {"ours": "compiled"}
    else:
        fast = {"compiled": "compiled", "ours": "triton", "mask of ours": "sdpa"}

    def layer(rpe_on: str, backend: str) -> Callable | None:
        torch.manual_seed(0)
        encodings = build_rpe(parse_rpe_spec(spec + rpe_on, skip=skip), head_dim, heads)
        tables = [p for rpe in encodings if rpe is not None for p in rpe.to(bench.device, dtype).parameters()]
        for table in tables:
            torch.nn.init.normal_(table, std=0.02)
        if not can_run(backend, AttentionCall(*leaves, *encodings, height, width)):
            return None

        def run() -> Tensor:
            return rpe_attention(*leaves, *encodings, height=height, width=width, backend=backend)

        run.leaves = [*leaves, *tables]
        return run

    def masked() -> Callable:
        rpe_k = build_rpe(parse_rpe_spec(spec + "k", skip=skip), head_dim, heads)[1].to(bench.device, dtype)
        torch.nn.init.normal_(rpe_k.lookup_table_weight, std=0.02)

        def run() -> Tensor:
            mask = rpe_k(leaves[0] * head_dim**-0.5, height, width)
            return F.scaled_dot_product_attention(*leaves, attn_mask=mask)

        run.leaves = [*leaves, rpe_k.lookup_table_weight]
        return run

    def plain() -> Tensor:
        return F.scaled_dot_product_attention(*leaves)

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # PyTorch may prefer another, such as cuDNN's
            return plain()

    plain.leaves = flash.leaves = leaves
    candidates = {"sdpa": plain, "sdpa + mask": masked()}
    if bench.device.type == "cuda" and dtype != torch.float32:
        candidates["flash"] = flash
    for rpe_on in ("k", "qk", "qkv"):
        eager, tolerance = layer(rpe_on, "eager"), 200 * torch.finfo(dtype).eps
        for name, backend in fast.items():
            if (ours := layer(rpe_on, backend)) is None:
                print(f"{shape}: backend {backend} cannot run {rpe_on} here")
                continue
            check(f"attention {rpe_on}, {backend}", ours(), eager(), tolerance)
            for a, b in zip(*(torch.autograd.grad(f(), f.leaves, grad) for f in (ours, eager)), strict=True):
                check(f"attention {rpe_on}, {backend}, gradient", a, b, tolerance)
            candidates[f"{name} {rpe_on}"] = ours
        if rpe_on != "qk":
            candidates[f"eager {rpe_on}"] = eager
    with torch.no_grad():
        bench.compare("attention forward", shape, dtype_name, "sdpa", candidates)
    both = {name: (lambda f=f: torch.autograd.grad(f(), f.leaves, grad)) for name, f in candidates.items()}
    bench.compare("attention forward + backward", shape, dtype_name, "sdpa", both)


def describe(device: torch.device, bench: Bench | None = None) -> str:
    """The conditions of a measurement: device, memory, rounds, threads, versions."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = processor_name()
        if hasattr(torch.ops.irpe, "cpu_capability"):
            name += f", {torch.ops.irpe.cpu_capability()}"
    if bench is not None:
        name += "; freed memory is kept" if bench.keeps_memory else ""
        name += f"; timed rounds: {bench.rounds}, after {bench.warm_up} of warm-up"
    return f"{name}; {torch.get_num_threads()} thread(s); torch {torch.__version__}; Python {platform.python_version()}"


def write_csv(
    folder: Path, kind: str, device: torch.device, fields: list[str], rows: list[list], bench: Bench | None = None
) -> Path:
    """As `info.write_csv`, with the processor and the number of its threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    if device.type == "cpu" and torch.get_num_threads() > 1:
        name += f" {torch.get_num_threads()} threads"
    return info.write_csv(folder, kind, name, describe(device, bench), [fields, *rows])


def begin(parser: argparse.ArgumentParser, rounds: int, queued: bool = False) -> tuple[argparse.Namespace, Bench]:
    """Read the command line, with the flags that every benchmark has, and print the conditions."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help="dtype of the tensors or of autocast")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds")
    parser.add_argument("--quick", action="store_true", help="one round, as a test")
    parser.add_argument("--output", type=Path, help="folder to write a CSV into")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    bench = Bench(torch.device(args.device), 1 if args.quick else args.rounds, queued)
    print(describe(bench.device, bench))
    return args, bench


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    args, bench = begin(parser, rounds=15, queued=True)
    known = GPU_SHAPES if bench.device.type == "cuda" else SHAPES
    shapes = {shape: sizes for shape, sizes in known.items() if args.only in shape}
    if not shapes:
        sys.exit(f"--only {args.only!r} matches no shape; there are: {', '.join(known)}")
    for shape, sizes in shapes.items():
        benchmark_lookup(bench, shape, sizes, args.dtype)
        benchmark_attention(bench, shape, sizes, args.dtype)
    if args.output:
        print(write_csv(args.output, f"ops_{args.dtype}", bench.device, FIELDS, bench.rows, bench))


if __name__ == "__main__":
    main()
