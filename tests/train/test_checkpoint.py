"""Reading checkpoint files: what is accepted, what is refused, and with which message."""

import argparse
import os
import pathlib
import pickle
import random
import re
import zipfile
from collections import deque
from decimal import Decimal

import numpy as np
import pytest
import torch

from irpe_train.checkpoint import load_matching, model_weights, read_checkpoint, read_weights, write_checkpoint
from irpe_train.errors import BadCheckpoint


class Hostile:
    """A pickle that creates a file when it is read carelessly."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def test_published_checkpoint_is_read(tmp_path):
    """The published ones hold a Namespace, a PosixPath where submitit ran, and a ``module.`` prefix if saved so."""
    args = argparse.Namespace(lr=1e-3, output_dir=pathlib.PosixPath("/out"), nothing=None)
    weights = torch.nn.Linear(3, 2).state_dict()
    prefixed = {f"module.{name}": value for name, value in weights.items()}
    torch.save({"model": prefixed, "epoch": 299, "args": args}, tmp_path / "a.pth")
    contents = read_checkpoint(tmp_path / "a.pth")
    assert contents["epoch"] == 299 and contents["args"].lr == 1e-3 and str(contents["args"].output_dir) == "/out"
    model = torch.nn.Linear(3, 2)
    load_matching(model, model_weights(contents, source="a.pth"), source="a.pth")
    assert torch.equal(model.weight, weights["weight"])


@pytest.mark.parametrize("module", [b"pathlib", b"pathlib._local"])
@pytest.mark.parametrize("name", [b"PosixPath", b"WindowsPath"])
def test_paths_of_other_systems_and_pythons_are_read(tmp_path, module, name):
    torch.save({"model": {}, "p": pathlib.PurePosixPath("out")}, tmp_path / "a.pth", pickle_protocol=2)
    here = f"c{pathlib.PurePosixPath.__module__}\nPurePosixPath\n".encode()  # pathlib._local in Python 3.13
    with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
        for member in old.namelist():
            contents = old.read(member)
            assert here in contents or not member.endswith("data.pkl")
            new.writestr(member, contents.replace(here, b"c" + module + b"\n" + name + b"\n"))
    assert str(read_checkpoint(tmp_path / "b.pth")["p"]) == "out"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", ["value", "in_args"])
def test_pickle_with_code_is_refused_and_not_run(tmp_path, zipped, where):
    trace, path = tmp_path / "it_ran", tmp_path / "evil.pth"
    evil = Hostile(trace) if where == "value" else argparse.Namespace(inner=Hostile(trace))
    torch.save({"model": {}, "args": evil}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(BadCheckpoint, match=r"evil.pth: refused: it holds a reference to posix.mkdir.*Nothing was run"):
        read_checkpoint(path)
    assert not trace.exists()


def test_bare_pickle_with_code_is_refused_and_not_run(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Hostile(tmp_path / "it_ran")))
    with pytest.raises(BadCheckpoint, match="evil.pth"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.7, 0.95, 0.999])
def test_truncated_file_is_named(tmp_path, fraction):
    write_checkpoint({"model": torch.nn.Linear(100, 100).state_dict(), "epoch": 1}, tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(BadCheckpoint, match=r"a.pth: damaged"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"", "the file is empty"),
        (b"hello, I am a text file\n" * 9, "damaged"),
        (b"PK\x03\x04" + b"\0" * 100, "damaged"),
    ],
)
def test_other_files_are_named(tmp_path, contents, words):
    (tmp_path / "a.pth").write_bytes(contents)
    with pytest.raises(BadCheckpoint, match=f"a.pth: {words}"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: np.savez(path, a=np.ones(3)),
        lambda path: torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path),
        lambda path: torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), path),
    ],
    ids=["NumPy", "TorchScript", "torch.export"],
)
def test_other_archives_are_not_called_damaged(tmp_path, write):
    with open(tmp_path / "a.pth", "wb") as file:
        write(file)
    with pytest.raises(BadCheckpoint, match="a.pth: not weights that torch.save wrote, but an exported or"):
        read_checkpoint(tmp_path / "a.pth")


def test_missing_file_and_wrong_contents_are_named(tmp_path):
    with pytest.raises(BadCheckpoint, match="none.pth: no such file"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(BadCheckpoint, match=f"{tmp_path}: a folder; give the file in it"):
        read_checkpoint(tmp_path)
    with pytest.raises(BadCheckpoint, match="checkpoint http://127.0.0.1/a.pth: only https:// is read"):
        read_checkpoint("http://127.0.0.1/a.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(BadCheckpoint, match="expected a dict with a 'model', got list"):
        read_checkpoint(tmp_path / "list.pth")
    with pytest.raises(BadCheckpoint, match="no 'model' in it; it has: weights"):
        model_weights({"weights": 3}, source="a.pth")
    for odd in (3, {}, {"a": 1}, {"a": torch.ones(1), "b": 1}):
        with pytest.raises(BadCheckpoint, match="'model' is not a dict of tensors"):
            model_weights({"model": odd}, source="a.pth")


def test_layout_of_timm_is_read_and_weights_do_not_stand_in_for_their_average():
    one, other = {"w": torch.ones(1)}, {"w": torch.zeros(1)}
    checkpoint = {"epoch": 1, "arch": "x", "state_dict": one, "state_dict_ema": other}
    assert model_weights(checkpoint, source="a.pth") == one
    assert model_weights(checkpoint, source="a.pth", key="model_ema") == other
    for without in (one, {"state_dict": one}, {"model": one, "model_ema": None}):
        assert model_weights(without, source="a.pth") == one
        with pytest.raises(BadCheckpoint, match="a.pth: no 'model_ema' in it"):
            model_weights(without, source="a.pth", key="model_ema")


def test_zip_bomb_is_refused_unread(tmp_path):
    """A megabyte of file that claims a gigabyte; torch itself never compresses."""
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 2**20)
        with archive.open("archive/data/0", "w") as member:
            for _ in range(64):
                member.write(b"\0" * 2**20)
    with pytest.raises(BadCheckpoint, match=r"bomb.pth: refused: its members claim 68,157,440 bytes in a file of"):
        read_checkpoint(tmp_path / "bomb.pth")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(bad):
    weights = torch.nn.Linear(3, 2).state_dict()
    weights["weight"][1, 2] = bad
    with pytest.raises(BadCheckpoint, match="a.pth: weight has values that are NaN or infinite"):
        model_weights({"model": weights}, source="a.pth")


def test_another_model_is_refused_with_keys_named_and_nothing_changed():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {
        "0.weight": torch.zeros(4, 3),
        "0.bias": torch.zeros(2),
        "1.weight": torch.zeros(2, 2),
        "head.bias": torch.zeros(1),
    }
    with pytest.raises(
        BadCheckpoint,
        match=r"missing: 1.bias; unexpected: head.bias; other shapes: 0.weight \(4, 3\), "
        r"not \(2, 3\). Build the model with the flags it was trained with: a run has them in config.yaml\.$",
    ):
        load_matching(model, weights, source="a.pth")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_prefix_of_all_names_is_told():
    weights = {f"model.{name}": value for name, value in torch.nn.Linear(3, 2).state_dict().items()}
    with pytest.raises(
        BadCheckpoint, match=r"unexpected: model.weight, model.bias.* Its names begin with 'model.': cut"
    ):
        load_matching(torch.nn.Linear(3, 2), weights, source="lightning.ckpt")


def test_only_the_named_keys_may_start_fresh_and_each_is_accounted_for():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 5), torch.nn.Linear(1, 1))
    other = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    weights = other.state_dict() | {"1.more": torch.ones(2), "0.num_batches_tracked": torch.ones(1)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_matching(model, weights, source="a.pth", may_start_fresh=lambda key: key[0] in "12")
    assert report == {
        "1.weight": "starts fresh: (4, 2) there, (5, 2) here",
        "1.bias": "starts fresh: (4,) there, (5,) here",
        "2.weight": "starts fresh: not in the checkpoint",
        "2.bias": "starts fresh: not in the checkpoint",
        "1.more": "is not used",
    }
    for name, value in model.state_dict().items():
        assert torch.equal(value, (weights if name[0] == "0" else before)[name])
    with pytest.raises(BadCheckpoint, match=r"missing: 2.weight, 2.bias; unexpected: 1.more. Build"):
        load_matching(model, weights, source="a.pth", may_start_fresh=lambda key: key in ("1.weight", "1.bias"))


def test_a_comment_of_another_program_is_not_a_seal(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"model": {"w": torch.full((64,), 3.0)}}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"made by hand"
    assert read_weights(path)["w"].sum() == 192
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"\0\0\x40\x40" * 8, b"\0\0\x41\x40" * 8))
    with pytest.raises(BadCheckpoint, match="and its checksum differ"):
        read_checkpoint(path)
    path.write_bytes(whole[:-3])
    with pytest.raises(BadCheckpoint, match="damaged or truncated"):
        read_checkpoint(path)


def test_a_damaged_seal_is_not_a_comment_of_another_program(tmp_path):
    path = tmp_path / "a.pth"
    write_checkpoint({"model": {}}, path)
    whole = path.read_bytes()
    for bit in range(8 * 21):
        damaged = bytearray(whole)
        damaged[-1 - bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(BadCheckpoint, match="damaged"):
            read_checkpoint(path)
    for cut in range(1, 22):
        path.write_bytes(whole[:-cut])
        with pytest.raises(BadCheckpoint, match="damaged"):
            read_checkpoint(path)


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "torch.save"])
def test_no_flipped_bit_and_no_cut_loads_silently(tmp_path, ours):
    """400 flipped bits and 100 cuts. Other files have no checksum of their headers: there the weights must be right."""
    model = torch.nn.Sequential(torch.nn.Linear(9, 17), torch.nn.Linear(17, 3))
    contents, path = {"model": model.state_dict(), "epoch": 7}, tmp_path / "a.pth"
    write_checkpoint(contents, path) if ours else torch.save(contents, path)
    whole, draw, loaded = path.read_bytes(), random.Random(0), 0
    assert torch.load(path, weights_only=True)["epoch"] == 7  # other programs can read a sealed file
    for number in range(500):
        damaged = bytearray(whole)
        if number < 400:
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        else:
            damaged = damaged[: draw.randrange(len(whole))]
        path.write_bytes(damaged)
        try:
            found = read_checkpoint(path)
        except BadCheckpoint as error:
            assert str(error).startswith(f"checkpoint {path}: ") and "\n" not in str(error)
            continue
        loaded += 1
        assert not ours and number < 400 and found["epoch"] == 7
        assert all(torch.equal(found["model"][name], value) for name, value in model.state_dict().items())
    assert loaded < 400


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.zeros(1).expand(10**5, 10**5), "model.w.0 has 10,000,000,000 elements, and the file stores"),
        (lambda: torch.zeros(1).expand(3), "has 3 elements, and the file stores 4 bytes of it; save a contiguous copy"),
        (lambda: torch.eye(4).to_sparse(), "model.w.0 is sparse_coo, float32, on cpu; expected a dense tensor"),
        (lambda: torch.eye(4).to_sparse_csr(), "model.w.0 is sparse_csr"),
        (lambda: torch.empty(9, device="meta"), "model.w.0 is strided, float32, on meta"),
        (lambda: torch.ones(3).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda: torch.ones(3, dtype=torch.complex64), "complex64"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "qint8"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_plain_numbers_are_named_wherever_they_are(tmp_path, make, words):
    torch.save({"model": argparse.Namespace(w=[make()])}, tmp_path / "a.pth")
    with pytest.raises(BadCheckpoint, match="a.pth: .*" + re.escape(words)):
        read_checkpoint(tmp_path / "a.pth")


def test_views_and_shared_weights_are_read(tmp_path):
    table = torch.randn(6, 4)
    weights = {"a": table, "b": table, "c": table.t(), "d": table[2:], "e": torch.empty(0, 3)}
    torch.save({"model": weights}, tmp_path / "a.pth")
    found = read_weights(tmp_path / "a.pth")
    assert all(torch.equal(found[name], value) for name, value in weights.items())


@pytest.mark.parametrize("name", [1, None, ("a",), b"w"])
def test_names_that_are_not_text_are_refused(name):
    with pytest.raises(BadCheckpoint, match="a.pth: 'model' is not a dict of tensors by name"):
        model_weights({"model": {name: torch.ones(1)}}, source="a.pth")


@pytest.mark.parametrize(
    "prefix", ["module.0.", "_orig_mod.0.", "module._orig_mod.0.", "_orig_mod.module.0.", "module.0._orig_mod."]
)
def test_prefixes_of_wrapped_and_compiled_models_and_blocks_are_taken_off(prefix):
    plain_weights = torch.nn.Sequential(torch.nn.Linear(3, 2)).state_dict()
    weights = {name.replace("0.", prefix): value for name, value in plain_weights.items()}
    assert list(model_weights({"model": weights}, source="a.pth")) == list(plain_weights)
    with pytest.raises(BadCheckpoint, match=f"a.pth: 'model' holds a weight twice, as {prefix}weight"):
        model_weights({"model": weights | plain_weights}, source="a.pth")


def test_names_in_messages_stay_on_their_line():
    with pytest.raises(BadCheckpoint) as error:
        load_matching(torch.nn.Linear(1, 1), {"a\n\x1b[31m": torch.ones(1), "b" * 9999: torch.ones(1)}, source="a.pth")
    assert str(error.value).isprintable() and len(str(error.value)) < 500


@pytest.mark.parametrize("value", [frozenset([1]), int, Decimal(1), deque([1])], ids=repr)
def test_what_is_refused_is_called_by_its_name(tmp_path, value):
    torch.save({"model": {}, "extra": value}, tmp_path / "a.pth")
    kind = value if isinstance(value, type) else type(value)
    with pytest.raises(BadCheckpoint, match=rf"it holds a reference to ([\w.]+\.)?{kind.__name__}, which could run"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "content", [b"<html>sign in</html>", b"version https://git-lfs", b"{}", b"\x50\x02{", b"hello, I am text"]
)
def test_other_files_are_shown_by_their_beginning(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    words = "not a file that torch.save wrote (it begins with " + repr(content[:20])
    with pytest.raises(BadCheckpoint, match=re.escape(words)) as error:
        read_checkpoint(tmp_path / "a.pth")
    assert "weights_only" not in str(error.value)


def test_quantised_weights_are_refused():
    model = torch.nn.Linear(2, 2)
    weights = model.state_dict() | {"weight": torch.ones(2, 2, dtype=torch.int8)}
    with pytest.raises(BadCheckpoint, match=r"a\.pth: weight holds torch\.int8; quantised"):
        load_matching(model, weights, source="a.pth")
    norm = torch.nn.BatchNorm1d(2)  # its counter is an integer on both sides
    assert load_matching(norm, norm.state_dict(), source="a.pth") == {}


def test_an_exported_file_is_not_called_damaged(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\x08\n\x12\x07pytorch\x1a\x06")
    with pytest.raises(
        BadCheckpoint, match="model.onnx: an exported ONNX model, which only predict runs; give the checkp"
    ):
        read_checkpoint(tmp_path / "model.onnx")
