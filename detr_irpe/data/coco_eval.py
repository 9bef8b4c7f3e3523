"""COCO average precision over all processes: each collects the detections of its images, the whole set is scored once.

Scoring is pycocotools' own, or faster-coco-eval's where that is installed (the same figures, sooner).
"""

import contextlib
import io
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor

from detr_irpe.data.annotations import read_json
from irpe_train import distributed

BACKENDS = ("auto", "faster-coco-eval", "pycocotools")
FIGURES = (  # the twelve, in COCO's order: what, at which overlap, objects of which size, among how many detections
    ("Average Precision", "AP", "0.50:0.95", "all", 100),
    ("Average Precision", "AP", "0.50", "all", 100),
    ("Average Precision", "AP", "0.75", "all", 100),
    ("Average Precision", "AP", "0.50:0.95", "small", 100),
    ("Average Precision", "AP", "0.50:0.95", "medium", 100),
    ("Average Precision", "AP", "0.50:0.95", "large", 100),
    ("Average Recall", "AR", "0.50:0.95", "all", 1),
    ("Average Recall", "AR", "0.50:0.95", "all", 10),
    ("Average Recall", "AR", "0.50:0.95", "all", 100),
    ("Average Recall", "AR", "0.50:0.95", "small", 100),
    ("Average Recall", "AR", "0.50:0.95", "medium", 100),
    ("Average Recall", "AR", "0.50:0.95", "large", 100),
)


class CocoEvaluator:
    """Collects detections image by image, then scores the images that were seen, on the main process.

    Args:
        annotations: ``instances_val2017.json`` or the like.
        iou_types: ``bbox``, ``segm`` or both.
        backend: which library scores; ``auto`` takes faster-coco-eval where it is installed.
    """

    def __init__(self, annotations: Path, iou_types: Sequence[str] = ("bbox",), *, backend: str = "auto") -> None:
        self.annotations, self.iou_types = annotations, tuple(iou_types)
        self._coco, self._coco_eval = _scoring_library(backend)
        self._detections: dict[int, dict] = {}

    def update(self, predictions: dict[int, dict[str, Tensor]]) -> None:
        """Add the detections of a few images.

        Args:
            predictions: image id -> ``boxes`` (n, 4) corners in pixels of the original image, ``scores`` and ``labels``
                (n,); for ``segm`` also ``masks`` (n, 1, height, width) of the original size, bool or probabilities.
        """
        for image_id, found in predictions.items():
            corners = found["boxes"].float().cpu()
            boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
            packed = {
                "boxes": boxes.numpy(),
                "scores": found["scores"].float().cpu().numpy(),
                "labels": found["labels"].cpu().numpy(),
            }
            if "segm" in self.iou_types:
                packed["masks"] = encode_masks(found["masks"][:, 0])
            self._detections[image_id] = packed

    def summarize(self) -> dict[str, Namespace] | None:
        """Score the detections of all processes; to be called by every one of them.

        Returns: ``{iou_type: Namespace(stats, eval)}`` on the main process, None on the others. ``stats`` has the
            twelve figures, -1.0 where nothing of that size exists; ``eval`` is what ``eval.pth`` holds (``as_saved``).
        """
        gathered = distributed.gather(self._detections)
        if not distributed.is_main():
            return None
        detections = {image_id: found for part in gathered for image_id, found in part.items()}
        truth = _ground_truth(self.annotations, self._coco)
        return {iou_type: self._score(truth, detections, iou_type) for iou_type in self.iou_types}

    def _score(self, truth, detections: dict[int, dict], iou_type: str) -> Namespace:
        rows = _box_rows(detections) if iou_type == "bbox" else _mask_entries(detections)
        with contextlib.redirect_stdout(io.StringIO()):  # both libraries print their progress
            found = truth.loadRes(rows) if len(rows) else _nothing_found(truth, self._coco)
            scorer = self._coco_eval(truth, found, iou_type)
            scorer.params.imgIds = sorted(detections)
            scorer.evaluate()
            scorer.accumulate()
            scorer.summarize()
        return Namespace(stats=[float(figure) for figure in scorer.stats[:12]], eval=as_saved(scorer.eval))


