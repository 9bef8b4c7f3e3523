"""Compiles the Triton kernels for GPUs that are not here, and counts the resources they need.

Usage: python -m tests.helpers.triton_builds [--output docs/benchmarks]    # every variant: minutes
"""

import argparse
import csv
import datetime
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from irpe_ops.backends import triton_kernels, triton_launch

KERNELS = (
    "spread_kernel",
    "forward_kernel",
    "delta_kernel",
    "key_gradient_kernel",
    "query_gradient_kernel",
    "sum_kernel",
)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_TENSORS = ["q", "k", "v", "lookup", "pairs", "pairs_k", "pairs_q", "pairs_v", "out", "sums", "kept", "grad_out",
            "grad_sums", "grad_q", "grad_k", "grad_v"]  # fmt: skip
_OTHERS = {"offset_table": "*u8", "padding": "*u8", "seed": "*i64", "log_sums": "*fp32", "deltas": "*fp32",
           "peaks": "*fp32", "scale": "fp32", "dropout_p": "fp32"}  # fmt: skip
_NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
_NO_FLAGS = {"ON_K": True, "ON_Q": False, "ON_V": False, "PADDING": False, "MASK": "none", "DROPOUT": False, "PARTS": 1}

_ALL = {"ON_Q": True, "ON_V": True}
_DETR = {"PADDING": True, "DROPOUT": True}
VARIANTS = [  # compute capability, head_dim, buckets, dtype, flags; without flags: on keys alone
    (90, 64, 50, torch.bfloat16, {}),  # DeiT
    (80, 64, 50, torch.bfloat16, {}),
    (120, 64, 50, torch.bfloat16, {}),
    (90, 64, 50, torch.bfloat16, _ALL),
    (80, 64, 50, torch.bfloat16, _ALL),
    (120, 64, 50, torch.bfloat16, _ALL),
    (90, 32, 81, torch.bfloat16, _DETR),  # DETR
    (80, 32, 81, torch.bfloat16, _DETR),
    (90, 32, 81, torch.bfloat16, _DETR | _ALL),
    (80, 32, 81, torch.bfloat16, _DETR | _ALL),
    (90, 80, 50, torch.bfloat16, _ALL | {"MASK": "float"}),  # ViT-H
    (120, 80, 50, torch.bfloat16, {}),
    (90, 64, 50, torch.float32, {}),
    (80, 64, 81, torch.float32, _ALL | {"MASK": "bool", "DROPOUT": True}),
    (90, 32, 10, torch.bfloat16, _ALL | _DETR | {"MASK": "float", "PARTS": 2}),  # cross
]


def compile_kernel(name: str, *, head_dim: int, buckets: int, arch: int, dtype=torch.bfloat16, tiles=None, **flags):
    """Kernel ``name`` as a launch would compile it for ``sm_{arch}``; ``tiles`` replaces some of its constants."""
    kernel = getattr(triton_kernels, name)
    parts = flags.get("PARTS", 1)
    padded = (buckets + -buckets % triton_launch.COLUMN_MULTIPLE) * parts
    columns = max(16, triton_launch.power_of_two(padded))
    constants = triton_launch.constants(dtype, head_dim, arch // 10) | _NO_FLAGS | flags
    constants |= {"PADDED": padded // parts, "ALL_PADDED": padded, "COLUMNS": columns}
    if name == "spread_kernel":
        constants |= triton_launch.spread_tiles(200)
    elif name == "sum_kernel":
        constants |= triton_launch.sum_tiles(dtype, columns, 64) | {"RELATIVE": constants["ON_V"]}
    elif name == "key_gradient_kernel":
        constants["num_stages"] = constants["KEY_STAGES"]
    constants |= tiles or {}
    options = triton_launch.options(constants)
    constants = {n: value for n, value in constants.items() if n in kernel.arg_names}
    types = _OTHERS | dict.fromkeys(_TENSORS, _NAMES[dtype])
    types["mask"] = "*fp32" if flags.get("MASK") == "float" else "*u8"
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    # What a launch detects: tensors and the strides of q, k, v start at multiples of 16.
    aligned = [i for i, n in enumerate(kernel.arg_names) if n in _TENSORS or re.fullmatch(r"(q|k|v|go|gs)_\w+", n)]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled, folder: Path) -> dict[str, int]:
    """REG per thread, STACK bytes per thread (for spilled registers) and SHARED bytes per program."""
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    text = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text)}
    return found | {"SHARED": compiled.metadata.shared}


def instructions(compiled, folder: Path) -> int:
    """Counts in the longest loop of the binary, which runs for every tile; in all of it if there is no loop."""
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    text = subprocess.run([CUOBJDUMP, "-sass", path], capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@\S+ )?([A-Z][\w.]*)([^;]*);", text)
    places = {int(place, 16): number for number, (place, _, _) in enumerate(lines)}
    loops = [0]
    for number, (_, name, operands) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if target and places.get(int(target[1], 16), number) < number:
            loops.append(number - places[int(target[1], 16)] + 1)
    return max(loops) or len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder to write a CSV into")
    args = parser.parse_args()
    rows = []
    for arch, head_dim, buckets, dtype, flags in VARIANTS:
        for name in KERNELS:
            compiled = compile_kernel(name, head_dim=head_dim, buckets=buckets, arch=arch, dtype=dtype, **flags)
            with tempfile.TemporaryDirectory() as folder:
                used, longest = resources(compiled, Path(folder)), instructions(compiled, Path(folder))
            tiles = compiled.src.constants
            tiles = {compiled.src.fn.arg_names[place[0]]: value for place, value in tiles.items()}
            shape = tiles.get("BLOCK_M", tiles.get("BLOCK_P")), tiles.get("BLOCK_N", tiles.get("HEAD"))
            per_score = longest * 32 * compiled.metadata.num_warps / (shape[0] * shape[1])
            roles = "qkv" if flags.get("ON_V") else "k"
            extras = "+".join(key.lower() for key in ("PADDING", "MASK", "DROPOUT", "PARTS") if key in flags)
            rows.append([f"sm_{arch}", head_dim, buckets, str(dtype)[6:], roles, extras, name, f"{shape[0]}x{shape[1]}",
                         compiled.metadata.num_warps, used["REG"], used["STACK"], used["SHARED"], longest,
                         f"{per_score:.0f}"])  # fmt: skip
            print(*rows[-1], flush=True)
    if args.output:
        path = args.output / f"triton_compiled-not-run_{datetime.date.today()}.csv"
        with path.open("w", newline="") as file:
            file.write(f"# compiled, not run: Triton {triton.__version__}; instructions are of the longest loop\n")
            header = "gpu,head_dim,buckets,dtype,rpe_on,extras,kernel,tile,warps,registers,stack_bytes,shared_bytes,"
            writer = csv.writer(file)
            writer.writerow((header + "instructions,instructions_per_score").split(","))
            writer.writerows(rows)
        print(path)


if __name__ == "__main__":
    main()
