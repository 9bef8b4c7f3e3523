import json
import logging
import re

import pytest
import torch
from PIL import Image

from detr_irpe.check_data import annotation_problems, main, quick_check
from detr_irpe.data.annotations import Annotations
from detr_irpe.data.coco import CocoDetection
from detr_irpe.data.transforms import eval_transforms
from tests.helpers.tiny_coco import edit_annotations, write_tiny_coco


def check(root, capsys, *flags):
    status = main(["--coco_path", str(root), "--num_workers", "0", *flags])
    return status, capsys.readouterr().out


def both_splits(root, **options):
    """What a start of training checks: validation first."""
    return [CocoDetection(root, split, eval_transforms(40), **options) for split in ("val2017", "train2017")]


def add(box, category=3, image=102, **more):
    """A change of the annotations: one more object."""
    return lambda c: c["annotations"].append(
        {"id": 900, "image_id": image, "category_id": category, "bbox": box, "area": 1, "iscrowd": 0} | more
    )


@pytest.mark.parametrize("zips", [False, True])
def test_a_good_set_passes(tmp_path, capsys, zips):
    status, text = check(write_tiny_coco(tmp_path, zips=zips), capsys)
    assert status == 0 and "ready for training" in text
    assert "train2017: 6 images (2 without objects), 6 objects, 3 categories, largest id 9" in text


@pytest.mark.parametrize(
    "change, words",
    [
        (
            add([5, 5, -3, 4]),
            r"boxes with a negative side.*: 1 \(annotation 900 of image 102: bbox \[5.0, 5.0, -3.0, 4.0\]",
        ),
        (add([5, 5, 0, 4]), "empty boxes.*: 1"),
        (add([50, 5, 20, 4]), "boxes that reach outside their image.*: 1"),
        (
            add([float("nan"), 5, 20, 4]),
            r"annotations\[6\]\['bbox'\] is \[NaN, 5, 20, 4\]; a list of four finite numbers is wanted",
        ),
        (add([5, 5, 9, 9], category=8), r"1 annotations of categories that the file does not list \(ids 8\)"),
        (add([5, 5, 9, 9], category=-1), r"categories that the file does not list \(ids -1\)"),
        (add([5, 5, 9, 9], image=555), r"1 annotations of images that the file does not list \(ids 555\)"),
        (
            lambda c: add(
                c["annotations"][0]["bbox"], c["annotations"][0]["category_id"], c["annotations"][0]["image_id"]
            )(c),
            "duplicate objects .*: 1",
        ),
        (add([5, 5, 9, 9], id=1), r"duplicate annotation ids: 1 \(1\)"),
        (lambda c: c["images"].append(c["images"][0]), r"duplicate image ids: 1 \(100\)"),
        (lambda c: c["images"][1].update(file_name=c["images"][0]["file_name"]), "duplicate file names: 1"),
        (lambda c: c["images"][1].update(height=30), "another size than annotated: 1 .*44 x 56, annotated 30 x 56"),
        (lambda c: c["images"][1].update(file_name="nowhere.jpg"), r"missing images: 1 \(nowhere.jpg\)"),
        (lambda c: c["annotations"][0].pop("bbox"), r"annotations\[0\] lacks 'bbox'"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, capsys, change, words):
    root = write_tiny_coco(tmp_path)
    edit_annotations(root, "train2017", change)
    status, text = check(root, capsys, "--num_classes", "10")
    assert status == 1 and re.search(words, text), text
    assert "not ready for training" in text and "val2017: 5 images" in text


def test_unreadable_images_are_counted_and_the_first_named(tmp_path, capsys):
    root = write_tiny_coco(tmp_path, train=8)
    for number in range(5):
        (root / f"train2017/{100 + number:012d}.jpg").write_bytes(b"nothing")
    status, text = check(root, capsys)
    assert status == 1 and "unreadable images: 5 (" in text and "000000000102.jpg: this image cannot be read" in text
    assert text.count("cannot be read") == 3


def test_a_missing_split_is_named(tmp_path, capsys):
    status, text = check(tmp_path, capsys)
    assert status == 1 and "no annotation file" in text and "instances_train2017.json" in text


def test_panoptic_annotations(tmp_path, capsys):
    root = write_tiny_coco(tmp_path, panoptic=True)
    assert check(root, capsys, "--coco_panoptic_path", str(root))[0] == 0
    path = root / "annotations/panoptic_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][2]["segments_info"][0]["category_id"] = 77
    content["annotations"][1]["segments_info"] = []
    path.write_text(json.dumps(content))
    Image.new("RGB", (20, 20)).save(root / "panoptic_train2017/000000000100.png")
    (root / "panoptic_train2017/000000000103.png").write_bytes(b"nothing")
    status, text = check(root, capsys, "--coco_panoptic_path", str(root))
    assert status == 1 and "segments of categories that the file does not list (ids 77)" in text
    content["annotations"][2]["segments_info"][0]["category_id"] = 3
    path.write_text(json.dumps(content))
    status, text = check(root, capsys, "--coco_panoptic_path", str(root))
    assert status == 1 and "'segments_info' does not list: 1" in text
    assert "is 20 x 20, not 40 x 56" in text and "unreadable segment images: 1" in text


def test_few_bad_boxes_in_a_large_set_are_a_warning(tmp_path, capsys):
    root = write_tiny_coco(tmp_path, train=1)
    Image.new("RGB", (2000, 1000)).save(root / "train2017/000000000100.jpg")

    def many(content):
        content["images"][0].update(width=2000, height=1000)
        content["annotations"] = [
            {"id": i + 1, "image_id": 100, "category_id": 3, "bbox": [i % 1900, i // 1900, 5, 5 if i else 0]}
            for i in range(1500)
        ]

    edit_annotations(root, "train2017", many)
    status, text = check(root, capsys)
    assert status == 0 and "warning: instances_train2017.json: empty boxes, which are dropped: 1" in text
    status, text = check(root, capsys, "--num_classes", "3")
    assert status == 1 and "category ids out of range (0 to 2): 1500" in text
    edit_annotations(root, "train2017", lambda c: c["annotations"][7].update(category_id=9))
    status, text = check(root, capsys, "--num_classes", "9")  # one in 1,500 is one too many where it cannot be learned
    assert status == 1 and "error: instances_train2017.json: category ids out of range (0 to 8): 1 (9)" in text


def test_training_starts_with_a_quick_check(tmp_path, caplog):
    root = write_tiny_coco(tmp_path)
    logging.getLogger("irpe").propagate = True
    edit_annotations(root, "train2017", add([50, 5, 20, 4]))
    with caplog.at_level("WARNING", logger="irpe"):
        quick_check(both_splits(root), 10)
    assert "reach outside their image, and are clipped to it: 1" in caplog.text
    with pytest.raises(ValueError, match=r"category ids out of range \(0 to 8\)"):
        quick_check(both_splits(root), 9)


def test_nothing_is_found_in_a_good_file(tmp_path):
    annotations = Annotations(write_tiny_coco(tmp_path) / "annotations/instances_train2017.json")
    assert annotation_problems(annotations, 10) == []


def test_a_check_leaves_the_random_state_alone(tmp_path):
    sets = both_splits(write_tiny_coco(tmp_path))
    before = torch.get_rng_state()
    quick_check(sets, 10)
    assert torch.equal(torch.get_rng_state(), before)
