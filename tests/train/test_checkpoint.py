"""Checkpoint files: what is read, what is refused and with which words, and what a kill or a full disk leaves."""

import argparse
import contextlib
import copy
import math
import os
import pathlib
import pickle
import random
import re
import resource
import time
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest
import torch

from irpe_train import download as downloads
from irpe_train.checkpoint import link, load_matching, model_weights, read_checkpoint, read_weights, write_checkpoint
from irpe_train.distributed import set_up_logging
from irpe_train.errors import BadCheckpoint, RunError
from irpe_train.run_folder import Checkpoints
from irpe_train.state import TrainState, plain

DEIT = ("model", "optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args")
DETR = ("model", "optimizer", "lr_scheduler", "epoch", "args")


class Hostile:
    """A pickle that creates a file when it is read carelessly."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def a_state(**options):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    return TrainState(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1), **options)


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


def test_missing_file_and_wrong_contents_are_named(tmp_path):
    with pytest.raises(BadCheckpoint, match="none.pth: no such file"):
        read_checkpoint(tmp_path / "none.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(BadCheckpoint, match="expected a dict with a 'model', got list"):
        read_checkpoint(tmp_path / "list.pth")
    with pytest.raises(BadCheckpoint, match="no 'model' in it; it has: weights"):
        model_weights({"weights": 3}, source="a.pth")
    with pytest.raises(BadCheckpoint, match="'model' is not a dict of tensors"):
        model_weights({"model": {"a": 1}}, source="a.pth")


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
        r"not \(2, 3\)",
    ):
        load_matching(model, weights, source="a.pth")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


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


@pytest.mark.parametrize("name", ["right", "wrong", "without"])
def test_a_fetched_file_is_held_against_the_hash_in_its_name(tmp_path, monkeypatch, name):
    torch.save({"model": {"w": torch.ones(3)}}, tmp_path / "theirs.pth")
    digest = downloads.sha256(tmp_path / "theirs.pth")[:8]
    file = {"right": f"net-{digest}.pth", "wrong": "net-01234567.pth", "without": "net.pth"}[name]
    asked = []

    def download(url, part, *, most):
        asked.append(url)
        part.write_bytes((tmp_path / "theirs.pth").read_bytes())

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(downloads, "download", download)
    for _ in range(2):  # the second time it is there
        with (
            pytest.raises(BadCheckpoint, match="not as its name says") if name == "wrong" else contextlib.nullcontext()
        ):
            assert read_weights(f"https://example.org/a/{file}?download=1")["w"].sum() == 3
    assert asked == [f"https://example.org/a/{file}?download=1"] * (2 if name == "wrong" else 1)


def test_a_file_that_cannot_be_fetched_is_one_message(tmp_path, monkeypatch):
    def download(url, part, *, most):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(downloads, "download", download)
    with pytest.raises(BadCheckpoint, match=rf"cannot fetch it \(no network\). Put it here by hand: {tmp_path}.*a.pth"):
        read_checkpoint("https://example.org/a.pth")


def test_one_process_fetches_and_the_others_wait(tmp_path, monkeypatch):
    torch.save({"model": {"w": torch.ones(3)}}, tmp_path / "theirs.pth")
    asked = []

    def download(url, part, *, most):
        asked.append(url)
        time.sleep(0.2)  # time enough for another to begin
        part.write_bytes((tmp_path / "theirs.pth").read_bytes())

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(downloads, "download", download)
    with ThreadPoolExecutor(4) as pool:  # the lock is of an open folder, so threads are kept apart like processes
        found = list(pool.map(downloads.local_file, ["https://example.org/a.pth"] * 4))
    assert len(asked) == 1 and set(found) == {tmp_path / "hub" / "checkpoints" / "a.pth"}


def test_a_comment_of_another_program_is_no_seal(tmp_path):
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


def test_a_damaged_seal_is_no_comment_of_another_program(tmp_path):
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
def test_no_flipped_bit_and_no_cut_loads_in_silence(tmp_path, ours):
    """400 flipped bits and 100 cuts. Other files have no checksum of their headers: there the weights must be right."""
    model = torch.nn.Sequential(torch.nn.Linear(9, 17), torch.nn.Linear(17, 3))
    contents, path = {"model": model.state_dict(), "epoch": 7}, tmp_path / "a.pth"
    write_checkpoint(contents, path) if ours else torch.save(contents, path)
    whole, draw, loaded = path.read_bytes(), random.Random(0), 0
    assert torch.load(path, weights_only=True)["epoch"] == 7  # the seal is no obstacle to other programs
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
        (lambda: torch.eye(4).to_sparse(), "model.w.0 is sparse_coo, float32, on cpu; expected a dense tensor"),
        (lambda: torch.eye(4).to_sparse_csr(), "model.w.0 is sparse_csr"),
        (lambda: torch.empty(9, device="meta"), "model.w.0 is strided, float32, on meta"),
        (lambda: torch.ones(3).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda: torch.ones(3, dtype=torch.complex64), "complex64"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "qint8"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_plain_numbers_are_named_wherever_they_are(tmp_path, make, words):
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
def test_names_that_are_no_text_are_refused(name):
    with pytest.raises(BadCheckpoint, match="a.pth: 'model' is not a dict of tensors by name"):
        model_weights({"model": {name: torch.ones(1)}}, source="a.pth")


def whole_checkpoint():
    state = a_state()
    state.model(torch.ones(1, 3)).sum().backward()
    state.optimizer.step()
    return state.to_dict(DETR)


@pytest.mark.parametrize(
    "progress",
    [
        3,
        [],
        None,
        {"step": "4"},
        {"step": -1},
        {"step": 9, "fits": [8, 1, 0]},
        {"epoch": 1.5},
        {"epoch": -1},
        {"epoch": None},
        {"best": "high"},
        {"train_stats": [1]},
        {"train_stats": {"loss": "low"}},
        {"fits": 3},
        {"fits": ["a"]},
        {"meters": 3},
        {"meters": [{"loss": 3}]},
        {"meters": [{"loss": {"total": 1.0, "count": 1, "window": [None]}}]},
        {"meters": [{"loss": {"total": 1.0, "count": 1}}]},
        {"format": "1"},
    ],
    ids=str,
)
def test_a_position_that_makes_no_sense_is_refused(progress):
    contents = whole_checkpoint()
    contents["progress"] = contents["progress"] | progress if isinstance(progress, dict) else progress
    with pytest.raises(BadCheckpoint, match="a.pth: its position .* makes no sense"):
        a_state().load_dict(contents, source="a.pth")


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("lr_scheduler", {"last_epoch": "three"}),
        ("lr_scheduler", {"step": 3}),
        ("lr_scheduler", {"base_lrs": 0.1}),
        ("optimizer", {"param_groups": 3}),
        ("optimizer", {"state": []}),
        ("optimizer", {"param_groups": [{"lr": "fast", "params": [0, 1]}]}),
    ],
)
def test_a_state_of_another_form_is_refused_before_it_is_used(part, change):
    contents = whole_checkpoint()
    contents[part] = contents[part] | change
    with pytest.raises(BadCheckpoint, match=f"a.pth: its {part} does not fit this run"):
        a_state().load_dict(contents, source="a.pth")


def changed(contents, where, change):
    """``contents`` with ``change`` at the place ``where``; None removes what is there."""
    *path, last = where
    place = contents
    for key in path:
        place = place[key]
    if change is None:
        del place[last]
    else:
        place[last] = change
    return contents


GROUP, MOMENTS = ("optimizer", "param_groups", 0), ("optimizer", "state", 0)
MISFITS = {
    "no lr": ((*GROUP, "lr"), None),
    "no betas": ((*GROUP, "betas"), None),
    "one beta": ((*GROUP, "betas"), (0.9,)),
    "lr of NaN": ((*GROUP, "lr"), math.nan),
    "capturable on a CPU": ((*GROUP, "capturable"), True),
    "no first moment": ((*MOMENTS, "exp_avg"), None),
    "moment of another shape": ((*MOMENTS, "exp_avg"), torch.ones(2, 2)),
    "moment that broadcasts": ((*MOMENTS, "exp_avg"), torch.ones(2, 1)),
    "moment of NaN": ((*MOMENTS, "exp_avg"), torch.full((2, 3), math.nan)),
    "negative second moment": ((*MOMENTS, "exp_avg_sq"), -torch.ones(2, 3)),
    "negative step": ((*MOMENTS, "step"), torch.tensor(-5.0)),
    "step of many": ((*MOMENTS, "step"), torch.ones(3)),
    "no dict": (MOMENTS, torch.ones(3)),
    "parameter by name": (("optimizer", "state", "0"), {"step": torch.tensor(1.0)}),
    "another optimizer": (("optimizer", "state"), {0: {"momentum_buffer": torch.ones(2, 3)}}),
    "no tensor but a set": (("optimizer",), {1, 2}),
    "a tensor": (("optimizer",), torch.ones(3)),
    "optimizer in a schedule": (("lr_scheduler", "optimizer"), 3),
    "schedule of NaN": (("lr_scheduler", "last_epoch"), math.nan),
    "schedule of steps of 0": (("lr_scheduler", "step_size"), 0),
    "schedule of two groups": (("lr_scheduler", "base_lrs"), [0.1, 0.1]),
    "another schedule": (("lr_scheduler",), {"t_initial": 3, "warmup_t": 0}),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_state_that_would_fail_later_is_refused_when_it_is_loaded(name):
    where, change = MISFITS[name]
    contents = changed(whole_checkpoint(), where, change)
    with pytest.raises(BadCheckpoint, match=f"a.pth: its {where[0]} does not fit this run .*; use the flags") as error:
        a_state().load_dict(contents, source="a.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["Adam", "SGD", "RMSprop", "Adagrad", "Adadelta", "NAdam", "Adafactor"])
def test_the_trial_step_changes_nothing(kind):
    """Neither weights nor state, and any optimizer that was stored is taken back."""
    states = [a_state(), a_state()]
    for state in states:
        state.optimizer = getattr(torch.optim, kind)(state.model.parameters(), lr=0.1)
        state.lr_scheduler = torch.optim.lr_scheduler.StepLR(state.optimizer, 2)
    for _ in range(3):
        states[0].model(torch.ones(1, 3)).sum().backward()
        states[0].optimizer.step()
    states[0].lr_scheduler.step()
    stored = copy.deepcopy(states[0].to_dict(DETR))
    assert states[1].load_dict(copy.deepcopy(stored), source="a.pth")
    for key in ("model", "optimizer", "lr_scheduler"):
        torch.testing.assert_close(states[1].to_dict(DETR)[key], stored[key], rtol=0, atol=0)


@pytest.mark.parametrize("gone", ["optimizer", "lr_scheduler", "epoch"])
@pytest.mark.parametrize("value", [None, {}])
def test_what_lacks_a_part_of_the_state_is_weights_alone(gone, value, capsys):
    set_up_logging(0)
    state = a_state(epoch=4)
    assert not state.load_dict(whole_checkpoint() | {gone: value}, source="a.pth")
    assert state.epoch == 4 and f"has weights only (no {gone}): training starts at epoch 4" in capsys.readouterr().out


def nest(levels):
    value = ["x"]
    for _ in range(levels):
        value = [value, value]
    return value


@pytest.mark.parametrize("where", [("args",), ("extra",), ("progress", "also"), (*MOMENTS, "x")])
@pytest.mark.parametrize("kind", ["many", "endless"])
def test_lists_that_stand_for_more_than_the_file_are_refused(tmp_path, where, kind):
    value = nest(50)
    if kind == "endless":
        value.append(value)
    torch.save(changed(whole_checkpoint(), where, value), tmp_path / "a.pth")
    with pytest.raises(BadCheckpoint, match=r"a\.pth: refused: it names more values than the [\d,]+ bytes of the file"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrapped_and_compiled_models_are_taken_off(prefix):
    plain_weights = torch.nn.Linear(3, 2).state_dict()
    weights = {prefix + name: value for name, value in plain_weights.items()}
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


@pytest.mark.parametrize("content", [b"<html>sign in</html>", b"version https://git-lfs", b"{}", b"\x50\x02{"])
def test_other_files_are_shown_by_their_beginning(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    words = "not a file that torch.save wrote (it begins with " + repr(content[:20])
    with pytest.raises(BadCheckpoint, match=re.escape(words)) as error:
        read_checkpoint(tmp_path / "a.pth")
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("keys", [DEIT, DETR], ids=["deit", "detr"])
def test_published_keys_come_first_in_the_published_order(tmp_path, keys):
    flags = argparse.Namespace(lr=0.1, path=pathlib.Path("x"), device=torch.device("cpu"))
    state = a_state(scaler=torch.amp.GradScaler("cpu", enabled=False), flags=flags, extra={"names": {1: "one"}})
    state.ema = argparse.Namespace(module=torch.nn.Linear(3, 2))
    Checkpoints(tmp_path, keys).save(state)
    contents = read_checkpoint(tmp_path / "checkpoint.pth")
    assert tuple(contents)[: len(keys)] == keys
    assert set(contents) == {*DEIT, "progress", "names"} and contents["names"] == {1: "one"}
    assert vars(contents["args"]) == {"lr": 0.1, "path": "x", "device": "cpu"}
    assert contents["epoch"] == -1  # none is finished yet


def test_epoch_is_the_finished_one(tmp_path):
    state = a_state(epoch=3)
    for step, stats, finished in ((0, None, 2), (5, None, 2), (9, {"loss": 1.0}, 3)):
        state.step, state.train_stats = step, stats
        assert state.to_dict(DETR)["epoch"] == finished


def test_checkpoint_of_a_newer_program_is_refused():
    contents = a_state().to_dict(DETR)
    contents["progress"]["format"] = 99
    with pytest.raises(BadCheckpoint, match=r"newer version of this program \(format 99, known is 1\)"):
        a_state().load_dict(contents, source="a.pth")


def test_weights_alone_start_a_new_run(tmp_path):
    state = a_state(epoch=2)
    torch.save({"model": a_state().model.state_dict()}, tmp_path / "a.pth")
    found = Checkpoints("", DETR).open(str(tmp_path / "a.pth"))
    assert not state.load_dict(found.contents, source=found.source)
    assert state.epoch == 2


def test_published_position_is_the_next_epoch():
    contents = a_state().to_dict(DETR)
    del contents["progress"]
    contents["epoch"] = 149
    state = a_state()
    assert state.load_dict(contents, source="a.pth")
    assert (state.epoch, state.step, state.train_stats) == (150, 0, None)


def test_optimizer_of_another_run_is_refused():
    contents = a_state().to_dict(DETR)
    contents["optimizer"]["param_groups"].append(contents["optimizer"]["param_groups"][0])
    with pytest.raises(BadCheckpoint, match="a.pth: its optimizer does not fit this run"):
        a_state().load_dict(contents, source="a.pth")


def test_auto_needs_a_folder():
    with pytest.raises(BadCheckpoint, match="--resume auto looks into --output_dir"):
        Checkpoints("", DETR).open("auto")


def test_the_one_before_is_kept_and_other_names_are_the_same_contents(tmp_path):
    path, previous = tmp_path / "checkpoint.pth", tmp_path / "previous.pth"
    for epoch in range(3):
        write_checkpoint({"epoch": epoch}, path, previous=previous, also=(tmp_path / "best.pth",) if epoch == 1 else ())
    assert [read_checkpoint(p)["epoch"] for p in (path, previous, tmp_path / "best.pth")] == [2, 1, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pth", "checkpoint.pth", "previous.pth"]


@pytest.mark.parametrize("fails", ["", "link", "replace"])
def test_a_second_name_leaves_nothing_behind(tmp_path, monkeypatch, fails):
    (tmp_path / "a.pth").write_text("new")
    (tmp_path / ".best.pth.tmp").write_text("of a run that was killed")

    def fail(*args):
        raise OSError("not here")

    if fails:
        monkeypatch.setattr(f"os.{fails}", fail)
    for _ in range(2):  # the second time both names are one file already
        with pytest.raises(OSError, match="not here") if fails == "replace" else contextlib.nullcontext():
            link(tmp_path / "a.pth", tmp_path / "best.pth")
    names = ["a.pth"] if fails == "replace" else ["a.pth", "best.pth"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all((tmp_path / name).read_text() == "new" for name in names)


def test_full_disk_fails_loudly_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pth"
    write_checkpoint({"epoch": 0}, path, previous=tmp_path / "previous.pth")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # what a full disk does to this process
    try:
        with pytest.raises(RunError, match=r"cannot write .*checkpoint.pth: .*last good checkpoint is kept: .*t.pth"):
            write_checkpoint({"epoch": 1, "model": torch.zeros(10**6)}, path, previous=tmp_path / "previous.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_checkpoint(path)["epoch"] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


@pytest.mark.parametrize("kind", ["file", "fifo", "link", "loop"])
def test_what_has_the_temporary_name_is_in_nobodys_way(tmp_path, kind):
    (tmp_path / "mine").write_text("mine")
    temporary = tmp_path / ".checkpoint.pth.tmp"
    {
        "file": lambda: temporary.write_text("of a run that was killed"),
        "fifo": lambda: os.mkfifo(temporary),
        "link": lambda: temporary.symlink_to(tmp_path / "mine"),
        "loop": lambda: temporary.symlink_to(temporary),
    }[kind]()
    write_checkpoint({"epoch": 1}, tmp_path / "checkpoint.pth")
    assert read_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == 1 and (tmp_path / "mine").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pth", "mine"]


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write .*file/checkpoint.pth"):
        write_checkpoint({}, tmp_path / "file" / "checkpoint.pth")


def test_plain_keeps_what_can_be_read_back():
    import numpy as np

    value = plain({"a": np.float64(1.5), "b": [np.int64(2), (True, None)], "c": pathlib.Path("x"), 3: torch.ones(1)})
    assert value == {"a": 1.5, "b": [2, (True, None)], "c": "x", 3: torch.ones(1)}
    assert type(value["a"]) is float and type(value["b"][0]) is int


def test_quantised_weights_are_refused():
    model = torch.nn.Linear(2, 2)
    weights = model.state_dict() | {"weight": torch.ones(2, 2, dtype=torch.int8)}
    with pytest.raises(BadCheckpoint, match=r"a\.pth: weight holds torch\.int8; quantised"):
        load_matching(model, weights, source="a.pth")