def encode_masks(masks: Tensor) -> list[dict]:
    """Masks (n, height, width), bool or probabilities (over 0.5 counts), as compressed run lengths."""
    binary = (masks if masks.dtype == torch.bool else masks > 0.5).cpu().numpy().astype(np.uint8)
    return [rle.encode(np.asfortranarray(mask)) for mask in binary]


def as_saved(result: dict) -> dict:
    """A scorer's ``eval`` with tensors and plain values only, so that it is read back without running anything.

    ``params`` is a dict (``recThrs``, ``iouThrs``, ...), where the published file has an object of a class.
    """
    params = {name: _plain(value) for name, value in vars(result["params"]).items() if not name.startswith("_")}
    counts = [int(count) for count in result["counts"]]
    arrays = {
        name: torch.from_numpy(np.array(result[name], dtype=np.float64)) for name in ("precision", "recall", "scores")
    }
    return {"params": params, "counts": counts, "date": str(result["date"])} | arrays


def format_figures(stats: Sequence[float], iou_type: str) -> str:
    """The twelve figures, one a line, as pycocotools prints them."""
    lines = [
        f" {name:<18} ({short}) @[ IoU={overlap:<9} | area={area:>6} | maxDets={count:>3} ] = {value:0.3f}"
        for (name, short, overlap, area, count), value in zip(FIGURES, stats, strict=True)
    ]
    return "\n".join([f"IoU metric: {iou_type}", *lines])


def _scoring_library(name: str) -> tuple[type, type]:
    if name not in BACKENDS:
        raise ValueError(f"COCO scoring by {name!r}: unknown; expected one of {', '.join(BACKENDS)}")
    if name != "pycocotools":
        try:
            from faster_coco_eval import COCO, COCOeval_faster

            return COCO, COCOeval_faster
        except ImportError as error:
            if name != "auto":
                raise ImportError("COCO scoring by faster-coco-eval: pip install faster-coco-eval") from error
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval


def _ground_truth(path: Path, coco_class: type):
    """The annotations, with the fields that scoring needs filled in where own data lacks them."""
    content = read_json(path)
    objects = content.setdefault("annotations", [])
    content.setdefault("info", {})
    for entry in objects:
        entry.setdefault("iscrowd", 0)
        entry.setdefault("area", entry["bbox"][2] * entry["bbox"][3])
    ids = {entry.get("id", 0) for entry in objects}
    if len(ids) < len(objects) or 0 in ids:  # scoring takes an object numbered 0 for "not matched"
        for number, entry in enumerate(objects, 1):
            entry["id"] = number
    return _indexed(content, coco_class)


def _nothing_found(truth, coco_class: type):
    return _indexed(truth.dataset | {"annotations": []}, coco_class)


def _indexed(content: dict, coco_class: type):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_class()
        coco.dataset = content
        coco.createIndex()
    return coco


def _box_rows(detections: dict[int, dict]) -> np.ndarray:
    """(detections, 7): image id, x, y, width, height, score, label, in float64 as the libraries compute."""
    blocks = [
        np.column_stack([np.full(len(found["scores"]), image_id), found["boxes"], found["scores"], found["labels"]])
        for image_id, found in sorted(detections.items())
    ]
    return np.concatenate(blocks).astype(np.float64) if blocks else np.zeros((0, 7))


def _mask_entries(detections: dict[int, dict]) -> list[dict]:
    return [
        {"image_id": image_id, "category_id": int(label), "segmentation": mask, "score": float(score)}
        for image_id, found in sorted(detections.items())
        for mask, label, score in zip(found["masks"], found["labels"], found["scores"], strict=True)
    ]


def _plain(value):
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.astype(np.float64))
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
