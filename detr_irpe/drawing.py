# SPDX-License-Identifier: Apache-2.0
"""Pictures of detections and of the encoder's attention."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_segmentation_masks

from irpe_train.pixels import to_rgb

READABLE_SIDE = 480  # pixels; a smaller image is enlarged by an integer factor, so that the labels can be read
LARGEST_SIDE = 2048  # pixels; no image is enlarged beyond this, however thin it is
# Ten colours that colour-blind readers can distinguish: Paul Tol's "muted" scheme, its grey last.
PALETTE = (
    *("#cc6677", "#332288", "#ddcc77", "#117733", "#88ccee"),
    *("#882255", "#44aa99", "#999933", "#aa4499", "#dddddd"),
)


def draw_objects(
    image: Image.Image, boxes: Tensor, classes: Sequence[int], labels: Sequence[str], masks: Tensor | None = None
) -> Image.Image:
    """An image with boxes and labels, each class in its colour; lines and text grow with the image.

    Args:
        boxes: ``(n, 4)`` corners, in pixels of ``image``.
        classes, labels: one per object; the class's index among all classes sets the colour, the label is written.
        masks: ``(n, height, width)``, non-zero = object.
    """
    wanted = -(-READABLE_SIDE // min(image.size))
    factor = max(1, min(wanted, LARGEST_SIDE // max(image.size)))
    picture = to_rgb(image).resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    colours = [PALETTE[index % len(PALETTE)] for index in classes]
    if masks is not None and len(masks):
        enlarged = F.interpolate(masks[:, None].float(), scale_factor=factor, mode="nearest")[:, 0] > 0
        picture = to_pil_image(draw_segmentation_masks(pil_to_tensor(picture), enlarged, alpha=0.5, colors=colours))
    canvas, font, line = ImageDraw.Draw(picture), font_for(picture), max(2, min(picture.size) // 240)
    edge = torch.tensor([picture.width - 1, picture.height - 1] * 2)
    corners = (boxes * factor).minimum(edge).clamp(min=0).round().int().tolist()
    for (x0, y0, x1, y1), colour in zip(corners, colours, strict=True):
        x1, y1 = max(x0, x1), max(y0, y1)
        canvas.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=ink_on(colour), width=line + 2)  # visible anywhere
        canvas.rectangle((x0, y0, x1, y1), outline=colour, width=line)
    for (x0, y0, _, _), colour, label in zip(corners, colours, labels, strict=True):  # over all boxes
        left, top, right, bottom = canvas.textbbox((0, 0), label, font=font)
        width, height = right - left + 2 * line, bottom - top + 2 * line
        x = min(x0, max(picture.width - width, 0))
        y = y0 - height if y0 >= height else y0  # above the box, or inside it at the image border
        canvas.rectangle((x, y, x + width, y + height), fill=colour)
        canvas.text((x + line - left, y + line - top), label, fill=ink_on(colour), font=font)
    return picture


def font_for(picture: Image.Image) -> ImageFont.FreeTypeFont:
    """Pillow's own font, 1/40 of the shorter side high, but at least 12 pixels."""
    return ImageFont.load_default(size=max(12, min(picture.size) // 40))


def ink_on(colour: str) -> str:
    """Black or white, whichever is more readable on a colour (by its ITU-R BT.601 luminance)."""
    red, green, blue = ImageColor.getrgb(colour)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 127 else "white"


def side_by_side(pictures: dict[str, Image.Image]) -> Image.Image:
    """Pictures in a row with a white gap, their titles above them."""
    gap, font = 8, font_for(next(iter(pictures.values())))
    title = 2 * gap + font.size
    width = sum(picture.width + gap for picture in pictures.values()) - gap
    row = Image.new("RGB", (width, title + max(picture.height for picture in pictures.values())), "white")
    left = 0
    for name, picture in pictures.items():
        ImageDraw.Draw(row).text((left + gap, gap), name, fill="black", font=font)
        row.paste(picture, (left, title))
        left += picture.width + gap
    return row


def cell_of(point: tuple[float, float], size: tuple[int, int], height: int, width: int) -> int:
    """The token of a ``height x width`` map that covers a point of an image of ``size`` (width, height)."""
    x, y = point
    if not (0 <= x < size[0] and 0 <= y < size[1]):
        raise ValueError(f"--point {x:g},{y:g} is outside the image of {size[0]} x {size[1]} pixels (x,y).")
    return int(y * height / size[1]) * width + int(x * width / size[0])


@torch.no_grad()
def attention_maps(layer: torch.nn.Module, inputs: tuple, token: int) -> dict[str, Tensor]:
    """The attention of one token in an encoder layer, ``(height, width)`` each: the mean of the heads, and each head.

    Args: layer: an ``RPESelfAttention``; inputs: the arguments of its call.
    """
    query_key, _, mask = inputs
    weights = layer.weights(query_key, mask)[0, :, token].unflatten(-1, mask.shape[1:])
    return {"mean of heads": weights.mean(0)} | {f"head {head}": values for head, values in enumerate(weights)}
