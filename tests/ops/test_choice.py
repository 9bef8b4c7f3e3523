"""The choice of `auto` where it may measure: the policy, on the CPU, with candidates that are slow, wrong or broken."""

import functools
import json
import os
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from irpe_ops import build_rpe, parse_rpe_spec, rpe_attention
from irpe_ops.attention_call import AttentionCall
from irpe_ops.backends import choice, measure
from irpe_ops.backends.eager import attention as eager_attention
from tests import oracles


def make_call(spec="rpe-1.9-product-ctx-1-qkv", dropout_p=0.0, dtype=torch.float32, grid=(3, 4), **options):
    encodings = build_rpe(parse_rpe_spec(spec, 1), 8, 2)
    for seed, rpe in enumerate(encodings):
        if rpe is not None:
            oracles.fill_tables(rpe.to(dtype), seed)
    qkv = torch.randn(3, 2, 2, grid[0] * grid[1] + 1, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, k, v = qkv.unbind()
    return AttentionCall(q.requires_grad_(), k, v, *encodings, *grid, dropout_p=dropout_p, scale=0.5, **options)


def make_layer():
    layer = torch.nn.Module()
    layer.attn_backend = "auto"
    layer.rpe_q, layer.rpe_k, layer.rpe_v = build_rpe(parse_rpe_spec("rpe-1.9-product-ctx-1-k", 1), 8, 2)
    return layer


class Clock:
    """Each read is a millisecond later; ``slow`` takes one more for each earlier call."""

    def __init__(self):
        self.milliseconds = self.calls = 0

    def perf_counter(self):
        self.milliseconds += 1
        return self.milliseconds / 1e3


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(measure, "time", Clock())


def slow(call):
    measure.time.calls += 1
    measure.time.milliseconds += measure.time.calls
    return eager_attention(call)


def wrong(call):
    return eager_attention(call) * 1.01


def wrong_backward(call):
    out = eager_attention(call)
    return out + 0.05 * (out - out.detach())


def nan(call):
    return eager_attention(call) * float("nan")


def nan_gradient(call):
    v = call.v.clone()
    v.register_hook(lambda grad: grad * float("nan"))
    return eager_attention(call._replace(v=v))


def raising(call):
    raise RuntimeError("ptxas fatal: out of registers\nand a page of assembly")


def out_of_memory_at_real_size(call):
    if call.q.shape[2] > 36:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB")
    return eager_attention(call)


FAKES = {
    "eager": eager_attention, "slow": slow, "wrong": wrong, "wrong_backward": wrong_backward, "nan": nan,
    "nan_gradient": nan_gradient, "raising": raising, "big": out_of_memory_at_real_size,
}  # fmt: skip


def test_right_candidates_are_timed_and_the_others_named():
    found = choice.measure(make_call(grid=(6, 7)), FAKES, eager_attention)
    assert found.ms == {"eager": pytest.approx(1), "slow": pytest.approx(7)}  # the median of calls 4 to 8, and 1
    assert found.left_out["raising"] == "RuntimeError: ptxas fatal: out of registers"
    assert found.left_out["big"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 40 GiB"
    for name in ("wrong", "wrong_backward", "nan", "nan_gradient"):
        assert found.left_out[name].startswith("ArithmeticError: relative error")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["padding", "bool", "float", "gradient", "no encoding", "bias", "dropout"])
def test_every_kind_of_call_can_be_measured(kind, dtype):
    masks = {
        "padding": {"key_padding_mask": torch.zeros(2, 13, dtype=torch.bool)},
        "bool": {"attn_mask": torch.eye(13, dtype=torch.bool)},
        "float": {"attn_mask": torch.zeros(2, 1, 13, 13)},
        "gradient": {"attn_mask": torch.zeros(13, 13, dtype=dtype, requires_grad=True)},
        "dropout": {"dropout_p": 0.5},
    }
    spec = "rpe-1.9-cross-bias-0-qk" if kind == "bias" else "rpe-1.9-product-ctx-0-qkv"
    call = make_call(spec, dtype=dtype, **masks.get(kind, {}))
    if kind == "no encoding":
        call = call._replace(rpe_q=None, rpe_k=None, rpe_v=None, height=None, width=None)
    again = choice.measure(call, {"eager": eager_attention, "nan": nan}, eager_attention)
    assert list(again.ms) == ["eager"] and list(again.left_out) == ["nan"]


def test_non_leaf_tables_are_measured_too():
    """In a replica of DataParallel, or a view of one flat parameter, a table is computed from another tensor."""
    call = make_call("rpe-1.9-cross-ctx-0-k")
    parts = call.rpe_k.parts
    for part in parts:
        flat = part._parameters.pop("lookup_table_weight")
        part.lookup_table_weight = flat * 1
    found = choice.measure(call, {"eager": eager_attention}, eager_attention)
    assert list(found.ms) == ["eager"] and not found.left_out


def test_measuring_for_one_token_and_with_another_default_device():
    call = make_call(grid=(1, 1))._replace(height=1, width=1)
    with torch.device("meta"):  # what a user's `torch.set_default_device("cuda")` would be
        found = choice.measure(call, {"eager": eager_attention, "wrong": wrong}, eager_attention)
    assert list(found.ms) == ["eager"] and list(found.left_out) == ["wrong"]


def test_a_candidate_that_breaks_the_device_ends_the_run_with_its_name(monkeypatch):
    def wait(device):
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def breaks(call):
        broken.append(True)
        raise RuntimeError("CUDA error: misaligned address")

    broken = []
    monkeypatch.setattr(measure, "wait", wait)
    with pytest.raises(RuntimeError, match="'breaks' has left cpu unusable .*misaligned address.*backend='eager'"):
        choice.measure(make_call(), {"breaks": breaks, "eager": eager_attention}, eager_attention)


def test_nothing_of_the_run_is_touched():
    call = make_call(dropout_p=0.5)
    torch.manual_seed(5)
    before, state = call.rpe_k.table.detach().clone(), torch.get_rng_state()
    choice.measure(call, {"eager": eager_attention}, eager_attention)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(call.rpe_k.table, before)
    assert all(tensor.grad is None for tensor in (call.q, call.rpe_k.table))
    with torch.inference_mode():
        assert choice.measure(call, {"eager": eager_attention}, eager_attention).ms


class Fakes:
    """Stands for the backends' modules, and counts how often each runs."""

    def __init__(self):
        self.runs = dict.fromkeys(FAKES, 0)
        self.why = None

    def __call__(self, name):
        def attention(call):
            self.runs[name] += 1
            return FAKES[name](call)

        module = type("Module", (), {})
        module.attention, module.missing, module.why_not = (
            attention,
            lambda: None,
            lambda call: None if name == "eager" else self.why,
        )
        return module


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    """As on a GPU, with fake candidates, an empty cache and nothing known."""
    fakes = Fakes()
    monkeypatch.setattr(choice, "module_of", fakes)
    monkeypatch.setattr(choice, "MEASURED", {"cpu": ("raising", "slow", "eager")})
    monkeypatch.setattr(choice, "MEASURED_FP32", {"cpu": ("slow", "eager", "raising")})
    monkeypatch.setattr(choice, "FIXED", {"cpu": ("slow", "eager")})
    monkeypatch.setattr(choice, "FIXED_INFERENCE", {"cpu": ("wrong", "eager")})
    monkeypatch.setattr(choice, "_known", {})
    monkeypatch.setattr(choice, "_warned", set())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("IRPE_ATTENTION_TUNING", raising=False)
    return fakes


def test_the_fastest_is_taken_measured_once_and_failures_warned_of_once(fakes):
    with pytest.warns(UserWarning, match="'raising' is left out on this machine: RuntimeError: ptxas fatal") as caught:
        assert choice.choose(make_call()) == "eager"
    assert len(caught) == 1
    runs = dict(fakes.runs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice.choose(make_call()) == "eager"
        assert fakes.runs == runs
        assert choice.choose(make_call("rpe-1.9-product-ctx-1-k")) == "eager"  # another kind
    assert fakes.runs["slow"] > runs["slow"]


@pytest.mark.filterwarnings("ignore:attention backend")
def test_the_next_process_reads_what_this_one_found(fakes, monkeypatch):
    choice.choose(make_call())
    runs, kept = dict(fakes.runs), choice.cache_file()
    (entry,) = json.loads(kept.read_text()).values()
    assert set(entry["ms"]) == {"slow", "eager"} and set(entry["left_out"]) == {"raising"}
    choice._known.clear()
    assert choice.choose(make_call()) == "eager" and fakes.runs == runs
    entry = json.dumps({choice._kind(make_call()): {"ms": "fast", "left_out": {}}})
    for damage in ("", "[]", '{"cpu": 3}', entry):  # measured again, and repaired
        choice._known.clear()
        kept.write_text(damage)
        assert choice.choose(make_call()) == "eager"
        assert '"slow"' in kept.read_text()
    assert fakes.runs["slow"] == 5 * runs["slow"]
    with monkeypatch.context() as patch:
        patch.setattr(choice, "extension_file", __file__)
        assert choice.cache_file() != kept  # rpe_ops_cuda was built anew
        patch.setattr(choice, "extension_file", "gone.so")
        choice._known.clear()
        assert choice.choose(make_call()) == "eager"
    choice._known.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))  # a file, so a folder cannot be created there
    assert choice.choose(make_call()) == "eager"
    choice._known.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", "~/x")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no home folder
    assert choice.choose(make_call()) == "eager"
    choice._known.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept.parent.parent))
    kept.unlink()
    os.mkfifo(kept)  # does not block
    assert choice.choose(make_call()) == "eager" and '"slow"' in kept.read_text()


