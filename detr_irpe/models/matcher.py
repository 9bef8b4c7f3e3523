# SPDX-License-Identifier: Apache-2.0
"""The assignment of queries to objects: one to one, at the lowest cost.

Source: Carion et al., ECCV 2020, Sec. 3.1 and Eq. (1).
"""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

WORST = 1e9  # replaces non-finite costs: the loss reports them, so the assignment must not fail first


class HungarianMatcher:
    """Assign objects to queries by class probability, L1 distance and generalised IoU of the boxes, in fp32."""

    def __init__(self, cost_class: float = 1.0, cost_bbox: float = 5.0, cost_giou: float = 2.0):
        if cost_class == cost_bbox == cost_giou == 0:
            raise ValueError("--set_cost_class, --set_cost_bbox and --set_cost_giou are all 0: give one above 0.")
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou

    def __call__(self, outputs: dict, targets: Sequence[dict]) -> list[tuple[Tensor, Tensor]]:
        """Match one set of predictions.

        Args:
            outputs: ``pred_logits`` ``(B, Q, C + 1)`` and ``pred_boxes`` ``(B, Q, 4)``.
            targets: for each image ``labels`` ``(n,)`` and ``boxes`` ``(n, 4)``, centre and size, normalised.
        Returns: for each image the query numbers (ascending) and the object numbers they match, ``(min(Q, n),)`` int64.
        """
        return self.match_layers([outputs], targets)[0]

    @torch.no_grad()
    def match_layers(self, layers: Sequence[dict], targets: Sequence[dict]) -> list[list[tuple[Tensor, Tensor]]]:
        """``__call__`` for several sets of predictions at once, with a single copy to the CPU.

        Returns: on the CPU, one list per layer.
        """
        counts = [len(target["boxes"]) for target in targets]
        logits = torch.stack([layer["pred_logits"] for layer in layers])  # (layers, B, Q, C + 1)
        if len(targets) != logits.shape[1]:
            raise ValueError(f"matching: {logits.shape[1]} images with {len(targets)} targets; expected one for each")
        boxes = torch.stack([layer["pred_boxes"] for layer in layers])
        blocks = self.costs(logits, boxes, targets).split(counts, dim=-1)
        own = torch.cat([block[:, image].flatten(1) for image, block in enumerate(blocks)], dim=1).cpu()
        num_queries = logits.shape[2]

        def assign(cost: Tensor, count: int) -> tuple[Tensor, Tensor]:
            return tuple(map(torch.from_numpy, linear_sum_assignment(cost.view(num_queries, count).numpy())))

        costs = (layer.split([num_queries * count for count in counts]) for layer in own)
        return [list(map(assign, of_layer, counts)) for of_layer in costs]

    def costs(self, logits: Tensor, boxes: Tensor, targets: Sequence[dict]) -> Tensor:
        """Cost of every query for every object of the batch: ``(layers, B, Q, sum of n)``, fp32, finite."""
        labels = torch.cat([target["labels"] for target in targets])
        wanted = torch.cat([target["boxes"] for target in targets]).float()
        probability = logits.float().softmax(-1)[..., labels]
        boxes = boxes.float().flatten(0, 2)
        distance = torch.cdist(boxes, wanted, p=1)
        giou = generalized_box_iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy"))
        cost = self.cost_bbox * distance - self.cost_giou * giou
        cost = cost.view(*logits.shape[:3], -1) - self.cost_class * probability
        return cost.nan_to_num(nan=WORST)
