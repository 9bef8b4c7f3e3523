"""A user's own method: registered once, it works wherever a published one does."""

import contextlib
import os
import pickle
import re
import subprocess

import pytest
import torch
from torch import nn

from irpe_ops import build_rpe, get_bucket_ids_2d, parse_rpe_spec, register_bucket_method, rpe_attention
from irpe_ops.backends import module_of
from irpe_ops.methods import METHODS, BucketMap, maps_of
from tests.helpers.quick_python import quick_programs

PLUGIN = """
import torch
from irpe_ops import register_bucket_method

def ring(drow, dcol, index, beta):
    return index(torch.maximum(drow.abs(), dcol.abs()))

register_bucket_method("ring", ring, lambda beta: beta + 1)
"""


def ring(drow, dcol, index, beta):
    return index(torch.maximum(drow.abs(), dcol.abs()))


def above(drow, dcol, index, beta):
    return (drow > 0).long()  # says nothing about columns: to be broadcast


@pytest.fixture
def registered():
    before = dict(METHODS)
    register_bucket_method("ring", ring, lambda beta: beta + 1)
    register_bucket_method("above", above, lambda beta: 2)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.usefixtures("registered")
def test_ids_of_a_method_of_ones_own():
    ids, num_buckets = get_bucket_ids_2d("Ring", 2, 3, 1, 2.0, 4.0, 16.0)
    assert num_buckets == 6  # 0 to 4, and the leading token
    assert ids[1].tolist() == [5, 0, 1, 2, 1, 1, 2] and (ids[0] == 5).all()
    ids, num_buckets = get_bucket_ids_2d("above", 2, 2, 0, 2.0, 4.0, 16.0)
    assert num_buckets == 2 and ids.tolist() == [[0, 0, 0, 0]] * 2 + [[1, 1, 0, 0]] * 2


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("spec", ["rpe-1.9-ring-ctx-1-qkv", "rpe-2.0-above-bias-0-qk"])
@pytest.mark.parametrize("backend", ["eager", "compiled", "torch.compile"])
def test_every_backend_takes_it(spec, backend):
    if backend == "compiled" and module_of("compiled").missing():
        pytest.skip(module_of("compiled").missing())
    config = parse_rpe_spec(spec, skip=1)
    assert config.spec.split("-")[2] == config.method
    encodings = build_rpe(config, 8, 2)
    torch.manual_seed(0)
    for rpe in filter(None, encodings):
        nn.init.normal_(rpe.table)
    q, k, v = torch.randn(3, 2, 2, 13, 8)
    wanted = q * 8**-0.5 @ k.transpose(2, 3)
    ids, _ = get_bucket_ids_2d(config.method, 3, 4, 1, config.ratio, 2 * config.ratio, 8 * config.ratio)
    ids = ids.expand(2, 2, -1, -1)
    for x, rpe in ((q, encodings[1]), (k, encodings[0])):
        found = rpe.lookup(x * 8**-0.5).expand(2, 2, 13, -1).gather(-1, ids)
        wanted = wanted + (found if rpe is encodings[1] else found.transpose(2, 3))
    weights = wanted.softmax(-1)
    wanted = weights @ v
    if encodings[2] is not None:
        wanted = wanted + torch.einsum("bhij,ijd->bhid", weights, encodings[2].table[0][ids[0, 0]])
    function = torch.compile(rpe_attention, backend="eager", fullgraph=True) if "." in backend else rpe_attention
    out = function(q, k, v, *encodings, height=3, width=4, backend="eager" if "." in backend else backend)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("registered")
def test_it_can_be_exported():
    _, rpe_k, _ = build_rpe(parse_rpe_spec("rpe-1.9-ring-ctx-1-k"), 8, 2)
    nn.init.normal_(rpe_k.table)
    x = torch.randn(1, 2, 12, 8)

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.rpe = rpe_k

        def forward(self, x):
            return self.rpe(x, 3, 4)

    torch.testing.assert_close(torch.export.export(Three(), (x,)).module()(x), rpe_k(x, 3, 4))


