# SPDX-License-Identifier: Apache-2.0
"""Segment ids of a panoptic map as the colours of a PNG, COCO's format: red + 256 green + 65536 blue."""

from io import BytesIO

import numpy as np
from PIL import Image


def encode_ids(ids: np.ndarray) -> bytes:
    """Segment ids ``(height, width)``, below ``2 ** 24``, as a PNG."""
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    with BytesIO() as buffer:
        Image.fromarray(colours).save(buffer, format="PNG")
        return buffer.getvalue()


def decode_ids(png: bytes) -> np.ndarray:
    """The inverse: int64 ``(height, width)``."""
    return ids_of_colours(Image.open(BytesIO(png)).convert("RGB"))


def ids_of_colours(image: Image.Image) -> np.ndarray:
    """Of an RGB image: int64 ``(height, width)``."""
    return np.asarray(image).astype(np.int64) @ np.array([1, 256, 65536])
