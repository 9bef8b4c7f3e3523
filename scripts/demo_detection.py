# SPDX-License-Identifier: Apache-2.0
"""The detection half of the demo data: handwritten digits on crops of photographs, with exact boxes and masks.

Everything comes with scikit-learn: its 1,797 handwritten digits (8 x 8) and its two photographs (``china.jpg``,
``flower.jpg``). No digit and no part of a photograph is in both training and validation.

``coco_digits/`` is a COCO-layout set, as folders and as archives: 1 to 3 digits of 28 to 44 pixels per image, all
images 64 x 80 pixels so that no figure depends on how a batch is padded. ``digits_on_photos/`` has single digits on
photographs in the ImageNet layout: a backbone learns to classify on it before it learns to detect, as the published
DETR's did on ImageNet.
"""

import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle

CATEGORY_IDS = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)  # of the digits 0 to 9: not from 0, and with gaps
HEIGHT, WIDTH = 64, 80  # pixels
DIGIT_SIDE = (28, 44)  # pixels; the ink of a digit is smaller than its square
MOST_DIGITS = 3
CLASSIFIED_SIDE = 54  # pixels of an image with one digit
IMAGES = {"train2017": 6000, "val2017": 300}
CLASSIFIED_IMAGES = {"train": 9000, "val": 500}
SEED = 0


class Source:
    """Digits and photographs of one half: ``train`` or ``val``."""

    def __init__(self, half: str) -> None:
        from sklearn.datasets import load_digits, load_sample_images

        pixels, labels = load_digits(return_X_y=True)
        order = np.random.RandomState(SEED).permutation(len(labels))
        cut = len(order) * 3 // 4
        chosen = order[:cut] if half == "train" else order[cut:]
        self.digits = np.round(pixels.reshape(-1, 8, 8)[chosen] * (255 / 16)).astype(np.uint8)
        self.labels = labels[chosen]
        left, right = (0, 448) if half == "train" else (448, 640)
        self.photos = [photo[:, left:right] for photo in load_sample_images().images]
        self.rng = np.random.RandomState(SEED + (half == "val"))  # legacy generator: its stream never changes

    def background(self, height: int, width: int) -> np.ndarray:
        """A random window of a photograph, (height, width, 3) uint8."""
        photo = self.photos[self.rng.randint(len(self.photos))]
        top = self.rng.randint(photo.shape[0] - height + 1)
        left = self.rng.randint(photo.shape[1] - width + 1)
        return photo[top : top + height, left : left + width].copy()

    def digit(self) -> tuple[np.ndarray, int]:
        """A random digit, enlarged and cropped to its ink: opacity (h, w) uint8, and its number."""
        number = self.rng.randint(len(self.labels))
        side = self.rng.randint(DIGIT_SIDE[0], DIGIT_SIDE[1] + 1)
        ink = np.asarray(Image.fromarray(self.digits[number]).resize((side, side), Image.Resampling.BILINEAR))
        drawn = ink > 64
        rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
        ink = np.where(drawn, ink, 0)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        return ink, int(self.labels[number])

    def paint(self, image: np.ndarray, ink: np.ndarray, top: int, left: int) -> None:
        """Draw ``ink`` on ``image`` in place, in the one of five random colours that contrasts most with it."""
        under = image[top : top + ink.shape[0], left : left + ink.shape[1]]
        colours = self.rng.randint(0, 256, (5, 3))
        colour = colours[abs(colours - under.reshape(-1, 3).mean(0)).sum(1).argmax()]
        opacity = ink[..., None] / 255
        under[:] = np.round(under * (1 - opacity) + colour * opacity)

    def scene(self, digits: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
        """An image with up to ``digits`` digits that do not touch; label and mask (HEIGHT, WIDTH) bool of each."""
        image, objects = self.background(HEIGHT, WIDTH), []
        taken = np.zeros((HEIGHT, WIDTH), dtype=bool)
        for _ in range(digits):
            ink, label = self.digit()
            h, w = ink.shape
            for _ in range(20):  # tries to find a free place
                top, left = self.rng.randint(HEIGHT - h + 1), self.rng.randint(WIDTH - w + 1)
                if not taken[top : top + h, left : left + w].any():
                    taken[top : top + h, left : left + w] = True
                    self.paint(image, ink, top, left)
                    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
                    mask[top : top + h, left : left + w] = ink > 0
                    objects.append((label, mask))
                    break
        return image, objects


def write_detection_data(out: Path) -> dict[str, int]:
    """Write ``out/coco_digits`` and ``out/digits_on_photos``; returns the number of images in each part."""
    counts = {}
    for split, count in IMAGES.items():
        write_coco_split(out / "coco_digits", split, count, Source(split.removesuffix("2017")))
        counts[f"coco_digits/{split}"] = count
    for split, count in CLASSIFIED_IMAGES.items():
        write_class_folders(out / "digits_on_photos" / split, count, Source(split))
        counts[f"digits_on_photos/{split}"] = count
    return counts


def write_coco_split(root: Path, split: str, count: int, source: Source) -> None:
    """``annotations/instances_{split}.json``, ``{split}/*.jpg`` and ``{split}.zip`` below ``root``."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    images, annotations = [], []
    with zipfile.ZipFile(root / f"{split}.zip", "w", zipfile.ZIP_STORED) as archive:
        for image_id in range(1, count + 1):
            image, objects = source.scene(source.rng.randint(1, MOST_DIGITS + 1))
            name = f"{image_id:012d}.jpg"
            Image.fromarray(image).save(root / split / name, quality=95)
            archive.writestr(zipfile.ZipInfo(f"{split}/{name}"), (root / split / name).read_bytes())  # no timestamp
            images.append({"id": image_id, "file_name": name, "height": image.shape[0], "width": image.shape[1]})
            for digit, mask in objects:
                annotations.append(annotation(len(annotations) + 1, image_id, CATEGORY_IDS[digit], mask))
    categories = [{"id": i, "name": str(digit)} for digit, i in enumerate(CATEGORY_IDS)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def annotation(number: int, image_id: int, category_id: int, mask: np.ndarray) -> dict:
    """One object in COCO's format, with compressed RLE; the box is the tightest around the mask."""
    runs = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": rle.toBbox(runs).tolist(),
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()},
    }


def write_class_folders(folder: Path, count: int, source: Source) -> None:
    """``folder/<digit>/*.jpg``: one digit per image, anywhere on a photograph."""
    for index in range(count):
        ink, label = source.digit()
        image = source.background(CLASSIFIED_SIDE, CLASSIFIED_SIDE)
        top = source.rng.randint(CLASSIFIED_SIDE - ink.shape[0] + 1)
        left = source.rng.randint(CLASSIFIED_SIDE - ink.shape[1] + 1)
        source.paint(image, ink, top, left)
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / str(label) / f"{index:05d}.jpg", quality=95)
