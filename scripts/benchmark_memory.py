# SPDX-License-Identifier: Apache-2.0
"""Measures the peak memory of one encoded attention, forward and backward, on longer and longer sequences.

Usage:
    python scripts/benchmark_memory.py [--device cpu] [--grids 32x32 32x64 64x64] [--heads 8] [--head-dim 32]
                                       [--output docs/benchmarks]

Compares ours with PyTorch's fused attention without encoding ("sdpa") and the definition with plain gathers, without
our extension ("gather"). Each candidate runs in its own process: the growth of its resident set (Linux) or of its
allocations (CUDA) from before the call to its peak, inputs included, compared with one fp32 (heads, L, L) tensor. A
first call with one small head makes the bucket map of the grid, which all layers share: one or four bytes per pair.
"""

import argparse
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmark_ops import describe, write_csv

from irpe_ops import build_rpe, parse_rpe_spec, rpe_attention

CANDIDATES = ["sdpa", "ours k", "ours qkv", "gather k", "gather qkv"]


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's high-water mark


def now_and_peak(device: torch.device) -> tuple[float, float]:
    """MiB in use now, and the peak since ``reset_peak``."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20, torch.cuda.max_memory_allocated(device) / 2**20
    fields = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE))
    return int(fields["VmRSS"]) / 1024, int(fields["VmHWM"]) / 1024


def run(candidate: str, height: int, width: int, heads: int, head_dim: int, device: torch.device) -> None:
    kind, _, rpe_on = candidate.partition(" ")
    q, k, v = torch.randn(3, 1, heads, height * width, head_dim, device=device, requires_grad=True)
    if kind == "sdpa":
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        encodings = build_rpe(parse_rpe_spec(f"rpe-2.0-product-ctx-1-{rpe_on}"), head_dim, heads)
        encodings = [None if rpe is None else rpe.to(device) for rpe in encodings]
        backend = "auto" if kind == "ours" else "eager"
        out = rpe_attention(q, k, v, *encodings, height=height, width=width, backend=backend)
    out.sum().backward()


def measure(candidate: str, grid: tuple[int, int], args: argparse.Namespace) -> float:
    """MiB of the peak above what was in use before the call."""
    torch.set_num_threads(1)
    if candidate.startswith("gather"):
        sys.modules["irpe_ops.rpe_index"].compiled_devices = ()
    device = torch.device(args.device)
    run(candidate, *grid, 1, 8, device)
    reset_peak(device)
    before, _ = now_and_peak(device)
    run(candidate, *grid, args.heads, args.head_dim, device)
    return now_and_peak(device)[1] - before


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--grids", nargs="+", default=["32x32", "32x64", "64x64"], help="L = height x width")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--output", type=Path, help="folder to write a CSV into")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu" and not Path("/proc/self/clear_refs").exists():
        sys.exit("peak memory is read from Linux's /proc, which is missing here (--device cuda needs none)")
    torch.set_num_threads(1)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc then returns freed memory at once
    print(describe(device))
    context, rows = multiprocessing.get_context("spawn"), []
    for height, width in (map(int, grid.split("x")) for grid in args.grids):
        length = height * width
        matrix = args.heads * length * length * 4 / 2**20
        print(f"L = {length}, {args.heads} heads of {args.head_dim}, fp32; one (heads, L, L) tensor: {matrix:,.0f} MiB")
        for candidate in CANDIDATES:
            with ProcessPoolExecutor(1, context) as process:  # a Pool would wait for a killed process
                megabytes = process.submit(measure, candidate, (height, width), args).result()
            print(f"{candidate:10}  {megabytes:8,.0f} MiB  {megabytes / matrix:6.2f} of that tensor", flush=True)
            rows.append([candidate, length, args.heads, args.head_dim, f"{megabytes:.0f}", f"{megabytes / matrix:.3f}"])
    if args.output:
        fields = ["candidate", "length", "heads", "head_dim", "peak_MiB", "of_one_matrix"]
        print(write_csv(args.output, "memory_fp32", device, fields, rows))


if __name__ == "__main__":
    main()
