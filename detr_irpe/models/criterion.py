# SPDX-License-Identifier: Apache-2.0
"""The losses of DETR: class, box and, with a mask head, mask; at every decoder layer.

Source: Carion et al., ECCV 2020, Sec. 3.1 (set loss), A.2 (the terms).
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, sigmoid_focal_loss

from detr_irpe.boxes import paired_giou
from detr_irpe.models.matcher import HungarianMatcher
from irpe_train.distributed import reduce_mean

Losses = dict[str, Tensor]


class Matched(NamedTuple):
    """The ``n`` matched pairs of a batch: image, query and object number (counted through the batch), each ``(n,)``."""

    image: Tensor
    query: Tensor
    object: Tensor


class SetCriterion(nn.Module):
    """Losses of a set of predictions against the objects of each image.

    Args:
        num_classes: without "no object".
        weight_dict: weight of each loss by name, for the training loop to apply; a loss without one is only logged.
        eos_coef: weight of the class "no object".
        masks: also the two mask losses (at the last layer).
    """

    def __init__(
        self,
        num_classes: int,
        matcher: HungarianMatcher,
        weight_dict: dict[str, float],
        eos_coef: float = 0.1,
        masks: bool = False,
    ):
        super().__init__()
        self.num_classes, self.matcher, self.weight_dict = num_classes, matcher, weight_dict
        self.eos_coef, self.masks = eos_coef, masks

    def forward(self, outputs: dict, targets: Sequence[dict]) -> Losses:
        """Match every decoder layer, then compute its losses, in fp32 even under autocast.

        Args:
            outputs: of the model.
            targets: for each image ``labels`` ``(n,)``, ``boxes`` ``(n, 4)``, and ``masks`` ``(n, h, w)`` if needed.
        Returns: scalars, not weighted: ``loss_ce``, ``class_error`` (percent of matched queries with a wrong class),
            ``loss_bbox``, ``loss_giou``, ``cardinality_error``, ``loss_mask``, ``loss_dice``; ``..._{i}`` of layer i.
        """
        layers = [outputs, *outputs.get("aux_outputs", [])]
        with torch.autocast(outputs["pred_logits"].device.type, enabled=False):
            matches = self._match(layers, targets)
            num_boxes = self._num_boxes(targets, outputs["pred_logits"].device)
            losses = {}
            for index, (layer, matched) in enumerate(zip(layers, matches, strict=True)):
                found = self.loss_labels(layer, targets, matched)
                found |= self.loss_boxes(layer, targets, matched, num_boxes)
                found |= self.cardinality(layer, targets)
                if index == 0 and self.masks:
                    found |= self.loss_masks(layer, targets, matched, num_boxes)
                if index > 0:  # layer 0 of the list is the last one of the decoder
                    found.pop("class_error")
                    found = {f"{name}_{index - 1}": loss for name, loss in found.items()}
                losses |= found
        return losses

    def loss_labels(self, outputs: dict, targets: Sequence[dict], matched: Matched) -> Losses:
        """Cross entropy over all queries; unmatched ones are "no object", weighted by ``eos_coef``."""
        logits = outputs["pred_logits"].float()
        labels = torch.cat([target["labels"] for target in targets])[matched.object]
        wanted = torch.full(logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device)
        wanted[matched.image, matched.query] = labels
        class_weights = logits.new_ones(self.num_classes + 1)
        class_weights[-1] = self.eos_coef
        # Flat: with more dimensions CUDA has no deterministic kernel, and --deterministic would end the run.
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), class_weights)
        right = (logits[matched.image, matched.query].argmax(-1) == labels).sum()
        return {"loss_ce": loss, "class_error": 100 - 100 * right / max(len(labels), 1)}

    @torch.no_grad()
    def cardinality(self, outputs: dict, targets: Sequence[dict]) -> Losses:
        """Mean absolute error of the number of queries that are not "no object"; only logged, not a loss."""
        logits = outputs["pred_logits"]
        found = (logits.argmax(-1) != self.num_classes).sum(1)
        wanted = torch.tensor([len(target["labels"]) for target in targets]).to(logits.device, non_blocking=True)
        return {"cardinality_error": (found - wanted).abs().float().mean()}

    def loss_boxes(self, outputs: dict, targets: Sequence[dict], matched: Matched, num_boxes: Tensor) -> Losses:
        """L1 distance and ``1 - GIoU`` of the matched boxes, summed over pairs, divided by ``num_boxes``."""
        boxes = outputs["pred_boxes"][matched.image, matched.query].float()
        wanted = torch.cat([target["boxes"] for target in targets])[matched.object].float()
        giou = paired_giou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy"))
        return {"loss_bbox": (boxes - wanted).abs().sum() / num_boxes, "loss_giou": (1 - giou).sum() / num_boxes}

    def loss_masks(self, outputs: dict, targets: Sequence[dict], matched: Matched, num_boxes: Tensor) -> Losses:
        """Focal and dice loss of the matched masks, upsampled to the size of the padded batch.

        Source: Lin et al., ICCV 2017 (focal); Milletari et al., 3DV 2016 (dice).
        """
        masks = outputs["pred_masks"][matched.image, matched.query].float()  # (n, h, w)
        height, width = (max(target["masks"].shape[axis] for target in targets) for axis in (1, 2))
        wanted = [F.pad(m, (0, width - m.shape[2], 0, height - m.shape[1])) for m in (t["masks"] for t in targets)]
        wanted = torch.cat(wanted)[matched.object].to(masks)  # (n, height, width), padded as the batch of images is
        masks = F.interpolate(masks[:, None], size=wanted.shape[-2:], mode="bilinear", align_corners=False)
        masks, wanted = masks.flatten(1), wanted.flatten(1)
        focal = sigmoid_focal_loss(masks, wanted, alpha=0.25, gamma=2).mean(1)
        probability = masks.sigmoid()
        dice = 1 - (2 * (probability * wanted).sum(1) + 1) / (probability.sum(1) + wanted.sum(1) + 1)
        return {"loss_mask": focal.sum() / num_boxes, "loss_dice": dice.sum() / num_boxes}

    def _num_boxes(self, targets: Sequence[dict], device: torch.device) -> Tensor:
        """The divisor of sums over pairs: the number of objects, at least 1. In training it is averaged over processes,
        so that the mean of their gradients is the gradient of one big batch; every process takes part, even without
        objects. In evaluation the processes do not wait for each other."""
        count = torch.tensor(float(sum(len(target["labels"]) for target in targets))).to(device, non_blocking=True)
        return (reduce_mean(count) if self.training else count).clamp(min=1)

    def _match(self, layers: Sequence[dict], targets: Sequence[dict]) -> list[Matched]:
        """Matched pairs of every layer on the device: one copy to the CPU (costs), one back (pairs)."""
        starts = [0, *accumulate(len(target["labels"]) for target in targets)]
        pairs = []
        for matches in self.matcher.match_layers(layers, targets):
            rows = ((torch.full_like(q, image), q, o + starts[image]) for image, (q, o) in enumerate(matches))
            pairs.append(torch.cat([torch.stack(row) for row in rows], dim=1))
        pairs = torch.stack(pairs)  # (layers, 3, n)
        return [Matched(*layer) for layer in pairs.to(layers[0]["pred_logits"].device, non_blocking=True)]
