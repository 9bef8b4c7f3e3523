# SPDX-License-Identifier: Apache-2.0
"""``irpe detect predict``: the objects in images. Files, flags and results: `get_predict_parser`."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from unicodedata import normalize

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_convert

from detr_irpe.args import get_predict_parser
from detr_irpe.data.annotations import Annotations
from detr_irpe.data.coco import decode_in_frame
from detr_irpe.data.problems import naming_problems
from detr_irpe.data.segmentations import encode_masks
from detr_irpe.drawing import attention_maps, cell_of, draw_objects, side_by_side
from detr_irpe.load_model import Detector
from irpe_ops.modules import buckets_of
from irpe_ops.visualize import draw_over_image, draw_tables, save
from irpe_train.distributed import choose_device
from irpe_train.errors import BadData, shown
from irpe_train.launch import launch
from irpe_train.logger import logger, set_up_logging
from irpe_train.outputs import OutputFolder, result_names
from irpe_train.pixels import files_of, is_turned, read_image

REACH = 8  # rows and columns in the pictures of learned tables, including the patch itself
MOST_POINTS = 3  # query points of attention, if none are given: the centres of the best detections


def main(args: argparse.Namespace) -> None:
    """Predict for every image of ``args.images``. A file that it may not replace is refused before any work."""
    if not (args.images or args.tables):
        raise ValueError("nothing to predict: name images, or give --tables")
    if args.point and not args.attention:
        raise ValueError("--point is the query point of --attention: add --attention")
    set_up_logging(0)
    names = result_names(files_of(args.images, besides=args.out))
    suffixes = (".png", ".json", *(["_attention.png"] if args.attention else []))
    results = [name + suffix for name in names.values() for suffix in suffixes]
    out = OutputFolder(args.out, names)
    out.refuse_to_replace(results + (["tables.png"] if args.tables or args.attention else []))
    detector = Detector(args.resume, choose_device(args.device))
    if args.attention:
        if not len(detector.encoder.layers):
            raise ValueError(f"--attention: {args.resume} has no encoder layer to inspect")
        seen, layer = [], detector.encoder.layers[-1].self_attn
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    encoded = (args.tables or args.attention) and buckets_of(detector.encoder)
    if args.tables and not encoded:
        raise ValueError(f"--tables: {args.resume} has no relative position encoding")
    truth = Truth(args.annotations, detector.names) if args.annotations else None
    numbers = {image: truth.number_of(image) if truth else None for image in names}
    if encoded:
        with out.writing("tables.png") as (file,):
            save(draw_tables(detector.encoder, REACH, REACH), file)
        logger.info(f"tables.png is in {args.out}")

    unreadable = []
    for path, number in numbers.items():
        try:
            annotated = truth.annotations.sizes[number].tolist() if truth else None
            image, frame = read_in_frame(path, annotated)
            if annotated and 0 not in annotated and annotated != [image.height, image.width]:
                sides = f"{image.height} x {image.width} pixels, annotated {annotated[0]} x {annotated[1]}"
                logger.warning(f"{path}: {sides}: its annotated objects may be drawn in the wrong places")
            for point in args.point or ():
                cell_of(point, image.size, 1, 1)
        except (OSError, ValueError) as error:  # the other images are still predicted
            unreadable.append(str(error) if isinstance(error, OSError) else f"{path}: {error}")
            logger.error(unreadable[-1])
            continue
        every = detector(image)
        found = {kind: values[every["scores"] > args.threshold] for kind, values in every.items()}
        picture = draw_found(image, found, detector.names)
        if truth is not None:
            picture = side_by_side({"truth": truth.draw(image, number, detector.names), "prediction": picture})
        name = names[path]
        described = describe(path, image, found, detector.names) | {"frame": frame}
        with out.writing(f"{name}.png", f"{name}.json") as (picture_file, json_file):
            picture.save(picture_file)
            json_file.write_text(json.dumps(described, indent=1))
        count = f"{len(found['scores'])} objects"
        if not len(found["scores"]) and len(every["scores"]):
            count += f" (best score {every['scores'][0]:.2f}, --threshold {args.threshold:g})"
        logger.info(f"{shown(path)}: {count} -> {shown(args.out / name)}.png, .json")
        if args.attention:
            points = args.point or centres(found["boxes"], image)
            with out.writing(f"{name}_attention.png") as (file,):
                draw_attention(image, layer, seen.pop(), points, path.name, file)
    if unreadable:
        raise BadData(f"{len(unreadable)} of {len(names)} images could not be predicted: {'; '.join(unreadable[:3])}")


def read_in_frame(path: Path, annotated: Sequence[int] | None) -> tuple[Image.Image, str]:
    """An RGB image, and which frame its pixels are in: ``displayed``, as a person sees it, or ``stored``.

    Args: annotated: height and width in its annotations, 0 if they do not say; None without annotations.
    Raises: OSError: it cannot be read; the message names it.
    """
    stored = read_image(path)
    if not is_turned(stored):
        return stored, "displayed"
    if annotated is None:
        return read_image(path, upright=True), "displayed"
    image = decode_in_frame(path.read_bytes(), str(path), annotated)
    return image, "stored" if image.size == stored.size else "displayed"


class Truth:
    """The annotations of the images to predict. ``names``: the checkpoint's, for a file without categories."""

    def __init__(self, path: Path, names: dict[int, str]):
        self.annotations = Annotations(path, categories=names)
        self.files = [normalize("NFC", name.decode()) for name in self.annotations.names]
        if names:
            for _, problem in naming_problems(names, self.annotations.categories, Path("the checkpoint"), path):
                logger.warning(str(problem))

    def number_of(self, path: Path) -> int:
        """The index of a file's image: the one whose name, with folders, ends its path, or the only one of that name.

        Raises: ValueError: there is none, or more than one.
        """
        for place in (os.path.abspath(path), os.path.realpath(path)):  # a link or its target may have the name
            whole = normalize("NFC", place)  # macOS decomposes accents
            if fitting := [i for i, name in enumerate(self.files) if whole.endswith("/" + name)]:
                break
        longest = max((len(self.files[i]) for i in fitting), default=0)
        fitting = [i for i in fitting if len(self.files[i]) == longest]
        fitting = fitting or [i for i, name in enumerate(self.files) if Path(name).name == normalize("NFC", path.name)]
        if len(fitting) != 1:
            count = "no image" if not fitting else f"{len(fitting)} images"
            raise ValueError(f"--annotations {self.annotations.path}: {count} called {path.name} there")
        return fitting[0]

    def draw(self, image: Image.Image, number: int, names: dict[int, str]) -> Image.Image:
        """The image with its annotated objects, in the colours of the predicted classes."""
        objects, known = self.annotations.of_image(number), self.annotations.categories
        ids = {name: i for i, name in names.items()}
        labels = [known[i] for i in objects["labels"].tolist()]
        chosen = [ids.get(label, i) for label, i in zip(labels, objects["labels"].tolist(), strict=True)]
        return draw_objects(image, box_convert(objects["boxes"], "xywh", "xyxy"), class_indices(chosen, names), labels)


