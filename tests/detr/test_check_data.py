import json
import logging
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from detr_irpe.args import get_check_parser
from detr_irpe.check_data import main, quick_check
from detr_irpe.data.coco import CocoDetection
from detr_irpe.data.panoptic import CocoPanoptic
from detr_irpe.data.transforms import eval_transforms
from tests.helpers.tiny_coco import edit_annotations, write_tiny_coco


def check(root, capsys, *flags):
    status = main(get_check_parser().parse_args(["--coco_path", str(root), "--num_workers", "0", *flags]))
    return status, capsys.readouterr().out


def both_splits(root, **options):
    """The checks at the start of training, validation first."""
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
            r"annotations\[6\]\['bbox'\] is \[NaN, 5, 20, 4\]; expected a list of four finite numbers",
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
        (lambda c: [i.pop("width") for i in c["images"]] and c.pop("annotations"), "without any object to learn.*: 6"),
        (lambda c: c["images"][1].update(file_name="a\nb.jpg"), r"unsafe file name 'a\\nb.jpg'"),
        (lambda c: c["images"][1].update(height=30), "another size than annotated: 1 .*44 x 56, annotated 30 x 56"),
        (
            lambda c: c["images"][1].update(file_name="nowhere.jpg"),
            r"missing images that .*_train2017.json lists: 1 \(nowhere.jpg\)",
        ),
        (lambda c: c["annotations"][0].pop("bbox"), r"annotations\[0\] lacks 'bbox'"),
    ],
)
def test_what_is_wrong_is_reported_and_the_start_agrees(tmp_path, capsys, change, words):
    root = write_tiny_coco(tmp_path)
    edit_annotations(root, "train2017", change)
    status, text = check(root, capsys, "--num_classes", "10")
    assert re.search(words, text) and "val2017: 5 images" in text, text
    assert ("not ready for training" in text) == status
    try:
        quick_check(both_splits(root), 10)
        assert status == 0, text
    except (ValueError, OSError) as error:
        assert status == 1 and re.search(words, str(error)), error


@pytest.mark.parametrize("bad, ready", [(0, True), (1, True), (2, False)])
def test_as_many_images_may_be_unreadable_as_training_skips(tmp_path, capsys, bad, ready):
    root = write_tiny_coco(tmp_path, train=20)
    for number in range(bad):
        (root / f"train2017/{100 + number:012d}.jpg").write_bytes(b"nothing")
    status, text = check(root, capsys, "--max-bad", "0.05")
    assert status == (not ready) and ("unreadable images" in text) == (bad > 0)
    assert check(root, capsys)[0] == (bad > 0)  # a thousandth of 20 rounds to zero
    if bad:  # the first image is in the sample
        with pytest.raises(ValueError, match="unreadable images: 1"):
            quick_check(both_splits(root), 10)
    quick_check(both_splits(root), 10, 0.05)


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


def edit_panoptic(root, change, split="val2017"):
    path = root / f"annotations/panoptic_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def grey_segments(root):
    """The segment images with the ids as 16-bit grey, as some tools export them."""
    for path in (root / "panoptic_val2017").glob("*.png"):
        ids = np.asarray(Image.open(path)).astype(np.uint16) @ np.array([1, 0, 0], np.uint16)
        Image.fromarray(ids).save(path)
    edit_panoptic(root, lambda c: [s.update(id=s["id"] - 512) for a in c["annotations"] for s in a["segments_info"]])


