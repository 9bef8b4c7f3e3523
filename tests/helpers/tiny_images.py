"""Small real image files: the classes differ in colour, so that a model learns them in seconds."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_images(root: Path, counts: dict[str, int], side: int = 32, seed: int = 0) -> Path:
    """``root/<class>/<n>.png``: noise, brighter in red, green, blue or everywhere for class 0, 1, 2 or 3."""
    rng = np.random.RandomState(seed)
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.randint(0, 90, (side, side, 3))
            pixels[:, :, label if label < 3 else slice(3)] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return root
