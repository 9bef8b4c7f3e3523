import json
import sys

import numpy as np
import pytest
import torch

from detr_irpe.data.coco import CocoDetection
from detr_irpe.data.coco_eval import CocoEvaluator
from detr_irpe.data.segmentations import decode_masks, encode_masks
from detr_irpe.data.transforms import eval_transforms
from irpe_train.checkpoint import read_checkpoint, write_checkpoint
from tests.helpers.tiny_coco import edit_annotations, write_tiny_coco

BACKENDS = ("pycocotools", "faster-coco-eval")


def annotations_of(root):
    return root / "annotations/instances_val2017.json"


def truth(root):
    """Image id -> (corner boxes, labels), as the file has them."""
    content = json.loads(annotations_of(root).read_text())
    found = {image["id"]: ([], []) for image in content["images"]}
    for a in content["annotations"]:
        x, y, w, h = a["bbox"]
        found[a["image_id"]][0].append([x, y, x + w, y + h])
        found[a["image_id"]][1].append(a["category_id"])
    return {
        i: (torch.tensor(b, dtype=torch.float32).reshape(-1, 4), torch.tensor(c, dtype=torch.int64))
        for i, (b, c) in found.items()
    }


def noisy_predictions(root, seed=0, queries=8):
    """The true boxes shifted a little, among boxes without objects."""
    generator = torch.Generator().manual_seed(seed)
    predictions = {}
    for image_id, (boxes, labels) in truth(root).items():
        shifted = boxes + torch.randn(boxes.shape, generator=generator) * 1.5
        corner = torch.rand(queries - len(boxes), 2, generator=generator) * 20
        noise = torch.cat([corner, corner + 5 + torch.rand(corner.shape, generator=generator) * 20], 1)
        other = torch.tensor([3, 4, 9, 7])[torch.randint(4, (len(noise),), generator=generator)]
        scores = torch.rand(queries, generator=generator)
        scores[: len(boxes)] += 0.3
        predictions[image_id] = {
            "boxes": torch.cat([shifted, noise]),
            "labels": torch.cat([labels, other]),
            "scores": scores,
        }
    return predictions


def score(root, predictions, iou_types=("bbox",), backend="auto"):
    evaluator = CocoEvaluator(annotations_of(root), iou_types, backend=backend)
    for image_id, found in predictions.items():
        evaluator.update({image_id: found})
    return evaluator.summarize()


@pytest.mark.parametrize("backend", BACKENDS)
def test_perfect_detections_score_one(tmp_path, backend):
    root = write_tiny_coco(tmp_path, val=9)
    exact = {i: {"boxes": b, "labels": c, "scores": torch.ones(len(b))} for i, (b, c) in truth(root).items()}
    stats = score(root, exact, backend=backend)["bbox"].stats
    assert len(stats) == 12
    np.testing.assert_allclose(np.array(stats)[[0, 1, 2, 3, 8, 9]], 1)
    assert stats[4] == stats[5] == -1  # all objects are small


def test_average_precision_of_a_case_worked_by_hand(tmp_path):
    root = write_tiny_coco(tmp_path, val=3)

    def one_category(content):
        content["annotations"] = [
            {"id": i + 1, "image_id": 100 + i, "category_id": 3, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0}
            for i in range(2)
        ]

    edit_annotations(root, "val2017", one_category)
    box, score_of = torch.tensor([[0.0, 0, 10, 10]]), lambda s: torch.tensor([s])
    found = {
        100 + i: {"boxes": box + shift, "labels": torch.tensor([3]), "scores": score_of(s)}
        for i, (shift, s) in enumerate(((0, 0.5), (30, 0.8), (30, 0.9)))
    }
    # Best first: wrong, wrong, right. At recall up to 1/2, 51 of 101 points, the precision is 1/3; beyond, 0.
    stats = score(root, found)["bbox"].stats
    assert stats[0] == pytest.approx(51 / 101 / 3) and stats[1] == pytest.approx(stats[0])
    assert stats[8] == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(3))
