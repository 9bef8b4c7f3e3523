"""``python -m deit_irpe.check_data``: it finds what would stop training, and nothing else."""

import io
import os
import tarfile

import pytest
from PIL import Image

from deit_irpe.args import get_check_parser
from deit_irpe.check_data import main
from deit_irpe.data.datasets import build_dataset
from deit_irpe.data.images import warn_of_odd_sets
from deit_irpe.data.split import split_folder
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
    assert "train: 5 images of 2 classes, 2 to 3 per class" in told and told.endswith("ready for training\n")
    assert "not ready" not in told


def test_images_of_both_splits_are_counted(tmp_path, capsys):
    write_images(tmp_path / "train", {"ant": 2, "bee": 3})
    write_images(tmp_path / "val", {"ant": 2, "bee": 3}, seed=1)
    assert check(["--data-path", str(tmp_path)]) == 0 and "pixel for pixel" not in capsys.readouterr().out
    Image.open(tmp_path / "train/bee/0.png").save(tmp_path / "val/ant/copy.bmp")
    assert check(["--data-path", str(tmp_path)]) == 0
    assert "warning: val: 1 of 6 images are in train too, pixel for pixel" in capsys.readouterr().out


def test_classes_without_a_training_image_are_reported(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("deit_irpe.data.images.logger.warning", said.append)
    sets = []
    for split in ("train", "val"):
        tar_of(tmp_path / f"x-{split}-0.tar", "1.jpg", ("1.cls", b"0"), "2.jpg", ("2.cls", b"3"))
        sets.append(build_dataset(tmp_path, split == "train", data_set="WDS"))
    warn_of_odd_sets(*sets)
    warn_of_odd_sets(None, sets[1])
    assert said == ["train: no image of 2 of 4 classes: 1, ..."]


@pytest.mark.parametrize("kind", ["folder", "class", "below", "tar", "shards"])
def test_validation_on_the_training_images_is_reported(tmp_path, kind, monkeypatch):
    """Under another name; parts of one folder do not count."""
    said = []
    monkeypatch.setattr("deit_irpe.data.images.logger.warning", said.append)
    write_images(tmp_path / "train", {"ant": 2, "bee": 2})
    options = {"load_tar": kind == "tar", "data_set": "WDS" if kind == "shards" else "IMNET"}
    if kind == "folder":
        (tmp_path / "val").symlink_to("train")
    elif kind == "class":
        write_images(tmp_path / "val", {"ant": 1})
        (tmp_path / "val/bee").symlink_to("../train/bee")
    elif kind == "below":
        write_images(tmp_path / "val", {"ant": 1, "bee": 1})
        (tmp_path / "train/bee/more").symlink_to("../../val/bee")
    elif kind == "tar":
        os.link(tar_of(tmp_path / "train.tar", "ant/0.jpg"), tmp_path / "val.tar")
    else:
        tar_of(tmp_path / "x-train-0.tar", "0.jpg", ("0.cls", b"0"))
        (tmp_path / "x-val-0.tar").symlink_to("x-train-0.tar")
    warn_of_odd_sets(*(build_dataset(tmp_path, train, **options) for train in (True, False)))
    assert len(said) == 1 and f"({2 if kind == 'folder' else 1} in all): the same images in both" in said[0]
    warn_of_odd_sets(*(split_folder(tmp_path / "train", train, 0.5) for train in (True, False)))
    assert len(said) == 1


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


def test_a_listed_class_without_images(tmp_path, capsys):
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