@pytest.mark.filterwarnings("ignore:attention backend")
def test_what_is_for_this_process_alone(fakes, monkeypatch):
    """Running out of memory is temporary; and without a home there is no place for a cache."""
    monkeypatch.setitem(FAKES, "raising", out_of_memory_at_real_size)
    choice.choose(make_call(grid=(7, 7)))
    assert not choice.cache_file().exists()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(choice.os.path, "expanduser", lambda path: path)  # a container's user without an entry
    assert choice.choose(make_call()) == "raising" and not choice.cache_file().parent.exists()


@pytest.mark.filterwarnings("ignore:attention backend")
@pytest.mark.parametrize("reentrant", [True, False])
def test_measuring_inside_activation_checkpointing(fakes, reentrant):
    """Non-reentrant checkpointing counts saved tensors and recomputes them, so it must not see ours."""

    def attention(q, table):
        return rpe_attention(q, call.k, call.v, *call[3:6], height=3, width=4)

    call = make_call()
    grads = []
    for run in (attention, functools.partial(checkpoint, attention, use_reentrant=reentrant)):
        choice._known.clear()
        choice.cache_file().unlink(missing_ok=True)
        run(call.q, call.rpe_k.table).square().sum().backward()
        grads.append(call.q.grad.clone())
        call.q.grad = None
        assert choice._known
    assert torch.equal(*grads)


