# SPDX-License-Identifier: Apache-2.0
"""COCO average precision over all processes: each collects its images' detections, and the whole set is scored once.

Scoring is done by pycocotools, or by faster-coco-eval if that is installed (the same figures, faster).
"""

import contextlib
import io
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.ops import box_convert

from detr_irpe.data.annotations import Annotations
from detr_irpe.data.segmentations import encode_masks, to_rle
from irpe_train import distributed
from irpe_train.errors import import_optional
from irpe_train.state import plain

BACKENDS = ("auto", "faster-coco-eval", "pycocotools")
KINDS = ("boxes", "scores", "labels")


class CocoEvaluator:
    """Collects detections image by image, then scores the images that were seen, on the main process.

    Args:
        annotations: ``instances_val2017.json`` or the like, or its ``Annotations`` (with masks for ``segm``).
        iou_types: ``bbox``, ``segm`` or both.
        backend: the scoring library; ``auto`` takes faster-coco-eval if it is installed.
    """

    def __init__(
        self, annotations: Path | Annotations, iou_types: Sequence[str] = ("bbox",), *, backend: str = "auto"
    ) -> None:
        self._coco, self._coco_eval = _scoring_library(backend)
        self.iou_types = (iou_types,) if isinstance(iou_types, str) else tuple(iou_types)
        if unknown := set(self.iou_types) - {"bbox", "segm"}:
            raise ValueError(f"iou_types: unknown {', '.join(sorted(unknown))}; expected bbox, segm or both")
        if not isinstance(annotations, Annotations):
            annotations = Annotations(Path(annotations), with_masks="segm" in self.iou_types)
        self.annotations = annotations
        self._known = {image_id: index for index, image_id in enumerate(annotations.image_ids.tolist())}
        self._detections: dict[int, dict] = {}

    def update(self, predictions: dict[int, dict[str, Tensor]]) -> None:
        """Add the detections of a few images.

        Args:
            predictions: image id -> ``boxes`` (n, 4) corners in pixels of the original image, ``scores`` and ``labels``
                (n,); for ``segm`` also ``masks`` of the original size, (n, height, width) or (n, 1, height, width),
                bool or probabilities.
        Raises: ValueError: an image is unknown, or its detections are of different numbers, not finite, or their masks
            of another size.
        """
        for image_id, found in predictions.items():
            image_id = image_id.item() if isinstance(image_id, Tensor) else image_id
            if image_id not in self._known:
                raise ValueError(f"{self.annotations.path}: image {image_id} was evaluated but is not in it")
            boxes, scores, labels = (torch.as_tensor(found[kind]).detach().cpu() for kind in KINDS)
            if boxes.numel() == 0:  # [] as well
                boxes = boxes.reshape(0, 4)
            if boxes.shape != (len(scores), 4) or labels.shape != scores.shape:
                shapes = f"boxes {tuple(boxes.shape)}, scores {tuple(scores.shape)}, labels {tuple(labels.shape)}"
                raise ValueError(f"detections of image {image_id}: {shapes}; expected (n, 4), (n,), (n,)")
            boxes, scores = box_convert(boxes.float(), "xyxy", "xywh"), scores.float()
            if not (boxes.isfinite().all() and scores.isfinite().all()):  # the two libraries rank NaN differently
                raise ValueError(f"detections of image {image_id}: NaN or infinite; use an earlier checkpoint")
            packed = {"bbox": boxes.tolist(), "scores": scores.numpy(), "labels": labels.numpy()}
            if "segm" in self.iou_types:
                wanted = self.annotations.sizes[self._known[image_id]].tolist()
                masks = torch.as_tensor(found["masks"])
                masks = masks.flatten(0, -3) if masks.numel() else masks.new_zeros(0, *wanted)
                if len(masks) != len(boxes):
                    raise ValueError(f"detections of image {image_id}: {len(boxes)} boxes and {len(masks)} masks")
                size = list(masks.shape[1:])
                if len(masks) and 0 not in wanted and size != wanted:
                    raise ValueError(
                        f"masks of image {image_id}: height and width {size}; expected the image's, {wanted}"
                    )
                packed["segmentation"] = encode_masks(masks)
            self._detections[image_id] = packed

    def summarize(self) -> dict[str, Namespace] | None:
        """Score the detections of all processes; every process must call it.

        Returns: ``{iou_type: Namespace(stats, text, eval)}`` on the main process, None on the others. ``stats`` has the
            twelve figures, -1.0 if nothing of that size exists, and ``text`` a line for each, as published; ``eval`` is
            the content of ``eval.pth`` (``as_saved``).
        """
        gathered = distributed.gather(self._detections)
        if not distributed.is_main():
            return None
        detections = {image_id: found for part in gathered for image_id, found in part.items()}
        # The libraries get numbers from 1 in the order of the ids, see `_ground_truth`.
        numbers = {image_id: number for number, image_id in enumerate(self.annotations.image_ids.tolist(), 1)}
        numbered = {numbers[image_id]: found for image_id, found in detections.items()}
        truth = self._ground_truth()
        results = {iou_type: self._score(truth, numbered, iou_type) for iou_type in self.iou_types}
        for result in results.values():
            result.eval["params"]["imgIds"] = sorted(detections)
        return results

    def _score(self, truth, detections: dict[int, dict], iou_type: str) -> Namespace:
        entries = _entries(detections, iou_type)
        with contextlib.redirect_stdout(io.StringIO()):  # both libraries print their progress
            found = truth.loadRes(entries) if entries else self._indexed(truth.dataset | {"annotations": []})
            scorer = self._coco_eval(truth, found, iou_type)
            scorer.params.imgIds = list(detections)
            scorer.evaluate()
            scorer.accumulate()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            COCOeval.summarize(scorer)  # also for faster-coco-eval, which has more than the published figures
        return Namespace(stats=scorer.stats.tolist(), text=printed.getvalue().rstrip("\n"), eval=as_saved(scorer.eval))

    def _ground_truth(self):
        """The annotations in the scoring library's form; images and objects are numbered from 1, because both
        libraries treat an object numbered 0 as "not matched", and only one accepts negative numbers."""
        known = self.annotations
        sizes, owners = known.sizes.tolist(), known.image_of_object().tolist()
        fields = (known.labels.tolist(), known.boxes.tolist(), known.area.tolist(), known.iscrowd.tolist())
        objects = [
            {"id": number, "image_id": owner + 1, "category_id": label, "bbox": box, "area": area, "iscrowd": crowd}
            for number, (owner, label, box, area, crowd) in enumerate(zip(owners, *fields, strict=True), 1)
        ]
        if "segm" in self.iou_types:
            if known.unsized():
                raise ValueError(f"{known.path}: masks are scored at the height and width of images; some lack them")
            shapes = (shape for index in range(len(known)) for shape in known.segmentations_of_image(index))
            for entry, shape in zip(objects, shapes, strict=True):
                entry["segmentation"] = to_rle(shape, *sizes[entry["image_id"] - 1])
        images = [{"id": n, "height": h, "width": w} for n, (h, w) in enumerate(sizes, 1)]
        categories = [{"id": i, "name": name} for i, name in known.categories.items()]
        return self._indexed({"info": {}, "images": images, "annotations": objects, "categories": categories})

    def _indexed(self, content: dict):
        with contextlib.redirect_stdout(io.StringIO()):
            coco = self._coco()
            coco.dataset = content
            coco.createIndex()
        return coco


