# SPDX-License-Identifier: Apache-2.0
"""Lists the backends available here and why others are missing, checks their results, and times them."""

import csv
import datetime
import itertools
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from irpe_ops.args import end_with, get_info_parser
from irpe_ops.attention_call import AttentionCall
from irpe_ops.backends import NAMES, choice, eager, module_of
from irpe_ops.backends.measure import distance, in_double, run
from irpe_ops.config import parse_rpe_spec
from irpe_ops.modules import build_rpe
from irpe_ops.rpe_index import missing_kernels, rpe_index
from irpe_ops.whole_file import whole_file

# batch, heads, height, width, leading tokens, head dimension, spec without rpe_on, whether images are padded
SHAPES = {
    "DeiT-S B64 H6 L197 D64": (64, 6, 14, 14, 1, 64, "rpe-1.9-product-ctx-1-", False),
    "DETR encoder B2 H8 L850 D32": (2, 8, 25, 34, 0, 32, "rpe-2.0-product-ctx-1-", True),
}
FIELDS = ["shape", "dtype", "encodings", "work", "candidate", "median_ms", "left_out", "auto"]


@dataclass(frozen=True)
class Backend:
    """One implementation; ``missing`` says why it is not available and which command installs it."""

    name: str
    missing: str | None
    check: Callable[[], Iterator[tuple[str, float, float]]]  # (what, relative error, allowed)


def backends() -> list[Backend]:
    """All backends, slow and simple ones first."""
    compiled, triton = module_of("compiled"), module_of("triton")
    compiled_on_cuda = compiled.missing() or compiled.missing_on_cuda(0)
    triton_on_cuda = triton.missing() or triton.too_old(torch.device(_best_device(), 0))
    return [
        Backend("plain PyTorch", None, lambda: _check_attention("eager", "cpu")),
        Backend("sdpa attention", None, lambda: _check_attention("sdpa", _best_device())),
        Backend("compiled rpe_index, CPU", missing_kernels("cpu"), lambda: _check_lookup("cpu")),
        Backend("compiled rpe_index, CUDA", missing_kernels("cuda"), lambda: _check_lookup("cuda")),
        Backend("compiled attention, CPU", compiled.missing(), lambda: _check_attention("compiled", "cpu")),
        Backend("compiled attention, CUDA", compiled_on_cuda, lambda: _check_attention("compiled", "cuda")),
        Backend("triton attention, CUDA", triton_on_cuda, lambda: _check_attention("triton", "cuda")),
    ]


def main(argv: list[str] | None = None) -> int:
    """Print the table; the exit code is 1 if ``--check`` finds a wrong backend, else 0."""
    parser = get_info_parser()
    args = parser.parse_args(argv)
    print(f"python {platform.python_version()}, torch {torch.__version__}, {_device()}")
    wrong = 0
    for backend in backends():
        print(f"{'missing' if backend.missing else 'yes':8}{backend.name}")
        if backend.missing:
            print(f"{'':8}  {backend.missing}")
        elif args.check:
            wrong += not _passes(backend)
    if args.check and not args.benchmark:
        list(_rows(batch=1 if _best_device() == "cpu" else None))
    if args.benchmark:
        setup = f"{_device()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {datetime.date.today()}"
        rows = itertools.chain([FIELDS], _rows())  # slow, so the file is opened first
        try:
            print(write_csv(args.benchmark, "attention", _device(), f"{setup}, medians", rows))
        except OSError as error:
            sys.exit(f"{parser.prog}: --benchmark {args.benchmark}: cannot be written to ({error})")
    if wrong:
        print(f"{wrong} of the backends above gave wrong results; use backend='eager' and report this output")
    return 1 if wrong else 0


