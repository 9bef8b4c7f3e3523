"""python -m irpe_ops.info: what it lists, what it says is missing, and that --check can fail."""

import csv
import dataclasses
import re
import subprocess
import sys

import pytest

from irpe_ops import info
from tests.helpers.full_disk import full_disk

NAMES = ["plain PyTorch", "sdpa attention", "compiled rpe_index, CPU", "compiled rpe_index, CUDA",
         "compiled attention, CPU", "compiled attention, CUDA", "triton attention, CUDA"]  # fmt: skip


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch):
    shape = (2, 2, 3, 4, 1, 8, "rpe-1.9-product-ctx-1-", True)
    monkeypatch.setattr(info, "SHAPES", {"tiny B2 H2 L13 D8": shape})


def test_lists_every_backend_and_a_reason_for_each_missing_one(capsys):
    assert info.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("python ") and ", torch " in lines[0]
    listed = [line[8:] for line in lines[1:] if line.startswith(("yes", "missing"))]
    assert listed == NAMES
    for i, line in enumerate(lines):
        if line.startswith("missing"):
            assert lines[i + 1].startswith("          ") and len(lines[i + 1].strip()) > 10


def test_a_gpu_too_old_for_triton_is_a_reason_and_no_failure(monkeypatch):
    triton = info.module_of("triton")
    monkeypatch.setattr(triton, "missing", lambda: None)
    monkeypatch.setattr(triton, "generation", lambda device: 7)
    assert "compute capability 8.0" in info.backends()[-1].missing
    monkeypatch.setattr(triton, "generation", lambda device: 9)
    assert info.backends()[-1].missing is None


def test_check_runs_what_is_there(capsys):
    assert info.main(["--check"]) == 0
    out = capsys.readouterr().out
    assert "ok    rpe-1.9-product-ctx-1-qkv backward bfloat16: relative error" in out
    assert "WRONG" not in out and "nan" not in out
    lines = [line for line in out.splitlines() if line.startswith("tiny B1 H2 L13 D8, ")]
    assert len(lines) == 4 and all(re.search(r"(eager|sdpa|compiled) [\d.]+ ms.*; auto takes \w+$", x) for x in lines)


def test_benchmark_writes_a_csv(tmp_path, capsys, monkeypatch):
    real = info.module_of("sdpa").attention
    monkeypatch.setattr(info.module_of("sdpa"), "attention", lambda call: real(call) + 1)
    assert info.main(["--benchmark", str(tmp_path / "new")]) == 0
    (path,) = (tmp_path / "new").iterdir()
    assert path.name.startswith("attention_cpu") and str(path) in capsys.readouterr().out
    with path.open() as file:
        assert file.readline().startswith("# CPU only")
        rows = list(csv.DictReader(file))
    assert {row["encodings"] for row in rows} == {"k", "qkv"}
    assert {row["work"] for row in rows} == {"forward", "forward + backward"}
    assert all(float(row["median_ms"]) > 0 for row in rows if row["candidate"] == "eager")
    wrong = [row for row in rows if row["candidate"] == "sdpa"]
    assert len(wrong) == 2 and all("relative error" in row["left_out"] and not row["median_ms"] for row in wrong)
    assert [row["candidate"] for row in rows if row["auto"]] in ([["compiled"] * 4, ["eager"] * 4])


@pytest.mark.parametrize("error", [0.5, float("nan"), RuntimeError("illegal instruction")])
def test_a_wrong_backend_makes_check_fail(error, monkeypatch, capsys):
    def check():
        yield "first", 0.0, 0.1
        if isinstance(error, Exception):
            raise error
        yield "second", error, 0.1

    monkeypatch.setattr(info, "backends", lambda: [info.Backend("fake", None, check)])
    assert info.main([]) == 0
    assert info.main(["--check"]) == 1
    out = capsys.readouterr().out
    assert "ok    first: relative error 0.0e+00, allowed 1.0e-01" in out
    assert ("WRONG RuntimeError: illegal instruction" if isinstance(error, Exception) else "WRONG second") in out
    assert "1 of the backends above gave wrong results" in out


def test_an_unwritable_csv_is_reported_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(info, "_rows", lambda: map(pytest.fail, ["the work"]))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="--benchmark .*file: cannot be written to"):
        info.main(["--benchmark", str(tmp_path / "file")])


def test_a_csv_on_a_full_disk_is_named_and_not_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(info, "_rows", lambda: [["x" * 99_999]])
    with full_disk(50_000), pytest.raises(SystemExit, match=rf"File too large: '{tmp_path}/attention_.*\.csv'"):
        info.main(["--benchmark", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_missing_backend_is_not_a_failure(monkeypatch):
    monkeypatch.setattr(info, "backends", lambda: [info.Backend("fake", "not built", lambda: 1 / 0)])
    assert info.main(["--check"]) == 0


def test_a_wrong_lookup_is_seen(monkeypatch):
    monkeypatch.setattr(info, "rpe_index", lambda input, index: input[..., :1].expand(-1, -1, -1, index.shape[1]))
    first = next(info._check_lookup("cpu"))
    assert first[1] > first[2]


def test_works_without_the_extension_and_without_timm():
    code = (
        "import sys; sys.modules['rpe_ops_cuda'] = sys.modules['timm'] = None\n"
        "from irpe_ops import info, equip\n"
        "sys.exit(info.main([]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("pip install ./rpe_ops_cuda") >= 3


def test_backend_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.backends()[0].name = "other"
