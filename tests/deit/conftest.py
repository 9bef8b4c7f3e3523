"""Small real files for the tests: images of a class differ in colour, so that a model can learn them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def write_images(root: Path, counts: dict[str, int], side: int = 32, seed: int = 0) -> Path:
    """``root/<class>/<n>.png``; class number c of C is brightest in the c-th of C vertical stripes, under noise."""
    rng = np.random.RandomState(seed)
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.randint(0, 90, (side, side, 3))
            width = side // len(counts)
            pixels[:, label * width:(label + 1) * width] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def stripes(tmp_path_factory) -> Path:
    """48 training and 22 validation images of 4 classes, 32 x 32 pixels."""
    root = tmp_path_factory.mktemp("stripes")
    names = ["ant", "bee", "cat", "dog"]
    write_images(root / "train", dict.fromkeys(names, 12), seed=1)
    write_images(root / "val", dict(zip(names, (6, 6, 5, 5), strict=True)), seed=2)
    return root
