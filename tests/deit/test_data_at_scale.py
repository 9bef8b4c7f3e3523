"""WebDataset shards and Hugging Face folders give the same data set as the image folder."""

import io
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from deit_irpe.data.datasets import build_dataset
from deit_irpe.data.shards import ShardImages
from tests.helpers.deit_runs import deit_ok
from tests.helpers.tiny_images import write_images


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_shards(folder: Path, out: Path, per_shard: int = 20) -> Path:
    """The images of both splits of ``folder`` as shards, and the names of the classes."""
    out.mkdir()
    for split in ("train", "val"):
        data = build_dataset(folder, split == "train")
        for first in range(0, len(data), per_shard):
            with tarfile.open(out / f"set-{split}-{first // per_shard:04}.tar", "w") as tar:
                for index in range(first, min(first + per_shard, len(data))):
                    add(tar, f"{index:06}.png", data.read(index))
                    add(tar, f"{index:06}.cls", str(int(data.labels[index])).encode())
    (out / "classes.txt").write_text("\n".join(data.classes))
    return out


def write_parquet(folder: Path, out: Path) -> Path:
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face datasets: pip install datasets")
    for split, name in (("train", "train"), ("val", "validation")):
        data = build_dataset(folder, split == "train")
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=data.classes)})
        rows = {
            "image": [{"bytes": data.read(i), "path": None} for i in range(len(data))],
            "label": data.labels.tolist(),
        }
        (out / "data").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(out / "data" / f"{name}-00000-of-00001.parquet")
    shutil.copy(out / "data/train-00000-of-00001.parquet", out / "data/test-00000-of-00001.parquet")  # never requested
    return out


@pytest.fixture(params=["WDS", "HFDS"])
def packed(request, colours, tmp_path, monkeypatch):
    """(--data-set, its folder) with the images of ``colours``."""
    if request.param == "WDS":
        return "WDS", write_shards(colours, tmp_path / "shards")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face datasets: pip install datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return "HFDS", write_parquet(colours, tmp_path / "parquet")


def test_the_same_images_and_classes_in_the_same_order(packed, colours):
    kind, root = packed
    for train in (True, False):
        folder, other = build_dataset(colours, train), build_dataset(root, train, data_set=kind)
        assert list(other.classes) == list(folder.classes)
        np.testing.assert_array_equal(other.labels, folder.labels)
        for index in (0, len(folder) // 2, len(folder) - 1):
            (ours, label), (image, wanted) = other[index], folder[index]
            assert label == wanted and np.array_equal(np.asarray(ours), np.asarray(image))
    assert str(root) in other.name(3)


def test_training_is_the_same_to_the_bit(packed, colours, tmp_path):
    kind, root = packed
    flags = ("--epochs", "1", "--batch-size", "24", "--no-model-ema")
    deit_ok(colours, tmp_path / "folder", *flags)
    deit_ok(root, tmp_path / "packed", *flags, "--data-set", kind)
    one, other = (
        torch.load(tmp_path / run / "checkpoint.pth", weights_only=False)["model"] for run in ("folder", "packed")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


def write_shard(root: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(root / "x-train-0.tar", "w") as tar:
        for name, content in members:
            add(tar, name, content)
    return root


@pytest.mark.parametrize(
    "members, message",
    [
        ([("a/1.jpg", b"x"), ("a/1.json", b"{}")], "sample 'a/1' has jpg, json; expected cls and one of jpg"),
        ([("1.cls", b"0")], "sample '1' has cls; expected cls and one of"),
        ([("1.jpg", b"x"), ("1.cls", b"cat")], "1.cls holds 'cat'; expected a class number"),
        ([("1.jpg", b"x"), ("1.cls", b"7")], "class numbers from 7 to 7; expected 0 to 1, as .*classes.txt lists"),
        ([], "no samples"),
    ],
)
def test_an_invalid_shard_is_named(tmp_path, members, message):
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(ValueError, match=message):
        ShardImages(write_shard(tmp_path, *members), True)


def test_shards_must_be_there_and_uncompressed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \*val\*.tar there"):
        ShardImages(write_shard(tmp_path, ("1.jpg", b"x"), ("1.cls", b"0")), False)
    with tarfile.open(tmp_path / "y-val-0.tar", "w:gz") as tar:
        add(tar, "1.jpg", b"x" * 2000)
    with pytest.raises(ValueError, match="not an uncompressed tar"):
        ShardImages(tmp_path, False)


def test_classes_without_names_are_numbers(tmp_path):
    root = write_shard(tmp_path, ("1.jpg", b"x"), ("1.cls", b"2\n"), ("2.jpg", b"y"), ("2.cls", b"0"))
    data = ShardImages(root, True)
    assert (data.classes, data.labels.tolist(), data.read(1)) == (["0", "1", "2"], [2, 0], b"y")


def test_hugging_face_mistakes_are_named(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face datasets: pip install datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"image": [b"x"], "kind": [0]}).to_parquet(tmp_path / "set/train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="no column label; it has image, kind"):
        build_dataset(tmp_path / "set", True, data_set="HFDS")
    with pytest.raises(ValueError, match="no split validation or val or test; it has train"):
        build_dataset(tmp_path / "set", False, data_set="HFDS")
    for name in ("empty", "damaged", "numbers"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged/train.parquet").write_bytes(b"nothing")
    datasets.Dataset.from_dict({"image": [1], "label": [0]}).to_parquet(tmp_path / "numbers/train.parquet")
    for name, reason in (("empty", "EmptyDatasetError"), ("damaged", "ArrowInvalid"), ("numbers", "Arrow.*cast")):
        with pytest.raises(ValueError, match=rf"{name}: Hugging Face datasets cannot load it \({reason}"):
            build_dataset(tmp_path / name, True, data_set="HFDS")


@pytest.mark.parametrize("other", ["train/dog/2024", "val/train"])
def test_class_folders_that_datasets_would_read_otherwise_are_refused(tmp_path, monkeypatch, other):
    """A class per folder of years, and a class called train, whose validation images would be trained on."""
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face datasets: pip install datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_images(tmp_path / "good", {"train/cat": 2, "train/dog": 1, "val/dog": 1})
    assert build_dataset(tmp_path / "good", True, data_set="HFDS").classes == ["cat", "dog"]
    write_images(tmp_path / "bad", {"train/cat/2023" if "2024" in other else "train/cat": 1, other: 1})
    with pytest.raises(ValueError, match="that datasets takes as classes. Leave out --data-set HFDS"):
        build_dataset(tmp_path / "bad", True, data_set="HFDS")


def test_without_datasets_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="--data-set HFDS reads with Hugging Face datasets: pip install datasets"):
        build_dataset(tmp_path, True, data_set="HFDS")