@pytest.mark.filterwarnings("ignore:attention backend")
def test_a_cuda_graph_takes_what_its_warm_up_took(fakes, monkeypatch):
    """Another backend would make its maps, and compile, while the graph is captured: CUDA refuses both."""
    monkeypatch.setattr(choice, "_is_captured", lambda call: True)
    assert choice.choose(make_call()) == "slow" and sum(fakes.runs.values()) == 0
    with monkeypatch.context() as warm_up:
        warm_up.setattr(choice, "_is_captured", lambda call: False)
        assert choice.choose(make_call()) == "eager"
    assert choice.choose(make_call()) == "eager"


def test_nothing_is_measured_under_a_mode_that_sees_all_operators(fakes):
    """Such as selective checkpointing, which keeps the results of operators by their order, or a count of flops."""
    with FlopCounterMode(display=False):
        assert choice.choose(make_call()) == "slow"
    assert sum(fakes.runs.values()) == 0


@pytest.mark.filterwarnings("ignore:attention backend")
def test_what_cannot_run_the_call_is_not_a_candidate(fakes):
    fakes.why = "heads of 8 dimensions are too small"
    assert choice.choose(make_call()) == "eager"
    assert sum(fakes.runs.values()) == 0  # one candidate: nothing to measure


@pytest.mark.filterwarnings("ignore:attention backend")
def test_the_first_that_is_right_where_two_runs_must_choose_alike(fakes):
    """``slow`` comes before ``eager``, which is faster; ``raising`` fails, and in half precision comes before both."""
    torch.use_deterministic_algorithms(True)
    try:
        assert choice.choose(make_call()) == choice.choose(make_call(dtype=torch.bfloat16)) == "slow"
        line = choice.describe(make_layer(), batch=2, height=3, width=4)
        assert line == "slow (deterministic: the first of slow, eager, raising that is correct here)"
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_fixed_order_where_nothing_may_be_measured(fakes, monkeypatch):
    monkeypatch.setenv("IRPE_ATTENTION_TUNING", "0")
    assert choice.choose(make_call()) == "slow"
    with torch.no_grad():
        assert choice.choose(make_call()) == "wrong"
    fakes.why = "no"
    assert choice.choose(make_call()) == "eager"
    fakes.why = None
    monkeypatch.delenv("IRPE_ATTENTION_TUNING")
    for name in ("is_compiling", "is_exporting"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, name, lambda: True)
            assert choice.choose(make_call()) == ("eager" if name == "is_exporting" else "slow")
            taken = "eager" if name == "is_exporting" else "raising"
            assert choice.choose(make_call(dtype=torch.bfloat16)) == taken
    chosen = []
    call = make_call()
    torch.func.vmap(lambda q: chosen.append(choice.choose(call._replace(q=q))) or q)(call.q)
    assert chosen == ["slow"] and sum(fakes.runs.values()) == 0


