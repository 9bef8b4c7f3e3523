import errno
import os
from pathlib import Path

import pytest

from irpe_ops.whole_file import whole_file
from irpe_train.errors import RunError
from irpe_train.outputs import LIST, OutputFolder, refuse_existing, result_names, writable_folder
from irpe_train.run_folder import LOCK, lock
from irpe_train.text_files import complete, write_text
from tests.helpers.full_disk import full_disk


def test_only_what_was_written_before_is_replaced(tmp_path):
    out = OutputFolder(tmp_path / "new" / "out")
    out.refuse_to_replace(["a.json"])
    (out.folder / "a.json").write_text("1")
    out.wrote("a.json")
    OutputFolder(tmp_path / "new" / "out").refuse_to_replace(["a.json", "b.json"])
    (tmp_path / "new" / "out" / "b.json").write_text("mine")
    with pytest.raises(RunError, match=r"b.json: already there, and not a result of predict; nothing was written"):
        OutputFolder(tmp_path / "new" / "out").refuse_to_replace(["a.json", "b.json"])
    (tmp_path / "new" / "out" / "c.json").write_text("mine too")
    with pytest.raises(RunError, match=r"b.json and 1 more: already there"):
        OutputFolder(tmp_path / "new" / "out").refuse_to_replace(["a.json", "b.json", "c.json"])


def test_two_predictions_at_once_and_one_that_was_killed(tmp_path):
    one, other = OutputFolder(tmp_path), OutputFolder(tmp_path)
    for out, name in ((one, "a.json"), (other, "b.json"), (one, "c.json")):
        (out.folder / name).write_text(name)
        out.wrote(name)
    OutputFolder(tmp_path).refuse_to_replace(["a.json", "b.json", "c.json"])
    listed = tmp_path / ".written_by_predict"
    listed.write_text(listed.read_text()[:-9])
    other.wrote("b.json")
    OutputFolder(tmp_path).refuse_to_replace(["a.json", "b.json"])
    with pytest.raises(RunError, match="c.json: already there"):
        OutputFolder(tmp_path).refuse_to_replace(["c.json"])


def test_images_of_one_name_in_two_predictions(tmp_path):
    """As the frames of two cameras: the second would replace the results of the first."""
    first, second = {tmp_path / "one/1.jpg": "1"}, {tmp_path / "two/1.jpg": "1", tmp_path / "two/2.jpg": "2"}
    out = OutputFolder(tmp_path / "out", first)
    out.refuse_to_replace(["1.png"])
    (out.folder / "1.png").write_text("")
    out.wrote("1.png")
    OutputFolder(tmp_path / "out", first).refuse_to_replace(["1.png"])
    with pytest.raises(RunError, match=f"out/1.png: already there, from {tmp_path}/one/1.jpg; give another --out"):
        OutputFolder(tmp_path / "out", second).refuse_to_replace(["1.png", "2.png"])


def test_a_result_that_was_edited_is_somebodys(tmp_path):
    out = OutputFolder(tmp_path)
    (out.folder / "a.json").write_text("1")
    out.wrote("a.json")
    (tmp_path / "a.json").write_text("corrected by hand")
    with pytest.raises(RunError, match="a.json: already there"):
        out.refuse_to_replace(["a.json"])


def test_a_damaged_list_protects_everything(tmp_path):
    (tmp_path / "a.json").write_text("1")
    (tmp_path / ".written_by_predict").write_bytes(b"\xff\xfe a.json")
    with pytest.raises(RunError, match="a.json"):
        OutputFolder(tmp_path).refuse_to_replace(["a.json"])


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("file", "File exists"),
        ("file/below", "Not a directory"),
        ("dangling", "File exists"),
        ("n" * 300, "File name too long"),
        ("closed/x", "no permission|Permission denied"),
    ],
)
def test_a_folder_that_cannot_be_written_is_named_before_any_work(tmp_path, monkeypatch, place, reason):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "closed").mkdir(mode=0o555)
    monkeypatch.setattr(os, "access", lambda path, mode: "closed" not in str(path))  # root may write anywhere
    words = rf"--out .*{place}: cannot write there \(({reason})\); expected a folder"
    with pytest.raises(RunError, match=words):
        writable_folder(tmp_path / place)
    with pytest.raises(RunError, match=words):
        OutputFolder(tmp_path / place).refuse_to_replace(["a.json"])
    with pytest.raises(RunError, match=words):
        refuse_existing(tmp_path / place / "x.onnx")
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "nowhere").exists()