@pytest.mark.parametrize(
    "change, words",
    [
        (grey_segments, r"panoptic_val2017.json: segments in 'segments_info' without a pixel: 4 \(1 of"),
        (
            lambda root: edit_annotations(root, "val2017", lambda c: c["categories"][0].update(name="pink")),
            "3 is 'red' in panoptic_val2017.json and 'pink' in instances_val2017.json",
        ),
        (
            lambda root: edit_annotations(root, "val2017", lambda c: c["annotations"][0].update(segmentation=[])),
            "instances_val2017.json: objects without a mask; --masks needs one for each: 1",
        ),
        (
            lambda root: edit_annotations(root, "val2017", lambda c: [i.pop("height") for i in c["images"]]),
            "instances_val2017.json: images without height and width; --masks needs them: 5",
        ),
        (
            lambda root: edit_annotations(root, "val2017", lambda c: c["images"][2].update(height=80, width=112)),
            r"images of another size in instances_val2017.json, .*: 1 \(.*102.png is 40 x 56, annotated 80 x 112",
        ),
    ],
)
def test_the_boxes_that_score_a_panoptic_set_are_looked_at_too(tmp_path, capsys, change, words):
    root = write_tiny_coco(tmp_path, panoptic=True)

    def opened(split, instances):
        return CocoPanoptic(root, root, split, None, return_masks=True, instances=instances)

    file = root / "annotations/instances_val2017.json"
    quick_check([opened("val2017", file), opened("train2017", None)], 10)
    change(root)
    with pytest.raises(ValueError, match=words):
        quick_check([opened("val2017", file), opened("train2017", None)], 10)
    status, text = check(root, capsys, "--coco_panoptic_path", str(root), "--masks")
    assert status == 1 and re.search(f"error: (?:{words}|.*{words})", text), text


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
    assert status == 1 and "--num_classes 3 (the largest id plus one, or auto; a checkpoint has its own)" in text
    assert "has no output for the ids of some objects: 1500" in text
    edit_annotations(root, "train2017", lambda c: c["annotations"][7].update(category_id=9))
    status, text = check(root, capsys, "--num_classes", "9")  # one in 1,500 is one too many where it cannot be learned
    assert status == 1 and "error: instances_train2017.json: --num_classes 9 (the largest" in text
    assert ": 1 (9)" in text


def test_training_starts_with_a_quick_check(tmp_path, caplog):
    root = write_tiny_coco(tmp_path)
    logging.getLogger("irpe").propagate = True
    edit_annotations(root, "train2017", add([50, 5, 20, 4]))
    with caplog.at_level("WARNING", logger="irpe"):
        quick_check(both_splits(root), 10)
    assert "reach outside their image, and are clipped to it: 1" in caplog.text
    with pytest.raises(ValueError, match=r"--num_classes 9 \(the largest id plus one"):
        quick_check(both_splits(root), 9)


def each(group, key, new):
    """A change of every entry of a list."""
    return lambda content: [entry.update({key: new(entry[key])}) for entry in content[group]]


@pytest.mark.parametrize(
    "change, words",
    [
        (
            each("annotations", "iscrowd", lambda _: 1),
            "without any object to learn \\(all are crowds or have no box\\): 6",
        ),
        (each("annotations", "bbox", lambda box: [*box[:2], 0, 5]), "without any object to learn"),
        (each("annotations", "bbox", lambda box: [99, 99, *box[2:]]), "without any object to learn"),
        (lambda c: c.pop("annotations"), "without any object to learn"),
        (lambda c: c.update(images=[], annotations=[]), "no images: 1"),
        (
            each("annotations", "bbox", lambda box: [side / 56 for side in box]),
            "look like fractions of the image; .*: 6",
        ),
        (each("annotations", "area", lambda area: -area), "objects with a negative area, which are not scored: 6"),
        (
            each("annotations", "bbox", lambda box: [*box[:2], box[0] + box[2], box[1] + box[3]]),
            "look like two corners; .*: 6",
        ),
        (
            each("annotations", "bbox", lambda box: [box[0] + box[2] / 2, box[1] + box[3] / 2, box[2], box[3] + 9]),
            "look like centre and size; .*: 6",
        ),
        (each("annotations", "bbox", lambda box: [side * 4 for side in box]), "reach outside their image, .*: [56]"),
        (each("images", "height", lambda _: 400), "images of another size than annotated: 6"),
    ],
)
def test_what_cannot_be_learned_stops_check_and_training(tmp_path, capsys, change, words):
    root = write_tiny_coco(tmp_path)
    edit_annotations(root, "train2017", change)
    status, text = check(root, capsys)
    assert status == 1 and re.search(f"error: instances_train2017.json: .*{words}", text), text
    with pytest.raises(ValueError, match=f"instances_train2017.json: .*{words}"):
        quick_check(both_splits(root), 10)


