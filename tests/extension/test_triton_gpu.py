"""The Triton backend on a GPU: every case of triton_cases.py, then real sizes, accuracy, determinism and memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from irpe_ops import build_rpe, parse_rpe_spec, rpe_attention
from irpe_ops.backends import choice
from tests import oracles

pytestmark = pytest.mark.gpu
CASES = Path(__file__).parents[1] / "helpers" / "triton_cases.py"
SHAPES = {  # spec, batch, heads, grid, skip, head_dim
    "deit": ("rpe-1.9-product-ctx-1-{}", 4, 6, (14, 14), 1, 64),
    "detr": ("rpe-2.0-product-ctx-1-{}", 2, 8, (25, 34), 0, 32),
    "cross": ("rpe-20-cross-ctx-0-{}", 2, 6, (14, 14), 1, 64),
    "euc": ("rpe-20-euc-ctx-1-{}", 2, 6, (14, 14), 1, 64),
}


def example(name, rpe_on, dtype):
    spec, batch, heads, grid, skip, head_dim = SHAPES[name]
    encodings = build_rpe(parse_rpe_spec(spec.format(rpe_on), skip), head_dim, heads)
    for seed, rpe in enumerate(encodings):
        if rpe is not None:
            oracles.fill_tables(rpe, seed, std=0.1)
            rpe.to("cuda", dtype)
    generator = torch.Generator("cuda").manual_seed(0)
    length = grid[0] * grid[1] + skip
    packed = torch.randn(batch, length, 3, heads, head_dim, device="cuda", generator=generator).to(dtype)
    return packed, encodings, {"height": grid[0], "width": grid[1]}


def run(packed, encodings, options, backend):
    packed = packed.detach().requires_grad_()
    out = rpe_attention(*packed.permute(2, 0, 3, 1, 4), *encodings, **options, backend=backend)
    generator = torch.Generator("cuda").manual_seed(1)
    weights = torch.randn(out.shape, device="cuda", generator=generator).to(out.dtype)
    tables = [p for rpe in encodings if rpe is not None for p in rpe.parameters()]
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [packed, *tables])]


def test_all_cases_pass_on_the_gpu():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    result = subprocess.run(command, cwd=CASES.parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rpe_on", ["k", "qkv"])
@pytest.mark.parametrize("name", SHAPES)
def test_as_accurate_as_plain_pytorch(name, rpe_on, dtype):
    packed, encodings, options = example(name, rpe_on, dtype)
    ours = run(packed, encodings, options, "triton")
    plain = run(packed, encodings, options, "eager")
    wide = [None if rpe is None else rpe.double() for rpe in encodings]
    exact = run(packed.double(), wide, options, "eager")
    for x, y, answer in zip(ours, plain, exact, strict=True):
        oracles.assert_as_accurate_as_torch(x, y, answer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_give_the_same_bits(dtype):
    case = example("detr", "qkv", dtype)
    for first, second in zip(run(*case, "triton"), run(*case, "triton"), strict=True):
        assert torch.equal(first, second)


def test_auto_takes_one_that_is_right_and_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "_known", {})
    run(*example("deit", "k", torch.bfloat16), "auto")
    (found,) = choice._known.values()
    assert set(found.ms) | set(found.left_out) == {"sdpa", "triton", "eager"} and "eager" in found.ms


def test_no_square_tensor_at_4096_tokens():
    """Forward and backward of 4,096 tokens stay below one (B, H, L, L) tensor of the smallest dtype there is."""
    encodings = [rpe.cuda().bfloat16() for rpe in build_rpe(parse_rpe_spec("rpe-1.9-product-ctx-1-qkv"), 32, 8)]
    packed = torch.randn(1, 4096, 3, 8, 32, device="cuda", dtype=torch.bfloat16)
    run(packed, encodings, {}, "triton")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(packed, encodings, {}, "triton")
    assert torch.cuda.max_memory_allocated() - before < 8 * 4096 * 4096


def test_inductor_compiles_a_training_step_without_a_graph_break():
    packed, encodings, options = example("deit", "qkv", torch.float32)

    def step(x):
        return rpe_attention(*x.permute(2, 0, 3, 1, 4), *encodings, **options, backend="triton")

    compiled = torch.compile(step, fullgraph=True)
    x, y = (packed.clone().requires_grad_() for _ in range(2))
    torch.testing.assert_close(compiled(x), step(y), rtol=1e-4, atol=1e-4)
    compiled(x).sum().backward()
    step(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-4)
