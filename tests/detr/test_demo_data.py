"""The demo's detection data: real loader, exact boxes and masks, the same bytes every time."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr_irpe.check_data import problems_of, summary_of
from detr_irpe.data.coco import CocoDetection
from detr_irpe.data.transforms import eval_transforms

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/demo_detection.py"


@pytest.fixture(scope="module")
def demo():
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("demo_detection", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.IMAGES = {"train2017": 12, "val2017": 5}
    module.CLASSIFIED_IMAGES = {"train": 30, "val": 10}
    return module


@pytest.fixture(scope="module")
def out(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    demo.write_detection_data(folder)
    return folder


def test_the_real_loader_reads_it_and_the_check_finds_nothing(out):
    for split, count in (("train2017", 12), ("val2017", 5)):
        dataset = CocoDetection(out / "coco_digits", split, None)
        summary = summary_of(dataset)
        assert problems_of(dataset, train=True) == [] and f"{split}: {count} images (0 without objects)" in summary
        assert "10 categories, largest id 29" in summary


def test_boxes_are_the_tightest_around_the_masks_and_objects_do_not_overlap(out):
    dataset = CocoDetection(out / "coco_digits", "train2017", eval_transforms(64), return_masks=True)
    assert list(dataset.categories.values()) == [str(digit) for digit in range(10)]
    for index in range(len(dataset)):
        image, target = dataset[index]
        height, width = image.shape[1:]
        assert (height, width) == (64, 80) and 1 <= len(target["boxes"]) <= 3
        assert target["masks"].sum(0).max() == 1
        scaled = target["boxes"] * torch.tensor([width, height, width, height])
        for (cx, cy, w, h), mask, area in zip(scaled.tolist(), target["masks"], target["area"], strict=True):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(tight, [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], atol=1e-3)
            assert mask.sum() == area


def test_archives_hold_the_same_images(out, tmp_path):
    folder = CocoDetection(out / "coco_digits", "val2017", eval_transforms(64))
    root = tmp_path / "zipped"
    (root / "annotations").mkdir(parents=True)
    for name in ("annotations/instances_val2017.json", "val2017.zip"):
        (root / name).write_bytes((out / "coco_digits" / name).read_bytes())
    archive = CocoDetection(root, "val2017", eval_transforms(64))
    assert "val2017.zip" in archive.name(0)
    for index in range(5):
        assert torch.equal(folder[index][0], archive[index][0])


def test_the_same_bytes_every_time(demo, out, tmp_path):
    demo.write_detection_data(tmp_path)
    for file in out.rglob("*.*"):
        assert file.read_bytes() == (tmp_path / file.relative_to(out)).read_bytes(), file


def test_nothing_of_training_is_in_validation(demo):
    train, val = demo.Source("train"), demo.Source("val")
    assert len(train.digits) + len(val.digits) == 1797
    assert not {d.tobytes() for d in train.digits} & {d.tobytes() for d in val.digits}
    assert [a.shape[1] + b.shape[1] for a, b in zip(train.photos, val.photos, strict=True)] == [640, 640]


def test_classes_are_folders_of_images_of_one_size(out):
    files = list((out / "digits_on_photos/train").rglob("*.jpg"))
    assert len(files) == 30 and {file.parent.name for file in files} <= {str(digit) for digit in range(10)}
    assert {Image.open(file).size for file in files} == {(54, 54)}
