import os
from pathlib import Path

import pytest

from irpe_train.errors import RunError
from irpe_train.outputs import MARK, complete, refuse_existing, result_names, results_folder, writable_folder
from irpe_train.run_folder import LOCK, lock
from irpe_train.text_files import write_text
from tests.helpers.full_disk import full_disk


def test_results_never_go_where_files_are(tmp_path):
    first = results_folder(tmp_path / "new" / "out", ["a.png"])
    assert first == tmp_path / "new" / "out" and [path.name for path in first.iterdir()] == [MARK]
    (first / MARK).unlink()
    assert results_folder(first, ["b/a.png"]) == first and (first / "b").is_dir()  # an empty one is taken
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").symlink_to(tmp_path / "nowhere")  # a link is a file too
    (tmp_path / "photos_2").mkdir()
    (tmp_path / "photos_2" / ".DS_Store").touch()
    for number in (3, 4):
        assert results_folder(tmp_path / "photos", []) == tmp_path / f"photos_{number}"
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.png"]


def test_two_predictions_at_once_have_a_folder_each(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARK).touch()
    monkeypatch.setattr("os.listdir", lambda folder: [])  # as it was when both looked
    assert results_folder(tmp_path / "out", []) == tmp_path / "out_2"


def test_a_folder_without_a_name_has_neighbours_too(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "a.png").touch()
    assert results_folder(Path(), []) == tmp_path / "here_2"


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
        results_folder(tmp_path / place, ["a.json"])
    with pytest.raises(RunError, match=words):
        refuse_existing(tmp_path / place / "x.onnx")
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "nowhere").exists()


def test_links_are_somebodys(tmp_path):
    (tmp_path / "photo").write_text("photo")
    for name, target in (("a.png", "photo"), ("b.png", "nowhere"), ("c.png", "c.png")):
        (tmp_path / name).symlink_to(tmp_path / target)
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
    with pytest.raises(RunError, match="two results would be called A.png: predict one of the images by itself"):
        results_folder(tmp_path / "out", ["A.png", "b.png", "a.png"])
    long = "nü" + 124 * "ü"  # 251 bytes
    with pytest.raises(RunError, match=f"called b/{long}.json, and no file name has over 255 bytes: rename the image"):
        results_folder(tmp_path / "out", [f"b/{long}.png", f"b/{long}.json"])
    assert not (tmp_path / "out").exists()


def test_what_is_interrupted_while_it_is_written_leaves_nothing_behind(tmp_path):
    with complete(tmp_path / "a.png", tmp_path / "a.json") as (picture, table):
        picture.write_text("complete")
        table.write_text("complete")
    with complete(tmp_path / ("x" * 250 + ".png")) as (picture,):  # as long as a name can be
        picture.write_text("complete")
    (tmp_path / ("x" * 250 + ".png")).unlink()
    with pytest.raises(KeyboardInterrupt), complete(tmp_path / "a.png", tmp_path / "a.json") as (picture, table):
        assert picture.suffix == ".png"
        picture.write_text("half")
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png"]
    assert (tmp_path / "a.png").read_text() == "complete"


def test_a_full_disk_is_told_with_the_file_and_keeps_the_old_one(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with full_disk(0):
        with pytest.raises(OSError, match="a.txt"):
            write_text(tmp_path / "a.txt", "new")
        with pytest.raises(OSError, match="a.png"), complete(tmp_path / "a.png") as (picture,):
            picture.write_text("half")
        with pytest.raises(OSError, match="'.*/a.png'"), complete(tmp_path / "a.png") as (picture,):
            raise OSError(28, "no space", str(picture.parent))  # as of a library
        with pytest.raises(OSError, match=LOCK):
            lock(tmp_path)
    with pytest.raises(FileNotFoundError, match="gone/a.png'"), complete(tmp_path / "gone" / "a.png"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"