@pytest.mark.usefixtures("registered")
def test_a_cell_run_twice_replaces_and_another_function_does_not():
    before, _ = get_bucket_ids_2d("above", 3, 1, 0, 1, 2, 8)
    _, rpe_k, _ = build_rpe(parse_rpe_spec("rpe-1-above-bias-1-k"), 8, 1)
    assert torch.equal(rpe_k.bucket_ids(3, 3, 1, torch.device("cpu")).long(), before)

    def again(drow, dcol, index, beta):
        return (drow < 0).long()

    again.__qualname__ = "above"
    register_bucket_method("above", again, lambda beta: 2)
    assert torch.equal(rpe_k.bucket_ids(3, 3, 1, torch.device("cpu")).long(), before.T)
    with pytest.raises(ValueError, match="'above' is registered already, by .*test_methods.above"):
        register_bucket_method("above", ring)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("product", ring), "'product' is a method of iRPE"),
        (("cross_rows", ring), "'cross_rows' is a method of iRPE"),
        (("my-ring", ring), "a name has a-z, 0-9 and _, and starts with a letter; got 'my-ring'"),
        ((None, ring), "got None"),
        (
            ("floats", lambda drow, dcol, index, beta: drow.float()),
            "'floats': ids must be an int64 tensor, got torch.f",
        ),
        (("none", lambda drow, dcol, index, beta: None), "'none': ids must be an int64 tensor, got NoneType"),
        (("array", lambda drow, dcol, index, beta: drow.numpy()), "'array': ids must be an int64 tensor, got ndarray"),
        (("signed", lambda drow, dcol, index, beta: index(drow)), "[0, 3) for beta=1, got -1 to 1"),
        (
            ("flat", lambda drow, dcol, index, beta: index(drow).flatten() + beta),
            "'flat': ids must broadcast to (7, 9)",
        ),
        (
            ("narrow", lambda drow, dcol, index, beta: (index(drow) + beta).expand(-1, 3)),
            "'narrow': ids must broadcast to (7, 9), as drow and dcol do, got (7, 3)",
        ),
        (("halves", ring, lambda beta: 2.0 * beta), "num_buckets(beta) must be an integer of at least 1, not 2.0"),
        (("counted", ring, lambda beta: None), "num_buckets(beta) must be an integer of at least 1, not None"),
        (("few", ring, lambda beta: 1), "'few': ids must lie in [0, 1) for beta=1, got 0 to 1"),
    ],
)
def test_what_cannot_be_a_method(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        register_bucket_method(*arguments)
    assert arguments[0] not in METHODS or arguments[0] == "product"


@pytest.mark.parametrize("arguments", [("table", [0, 1]), ("table", ring, 3)])
def test_a_table_in_place_of_a_function_is_refused(arguments):
    with pytest.raises(TypeError, match="'table': expected two functions, as in BucketMap; got (list|function)"):
        register_bucket_method(*arguments)
    assert "table" not in METHODS


def test_ids_that_only_a_larger_grid_shows_to_be_no_buckets():
    def rows(drow, dcol, index, beta):
        return drow.abs()

    with pytest.raises(ValueError, match=r"'rows': ids must lie in \[0, 10\) for beta=1, got 0 to 39"):
        register_bucket_method("rows", rows, lambda beta: 10)
    assert "rows" not in METHODS


def test_ids_are_checked_on_the_requested_grid(monkeypatch):
    monkeypatch.setitem(METHODS, "rows", BucketMap(lambda drow, dcol, index, beta: drow.abs(), lambda beta: 41))
    assert int(get_bucket_ids_2d("rows", 41, 1, 0, 2.0, 4.0, 16.0)[0].max()) == 40
    with pytest.raises(ValueError, match=r"bucket map 'rows': ids must lie in \[0, 41\) for beta=4"):
        get_bucket_ids_2d("rows", 42, 1, 1, 2.0, 4.0, 16.0)


@pytest.mark.parametrize(("backend", "compiler"), [("eager", "aot_eager"), ("sdpa", "eager"), ("sdpa", "aot_eager")])
def test_ids_are_checked_in_a_compiled_graph_too(monkeypatch, backend, compiler):
    """Tracing has no values; a wrong id would read outside the lookup."""
    monkeypatch.setitem(METHODS, "rows", BucketMap(lambda drow, dcol, index, beta: drow.abs(), lambda beta: 5))
    _, rpe_k, _ = build_rpe(parse_rpe_spec("rpe-1.9-rows-ctx-1-k"), 8, 2)
    torch.compiler.reset()
    attention = torch.compile(rpe_attention, backend=compiler, fullgraph=True)
    for height, right in ((5, True), (6, False)):
        q = torch.randn(1, 2, 2 * height, 8)
        with contextlib.nullcontext() if right else pytest.raises(RuntimeError, match=r"'rows': ids .* in \[0, 5\)"):
            attention(q, q, q, rpe_k=rpe_k, height=height, width=2, backend=backend)


def test_a_published_method_costs_no_check_in_a_compiled_graph(monkeypatch):
    monkeypatch.setattr(torch, "_assert_async", None)
    torch.compiler.reset()
    attention, q = torch.compile(rpe_attention, backend="eager", fullgraph=True), torch.randn(1, 2, 12, 8)
    for method in ("product", "euc", "quant", "cross"):
        _, rpe_k, _ = build_rpe(parse_rpe_spec(f"rpe-1.9-{method}-ctx-1-k"), 8, 2)
        attention(q, q, q, rpe_k=rpe_k, height=3, width=4, backend="eager")


def test_the_parts_of_cross_are_named_after_it():
    assert list(maps_of("cross")) == ["cross_rows", "cross_cols"]
    assert list(maps_of("euc")) == ["euc"]


def run(code, folder, **environment):
    return subprocess.run(
        [quick_programs() / "python", "-c", code], cwd=folder, env=os.environ | environment,
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.usefixtures("registered")
def test_another_thread_may_register_a_method_while_names_are_read(monkeypatch):
    def slow(method):
        METHODS.setdefault("another", METHODS["ring"])
        return maps_of(method)

    monkeypatch.setattr("irpe_ops.methods.maps_of", slow)
    assert get_bucket_ids_2d("cross_rows", 2, 2, 0, 2.0, 4.0, 16.0)[1] == 9


@pytest.mark.usefixtures("registered")
def test_what_was_unpickled_finds_its_method_in_the_module_that_the_environment_names(tmp_path):
    config = parse_rpe_spec("rpe-1.9-ring-ctx-1-k")
    (tmp_path / "both").write_bytes(pickle.dumps((config, build_rpe(config, 8, 2)[1])))
    (tmp_path / "mine.py").write_text(PLUGIN)
    read = "import pickle, torch, irpe_ops; config, rpe = pickle.load(open('both', 'rb')); "
    for code in ("rpe(torch.zeros(1, 2, 9, 8))", "irpe_ops.build_rpe(config, 8, 2)"):
        assert run(read + code, tmp_path, IRPE_PLUGINS="mine").returncode == 0
        assert "unknown method 'ring'; expected one of" in run(read + code, tmp_path, IRPE_PLUGINS="").stderr


def test_a_program_imports_the_modules_that_the_environment_names(tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    code = "import irpe_ops; print(irpe_ops.parse_rpe_spec('rpe-1.9-ring-ctx-1-k').spec)"
    assert run(code, tmp_path, IRPE_PLUGINS=" mine,").stdout.strip() == "rpe-1.9-ring-ctx-1-k"
    assert run(code, tmp_path, IRPE_PLUGINS="mine.py").stdout.strip() == "rpe-1.9-ring-ctx-1-k"
    alone = run(code, tmp_path, IRPE_PLUGINS="")
    assert (
        "unknown method 'ring'; expected one of euc, quant, cross, product (or your own: IRPE_PLUGINS" in alone.stderr
    )
    (tmp_path / "mode.py").write_text("from irpe_ops.modes import MODES\nMODES['mine'] = MODES['ctx']\n")
    code = "import irpe_ops; print(irpe_ops.parse_rpe_spec('rpe-1.9-product-mine-1-k').spec)"
    assert run(code, tmp_path, IRPE_PLUGINS="mode").stdout.strip() == "rpe-1.9-product-mine-1-k"
    code = "import irpe_ops; print(irpe_ops.parse_rpe_spec('rpe-1.9-product-ctx-1-k').spec)"  # needs no module
    wrong = run(code, tmp_path, IRPE_PLUGINS="yours")
    assert "IRPE_PLUGINS=yours: No module named 'yours'; put its folder on PYTHONPATH" in wrong.stderr
    (tmp_path / "broken.py").write_text("1 / 0")
    broken = run(code, tmp_path, IRPE_PLUGINS="broken").stderr
    assert "IRPE_PLUGINS=broken: ZeroDivisionError: division by zero" in broken
    (tmp_path / "program.py").write_text("raise SystemExit(2)")
    assert "IRPE_PLUGINS=program: SystemExit: 2" in run(code, tmp_path, IRPE_PLUGINS="program").stderr
    code = "import sys; sys.path[:] = [p for p in sys.path if p]; " + code  # as a console command starts
    assert run(code.replace("product", "ring"), tmp_path, IRPE_PLUGINS="mine").stdout.strip() == "rpe-1.9-ring-ctx-1-k"
