"""The compiled attention on CUDA without a GPU: refusals, shapes, ids by lane, and the operators, with a CPU that plays
a GPU for their kernels."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import irpe_ops.backends.compiled as backend
from irpe_ops import build_rpe, parse_rpe_spec, rpe_attention
from irpe_ops.attention_call import AttentionCall
from irpe_ops.buckets import ids_by_lane
from tests import oracles
from tests.extension.test_cuda_emulated import SOURCES, emulated, toolkit_headers
from tests.helpers.guard_pages import guarded

attention = pytest.importorskip("rpe_ops_cuda.attention", reason="rpe_ops_cuda is not installed")


def fake_call(spec="rpe-1.9-product-ctx-1-qkv", dtype=torch.bfloat16, head_dim=64, **options):
    """A call on a GPU that is not here."""
    encodings = build_rpe(parse_rpe_spec(spec, 1), head_dim, 2)
    q = torch.empty(2, 2, 13, head_dim, dtype=dtype)
    return AttentionCall(q, q, q, *encodings, 3, 4, **{"scale": 0.5} | options)


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(backend, "missing_on_cuda", lambda device: None)
    with FakeTensorMode(), torch.device("cuda"):
        yield


@pytest.mark.parametrize("spec", ["rpe-1.9-product-ctx-0-k", "rpe-1.9-product-ctx-1-qk", "rpe-10-euc-ctx-1-qkv"])
def test_what_it_takes_on_cuda(on_a_gpu, spec):
    call = fake_call(spec, torch.float16)
    assert backend.why_not(call) is None
    for grad in (True, False):  # keeps what backward needs, or not
        out = backend.attention(call._replace(q=call.q.detach().requires_grad_(grad)))
        assert (out.shape, out.dtype, out.device.type) == (call.q.shape, torch.float16, "cuda")
        assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float32}, "takes float16 and bfloat16, and q is torch.float32; use autocast, or"),
        ({"head_dim": 32}, "kernels for D=64, got D=32; use backend='triton'"),
        ({"dropout_p": 0.1}, "no masks and no dropout; use backend='triton'"),
        ({"key_padding_mask": True}, "no masks and no dropout; use backend='triton'"),
        ({"spec": "rpe-1.9-product-ctx-1-q"}, "encodes keys, queries and keys, or all three; use backend='triton'"),
        ({"spec": "rpe-1.9-product-ctx-1-kv"}, "encodes keys, queries and keys, or all three; use backend='triton'"),
        ({"spec": "rpe-1.9-cross-ctx-1-k"}, "with one map, not cross or bias; use backend='triton'"),
        ({"spec": "rpe-1.9-product-bias-1-qk"}, "with one map, not cross or bias; use backend='triton'"),
        ({"spec": "rpe-20-euc-ctx-1-k"}, "up to 56 buckets, ratio=20 has 82; use backend='triton'"),
        ({"scale": -0.5}, "scale must be positive, got -0.5; use backend='triton'"),
    ],
)
def test_what_it_refuses_on_cuda(on_a_gpu, change, words):
    if "key_padding_mask" in change:
        change = {"key_padding_mask": torch.zeros(2, 13, dtype=torch.bool)}
    assert words in backend.why_not(fake_call(**change))


def test_encodings_of_two_configs_are_refused_on_cuda(on_a_gpu):
    call = fake_call()
    for spec in ("rpe-1.8-product-ctx-1-qkv", "rpe-10-euc-ctx-1-qkv"):
        other = call._replace(rpe_q=fake_call(spec).rpe_q)
        assert "must share mode, method, ratio and skip; build them from one config" in backend.why_not(other)


def test_why_there_are_no_kernels_for_a_gpu(monkeypatch):
    reasons = {"cuda": None}
    monkeypatch.setattr(backend, "missing_kernels", lambda kind, device: reasons["cuda"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    ask = backend.missing_on_cuda.__wrapped__
    assert re.search("compute capability 8.0 .*; use backend='sdpa' or 'eager'", ask(0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert ask(0) is None
    reasons["cuda"] = "rpe_ops_cuda was built without CUDA"
    for gpu, rest in ((True, "; or use backend='triton'"), (False, "")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert ask(0) == "rpe_ops_cuda was built without CUDA" + rest


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_missing():
    with FakeTensorMode(), torch.device("cuda"):
        reason = backend.why_not(fake_call())
    assert re.search("built without CUDA|torch sees no CUDA device", reason)


@pytest.mark.parametrize("length", [1, 16, 17, 35])
def test_ids_by_lane(length):
    """Each lane's bytes, by the words of attention_kernels.h."""
    ids = torch.randint(1, 50, (length, length), dtype=torch.uint8, generator=torch.Generator().manual_seed(length))
    blocks = -(-length // 16)
    padded = torch.zeros(16 * blocks, 16 * blocks, dtype=torch.uint8)
    padded[:length, :length] = ids
    found = ids_by_lane(ids)
    assert found.shape == (2, blocks, blocks, 32, 8) and found is ids_by_lane(ids)
    for i in range(blocks):
        for j in range(blocks):
            for lane in range(32):
                g, t = lane // 4, lane % 4
                for layout, whole in enumerate((padded, padded.T)):
                    rows = whole[16 * i : 16 * i + 16, 16 * j : 16 * j + 16]
                    wanted = [
                        rows[g + down, 8 * right + 2 * t + c] for right in (0, 1) for down in (0, 8) for c in (0, 1)
                    ]
                    assert found[layout, i, j, lane].tolist() == wanted


KERNELS = (
    "attention_launch.cuh", "attention_forward.cu", "attention_rows.cuh", "attention_backward.cu", "table_gradient.cu"
)  # fmt: skip


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """The operators of attention_on_host.cpp."""
    headers = toolkit_headers()
    if headers is None or shutil.which("g++") is None:
        pytest.skip("needs g++ and the headers of a CUDA toolkit")
    folder, here, torch_root = tmp_path_factory.mktemp("on_host"), Path(__file__).parent, Path(torch.__file__).parent
    source = (SOURCES / "attention_cuda.cpp").read_text()
    changes = [
        ("#include <c10/cuda/.*>", ""),
        (r"\(irpe, CUDA,", "(irpe, CPU,"),
        ("256 << 20", "20000"),
    ]  # few heads at a time
    for old, new in changes:
        source, found = re.subn(old, new, source)
        assert found
    (folder / "attention_cuda.cpp").write_text(source)
    (folder / "kernels.cpp").write_text(emulated([*KERNELS], launches=3))
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-Wl,-Bsymbolic", "-Dirpe=irpe_on_host"]
    command += [f"-I{folder}", f"-I{SOURCES}", f"-I{here}", "-isystem", str(torch_root / "include")]
    command += ["-isystem", str(headers), str(here / "attention_on_host.cpp"), str(folder / "kernels.cpp")]
    command += ["-o", str(folder / "on_host.so"), f"-L{torch_root / 'lib'}", "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True)
    library = torch.library.Library("irpe_on_host", "FRAGMENT")
    for operator in (torch.ops.irpe.attention, torch.ops.irpe.attention_backward):
        library.define(str(operator.default._schema).removeprefix("irpe::"))
    torch.ops.load_library(folder / "on_host.so")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_ops", torch.ops.irpe_on_host)
        yield ctypes.CDLL(str(folder / "on_host.so"))


@pytest.fixture
def poisoned():
    """All memory that no one has written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


KB = 1024
GPUS = {  # multiprocessors, shared memory of a block and of all, major version of the compute capability
    "90": (2, 227 * KB, 228 * KB, 9),
    "80": (1, 163 * KB, 164 * KB, 8),
    "86": (3, 99 * KB, 100 * KB, 8),
    "tight": (2, 60 * KB, 61 * KB, 8),  # several tiles for few tokens
}


def layer(
    on_host, spec, grid, skip, batch, heads, dtype, tables, lay_out=guarded, gpu="90", of_sum=False, change=None,
    scale=0.125,
):  # fmt: skip
    """The results and gradients of the kernels, and of the definition in fp64, of q, k and v in one tensor."""
    on_host.emulate_device(*GPUS[gpu])
    encodings = build_rpe(parse_rpe_spec(spec, skip), 64, heads)
    for seed, rpe in enumerate(encodings):
        if rpe is not None:
            oracles.fill_tables(rpe.to(tables), seed, std=0.1)
            rpe.table.data = guarded(rpe.table.data)
    generator, length = torch.Generator().manual_seed(0), grid[0] * grid[1] + skip
    packed = torch.randn(batch, length, 3, heads, 64, generator=generator)
    weights = torch.randn(batch, heads, length, 64, generator=generator)
    if change is not None:
        change(packed, [rpe and rpe.table.data for rpe in encodings], weights)
    packed = lay_out(packed.to(dtype)).requires_grad_()

    def results(out, x):
        loss = out.float().sum() if of_sum else (out * weights).sum()
        return [out.detach(), *torch.autograd.grad(loss, [x, *(rpe.table for rpe in encodings if rpe is not None)])]

    maps = [], [guarded(ids_by_lane(encodings[1].bucket_ids(length, *grid, packed.device)))], []
    given = [rpe and rpe.table for rpe in encodings]
    out = attention.Attention.apply(
        *packed.permute(2, 0, 3, 1, 4), *given, *maps, None, None, None, scale, 0.0, True, True
    )
    ours = results(out, packed)
    exact = packed.detach().double().requires_grad_()
    encodings = [rpe and rpe.to(dtype).double() for rpe in encodings]
    options = {"height": grid[0], "width": grid[1], "scale": scale, "backend": "eager"}
    return ours, results(rpe_attention(*exact.permute(2, 0, 3, 1, 4), *encodings, **options), exact)


def misaligned(x):
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x).copy_(x)


def rows_of_odd_strides(x):
    wide = torch.empty(len(x), 8, x[0, 0].numel() + 1, dtype=x.dtype)
    return wide[:, : x.shape[1], :-1].unflatten(2, x.shape[2:]).copy_(x)


HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
CASES = [  # spec, grid, leading tokens, batch, heads, dtype, that of tables; layout, GPU, loss
    ("rpe-1.9-product-ctx-1-k", (7, 7), 1, 2, 3, BRAIN, FLOAT),
    ("rpe-1.9-product-ctx-0-k", (3, 5), 1, 3, 2, HALF, FLOAT, misaligned, "80"),
    ("rpe-1.9-product-ctx-1-k", (14, 14), 1, 1, 1, BRAIN, BRAIN, guarded, "tight"),
    ("rpe-1.9-product-ctx-0-qk", (1, 3), 0, 2, 3, HALF, HALF, misaligned),
    ("rpe-13-quant-ctx-0-qk", (3, 5), 0, 2, 2, BRAIN, HALF, guarded, "86"),
    ("rpe-1.9-product-ctx-1-qk", (7, 9), 1, 2, 2, HALF, FLOAT, guarded, "tight"),
    ("rpe-1.9-product-ctx-0-qkv", (4, 4), 1, 3, 2, BRAIN, FLOAT, lambda x: x.mT.contiguous().mT, "80"),
    ("rpe-10-euc-ctx-1-qkv", (4, 4), 0, 3, 1, BRAIN, BRAIN, guarded, "90", True),
    ("rpe-1.9-product-ctx-1-qkv", (14, 14), 1, 1, 1, HALF, FLOAT, guarded, "86"),
    ("rpe-1.9-product-ctx-0-qkv", (7, 7), 1, 1, 3, HALF, FLOAT, guarded, "tight"),
    ("rpe-1.9-product-ctx-0-k", (1, 2), 0, 2, 2, BRAIN, FLOAT, rows_of_odd_strides),
    ("rpe-1.9-product-ctx-1-qkv", (1, 1), 0, 2, 2, BRAIN, FLOAT, rows_of_odd_strides),
    ("rpe-1.9-product-ctx-1-qkv", (3, 3), 1, 0, 2, HALF, HALF, misaligned),
]


@pytest.mark.parametrize("case", CASES, ids=[" ".join(map(str, case[:5])) for case in CASES])
def test_the_operators_and_their_kernels(on_host, poisoned, case):
    ours, exact = layer(on_host, *case)
    assert ours[0].transpose(1, 2).is_contiguous() and all(table.is_contiguous() for table in ours[2:])
    assert [x.dtype for x in ours] == [case[5], case[5], *[case[6]] * (len(ours) - 2)]
    for x, answer in zip(ours, exact, strict=True):
        # Of one token all gradients but that of v are 0.
        allowed = 2 * torch.finfo(case[5]).eps * max(answer.norm(), 1.0)
        assert x.shape == answer.shape and (x.double() - answer).norm() <= allowed


def large_tables(packed, tables, weights):
    for table in tables:
        table *= 100


def growing_scores(packed, tables, weights):
    packed[:, :, 1] *= 0.3 * torch.arange(packed.shape[1])[:, None, None]


@pytest.mark.parametrize("change", [large_tables, growing_scores])
@pytest.mark.parametrize("gpu", ["90", "tight"])
def test_large_scores(on_host, poisoned, change, gpu):
    """The tokens that fill the last block must add nothing, whatever their lookups; maxima may come late."""
    ours, exact = layer(on_host, "rpe-1.9-product-ctx-1-qkv", (6, 9), 1, 1, 2, HALF, FLOAT, gpu=gpu, change=change)
    for x, answer in zip(ours, exact, strict=True):
        assert (x.double() - answer).norm() <= 4 * torch.finfo(HALF).eps * answer.norm()


def first_keys_infinite(packed, tables, weights):
    packed[:, :, 0, :, 3], packed[:, :40, 1, :, 3] = 1, -torch.inf


def test_scores_that_begin_with_minus_infinity(on_host, poisoned):
    (out, *_), (exact, *_) = layer(
        on_host, "rpe-1.9-product-ctx-1-k", (6, 9), 1, 1, 1, BRAIN, FLOAT, change=first_keys_infinite
    )
    assert (out - exact).norm() <= torch.finfo(BRAIN).eps * exact.norm()


@pytest.mark.parametrize("scale", [1e-38, 1e-45])
def test_tiny_scales(on_host, poisoned, scale):
    ours, exact = layer(on_host, "rpe-1.9-product-ctx-1-k", (6, 9), 1, 1, 1, BRAIN, FLOAT, scale=scale)
    for x, answer in zip(ours, exact, strict=True):
        assert (x - answer).norm() <= 2 * torch.finfo(BRAIN).eps * answer.norm() + 1e-30


def test_nan_stays_in_its_row(on_host, poisoned):
    def change(packed, tables, weights):
        packed[0, 40, 0, 0, 3] = torch.nan  # in a query

    (out, grad, *_), (exact, exact_grad, *_) = layer(
        on_host, "rpe-1.9-product-ctx-1-qkv", (6, 9), 1, 2, 2, HALF, FLOAT, change=change
    )
    assert torch.equal(out.isnan(), exact.isnan()) and out.isnan().sum() == 64
    assert torch.equal(grad.isnan(), exact_grad.isnan())


def test_no_tokens(on_host):
    q, table = torch.zeros(1, 1, 0, 64).half().requires_grad_(), torch.zeros(1, 64, 50, requires_grad=True)
    maps = [], [torch.zeros(2, 0, 0, 32, 8, dtype=torch.uint8)], []
    out = attention.Attention.apply(q, q, q, None, table, None, *maps, None, None, None, 0.1, 0.0, True, True)
    out.sum().backward()
    assert q.grad.shape == q.shape and not table.grad.any()


def test_refusals_of_the_operator(on_host):
    q, table = torch.zeros(1, 1, 9, 64).bfloat16(), torch.zeros(1, 64, 50)
    ids = ids_by_lane(torch.zeros(9, 9, dtype=torch.uint8))
    for change, words in [
        ({"q": q.float()}, "must all be float16 or bfloat16 on CUDA"),
        ({"k": q[..., :32]}, r"must be \(B, H, L, 64\) of one shape on CUDA"),
        (
            {"index": torch.zeros(9, 9, dtype=torch.uint8)},
            r"must be one aligned \(2, M, M, 32, 8\) uint8 tensor on CUDA",
        ),
        ({"index": misaligned(ids)}, r"must be one aligned \(2, M, M, 32, 8\) uint8 tensor on CUDA"),
        ({"index": ids.int()}, r"must be one aligned \(2, M, M, 32, 8\) uint8 tensor on CUDA"),
        ({"table": table[:, :32]}, r"table_k \[1, 32, 50\] does not fit H=1 and D=64"),
        ({"table": torch.zeros(1, 64, 57)}, "table_k has 57 buckets; .* at most 56 on CUDA"),
        ({"table_q": torch.zeros(1, 64, 49)}, "table_k has 50 buckets; all tables must have the same number"),
        ({"table": None}, "kernels for table_k, with table_q, or with both others"),
        ({"table_v": table.mT}, "kernels for table_k, with table_q, or with both others"),
        ({"scale": 0.0}, "no masks, no dropout and a positive scale, got dropout_p=0 and scale=0"),
        ({"dropout_p": 0.5}, "no masks, no dropout and a positive scale, got dropout_p=0.5"),
        ({"mask": torch.zeros(9, 9)}, "no masks, no dropout and a positive scale"),
    ]:
        given = {"q": q, "k": q, "table_q": None, "table": table, "table_v": None, "index": ids, "mask": None,
                 "scale": 0.1, "dropout_p": 0.0} | change  # fmt: skip
        with pytest.raises(ValueError, match=words):
            torch.ops.irpe_on_host.attention(
                given["q"], given["k"], q, given["table_q"], given["table"], given["table_v"], [], [given["index"]], [],
                None, given["mask"], None, given["scale"], given["dropout_p"], False, False,
            )  # fmt: skip
