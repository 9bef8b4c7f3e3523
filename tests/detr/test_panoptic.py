import json

import numpy as np
import pytest
import torch
from PIL import Image

from detr_irpe.data.panoptic import CocoPanoptic
from detr_irpe.data.panoptic_eval import PanopticEvaluator, format_quality, match_segments, panoptic_quality
from detr_irpe.data.problems import segment_image_problems
from detr_irpe.data.transforms import eval_transforms
from detr_irpe.segment_ids import encode_ids
from tests.helpers.tiny_coco import write_tiny_coco, zip_split


def tiny_panoptic(root, split="val2017"):
    return CocoPanoptic(root, root, split, eval_transforms(40), return_masks=True)


def test_targets_have_a_box_and_a_mask_for_every_segment(tmp_path):
    root = write_tiny_coco(tmp_path, panoptic=True)
    dataset = tiny_panoptic(root)
    image, target = dataset[2]
    content = json.loads((root / "annotations/instances_val2017.json").read_text())
    wanted = [a for a in content["annotations"] if a["image_id"] == 102]
    assert len(dataset) == 5 and image.shape == (3, 40, 56)
    assert target["labels"].tolist() == [a["category_id"] for a in wanted]
    assert target["area"].tolist() == [a["area"] for a in wanted]
    for mask, box, annotation in zip(target["masks"], target["boxes"], wanted, strict=True):
        x, y, w, h = annotation["bbox"]
        assert mask.sum() == w * h and mask[y : y + h, x : x + w].all()
        # a panoptic box ends at the last pixel, not after it, as published
        corners = torch.tensor([(x + (w - 1) / 2) / 56, (y + (h - 1) / 2) / 40, (w - 1) / 56, (h - 1) / 40])
        torch.testing.assert_close(box, corners)
    assert dataset[0][1]["masks"].shape == (0, 40, 56)
    assert dataset.categories == {3: "red", 4: "green", 9: "blue"} and dataset.things == {3, 4}


def test_both_folders_may_be_archives(tmp_path):
    root = write_tiny_coco(tmp_path, panoptic=True)
    before = tiny_panoptic(root)[2]
    for split in ("val2017", "panoptic_val2017"):
        zip_split(root, split)
    after = tiny_panoptic(root)[2]
    assert torch.equal(before[0], after[0]) and torch.equal(before[1]["masks"], after[1]["masks"])


def test_a_photo_is_read_in_the_frame_of_its_segment_image(tmp_path):
    root = write_tiny_coco(tmp_path, panoptic=True)
    before = tiny_panoptic(root)[2]
    path, exif = root / "val2017/000000000102.jpg", Image.Exif()
    exif[0x112] = 6  # stored lying on its side, shown upright
    Image.open(path).convert("RGB").transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)
    after = tiny_panoptic(root)[2]
    assert torch.equal(before[1]["masks"], after[1]["masks"]) and (before[0] - after[0]).abs().mean() < 0.1
    dataset = tiny_panoptic(root)
    assert not any(problem.count for problem in segment_image_problems(dataset, range(5), 0))


def test_what_is_missing_is_named(tmp_path):
    root = write_tiny_coco(tmp_path, panoptic=True)
    (root / "panoptic_val2017/000000000101.png").write_bytes(b"no image")
    with pytest.raises(OSError, match="000000000101.png: this image cannot be read"):
        tiny_panoptic(root)[1]
    (root / "panoptic_val2017/000000000101.png").unlink()
    with pytest.raises(FileNotFoundError, match="000000000101.png"):
        tiny_panoptic(root)
    path = root / "annotations/panoptic_val2017.json"
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}))
    with pytest.raises(ValueError, match="lacks .isthing.|no .categories."):
        tiny_panoptic(root)


def segments(*triples):
    return [{"id": i, "category_id": c, "iscrowd": crowd} for i, c, crowd in triples]


def columns(*runs):
    """A map of one row whose segment ids are given as (id, length)."""
    return np.concatenate([np.full(n, i, dtype=np.int64) for i, n in runs])[None]


def test_matching_by_hand():
    truth = columns((1, 10), (2, 10), (3, 10))
    found = columns((7, 8), (8, 12), (9, 10))
    true_segments = segments((1, 3, 0), (2, 3, 0), (3, 4, 0))
    result = match_segments(truth, true_segments, found, segments((7, 3, 0), (8, 3, 0), (9, 9, 0)))
    assert result.matched == [(3, pytest.approx(0.8)), (3, pytest.approx(10 / 12))]
    assert result.missed == [4] and result.false_alarms == [9]  # overlap with another category does not count
    half = match_segments(
        columns((1, 10), (2, 10)), segments((1, 3, 0), (2, 4, 0)), columns((7, 20)), segments((7, 3, 0))
    )
    assert half.matched == [] and half.missed == [3, 4] and half.false_alarms == [3]  # exactly half is not enough


def test_unlabelled_pixels_and_crowds_are_forgiven():
    # Six of the found segment's pixels are unlabelled: they are out of its union.
    result = match_segments(columns((1, 4), (0, 6)), segments((1, 3, 0)), columns((7, 10)), segments((7, 3, 0)))
    assert result.matched == [(3, 1.0)]
    # Not if fewer than half are; a segment of which no pixel is seen is nothing.
    found = segments((7, 3, 0), (8, 9, 0))
    result = match_segments(columns((0, 3), (1, 7)), segments((1, 4, 0)), columns((7, 10)), found)
    assert result.false_alarms == [3] and result.missed == [4]
    # Mostly on unlabelled pixels, or on a crowd of its category: not a false alarm. A missed crowd is not a miss.
    result = match_segments(columns((0, 6), (1, 4)), segments((1, 4, 0)), columns((7, 10)), segments((7, 3, 0)))
    assert result.false_alarms == [] and result.missed == [4]
    result = match_segments(columns((1, 10)), segments((1, 3, 1)), columns((7, 10)), segments((7, 3, 0)))
    assert (result.matched, result.missed, result.false_alarms) == ([], [], [])
    result = match_segments(columns((1, 10)), segments((1, 3, 1)), columns((7, 10)), segments((7, 4, 0)))
    assert result.false_alarms == [4]


