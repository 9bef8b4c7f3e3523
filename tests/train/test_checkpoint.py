"""Checkpoint files: what is read, what is refused and with which words, and what a kill or a full disk leaves."""

import argparse
import contextlib
import os
import pathlib
import pickle
import re
import resource
import zipfile

import pytest
import torch

from irpe_train.checkpoint import link, load_matching, model_weights, read_checkpoint, read_weights, write_checkpoint
from irpe_train.errors import BadCheckpoint, RunError
from irpe_train.state import Checkpoints, TrainState, plain

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
    return a_state().to_dict(DETR)


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
    with pytest.raises(BadCheckpoint, match="a.pth: what it says of its position .* makes no sense"):
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


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write .*file/checkpoint.pth"):
        write_checkpoint({}, tmp_path / "file" / "checkpoint.pth")


def test_plain_keeps_what_can_be_read_back():
    import numpy as np

    value = plain({"a": np.float64(1.5), "b": [np.int64(2), (True, None)], "c": pathlib.Path("x"), 3: torch.ones(1)})
    assert value == {"a": 1.5, "b": [2, (True, None)], "c": "x", 3: torch.ones(1)}
    assert type(value["a"]) is float and type(value["b"][0]) is int
