"""The demo's digits, and the smoke run on them."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from deit_irpe.data import images
from deit_irpe.data.tar_files import TarImages
from tests.helpers.deit_runs import deit_ok

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("make_demo_data", ROOT / "scripts" / "make_demo_data.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = tmp_path_factory.mktemp("digits")
    assert script.write_digits(folder) == {"train": 1078, "val": 719}
    return folder


def test_the_split_is_stratified_and_fixed(digits):
    train, val = (images.FolderImages(digits / split) for split in ("train", "val"))
    assert train.classes == val.classes == [str(digit) for digit in range(10)]
    counts = np.bincount(train.labels), np.bincount(val.labels)
    assert np.all(np.abs(counts[0] / (counts[0] + counts[1]) - 0.6) < 0.005)
    number = {Path(one.name(i)).name for one in (train, val) for i in range(len(one))}
    assert len(number) == 1797
    assert Path(train.name(0)).name == "digit_0020.png" and Path(val.name(0)).name == "digit_0000.png"
    image, digit = train[0][0], load_digits().images[20]  # 16 is white
    assert image.size == (32, 32) and np.asarray(image).mean() == pytest.approx(digit.mean() * 255 / 16, abs=2)


def test_the_tar_files_hold_the_same_images(digits):
    for split in ("train", "val"):
        folder, tar = images.FolderImages(digits / split), TarImages(digits / f"{split}.tar")
        assert tar.classes == folder.classes and tar.labels.tolist() == folder.labels.tolist()
        assert all(tar.read(i) == folder.read(i) for i in range(len(folder)))


def test_the_smoke_run(digits, tmp_path):
    deit_ok(digits, tmp_path / "run", "--config", str(ROOT / "configs/deit/smoke.yaml"), "--epochs", "1", model=[])
    (line,) = (json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines())
    assert line["n_parameters"] < 100_000 and 0 < line["test_acc1"] <= 100