def test_both_libraries_give_the_same_twelve_figures(tmp_path, seed):
    root = write_tiny_coco(tmp_path, val=12, seed=seed)
    edit_annotations(root, "val2017", lambda c: c["annotations"][0].update(iscrowd=1))
    predictions = noisy_predictions(root, seed)
    for found in predictions.values():
        masks = torch.zeros(len(found["boxes"]), 1, 44, 56)
        for mask, (x0, y0, x1, y1) in zip(masks, found["boxes"].int().tolist(), strict=True):
            mask[:, max(y0, 0) : y1, max(x0, 0) : x1] = 1
        found["masks"] = masks
    for image in json.loads(annotations_of(root).read_text())["images"]:
        predictions[image["id"]]["masks"] = predictions[image["id"]]["masks"][:, :, : image["height"]]
    ours, theirs = (score(root, predictions, ("bbox", "segm"), backend) for backend in BACKENDS)
    for iou_type in ("bbox", "segm"):
        assert 0.05 < ours[iou_type].stats[0] < 0.95
        np.testing.assert_allclose(ours[iou_type].stats, theirs[iou_type].stats, rtol=0, atol=1e-12)
        assert ours[iou_type].eval["precision"].shape == theirs[iou_type].eval["precision"].shape == (10, 101, 3, 4, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_nothing_detected_scores_zero_and_the_libraries_are_silent(tmp_path, backend, iou_type, capsys):
    root = write_tiny_coco(tmp_path)
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
        "masks": torch.zeros(0, 1, 40, 56),
    }
    stats = score(root, {i: nothing for i in truth(root)}, (iou_type,), backend)[iou_type].stats
    assert [stats[i] for i in (0, 1, 2, 3, 6, 7, 8, 9)] == [0] * 8
    assert not capsys.readouterr().out


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_are_scored_by_their_pixels(tmp_path, backend):
    root = write_tiny_coco(tmp_path, val=9)
    images = json.loads(annotations_of(root).read_text())["images"]
    size = {image["id"]: (image["height"], image["width"]) for image in images}
    found = {
        i: {"boxes": b, "labels": c, "scores": torch.ones(len(b)), "masks": torch.zeros(len(b), 1, *size[i])}
        for i, (b, c) in truth(root).items()
    }
    results = score(root, found, ("bbox", "segm"), backend)
    assert results["bbox"].stats[0] == pytest.approx(1) and results["segm"].stats[0] == 0


def test_only_the_images_that_were_seen_count(tmp_path):
    root = write_tiny_coco(tmp_path, val=9)
    exact = {i: {"boxes": b, "labels": c, "scores": torch.ones(len(b))} for i, (b, c) in truth(root).items()}
    assert score(root, {102: exact[102]})["bbox"].stats[0] == pytest.approx(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_images_changes_nothing(tmp_path, backend):
    root = write_tiny_coco(tmp_path, val=12)
    predictions = noisy_predictions(root)
    for found in predictions.values():  # ties between images are where order could matter
        found["scores"] = (found["scores"] * 4).round() / 4
    backwards = dict(reversed(predictions.items()))
    first, second = (score(root, found, backend=backend)["bbox"] for found in (predictions, backwards))
    assert first.stats == second.stats and first.eval["params"]["imgIds"] == second.eval["params"]["imgIds"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_own_data_may_lack_what_scoring_needs(tmp_path, backend):
    root = write_tiny_coco(tmp_path, val=12)
    predictions = noisy_predictions(root)
    wanted = score(root, predictions, backend=backend)["bbox"].stats
    for start in (0, None):  # ids from zero: pycocotools takes object 0 for "no match"

        def strip(content, start=start):
            for number, annotation in enumerate(content["annotations"]):
                for name in ("area", "iscrowd", "segmentation", "id"):
                    annotation.pop(name, None)
                if start is not None:
                    annotation["id"] = start + number

        edit_annotations(root, "val2017", strip)
        assert score(root, predictions, backend=backend)["bbox"].stats == wanted


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_curves_are_saved_without_anything_that_runs(tmp_path, backend):
    root = write_tiny_coco(tmp_path, val=12)
    result = score(root, noisy_predictions(root), backend=backend)["bbox"]
    write_checkpoint(result.eval, tmp_path / "eval.pth")
    saved = read_checkpoint(tmp_path / "eval.pth")
    assert list(saved) == ["params", "counts", "date", "precision", "recall", "scores"]
    assert saved["counts"] == [10, 101, 3, 4, 3]
    assert saved["recall"].shape == (10, 3, 4, 3) and saved["scores"].shape == (10, 101, 3, 4, 3)
    assert saved["precision"].dtype == torch.float64
    assert len(saved["params"]["recThrs"]) == 101 and saved["params"]["maxDets"] == [1, 10, 100]
    valid = saved["precision"][:, :, :, 0, 2]
    assert valid[valid > -1].mean().item() == pytest.approx(result.stats[0])


def test_masks_are_encoded_and_decoded(tmp_path):
    dataset = CocoDetection(write_tiny_coco(tmp_path), "val2017", eval_transforms(40), return_masks=True)
    masks = dataset[2][1]["masks"]
    assert len(masks) == 2
    assert torch.equal(decode_masks(encode_masks(masks), *masks.shape[1:]).bool(), masks)
    assert torch.equal(decode_masks(encode_masks(masks * 0.6), *masks.shape[1:]).bool(), masks)


@pytest.mark.parametrize("backend", BACKENDS)
def test_figures_are_printed_as_published(tmp_path, capsys, backend):
    root = write_tiny_coco(tmp_path, val=12)
    result = score(root, noisy_predictions(root), backend=backend)["bbox"]
    first, *others = result.text.split("\n")
    words = " Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = "
    assert first == f"{words}{result.stats[0]:.3f}" and len(others) == 11 and capsys.readouterr().out == ""
    assert others[-1] == " Average Recall     (AR) @[ IoU=0.50:0.95 | area= large | maxDets=100 ] = -1.000"
    assert [line.rpartition("= ")[2] for line in (first, *others)] == [f"{value:.3f}" for value in result.stats]


def test_an_unknown_or_missing_library_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'cocoapi': unknown; expected one of auto, faster-coco-eval, pycocotools"):
        CocoEvaluator(tmp_path, backend="cocoapi")
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ImportError, match="pip install faster-coco-eval"):
        CocoEvaluator(tmp_path, backend="faster-coco-eval")
    assert CocoEvaluator(annotations_of(write_tiny_coco(tmp_path)))._coco.__module__ == "pycocotools.coco"


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_beyond_the_precision_of_a_float_are_kept_apart(tmp_path, backend):
    root, first = write_tiny_coco(tmp_path, val=9), 2**53
    edit_annotations(root, "val2017", lambda c: [e.update(id=e["id"] - 100 + first) for e in c["images"]])
    edit_annotations(
        root, "val2017", lambda c: [e.update(image_id=e["image_id"] - 100 + first) for e in c["annotations"]]
    )
    exact = {i: {"boxes": b, "labels": c, "scores": torch.ones(len(b))} for i, (b, c) in truth(root).items()}
    result = score(root, exact, backend=backend)["bbox"]
    assert result.stats[0] == pytest.approx(1)
    assert result.eval["params"]["imgIds"] == list(range(first, first + 9))


def test_an_image_that_the_annotations_lack_is_named(tmp_path):
    root = write_tiny_coco(tmp_path)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}
    with pytest.raises(ValueError, match="instances_val2017.json: image 5 was evaluated but is not in it"):
        CocoEvaluator(annotations_of(root)).update({5: nothing})