@pytest.mark.parametrize("names", [["green", "red", "blue"], ["blue", "Green", "x"]])
def test_splits_that_name_classes_otherwise_are_refused(tmp_path, capsys, names):
    root = write_tiny_coco(tmp_path)

    def rename(content):
        for entry, name in zip(content["categories"], names, strict=True):
            entry["name"] = name

    edit_annotations(root, "val2017", rename)
    status, text = check(root, capsys)
    wanted = f"3 is 'red' in instances_train2017.json and '{names[0]}' in instances_val2017.json"
    assert status == 1 and wanted in text
    with pytest.raises(ValueError, match="mean something else in instances_val2017.json"):
        quick_check(both_splits(root), 10)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda s: [[side / 56 for side in s[0]]],
            "less than half inside their object's box: 6 .annotation 1 of 000000000101.jpg,",
        ),
        (lambda s: [[min(side + 30, 60) for side in s[0]]], "less than half inside their object's box: 6"),
        (lambda s: [[side + 6 for side in s[0]]], "less than half inside their object's box: 6"),  # centre and size
        (lambda s: s + [[side / 56 for side in s[0]]], None),  # one of two parts is enough
    ],
)
def test_masks_beside_their_boxes_are_not_trained_on(tmp_path, capsys, change, words):
    root = write_tiny_coco(tmp_path)
    edit_annotations(root, "train2017", lambda c: [a.update(bbox=[4, 5, 14, 12]) for a in c["annotations"]])
    corners = [[4, 5, 18, 5, 18, 17, 4, 17]]
    edit_annotations(root, "train2017", each("annotations", "segmentation", lambda _: change(corners)))
    quick_check(both_splits(root), 10)  # boxes need no masks
    for flags in ([], ["--masks"]):
        status, text = check(root, capsys, *flags)
        assert status == (words is not None) and re.search(words or "ready for training", text), text
    if words:
        with pytest.raises(ValueError, match=words):
            quick_check(both_splits(root, return_masks=True), 10)
    edit_annotations(root, "train2017", lambda c: [a.update(segmentation=corners) for a in c["annotations"][1:]])
    assert check(root, capsys, "--masks")[0] == 0  # a single one is a warning


def test_categories_of_one_name_and_those_that_nothing_teaches_are_a_warning(tmp_path, capsys):
    root = write_tiny_coco(tmp_path)
    for split in ("train2017", "val2017"):
        edit_annotations(
            root, split, lambda c: c["categories"].append({"id": 0, "name": "Red", "supercategory": "none"})
        )
    status, text = check(root, capsys)
    assert status == 0 and "warning: instances_train2017.json: names shared by several categories: 1 (red)" in text
    assert "warning: instances_train2017.json: categories without any object: 1 (0 'Red')" in text
    assert text.count("categories without any object") == 1  # a validation set need not have all


def test_images_that_both_splits_have_are_a_warning(tmp_path, capsys):
    root = write_tiny_coco(tmp_path)
    assert "pixel for pixel" not in check(root, capsys)[1]
    Image.open(root / "train2017/000000000102.jpg").save(root / "val2017/000000000104.jpg", "PNG")
    status, text = check(root, capsys)
    wanted = "warning: instances_val2017.json: images that another split has too, pixel for pixel: 1 (000000000104.jpg)"
    assert status == 0 and wanted in text


def test_boxes_of_a_smaller_copy_of_the_images_are_a_warning(tmp_path, capsys):
    root = write_tiny_coco(tmp_path)
    edit_annotations(root, "train2017", each("annotations", "bbox", lambda box: [side / 2 for side in box]))
    status, text = check(root, capsys)
    assert status == 1 and "instances_train2017.json: masks less than half inside" in text
    edit_annotations(root, "train2017", each("annotations", "segmentation", lambda _: []))
    status, text = check(root, capsys)
    assert status == 0 and "instances_train2017.json: boxes all in the top left quarter of their images; " in text
    assert "instances_val2017.json: boxes all" not in text


def test_full_body_boxes_that_reach_outside_are_not_taken_for_corners(tmp_path, capsys):
    root = write_tiny_coco(tmp_path)
    edit_annotations(root, "train2017", each("annotations", "bbox", lambda box: [box[0] - 4, *box[1:3], 50]))
    assert "look like" not in check(root, capsys)[1]


