"""The demo's detection data: real loader, exact boxes and masks, the same bytes every time."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr_irpe.check_data import summary_of
from detr_irpe.data.coco import CocoDetection
from detr_irpe.data.problems import problems_of
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
    counts = {"coco_digits/train2017": 12, "coco_digits/val2017": 5}
    assert demo.write_detection_data(folder) == counts | {"digits_on_photos/train": 30, "digits_on_photos/val": 10}
    return folder


def test_the_real_loader_reads_it_and_the_check_finds_nothing(out):
    for split, count in (("train2017", 12), ("val2017", 5)):
        dataset = CocoDetection(out / "coco_digits", split, None)
        summary = summary_of(dataset)
        found = [problem.what for _, problem in problems_of(dataset, train=True)]
        assert set(found) <= {"categories without any object"}  # a few images need not show all ten digits
        assert f"{split}: {count} images (0 without objects)" in summary
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


def test_the_objects_never_change(out):
    """Image, category, box and area as the script wrote them with Pillow 13.0.0, scikit-learn 1.9.1, NumPy 2.4.6."""
    for split, first, last in (
        ("train", [(1, 2, 19, 9, 23, 31, 512), (2, 13, 51, 20, 28, 37, 550)], [53, 18, 23, 31]),
        ("val", [(1, 17, 0, 15, 25, 33, 467), (1, 5, 50, 14, 28, 38, 673)], [37, 4, 20, 33]),
    ):
        content = json.loads((out / f"coco_digits/annotations/instances_{split}2017.json").read_text())
        objects = content["annotations"]
        assert [(o["image_id"], o["category_id"], *o["bbox"], o["area"]) for o in objects[:2]] == first
        assert objects[-1]["bbox"] == last and [o["id"] for o in objects] == [*range(1, len(objects) + 1)]
        assert [category["id"] for category in content["categories"]] == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]


def test_digits_are_painted_in_the_colour_that_contrasts_most(demo):
    source, image = demo.Source("train"), np.full((4, 4, 3), 100, np.uint8)
    source.rng = np.random.RandomState(7)
    source.paint(image, np.array([[255, 51], [0, 255]], np.uint8), 1, 1)
    colour = max(np.random.RandomState(7).randint(0, 256, (5, 3)), key=lambda colour: abs(colour - 100).sum())
    assert (image[1, 1] == colour).all() and (image[2, 2] == colour).all()
    assert (image[1, 2] == np.round(100 * 0.8 + colour * 0.2)).all() and (image != 100).any(-1).sum() == 3


def test_what_is_painted_is_what_the_masks_and_classes_say(demo, out):
    source, same = demo.Source("val"), demo.Source("val")
    image, ((_, mask),) = source.scene(1)
    painted = (image != same.background(*image.shape[:2])).any(-1)
    assert not painted[~mask].any() and painted[mask].mean() > 0.95
    source = demo.Source("train")
    ink, label = source.digit()
    saved = np.asarray(Image.open(out / f"digits_on_photos/train/{label}/00000.jpg")).astype(int)
    assert (abs(saved - source.background(54, 54)) > 60).any(-1).sum() > 0.5 * (ink > 128).sum()


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
    assert (len(train.digits), len(val.digits)) == (1347, 450)
    assert np.unique(train.digits).tolist() == [round(grey * 255 / 16) for grey in range(17)]
    assert not {d.tobytes() for d in train.digits} & {d.tobytes() for d in val.digits}
    widths = [(a.shape[1], b.shape[1]) for a, b in zip(train.photos, val.photos, strict=True)]
    assert widths == [(448, 192)] * 2  # of 640


def test_classes_are_folders_of_images_of_one_size(out):
    files = list((out / "digits_on_photos/train").rglob("*.jpg"))
    assert len(files) == 30 and {file.parent.name for file in files} <= {str(digit) for digit in range(10)}
    assert {Image.open(file).size for file in files} == {(54, 54)}