@pytest.mark.filterwarnings("ignore:attention backend")
def test_ranks_go_by_what_the_first_of_them_measured(fakes, monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    assert choice.choose(make_call()) == "eager"
    choice._known.clear()  # another rank, where the same call would have had another result
    monkeypatch.setattr(choice, "measure", lambda *a: choice.Measurement({"slow": 1.0}, {}))
    monkeypatch.setattr(choice, "_cached", lambda kind, find: find())
    assert choice.choose(make_call()) == "eager"
    assert choice.choose(make_call("rpe-1.9-product-ctx-1-k")) == "slow"  # it is the first here


def test_calls_of_one_kind():
    call = make_call()
    assert choice._kind(call) == choice._kind(make_call(grid=(2, 6)))  # 13 tokens
    others = [make_call(grid=(6, 7)), make_call("rpe-1.9-product-ctx-0-qkv"), make_call(dtype=torch.float64)]
    others += [make_call(dropout_p=0.1), make_call(attn_mask=torch.zeros(13, 13))]
    with torch.no_grad():
        kinds = {choice._kind(other) for other in [call, *others]}
        assert "training" in choice._kind(make_call(dropout_p=0.1))  # reentrant checkpointing, or no dropout
    assert choice._kind(call) not in kinds and len(kinds) == 6


@pytest.mark.filterwarnings("ignore:attention backend")
def test_the_banner_says_what_is_taken(fakes):
    layer = make_layer()
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        line = choice.describe(model, batch=2, height=3, width=4, padding=True)
    assert "torch.bfloat16" in next(iter(choice._known))
    assert choice.describe(model, batch=2, height=3, width=4, compiled=True).startswith("slow (the first of slow, ")
    assert line.startswith("eager, measured here: eager ") and ", slow " in line
    layer.attn_backend = "triton"
    assert choice.describe(model, batch=2, height=3, width=4) == "triton, as requested"
    assert choice.describe(model[0], batch=2, height=3, width=4) == "no relative position encoding"


def test_the_banner_without_measuring(monkeypatch):
    layer = make_layer()
    monkeypatch.setattr(choice, "FIXED", {"cpu": ("sdpa", "eager")})
    line = choice.describe(layer, batch=2, height=3, width=4)
    assert line == "sdpa (the first of sdpa, eager that can run here)"
    q = torch.randn(1, 2, 13, 8)
    torch.testing.assert_close(
        rpe_attention(q, q, q, rpe_k=layer.rpe_k, height=3, width=4), rpe_attention(q, q, q, backend="eager")
    )


def test_an_empty_batch_is_not_measured(monkeypatch):
    monkeypatch.delenv("IRPE_ATTENTION_TUNING", raising=False)
    call = make_call()
    assert choice.may_measure(call)
    assert not choice.may_measure(call._replace(q=call.q[:0], k=call.k[:0], v=call.v[:0]))
