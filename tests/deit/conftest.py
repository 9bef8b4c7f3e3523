"""The image folder shared by the tests in this folder."""

from pathlib import Path

import pytest

from tests.helpers.tiny_images import write_images


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> Path:
    """48 training and 22 validation images of 4 classes, 32 x 32 pixels."""
    root = tmp_path_factory.mktemp("colours")
    names = ["ant", "bee", "cat", "dog"]
    write_images(root / "train", dict.fromkeys(names, 12), seed=1)
    write_images(root / "val", dict(zip(names, (6, 6, 5, 5), strict=True)), seed=2)
    return root
