"""The Triton backend on a GPU: every case of triton_cases.py, then real sizes, accuracy, determinism and memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from irpe_ops import buckets, build_rpe, parse_rpe_spec, rpe_attention
from irpe_ops.backends import choice, triton_launch
from tests import oracles

OLD = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(OLD, reason="the kernels are for Ampere and later")]
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
    weights = torch.randn(out.shape, device="cuda", generator=generator).to(out)
    tables = [p for rpe in encodings if rpe is not None for p in rpe.parameters()]
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [packed, *tables])]


def test_all_cases_pass_on_the_gpu():
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "4", "-p", "no:cacheprovider", str(CASES)]  # they compile
    result = subprocess.run(command, cwd=CASES.parents[2], env=environment, capture_output=True, text=True)
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
    tried = set(found.ms) | set(found.left_out)
    assert tried - {"compiled"} == {"sdpa", "triton", "eager"} and "eager" in found.ms


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa", "triton"])
def test_on_a_gpu_that_is_not_the_current_one(backend):
    packed, encodings, options = example("deit", "k", torch.float32)
    expected = run(packed, encodings, options, "eager")
    moved = [rpe and rpe.to("cuda:1") for rpe in encodings]
    for ours, answer in zip(run(packed.to("cuda:1"), moved, options, backend), expected, strict=True):
        torch.testing.assert_close(ours.to(answer), answer, rtol=1e-4, atol=1e-4)


def test_tables_alone_are_trained_through_sdpa():
    packed, encodings, options = example("deit", "k", torch.bfloat16)
    grads = []
    for backend in ("sdpa", "eager"):
        out = rpe_attention(*packed.permute(2, 0, 3, 1, 4), *encodings, **options, backend=backend)
        grads.append(torch.autograd.grad(out.float().square().sum(), encodings[1].table)[0].float())
    assert (grads[0] - grads[1]).norm() < 0.05 * grads[1].norm()


def test_less_than_one_square_tensor_at_4096_tokens(monkeypatch):
    """Forward and backward keep values for the token pairs of one head at a time if they must, not of all eight."""
    monkeypatch.setattr(triton_launch, "chunk_bytes", lambda device: 1)
    encodings = [rpe.cuda().bfloat16() for rpe in build_rpe(parse_rpe_spec("rpe-1.9-product-ctx-1-qkv"), 32, 8)]
    packed = torch.randn(1, 4096, 3, 8, 32, device="cuda", dtype=torch.bfloat16)
    run(packed, encodings, {}, "triton")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(packed, encodings, {}, "triton")
    assert torch.cuda.max_memory_allocated() - before < 8 * 4096 * 4096 * 2  # bytes of a bfloat16


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


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa", "triton"])
@pytest.mark.parametrize("grid", [(14, 14), (13, 17)])  # the second is not square
def test_a_training_step_in_a_cuda_graph_equals_the_step_outside(backend, grid):
    """Nothing waits for the host, and cached offset tables outlive the graph's own memory pool."""
    encodings = build_rpe(parse_rpe_spec("rpe-1.9-product-ctx-1-qk", 1), 32, 2)
    for seed, rpe in enumerate(encodings[:2]):
        oracles.fill_tables(rpe, seed, std=0.1)
        rpe.cuda()
    packed = torch.randn(2, grid[0] * grid[1] + 1, 3, 2, 32, device="cuda", requires_grad=True)
    leaves = [packed, *(p for rpe in encodings[:2] for p in rpe.parameters())]

    def step():
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        out = rpe_attention(q, k, v, *encodings, height=grid[0], width=grid[1], backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    expected = [x.detach().clone() for x in step()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles, and makes what is kept
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    buckets._cached_map.cache_clear()  # as many other grids would; what is then free is written to
    buckets._cached_offsets.cache_clear()
    written = [torch.full((n,), 255, dtype=torch.uint8, device="cuda") for n in (1_000, 40_000, 50_000) * 32]
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    for ours, answer in zip(captured, expected, strict=True):
        torch.testing.assert_close(ours, answer, rtol=1e-4, atol=1e-5)
    assert all((block == 255).all() for block in written)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_compiled_with_cuda_graphs_over_several_sizes(backend):
    """``reduce-overhead``: leftovers of one size in the graph's memory are not read by the next."""
    encodings = build_rpe(parse_rpe_spec("rpe-1.9-product-ctx-1-k", 1), 32, 2)
    oracles.fill_tables(encodings[1], 0, std=0.1)
    encodings[1].cuda()
    compiled = torch.compile(rpe_attention, mode="reduce-overhead", fullgraph=True)
    for height, width in [(6, 7), (7, 6), (5, 9), (6, 7)] * 2:
        q, k, v = torch.randn(3, 2, 2, height * width + 1, 32, device="cuda").unbind()
        options = {"height": height, "width": width, "backend": backend}
        torch.compiler.cudagraph_mark_step_begin()
        ours = compiled(q, k, v, *encodings, **options).clone()
        torch.testing.assert_close(ours, rpe_attention(q, k, v, *encodings, **options), rtol=1e-4, atol=1e-5)