def test_sizes_must_agree():
    with pytest.raises(ValueError, match="must be equal"):
        match_segments(np.zeros((2, 3), np.int64), [], np.zeros((3, 2), np.int64), [])


def test_quality_by_hand():
    images = [
        match_segments(
            columns((1, 10), (2, 10)),
            segments((1, 3, 0), (2, 3, 0)),
            columns((7, 8), (8, 12)),
            segments((7, 3, 0), (8, 4, 0)),
        ),
        match_segments(columns((1, 10)), segments((1, 9, 0)), columns((7, 10)), segments((7, 9, 0))),
    ]
    # Category 3: one match of IoU 0.8, one miss. 4: one false alarm. 9: perfect. 5 does not occur.
    three = panoptic_quality(images, {3})
    assert three == {"pq": pytest.approx(0.8 / 1.5), "sq": pytest.approx(0.8), "rq": pytest.approx(1 / 1.5), "n": 1}
    assert panoptic_quality(images, {4}) == {"pq": 0, "sq": 0, "rq": 0, "n": 1}
    everything = panoptic_quality(images, {3, 4, 5, 9})
    assert everything["n"] == 3 and everything["pq"] == pytest.approx((0.8 / 1.5 + 0 + 1) / 3)
    assert panoptic_quality([], {3}) == {"pq": 0, "sq": 0, "rq": 0, "n": 0}


def test_evaluation_writes_pictures_and_predictions(tmp_path):
    dataset = tiny_panoptic(write_tiny_coco(tmp_path, panoptic=True))
    evaluator = PanopticEvaluator(dataset, tmp_path / "out/panoptic_eval")
    for index, image_id in enumerate(dataset.image_ids.tolist()):
        ids, infos = dataset.truth(index)
        evaluator.update(image_id, encode_ids(ids), infos)
    result = evaluator.summarize()
    occurring = {info["category_id"] for i in range(len(dataset)) for info in dataset.truth(i)[1]}
    assert result["All"] == {"pq": 1, "sq": 1, "rq": 1, "n": len(occurring)}
    assert result["Things"]["n"] == len(occurring & {3, 4}) and result["Stuff"]["n"] == len(occurring & {9})
    predictions = json.loads((tmp_path / "out/panoptic_eval/predictions.json").read_text())["annotations"]
    assert [p["file_name"] for p in predictions] == [f"{i:012d}.png" for i in range(100, 105)]
    assert (tmp_path / "out/panoptic_eval/000000000104.png").is_file()
    assert "All     100.0 100.0 100.0" in format_quality(result)
    unwritten = PanopticEvaluator(dataset, None)
    unwritten.update(image_id, encode_ids(ids), infos)
    assert unwritten.summarize()["All"]["pq"] == 1


def edit(root, change):
    path = root / "annotations/panoptic_val2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_the_order_of_the_file_changes_nothing(tmp_path):
    root = write_tiny_coco(tmp_path, panoptic=True)
    before = list(tiny_panoptic(root))
    edit(root, lambda c: c["annotations"].reverse())
    edit(root, lambda c: c["images"].append(c["images"].pop(1)))
    for (image, target), (other_image, other_target) in zip(before, tiny_panoptic(root), strict=True):
        assert torch.equal(image, other_image)
        assert all(torch.equal(target[name], other_target[name]) for name in target)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c["images"].pop(0), "do not pair up: image id 100 has only one of them"),
        (lambda c: c["annotations"].pop(0), "do not pair up: image id 100 has only one of them"),
        (lambda c: c["annotations"].append(c["annotations"][1]), r"duplicate annotations of images: 1 \(101\)"),
        (lambda c: c["annotations"][1].pop("segments_info"), "segments_info of image 101: not a list"),
        (
            lambda c: c["annotations"][1]["segments_info"][0].update(id=0),
            "segments_info of image 101.* from 1 to 16777215",
        ),
        (lambda c: c["annotations"][1]["segments_info"][0].update(category_id="x"), "segments_info of image 101"),
        (lambda c: c["annotations"][2]["segments_info"][1].update(id=513), "duplicate segment ids in one image"),
        (lambda c: c["annotations"][1]["segments_info"][0].update(category_id=5), r"does not list \(ids 5\)"),
        (lambda c: c["annotations"][1].update(file_name=None), r"annotations\[1\] lacks 'file_name'"),
        (lambda c: c["annotations"][1].update(file_name="..\\1.png"), "unsafe file name"),
    ],
)
def test_mistakes_in_panoptic_files_are_refused_by_their_place(tmp_path, change, words):
    root = write_tiny_coco(tmp_path, panoptic=True)
    edit(root, change)
    with pytest.raises(ValueError, match=f"panoptic_val2017.json: .*{words}"):
        tiny_panoptic(root)


def test_a_segment_image_of_another_size_is_named(tmp_path):
    root = write_tiny_coco(tmp_path, panoptic=True)
    Image.new("RGB", (20, 20)).save(root / "panoptic_val2017/000000000101.png")
    with pytest.raises(OSError, match=r"000000000101.png: \(20, 20\), its image \(44, 56\)"):
        tiny_panoptic(root)[1]
