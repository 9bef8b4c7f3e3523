"""Pictures of detections, and of where the encoder looks."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

READABLE_SIDE = 480  # a smaller image is enlarged by a whole factor, so that the labels can be read
COLOURS = [
    "#e6194b",
    "#3cb44b",
    "#ffe119",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#46f0f0",
    "#f032e6",
    "#bcf60c",
    "#fabebe",
    "#008080",
    "#e6beff",
]


def draw_objects(
    image: Image.Image, boxes: Tensor, category_ids: Sequence[int], labels: Sequence[str], masks: Tensor | None = None
) -> Image.Image:
    """An image with boxes and labels, each category in its colour.

    Args:
        boxes: ``(n, 4)`` corners, in pixels of ``image``.
        category_ids, labels: one an object; the id chooses the colour, the label is written.
        masks: ``(n, height, width)``, non-zero = object.
    """
    factor = max(1, math.ceil(READABLE_SIDE / min(image.size)))
    enlarged = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    canvas = pil_to_tensor(enlarged)
    colours = [COLOURS[category % len(COLOURS)] for category in category_ids]
    if len(boxes) == 0:
        return enlarged
    if masks is not None:
        enlarged_masks = F.interpolate(masks[:, None].float(), scale_factor=factor, mode="nearest")[:, 0] > 0
        canvas = draw_segmentation_masks(canvas, enlarged_masks, alpha=0.5, colors=colours)
    canvas = draw_bounding_boxes(
        canvas,
        boxes.float().cpu() * factor,
        list(labels),
        colors=colours,
        width=2,
        fill_labels=True,
        label_colors="black",
    )
    return to_pil_image(canvas)


def side_by_side(*pictures: Image.Image) -> Image.Image:
    """Pictures of one height in a row, with a white gap."""
    gap = 8
    row = Image.new("RGB", (sum(p.width + gap for p in pictures) - gap, max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + gap
    return row


def cell_of(point: tuple[float, float], size: tuple[int, int], height: int, width: int) -> int:
    """The token of a ``height x width`` map that covers a point of an image of ``size`` (width, height)."""
    x, y = point
    if not (0 <= x < size[0] and 0 <= y < size[1]):
        raise ValueError(f"--point {x:g},{y:g} lies outside the image, which is {size[0]} x {size[1]} pixels (x,y).")
    return int(y * height / size[1]) * width + int(x * width / size[0])


@torch.no_grad()
def attention_maps(layer: torch.nn.Module, inputs: tuple, token: int) -> dict[str, Tensor]:
    """Where one token looks in an encoder layer, ``(height, width)`` each: the mean of the heads, and each head.

    Args:
        layer: an ``RPESelfAttention``; inputs: what it was called with.
    """
    query_key, _, padding, height, width = inputs
    weights = layer.weights(query_key, padding, height, width)[0, :, token].unflatten(-1, (height, width))
    return {"mean of heads": weights.mean(0)} | {f"head {head}": values for head, values in enumerate(weights)}