def draw_found(image: Image.Image, found: dict[str, Tensor], names: dict[int, str]) -> Image.Image:
    """The image with the detections, each with its name and score."""
    ids = found["labels"].tolist()
    labels = [f"{names.get(i, i)} {score:.2f}" for i, score in zip(ids, found["scores"].tolist(), strict=True)]
    return draw_objects(image, found["boxes"], class_indices(ids, names), labels, found.get("masks"))


def class_indices(category_ids: Sequence[int], names: dict[int, str]) -> list[int]:
    """The index of each category among all, which sets its colour; an unknown one has its id."""
    places = {category: place for place, category in enumerate(sorted(names))}
    return [places.get(category, category) for category in category_ids]


def draw_attention(
    image: Image.Image, layer: nn.Module, inputs: tuple, points: Sequence[tuple[float, float]], name: str, path: Path
) -> None:
    """Save the attention of an encoder layer, called with ``inputs``, at ``points``."""
    grid = inputs[2].shape[1:]
    maps = [attention_maps(layer, inputs, cell_of(point, image.size, *grid)) for point in points]
    title = f"{name}: attention of each point in the last encoder layer ({grid[0]} x {grid[1]})"
    save(draw_over_image(image, points, maps, title), path)


def describe(path: Path, image: Image.Image, found: dict[str, Tensor], names: dict[int, str]) -> dict:
    """The detections of one image as plain data; masks as COCO's run-length encoding."""
    objects = [
        {
            "category_id": label,
            "category": names.get(label, str(label)),
            "score": round(score, 4),
            "box": [round(x, 2) for x in box],
        }
        for label, score, box in zip(*(found[name].tolist() for name in ("labels", "scores", "boxes")), strict=True)
    ]
    for entry, runs in zip(objects, encode_masks(found["masks"]) if "masks" in found else (), strict=False):
        entry["segmentation"] = {"size": runs["size"], "counts": runs["counts"].decode()}
    return {"image": str(path), "width": image.width, "height": image.height, "objects": objects}


def centres(boxes: Tensor, image: Image.Image) -> list[tuple[float, float]]:
    """The query points if none are given: the centres of the best detections, or the middle of the image."""
    limit = torch.tensor([image.width, image.height]) - 1
    points = box_convert(boxes[:MOST_POINTS], "xyxy", "cxcywh")[:, :2].clamp(min=0).minimum(limit).tolist()
    return list(dict.fromkeys(map(tuple, points))) or [(image.width / 2, image.height / 2)]


if __name__ == "__main__":
    launch(main, get_predict_parser())