def test_links_are_somebodys(tmp_path):
    (tmp_path / "photo").write_text("photo")
    for name, target in (("a.png", "photo"), ("b.png", "nowhere"), ("c.png", "c.png")):
        (tmp_path / name).symlink_to(tmp_path / target)
        with pytest.raises(RunError, match=f"{name}: already there, and not a result of predict"):
            OutputFolder(tmp_path).refuse_to_replace([name])
        with pytest.raises(RunError, match=f"--out .*{name}: already there; give another name"):
            refuse_existing(tmp_path / name)


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["p/a.png", "p/b.jpg"], ["a", "b"]),
        (["p/a/1.png", "p/b/1.png", "p/b/2.png"], ["a/1", "b/1", "b/2"]),
        (["p/1.png", "p/1.jpg"], ["1.png", "1.jpg"]),
        (["p/X.png", "p/q/x.png"], ["X", "q/x"]),
        (["p/a/1.png", "p/a/1.jpg", "p/b/1.png"], ["a/1.png", "a/1.jpg", "b/1.png"]),
        ([], []),
    ],
)
def test_each_image_has_results_of_its_own(files, names):
    assert list(result_names([Path(file) for file in files]).values()) == names


def test_results_of_one_name_or_too_long_a_name_are_refused_before_any_work(tmp_path):
    with pytest.raises(RunError, match="two results would be called A.png: .* into another --out"):
        OutputFolder(tmp_path).refuse_to_replace(["A.png", "b.png", "a.png"])
    long = "nü" + 124 * "ü"  # 251 bytes
    with pytest.raises(RunError, match=f"called b/{long}.json, and no file name has over 255 bytes: rename the image"):
        OutputFolder(tmp_path).refuse_to_replace([f"b/{long}.png", f"b/{long}.json"])


def test_what_is_interrupted_while_it_is_written_leaves_nothing_behind(tmp_path):
    out = OutputFolder(tmp_path)
    with out.writing("a.png", "a.json") as (picture, table):
        picture.write_text("complete")
        table.write_text("complete")
    with out.writing("x" * 250 + ".png") as (picture,):  # as long as a name can be
        picture.write_text("complete")
    (tmp_path / ("x" * 250 + ".png")).unlink()
    with pytest.raises(KeyboardInterrupt), OutputFolder(tmp_path).writing("a.png", "a.json") as (picture, table):
        assert picture.suffix == ".png"
        picture.write_text("half")
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == [LIST, "a.json", "a.png"]
    assert (tmp_path / "a.png").read_text() == "complete"
    OutputFolder(tmp_path).refuse_to_replace(["a.png", "a.json"])


def test_a_full_disk_is_told_with_the_file_and_keeps_the_old_one(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with full_disk(0):
        with pytest.raises(OSError, match="a.txt"):
            write_text(tmp_path / "a.txt", "new")
        with pytest.raises(OSError, match="a.png"), OutputFolder(tmp_path).writing("a.png") as (picture,):
            picture.write_text("half")
        with pytest.raises(OSError, match="'.*/a.png'"), OutputFolder(tmp_path).writing("a.png") as (picture,):
            raise OSError(28, "no space", str(picture.parent))  # as of a library
        with pytest.raises(OSError, match=LOCK):
            lock(tmp_path)
    with pytest.raises(FileNotFoundError, match="gone/a.png'"), complete(tmp_path / "gone" / "a.png"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.parametrize("writing", [complete, whole_file])
def test_a_file_is_written_although_its_hidden_folder_stays(tmp_path, monkeypatch, writing):
    def rmdir(path, **where):
        raise OSError(errno.ENOTEMPTY, "Directory not empty")  # as NFS says while a server is late

    monkeypatch.setattr("os.rmdir", rmdir)
    with writing(tmp_path / "a.txt"):
        next(tmp_path.glob(".part_*")).joinpath("a.txt").write_text("whole")
    assert (tmp_path / "a.txt").read_text() == "whole"
