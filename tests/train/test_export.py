"""An exported model computes the same as the trained one, for sizes that were never traced."""

import os
import re
import sys
from collections import OrderedDict

import onnx
import pytest
import safetensors
import torch
from torch import nn

from irpe_train.checkpoint import read_checkpoint
from irpe_train.errors import RunError
from irpe_train.export import export_model
from tests.helpers.full_disk import full_disk


class Scores(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x).softmax(-1)


class Traced(nn.Module):
    """Computes something else when it is exported than when it is run."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return self.scale * x * (2 if torch.compiler.is_exporting() else 3)


class NaNWhenTraced(nn.Module):
    """The same for its second output alone."""

    def forward(self, x):
        return x, x * (float("nan") if torch.compiler.is_exporting() else 3)


def export(model, out, formats):
    return export_model(
        model,
        [(torch.randn(2, 4),), (torch.randn(5, 4),)],
        out,
        formats=formats,
        inputs={"x": {0: "batch"}},
        outputs=["y"],
        metadata={"classes": "three"},
    )


def test_all_formats_agree_with_the_model(tmp_path, capsys):
    export(Scores(), tmp_path / "m.onnx", ["onnx", "pt2", "safetensors"])
    told = re.findall(r"/m\.(\w+): its outputs differ from the model's by at most (\S+) of", capsys.readouterr().out)
    assert [kind for kind, _ in told] == ["onnx", "pt2", "safetensors"] and all(float(most) < 1e-6 for _, most in told)
    assert {p.name for p in tmp_path.iterdir()} >= {"m.onnx", "m.pt2", "m.safetensors"}
    exported, extra = onnx.load(tmp_path / "m.onnx"), {"metadata.json": ""}
    assert exported.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert ("classes", "three") in [(entry.key, entry.value) for entry in exported.metadata_props]
    torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    assert extra == {"metadata.json": '{"classes": "three"}'}
    with safetensors.safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata() == {"classes": "three"}


@pytest.mark.parametrize(
    ("out", "written"),
    [("m.pt2", "m.pt2"), ("m.safetensors", "m.safetensors"), ("m.onnx", "m.onnx"), ("m.1", "m.1.onnx")],
)
def test_the_suffix_names_the_format_if_nothing_else_does(tmp_path, out, written):
    export(Scores(), tmp_path / out, None)
    assert [path.name for path in tmp_path.iterdir()] == [written]


@pytest.mark.parametrize("format", ["onnx", "pt2", "safetensors"])
def test_a_name_need_not_be_utf_8(tmp_path, format, monkeypatch):
    monkeypatch.setattr("builtins.print", lambda text: None)  # the parser of a command makes the console escape it
    export(Scores(), tmp_path / os.fsdecode(b"\xff"), [format])
    (file,) = tmp_path.iterdir()
    assert os.fsencode(file.name) == b"\xff." + format.encode()
    if format == "safetensors":
        assert read_checkpoint(file)["model"].keys() == {"linear.weight", "linear.bias"}


@pytest.mark.parametrize(("parts", "prefix"), [(["model"], ""), (["model", "head"], "model.")])
def test_weights_lose_the_prefix_of_a_wrapper_that_all_have(tmp_path, parts, prefix):
    export(nn.Sequential(OrderedDict((part, nn.Linear(4, 4)) for part in parts)), tmp_path / "m", ["safetensors"])
    names = read_checkpoint(tmp_path / "m.safetensors")["model"]
    assert f"{prefix}weight" in names and len(names) == 2 * len(parts)


def test_a_dot_in_a_name_is_not_a_suffix(tmp_path):
    for name in ("m_lr0.1", "m_lr0.2", "m_lr0.3.safetensors"):
        export(Scores(), tmp_path / name, ["safetensors"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"m_lr0.{i}.safetensors" for i in (1, 2, 3)]


@pytest.mark.parametrize("model", [Traced(1.0), Traced(1e-6), NaNWhenTraced()])
def test_a_difference_is_an_error(model, tmp_path):
    with pytest.raises(ValueError, match="outputs differ from the model's"):
        export(model, tmp_path / "m", ["pt2"])
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_no_file(tmp_path, monkeypatch):
    def half(model, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("irpe_train.export._save_safetensors", half)
    with pytest.raises(KeyboardInterrupt):
        export(Scores(), tmp_path / "m", ["safetensors"])
    assert not list(tmp_path.iterdir())


class Untraceable(nn.Module):
    """Has data-dependent control flow, which PyTorch cannot export."""

    def forward(self, x):
        return x * 2 if x.sum() > 0 else x * 3


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_what_cannot_be_written_is_one_message_and_leaves_no_file(tmp_path, format, monkeypatch):
    with pytest.raises(RunError, match=rf"m.{format}: this model cannot be exported \([^\n]+\)$"):
        export(Untraceable(), tmp_path / "m", ["safetensors", format])

    def half_written(program, file, **options):
        file.write(b"half")
        raise AssertionError

    monkeypatch.setattr(torch.export, "save", half_written)
    with pytest.raises(RunError, match=r"n.pt2: this model cannot be exported \(AssertionError\)"):
        export(Scores(), tmp_path / "n", ["pt2"])

    def wrapped(*args, **options):  # as by PyTorch's ONNX exporter
        raise RuntimeError("Failed to convert the exported program.\nThis is step 3/3") from ValueError("No function x")

    monkeypatch.setattr(torch.export, "export", wrapped)
    with pytest.raises(RunError, match=r"n.onnx: this model cannot be exported \(No function x\)"):
        export(Scores(), tmp_path / "n", ["onnx"])
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("format", ["onnx", "pt2", "safetensors"])
def test_a_full_disk_is_told_as_such_and_leaves_no_file(tmp_path, format):
    with full_disk(300), pytest.raises(OSError, match=rf"File too large: '{tmp_path}/m.{format}'"):
        export(nn.Linear(4, 100), tmp_path / "m", [format])
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises((ImportError, ValueError), match="safetensors"):
        export(Scores(), tmp_path / "m", ["safetensors"])


@pytest.mark.parametrize("formats", [["safetensors"], ["pt2", "safetensors"]])
def test_what_is_there_already_stays(tmp_path, formats):
    (tmp_path / "m.safetensors").write_text("trained weights")
    with pytest.raises(RunError, match=r"m\.safetensors: already there; give another name"):
        export(Scores(), tmp_path / "m.pt2", formats)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    assert (tmp_path / "m.safetensors").read_text() == "trained weights"


def test_an_empty_name_or_a_folder_is_refused(tmp_path):
    for out in ("", "/", tmp_path):
        with pytest.raises(RunError, match=f"--out '{out}': expected the name of a file"):
            export(Scores(), out, ["safetensors"])
