"""``python -m deit_irpe.check_data``: what would stop training is found, and what would not is not called so."""

import io
import tarfile

import pytest
from PIL import Image

from deit_irpe.args import get_check_parser
from deit_irpe.check_data import main
from tests.deit.test_archives import tar_of
from tests.helpers.tiny_images import write_images

FLAGS = ["--num_workers", "0"]


def check(words):
    return main(get_check_parser().parse_args([*words, *FLAGS]))


@pytest.fixture
def data(tmp_path):
    for split in ("train", "val"):
        write_images(tmp_path / split, {"ant": 2, "bee": 3})
    return tmp_path


def test_a_sound_set_is_ready(data, capsys):
    assert check(["--data-path", str(data)]) == 0
    told = capsys.readouterr().out
    assert "train: 5 images of 2 classes, 2 to 3 a class" in told and told.endswith("ready for training\n")
    assert "not ready" not in told


def test_unreadable_images_are_named_and_counted(data, capsys):
    for number in range(7):
        (data / "val" / "bee" / f"broken{number}.png").write_bytes(b"\x89PNG nothing")
    assert check(["--data-path", str(data)]) == 1
    told = capsys.readouterr().out
    assert "broken4.png" in told and "broken5.png" not in told and "7 images cannot be read" in told
    assert "classes without" not in told


def test_a_class_of_broken_images_alone(data, capsys):
    (data / "train" / "cat").mkdir()
    (data / "train" / "cat" / "x.png").write_bytes(b"no image")
    assert check(["--data-path", str(data)]) == 1
    told = capsys.readouterr().out
    assert "train: classes without a readable image: 'cat'" in told
    assert "different classes; only in train: cat" in told


def test_both_splits_are_looked_at(data, capsys):
    (data / "train").rename(data / "other")
    write_images(data / "val", {"cow": 1})
    assert check(["--data-path", str(data)]) == 1
    told = capsys.readouterr().out
    assert "train: no such folder" in told and "val: 6 images of 3 classes" in told


def test_a_cut_tar(data, capsys):
    for split in ("train", "val"):
        with tarfile.open(data / f"{split}.tar", "w") as tar:
            for path in sorted((data / split).rglob("*.png")):
                info = tarfile.TarInfo(f"{path.parent.name}/{path.name}")
                info.size = path.stat().st_size
                tar.addfile(info, io.BytesIO(path.read_bytes()))
    assert check(["--data-path", str(data), "--load-tar"]) == 0
    whole = (data / "val.tar").read_bytes()
    (data / "val.tar").write_bytes(whole[: len(whole) // 2])
    assert check(["--data-path", str(data), "--load-tar"]) == 1
    assert "val.tar" in capsys.readouterr().out


def test_a_class_that_is_listed_and_has_no_image(tmp_path, capsys):
    for split in ("train", "val"):
        image = io.BytesIO()
        Image.new("RGB", (4, 4)).save(image, "PNG")
        tar_of(tmp_path / f"x-{split}-0.tar", ("1.png", image.getvalue()), ("1.cls", b"1"))
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    assert check(["--data-path", str(tmp_path), "--data-set", "WDS"]) == 1
    assert "train: classes without a readable image: 'ant'" in capsys.readouterr().out


def test_one_folder_that_training_would_split(data, capsys):
    assert check(["--data-path", str(data / "train"), "--val-split", "0.4"]) == 0
    told = capsys.readouterr().out
    assert "train: 3 images of 2 classes" in told and "val: 2 images of 2 classes" in told
    assert not list(data.rglob("val_split.txt"))