def as_saved(result: dict) -> dict:
    """A scorer's ``eval`` as tensors and plain values only, so that it can be read back without executing code.

    ``params`` is a dict (``recThrs``, ``iouThrs``, ...), while the published file has a pickled object.
    """
    params = {name: plain(value) for name, value in vars(result["params"]).items() if not name.startswith("_")}
    counts = [int(count) for count in result["counts"]]
    arrays = {key: torch.from_numpy(np.array(result[key], np.float64)) for key in ("precision", "recall", "scores")}
    return {"params": params, "counts": counts, "date": str(result["date"])} | arrays


def _scoring_library(name: str) -> tuple[type, type]:
    if name not in BACKENDS:
        raise ValueError(f"COCO scoring by {name!r}: unknown; expected one of {', '.join(BACKENDS)}")
    if name != "pycocotools":
        try:
            faster = import_optional("faster_coco_eval", "COCO scoring by faster-coco-eval")
            return faster.COCO, faster.COCOeval_faster
        except ImportError:
            if name != "auto":
                raise
    from pycocotools.coco import COCO

    return COCO, COCOeval


def _entries(detections: dict[int, dict], iou_type: str) -> list[dict]:
    """The detections in COCO's format of results."""
    kind = "bbox" if iou_type == "bbox" else "segmentation"
    return [
        {"image_id": image_id, "category_id": int(label), kind: place, "score": float(score)}
        for image_id, found in detections.items()
        for place, label, score in zip(found[kind], found["labels"], found["scores"], strict=True)
    ]
