# SPDX-License-Identifier: Apache-2.0
"""From the outputs of the network to boxes in pixels, masks, and panoptic maps."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_convert

from detr_irpe.boxes import scale_to_pixels
from detr_irpe.segment_ids import encode_ids


class PostProcess(nn.Module):
    """Boxes in pixels, with the best class of each query."""

    @torch.no_grad()
    def forward(self, outputs: dict, target_sizes: Tensor) -> list[dict[str, Tensor]]:
        """Detections of each image, one per query, not sorted.

        Args:
            outputs: ``pred_logits`` ``(B, Q, C + 1)`` and ``pred_boxes`` ``(B, Q, 4)``.
            target_sizes: ``(B, 2)``, height and width to scale to: the original image's.
        Returns: for each image ``scores`` ``(Q,)``, ``labels`` ``(Q,)``, ``boxes`` ``(Q, 4)`` as corners.
        """
        logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        if len(logits) != len(target_sizes) or target_sizes.shape[1:] != (2,):
            got = f"got shape {tuple(target_sizes.shape)}."
            raise ValueError(f"target_sizes: expected (height, width) of each of {len(logits)} images; {got}")
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        # A compiled or exported graph cannot check values.
        if not (torch.compiler.is_compiling() or scores.isfinite().all() and boxes.isfinite().all()):
            raise ValueError("the model's scores or boxes are not finite: use an earlier checkpoint, or --amp none")
        boxes = scale_to_pixels(box_convert(boxes, "cxcywh", "xyxy"), target_sizes)
        return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(scores, labels, boxes, strict=True)]


class PostProcessSegm(nn.Module):
    """Adds the mask of every query to the results of ``PostProcess``."""

    threshold = 0.5  # of the mask's probability

    @torch.no_grad()
    def forward(
        self, results: list[dict], outputs: dict, orig_target_sizes: Tensor, max_target_sizes: Tensor
    ) -> list[dict]:
        """Masks at the size of the original images.

        Args:
            outputs: with ``pred_masks`` ``(B, Q, h, w)``.
            orig_target_sizes: ``(B, 2)``, height and width of the original images.
            max_target_sizes: ``(B, 2)``, of the images as the network saw them, without padding.
        Returns: ``results``, with ``masks`` ``(Q, 1, height, width)`` uint8 on the CPU in each.
        """
        seen, original = max_target_sizes.tolist(), orig_target_sizes.tolist()
        padded = [max(size[axis] for size in seen) for axis in (0, 1)]
        for result, masks, (h, w), size in zip(results, outputs["pred_masks"], seen, original, strict=True):
            masks = F.interpolate(masks[:, None].float(), size=padded, mode="bilinear", align_corners=False)
            masks = (masks.sigmoid() > self.threshold)[..., :h, :w].cpu()
            result["masks"] = F.interpolate(masks.float(), size=size, mode="nearest").byte()
        return results


class PostProcessPanoptic(nn.Module):
    """One segment per pixel: the queries with a confident class divide the image among themselves.

    Args:
        is_thing_map: category id -> whether it is countable; the segments of an uncountable one are merged.
        threshold: of the class score, below which a query is left out.
    """

    smallest_area = 4  # segments of at most this many pixels are dropped, and their pixels assigned again

    def __init__(self, is_thing_map: Mapping[int, bool], threshold: float = 0.85):
        super().__init__()
        self.is_thing_map, self.threshold = is_thing_map, threshold

    @torch.no_grad()
    def forward(self, outputs: dict, processed_sizes: Sequence, target_sizes: Sequence | None = None) -> list[dict]:
        """Panoptic maps.

        Args:
            outputs: with ``pred_logits``, ``pred_boxes`` and ``pred_masks``.
            processed_sizes: (height, width) of each image as the network saw it.
            target_sizes: (height, width) of each resulting map; default: ``processed_sizes``.
        Returns: for each image ``png_string``, a PNG whose colours are segment ids (R + 256 G + 65536 B), and
            ``segments_info``, a list of ``id``, ``isthing``, ``category_id`` and ``area`` in pixels.
        """
        target_sizes = processed_sizes if target_sizes is None else target_sizes
        if not len(processed_sizes) == len(target_sizes) == len(outputs["pred_logits"]):
            got = f"got {len(processed_sizes)} processed_sizes and {len(target_sizes)} target_sizes."
            raise ValueError(f"expected a size for each of {len(outputs['pred_logits'])} images; {got}")
        images = zip(outputs["pred_logits"], outputs["pred_masks"], processed_sizes, target_sizes, strict=True)
        return [self.segment(c.float(), m.float(), _pair(seen), _pair(wanted)) for c, m, seen, wanted in images]

    def segment(self, logits: Tensor, masks: Tensor, seen: tuple[int, int], wanted: tuple[int, int]) -> dict:
        """One image: ``logits`` ``(Q, C + 1)``, ``masks`` ``(Q, h, w)``, two sizes."""
        scores, classes = logits.softmax(-1).max(-1)
        keep = (classes != logits.shape[-1] - 1) & (scores > self.threshold)
        classes = classes[keep].tolist()
        masks = F.interpolate(masks[keep][:, None], size=seen, mode="bilinear", align_corners=False)[:, 0]
        ids = self._share_out(masks, wanted, self._first_of_its_stuff(classes))
        areas = _areas(ids, len(classes))
        while classes and min(areas) <= self.smallest_area:
            large = [k for k, area in enumerate(areas) if area > self.smallest_area]
            classes, masks = [classes[k] for k in large], masks[large]
            # As published, merged stuff has already lost its other members (their area was 0): merge nothing here.
            ids = self._share_out(masks, wanted)
            areas = _areas(ids, len(classes))
        segments = [
            {"id": k, "isthing": self.is_thing_map[c], "category_id": c, "area": area}
            for k, (c, area) in enumerate(zip(classes, areas, strict=True))
        ]
        return {"png_string": encode_ids(ids), "segments_info": segments}

    def _first_of_its_stuff(self, classes: Sequence[int]) -> list[int]:
        """For each segment, the first one of the same uncountable class, or itself if countable."""
        first = defaultdict(dict)
        return [k if self.is_thing_map[c] else first[c].setdefault("segment", k) for k, c in enumerate(classes)]

    @staticmethod
    def _share_out(masks: Tensor, size: tuple[int, int], merged: Sequence[int] | None = None) -> np.ndarray:
        """Segment number of every pixel, ``(height, width)``; all 0 without segments."""
        if len(masks) == 0:
            return np.zeros(size, dtype=np.int32)
        ids = masks.argmax(0)
        if merged is not None:
            ids = torch.tensor(merged, device=ids.device)[ids]
        image = Image.fromarray(ids.cpu().numpy().astype(np.int32))
        return np.asarray(image.resize(size[::-1], resample=Image.Resampling.NEAREST))


def _areas(ids: np.ndarray, count: int) -> list[int]:
    return np.bincount(ids.ravel(), minlength=count)[:count].tolist()


def _pair(size: Tensor | Sequence[int]) -> tuple[int, int]:
    height, width = size.tolist() if isinstance(size, Tensor) else size
    return int(height), int(width)
