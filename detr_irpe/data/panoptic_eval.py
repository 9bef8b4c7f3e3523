# SPDX-License-Identifier: Apache-2.0
"""Panoptic quality over all processes.

Source: Kirillov et al., Panoptic Segmentation, CVPR 2019, section 4; crowd and unlabelled regions as in COCO.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from detr_irpe.data.panoptic import CocoPanoptic
from detr_irpe.segment_ids import decode_ids
from irpe_train import distributed
from irpe_train.text_files import naming, write_text


@dataclass
class SegmentMatches:
    """The matches of one image: category and IoU of each true positive, category of each miss and false alarm."""

    matched: list[tuple[int, float]] = field(default_factory=list)
    false_alarms: list[int] = field(default_factory=list)
    missed: list[int] = field(default_factory=list)


def match_segments(
    truth: np.ndarray, truth_segments: list[dict], found: np.ndarray, found_segments: list[dict]
) -> SegmentMatches:
    """Pair the found segments of an image with the true ones of the same category at an IoU above 0.5.

    Args:
        truth, found: segment ids (height, width); 0 is unlabelled.
        truth_segments, found_segments: ``id`` and ``category_id`` of each, ``iscrowd`` of the true ones.
    Raises: ValueError: the two sizes differ.
    """
    if truth.shape != found.shape:
        raise ValueError(f"a panoptic result is {found.shape} and its annotation {truth.shape}; they must be equal")
    overlap, truth_area, found_area = _overlaps(truth, found)
    category = {s["id"]: s["category_id"] for s in truth_segments}
    crowds = {s["id"] for s in truth_segments if s.get("iscrowd", 0)}
    found_category = {s["id"]: s["category_id"] for s in found_segments}
    result, matched_truth, matched_found = SegmentMatches(), set(), set()

    for (true_id, found_id), pixels in overlap.items():
        if true_id not in category or true_id in crowds or category[true_id] != found_category.get(found_id):
            continue
        unlabelled = overlap.get((0, found_id), 0)
        iou = pixels / (truth_area[true_id] + found_area[found_id] - pixels - unlabelled)
        if iou > 0.5:  # so each has at most one match
            result.matched.append((category[true_id], iou))
            matched_truth.add(true_id)
            matched_found.add(found_id)

    result.missed = [category[i] for i in category if i not in matched_truth and i not in crowds]
    crowd_of = {category[i]: i for i in category if i in crowds}
    for found_id, label in found_category.items():
        if found_id in matched_found or found_id not in found_area:
            continue
        ignored = overlap.get((0, found_id), 0)
        if label in crowd_of:
            ignored += overlap.get((crowd_of[label], found_id), 0)
        if ignored / found_area[found_id] <= 0.5:
            result.false_alarms.append(label)
    return result


def panoptic_quality(images: list[SegmentMatches], categories: set[int]) -> dict[str, float]:
    """Means of ``pq``, ``sq`` and ``rq`` (fractions) over those of ``categories`` that occur; ``n`` is their number."""
    quality = []
    for category in sorted(categories):
        overlaps = [iou for image in images for label, iou in image.matched if label == category]
        errors = sum(image.false_alarms.count(category) + image.missed.count(category) for image in images)
        if overlaps or errors:
            recognition = len(overlaps) / (len(overlaps) + errors / 2)
            segmentation = sum(overlaps) / len(overlaps) if overlaps else 0.0
            quality.append((segmentation * recognition, segmentation, recognition))
    pq, sq, rq = np.mean(quality, axis=0).tolist() if quality else (0.0, 0.0, 0.0)
    return {"pq": pq, "sq": sq, "rq": rq, "n": len(quality)}


class PanopticEvaluator:
    """Compares panoptic results with a data set's annotations, image by image, and averages over all processes.

    Args:
        dataset: where the annotations come from.
        output_dir: folder for the PNG files and ``predictions.json``; None writes nothing.
    """

    def __init__(self, dataset: CocoPanoptic, output_dir: Path | None = None) -> None:
        self._dataset, self._output_dir = dataset, output_dir
        self._index = {image_id: index for index, image_id in enumerate(dataset.image_ids.tolist())}
        self._matches: dict[int, SegmentMatches] = {}
        self._predictions: dict[int, dict] = {}
        if output_dir is not None:
            output_dir.mkdir(parents=True, exist_ok=True)

    def update(self, image_id: int, png: bytes, segments: list[dict]) -> None:
        """Add the result of one image: a PNG of segment ids, and ``id`` and ``category_id`` of each segment in it."""
        truth, truth_segments = self._dataset.truth(self._index[image_id])
        self._matches[image_id] = match_segments(truth, truth_segments, decode_ids(png), segments)
        if self._output_dir is not None:
            name = f"{image_id:012d}.png"
            with naming(self._output_dir / name):
                (self._output_dir / name).write_bytes(png)
            self._predictions[image_id] = {"image_id": image_id, "file_name": name, "segments_info": segments}

    def summarize(self) -> dict[str, dict[str, float]] | None:
        """Panoptic quality ``{"All", "Things", "Stuff"}`` on the main process, None on others; all must call it."""
        gathered = distributed.gather((self._matches, self._predictions))
        if not distributed.is_main():
            return None
        matches = {i: m for part, _ in gathered for i, m in part.items()}
        images = [matches[i] for i in sorted(matches)]  # so that rounding does not depend on the number of processes
        if self._output_dir is not None:
            predictions = {i: p for _, part in gathered for i, p in part.items()}
            annotations = [predictions[i] for i in sorted(predictions)]
            write_text(self._output_dir / "predictions.json", json.dumps({"annotations": annotations}))
        everything, things = set(self._dataset.categories), self._dataset.things
        return {
            "All": panoptic_quality(images, everything),
            "Things": panoptic_quality(images, things),
            "Stuff": panoptic_quality(images, everything - things),
        }


def format_quality(result: dict[str, dict[str, float]]) -> str:
    """Panoptic, segmentation and recognition quality in percent, on one line each for all, things and stuff."""
    lines = [f"{'':<7} {'PQ':>5} {'SQ':>5} {'RQ':>5} {'N':>5}"]
    for name, q in result.items():
        lines.append(f"{name:<7} {100 * q['pq']:5.1f} {100 * q['sq']:5.1f} {100 * q['rq']:5.1f} {q['n']:5d}")
    return "\n".join(lines)


def _overlaps(truth: np.ndarray, found: np.ndarray) -> tuple[dict, dict, dict]:
    """Pixels shared by each pair of overlapping segments, and of each true and each found segment."""
    pairs, pixels = np.unique(truth * 2**24 + found, return_counts=True)
    overlap = {(int(p) >> 24, int(p) % 2**24): int(n) for p, n in zip(pairs, pixels, strict=True)}
    truth_area, found_area = Counter(), Counter()
    for (true_id, found_id), shared in overlap.items():
        truth_area[true_id] += shared
        found_area[found_id] += shared
    return overlap, truth_area, found_area