def test_masks_are_not_scored_without_sizes(tmp_path):
    root = write_tiny_coco(tmp_path)
    edit_annotations(root, "val2017", lambda c: c["images"][2].pop("height"))
    with pytest.raises(ValueError, match="masks are scored at the height and width of images; some lack them"):
        CocoEvaluator(annotations_of(root), ("segm",)).summarize()


def test_detections_come_as_callers_have_them(tmp_path):
    root = write_tiny_coco(tmp_path, val=5)
    images = json.loads(annotations_of(root).read_text())["images"]
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    wanted, given = {}, {}
    for image_id, (boxes, labels) in truth(root).items():
        masks = torch.zeros(len(boxes), *sizes[image_id], dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        scores = torch.ones(len(boxes))
        wanted[image_id] = {"boxes": boxes, "labels": labels, "scores": scores, "masks": masks[:, None]}
        arrays = {"boxes": boxes.numpy() if len(boxes) else [], "labels": labels.numpy()}
        given[torch.tensor([image_id])] = arrays | {"scores": scores.requires_grad_(), "masks": masks.numpy()}
    figures = score(root, wanted, ("bbox", "segm"))
    assert figures["segm"].stats[0] == pytest.approx(1)
    same = score(root, given, ("bbox", "segm"))
    assert [one.stats for one in same.values()] == [one.stats for one in figures.values()]
    assert score(root, given, "segm").keys() == {"segm"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.tensor([float("nan")])}, "NaN or infinite"),
        ({"boxes": torch.tensor([[1.0, 2.0, float("inf"), 4.0]])}, "NaN or infinite"),
        ({"scores": torch.tensor([0.5, 0.4])}, r"boxes \(1, 4\), scores \(2,\), labels \(1,\); expected \(n, 4\)"),
        ({"boxes": torch.ones(4, 1)}, r"boxes \(4, 1\), scores \(1,\)"),
        ({"masks": torch.ones(2, 40, 56)}, "1 boxes and 2 masks"),
        ({"masks": torch.ones(1, 1, 3, 4)}, r"masks of image 100: height and width \[3, 4\]; expected the image's"),
    ],
)
def test_detections_that_the_libraries_score_differently_are_refused(tmp_path, backend, change, message):
    root = write_tiny_coco(tmp_path, val=3)
    found = {"boxes": torch.tensor([[1.0, 2.0, 3.0, 4.0]]), "labels": torch.tensor([3]), "scores": torch.ones(1)}
    with pytest.raises(ValueError, match=message):
        score(root, {100: found | change}, ("bbox", "segm") if "masks" in change else ("bbox",), backend)


def test_unknown_kinds_of_scores_are_refused(tmp_path):
    with pytest.raises(ValueError, match="iou_types: unknown keypoints; expected bbox, segm or both"):
        CocoEvaluator(annotations_of(write_tiny_coco(tmp_path)), ("bbox", "keypoints"))


@pytest.mark.parametrize("image_id", [1.7, "abc", 7])
def test_unknown_images_are_refused(tmp_path, image_id):
    evaluator = CocoEvaluator(annotations_of(write_tiny_coco(tmp_path, first_id=1)), ("bbox", "segm"))
    nothing = {"boxes": [], "scores": [], "labels": [], "masks": []}
    evaluator.update({1: nothing})
    with pytest.raises(ValueError, match=f"image {image_id} was evaluated but is not in it"):
        evaluator.update({image_id: nothing})
