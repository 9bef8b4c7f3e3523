"""Checkpoints are written so that a kill, a full disk or a name in the way leaves the last good one."""

import contextlib
import os
import stat

import pytest
import torch

from irpe_train.checkpoint import link, read_checkpoint, write_checkpoint
from irpe_train.errors import RunError
from tests.helpers.full_disk import full_disk


def test_the_one_before_is_kept_and_other_names_are_the_same_contents(tmp_path):
    path, previous = tmp_path / "checkpoint.pth", tmp_path / "previous.pth"
    for epoch in range(3):
        write_checkpoint({"epoch": epoch}, path, previous=previous, also=(tmp_path / "best.pth",) if epoch == 1 else ())
    assert [read_checkpoint(p)["epoch"] for p in (path, previous, tmp_path / "best.pth")] == [2, 1, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pth", "checkpoint.pth", "previous.pth"]


def test_the_contents_are_on_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    path, events, replace = tmp_path / "new" / "folder" / "checkpoint.pth", [], os.replace

    def fsync(handle):
        is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        events.append("folder" if is_folder else os.fstat(handle).st_size)
        if is_folder:
            raise OSError("not on this file system")

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr("os.replace", lambda *names: events.append("named") or replace(*names))
    write_checkpoint({"epoch": 1}, path)
    assert events == [path.stat().st_size, "named", "folder"]


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


@pytest.mark.parametrize("limit", [1_000, 100_000])  # a small file fails as PyTorch closes it
def test_full_disk_fails_loudly_and_keeps_the_old_file(tmp_path, limit):
    path = tmp_path / "checkpoint.pth"
    write_checkpoint({"epoch": 0}, path, previous=tmp_path / "previous.pth")
    match = r"cannot write .*checkpoint.pth: \[Errno \d+\] .*last good checkpoint is kept: .*t.pth"
    with full_disk(limit), pytest.raises(RunError, match=r"eval.pth: \[Errno \d+\] .* choose another folder$"):
        write_checkpoint({"model": torch.zeros(10**6)}, tmp_path / "eval.pth")  # beside a checkpoint that is good
    with full_disk(limit), pytest.raises(RunError, match=match):
        write_checkpoint({"epoch": 1, "model": torch.zeros(10**6)}, path, previous=tmp_path / "previous.pth")
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