def test_two_boxes_that_reach_outside_are_not_taken_for_centres(tmp_path, capsys):
    root = write_tiny_coco(tmp_path)
    few = iter([[50, 20, 12, 12], [48, 20, 15, 12]])
    edit_annotations(root, "train2017", each("annotations", "bbox", lambda _: next(few, [20, 20, 10, 10])))
    text = check(root, capsys)[1]
    assert "look like" not in text and "boxes that reach outside their image, and are clipped to it: 2" in text


def test_capitals_and_new_classes_of_validation_are_not_mistakes(tmp_path, capsys):
    root = write_tiny_coco(tmp_path)
    edit_annotations(root, "val2017", lambda c: c["categories"][0].update(name=" Red"))
    edit_annotations(root, "val2017", lambda c: c["categories"].append({"id": 12, "name": "grey"}))
    status, text = check(root, capsys)
    assert status == 0 and "warning: instances_train2017.json: categories of instances_val2017.json that" in text
    quick_check(both_splits(root), 13)


@pytest.mark.parametrize("link", [True, False])
def test_validation_on_the_training_images_is_reported(tmp_path, capsys, link):
    root = write_tiny_coco(tmp_path)
    train, val = (root / "annotations" / f"instances_{split}2017.json" for split in ("train", "val"))
    content = train.read_bytes()
    val.unlink()
    val.symlink_to(train.name) if link else val.write_bytes(content)
    shutil.rmtree(root / "val2017")
    (root / "val2017").symlink_to("train2017")
    status, text = check(root, capsys)
    assert status == 0 and "warning: instances_train2017.json: the same annotations as instances_val2017.json" in text
    quick_check(both_splits(root), 10)
    assert "the same annotations as instances_val2017.json" in capsys.readouterr().out


def test_photos_that_viewers_turn_are_a_warning(tmp_path, capsys):
    root, exif = write_tiny_coco(tmp_path), Image.Exif()
    exif[0x112] = 3
    path = root / "train2017/000000000101.jpg"
    Image.open(path).save(path, exif=exif)
    status, text = check(root, capsys)
    assert status == 0 and "read as stored but shown rotated (EXIF): 1 (000000000101.jpg)" in text


@pytest.mark.parametrize("images", ["wrong size", "unreadable"])
def test_masks_need_readable_images_of_the_annotated_size(tmp_path, images):
    root = write_tiny_coco(tmp_path)
    if images == "unreadable":  # one is skipped in training, and stops an evaluation
        (root / "train2017/000000000101.jpg").write_bytes(b"no image")
        quick_check(both_splits(root, return_masks=True), 10, 0.2)
        (root / "val2017/000000000101.jpg").write_bytes(b"no image")
    else:
        Image.new("RGB", (30, 30)).save(root / "train2017/000000000101.jpg")
        quick_check(both_splits(root), 10)  # not needed for boxes
    with pytest.raises(ValueError, match="unreadable images: 1|another size than annotated: 1"):
        quick_check(both_splits(root, return_masks=True), 10)


def test_missing_masks_are_reported(tmp_path, capsys):
    root = write_tiny_coco(tmp_path)
    edit_annotations(root, "train2017", lambda c: c["annotations"][0].update(segmentation=[]))
    quick_check(both_splits(root), 10)
    missing = "objects without a mask; --masks needs one for each: 1"
    with pytest.raises(ValueError, match=f"{missing}.*`irpe detect check` .* same flags .*--masks"):
        quick_check(both_splits(root, return_masks=True), 10)
    status, printed = check(root, capsys, "--masks")
    assert status == 1 and missing in printed
    edit_annotations(root, "train2017", lambda c: [image.pop("height") for image in c["images"]])
    with pytest.raises(ValueError, match="images without height and width; --masks needs them: 6"):
        quick_check(both_splits(root, return_masks=True), 10)


def test_a_check_leaves_the_random_state_alone(tmp_path):
    sets = both_splits(write_tiny_coco(tmp_path))
    before = torch.get_rng_state()
    quick_check(sets, 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_damaged_metadata_of_a_photo_stop_nothing(tmp_path, capsys):
    root = write_tiny_coco(tmp_path)
    path = root / "train2017" / "000000000101.jpg"
    Image.open(path).save(path, exif=b"Exif\0\0garbage!!!")
    status, text = check(root, capsys)
    assert status == 0 and "EXIF" not in text