def _passes(backend: Backend) -> bool:
    right = True
    try:
        for what, error, allowed in backend.check():
            # Not `error > allowed`: a NaN would pass.
            good = error <= allowed
            print(f"{'':8}  {'ok' if good else 'WRONG':6}{what}: relative error {error:.1e}, allowed {allowed:.1e}")
            right = right and good
    except Exception as problem:  # the user needs to see whatever a broken backend raises
        print(f"{'':8}  WRONG {type(problem).__name__}: {problem}")
        right = False
    return right


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _rows(batch: int | None = None) -> Iterator[list[str]]:
    """Check and time every candidate at every shape, as in `choice`; print the results and yield CSV rows."""
    device = _best_device()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for shape, sizes in SHAPES.items():
        for rpe_on in ("k", "qkv"):
            for training in (False, True):
                full, *others, spec, padded = sizes
                call = _call(batch or full, *others, spec + rpe_on, padded, device, dtype, training)
                names = [name for name in NAMES if choice.can_run(name, call)]
                found = choice.measure(call, {name: module_of(name).attention for name in names}, eager.attention)
                with torch.set_grad_enabled(training):
                    taken = choice.choose(call)
                work = "forward + backward" if training else "forward"
                shown = shape if batch is None else re.sub(r"B\d+", f"B{batch}", shape)
                print(f"{shown}, {rpe_on}, {work}, {_short(dtype)}: {found}; auto takes {taken}")
                for name in names:
                    ms, reason = found.ms.get(name), found.left_out.get(name, "")
                    if reason:
                        print(f"{'':8}  {name} is left out: {reason}")
                    time = "" if ms is None else f"{ms:.3f}"
                    yield [shown, _short(dtype), rpe_on, work, name, time, reason, "yes" if name == taken else ""]


def _call(
    batch, heads, height, width, skip, head_dim, spec, padded, device, dtype, training, std=0.02
) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    length = height * width + skip
    packed = torch.randn(batch, length, 3, heads, head_dim, generator=generator).to(device, dtype)
    q, k, v = packed.requires_grad_(training).permute(2, 0, 3, 1, 4)
    encodings = build_rpe(parse_rpe_spec(spec, skip), head_dim, heads)
    for rpe in filter(None, encodings):
        for table in rpe.parameters():
            nn.init.normal_(table, std=std, generator=generator)
    encodings = [rpe and rpe.to(device, dtype).requires_grad_(training) for rpe in encodings]
    padding = torch.zeros(batch, length, dtype=torch.bool, device=device) if padded else None
    return AttentionCall(q, k, v, *encodings, height, width, padding, scale=head_dim**-0.5)


def write_csv(folder: Path, kind: str, device: str, conditions: str, rows: Iterable[list]) -> Path:
    """``<kind>_<device>_<date>.csv``, with the conditions in its first line."""
    device = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = folder / f"{kind}_{device}_{datetime.date.today().isoformat()}.csv"
    with whole_file(path) as part, part.open("w", newline="") as file:
        file.write(f"# {conditions}\n")
        csv.writer(file).writerows(rows)
    return path


def _check_lookup(device: str) -> Iterator[tuple[str, float, float]]:
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 50, (197, 197), generator=generator, dtype=torch.uint8).to(device)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        input = torch.randn(2, 3, 197, 50, generator=generator).to(device, dtype).requires_grad_()
        grad = torch.randn(2, 3, 197, 197, generator=generator).to(device, dtype)
        ids = index.long().expand(2, 3, -1, -1)
        output = rpe_index(input, index)
        yield f"lookup {_short(dtype)}", distance([output.detach()], [input.detach().gather(-1, ids)]), 0.0
        sums = torch.zeros(2, 3, 197, 50, dtype=torch.float64, device=device).scatter_add(-1, ids, grad.double())
        found = torch.autograd.grad(output, input, grad)
        yield f"gradient {_short(dtype)}", distance(found, [sums]), _allowed(dtype)


def _check_attention(name: str, device: str) -> Iterator[tuple[str, float, float]]:
    on = "qk" if name == "sdpa" else "qkv"  # sdpa cannot encode values
    for spec in (f"rpe-1.9-product-ctx-1-{on}", "rpe-20-euc-bias-0-qk", "rpe-2.0-cross-ctx-1-k"):
        for dtype in (torch.float32, torch.bfloat16):
            call = _call(2, 2, 6, 7, 1, 64, spec, False, device, dtype, training=True, std=0.2)
            if module_of(name).why_not(call):
                continue
            runs = (run(module_of(name).attention, call, True), run(eager.attention, in_double(call), True))
            # The output, and all gradients as one vector.
            ours, exact = ((out, torch.cat([grad.double().flatten() for grad in grads])) for out, *grads in runs)
            # A gradient is a longer sum: on an H200 PyTorch's own fp32 kernel is off by 9 eps.
            for what, eps, got, wanted in zip(("forward", "backward"), (8, 16), ours, exact, strict=True):
                yield f"{spec} {what} {_short(dtype)}", distance([got], [wanted]), _allowed(dtype, eps)


def _allowed(dtype: torch.dtype, eps: int = 8) -> float:
    return eps * torch.finfo(dtype).eps


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU only ({platform.machine()})"


if __name__ == "__main__":
    end_with(main)
