#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Write the demo data, real images without a download.

    python scripts/make_demo_data.py --out DIR [--task classification|detection|all]

classification: scikit-learn's 1,797 handwritten digits (8 x 8 grey pixels, the UCI repository's "Optical Recognition of
    Handwritten Digits"), enlarged to 32 x 32, as DIR/digits/train/<digit>/*.png and val/, and the same images as
    train.tar and val.tar. 60% of each digit is for training; the split never changes.
detection: see scripts/demo_detection.py.
"""

import argparse
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 32  # pixels: with 4 x 4 patches, one patch for each pixel of the 8 x 8 originals
TRAIN_SHARE = 0.6
SPLIT_SEED = 0


def write_digits(folder: Path) -> dict[str, int]:
    """Write the digits to ``folder`` (ImageNet layout, and tar files); returns the number of images of each split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit(
            "make_demo_data.py needs scikit-learn, which ships the images: pip install scikit-learn"
        ) from None
    pixels, labels = load_digits(return_X_y=True)
    pixels = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)

    counts = {}
    for split, indices in _stratified_split(labels).items():
        with tarfile.open(_parent(folder / f"{split}.tar"), "w") as tar:
            for index in indices:
                name = f"{labels[index]}/digit_{index:04d}.png"
                png = _png(pixels[index])
                _parent(folder / split / name).write_bytes(png)
                member = tarfile.TarInfo(name)  # no timestamp or owner: the same bytes on every machine
                member.size = len(png)
                tar.addfile(member, io.BytesIO(png))
        counts[split] = len(indices)
    return counts


def _stratified_split(labels: np.ndarray) -> dict[str, list[int]]:
    rng = np.random.RandomState(SPLIT_SEED)  # legacy generator: its stream never changes
    split = {"train": [], "val": []}
    for digit in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == digit))
        cut = round(TRAIN_SHARE * len(members))
        split["train"] += sorted(members[:cut].tolist())
        split["val"] += sorted(members[cut:].tolist())
    return split


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, format="PNG")
    return buffer.getvalue()


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; created if needed")
    parser.add_argument("--task", choices=("classification", "detection", "all"), default="all")
    args = parser.parse_args()
    if args.task in ("classification", "all"):
        counts = write_digits(args.out / "digits")
        print(f"{args.out / 'digits'}: {counts['train']} training and {counts['val']} validation images of 10 digits")
    if args.task in ("detection", "all"):
        from demo_detection import write_detection_data

        for part, count in write_detection_data(args.out).items():
            print(f"{args.out / part}: {count} images")


if __name__ == "__main__":
    main()
