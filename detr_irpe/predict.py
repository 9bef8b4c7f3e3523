"""Detect objects in images of your own: pictures with boxes (and masks), and the same as JSON.

    python -m detr_irpe.predict IMG... --resume X.pth --out DIR [--attention]

Writes DIR/NAME.png and DIR/NAME.json for each image; boxes are ``[x0, y0, x1, y1]`` in pixels, categories have the ids
and names of the data set the checkpoint was trained on. ``--annotations`` draws the ground truth beside the prediction.
``--attention`` adds DIR/NAME_attention.png, where the last encoder layer looks from chosen points, and, as ``--tables``
does without images, DIR/encodings.png, what the encodings learned for each offset.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from detr_irpe.boxes import xyxy_to_cxcywh
from detr_irpe.data.transforms import prepare_image
from detr_irpe.drawing import attention_maps, cell_of, draw_objects, side_by_side
from detr_irpe.load_model import load_model
from irpe_ops.visualize import draw_over_image, draw_tables, save
from irpe_train.arguments import fraction
from irpe_train.distributed import choose_device, logger, set_up_logging
from irpe_train.launch import launch

REACH = 8  # rows and columns in the pictures of learned tables, the patch itself counted
MOST_POINTS = 3  # of attention, where none are given: the centres of the best detections


class Detector:
    """A trained model with what it needs to speak of images: sizes, names, post-processing.

    Attributes:
        names: category id -> name.
    """

    def __init__(self, checkpoint_path: str, device: torch.device):
        self.model, self.postprocessors, self.flags, self.names = load_model(checkpoint_path)
        self.model.to(device)
        self.device = device

    @property
    def encoder(self) -> nn.Module:
        return getattr(self.model, "detr", self.model).transformer.encoder

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        """Every query's answer for an RGB image, best first, on the CPU: ``scores``, ``labels``, ``boxes`` (corners, in
        pixels), and with a mask head ``masks`` ``(Q, height, width)``."""
        pixels = prepare_image(image, self.flags.image_size).to(self.device)
        outputs = self.model([pixels])
        size = torch.tensor([[image.height, image.width]])
        results = self.postprocessors["bbox"](outputs, size)
        if "segm" in self.postprocessors:
            results = self.postprocessors["segm"](results, outputs, size, torch.tensor([pixels.shape[-2:]]))
            results[0]["masks"] = results[0]["masks"][:, 0]
        order = results[0]["scores"].argsort(descending=True).cpu()
        return {name: values.cpu()[order] for name, values in results[0].items()}


def main(args: argparse.Namespace) -> None:
    """Predict for every image of ``args.images``, one after the other."""
    if not (args.images or args.tables):
        raise ValueError("nothing to predict: name images, or ask for --tables")
    set_up_logging(0)
    _check_names(args.images)
    detector = Detector(args.resume, choose_device(args.device))
    truth = read_truth(args.annotations) if args.annotations else None
    args.out.mkdir(parents=True, exist_ok=True)
    for path in args.images:
        image = read_image(path)
        last_layer = _Inputs(detector.encoder.layers[-1].self_attn)
        found = detector(image)
        last_layer.handle.remove()
        found = {name: values[found["scores"] > args.threshold] for name, values in found.items()}
        picture = draw_objects(
            image, found["boxes"], found["labels"].tolist(), labels_of(found, detector.names), found.get("masks")
        )
        if truth is not None:
            picture = side_by_side(draw_truth(image, truth, path, detector.names), picture)
        picture.save(args.out / f"{path.stem}.png")
        (args.out / f"{path.stem}.json").write_text(json.dumps(describe(path, image, found, detector.names), indent=1))
        logger.info(f"{path}: {len(found['scores'])} objects -> {args.out / path.stem}.png, .json")
        if args.attention:
            points = args.point or centres(found["boxes"], image)
            grid = last_layer.inputs[3:]
            maps = [attention_maps(last_layer.layer, last_layer.inputs, cell_of(p, image.size, *grid)) for p in points]
            title = f"{path.name}: the last encoder layer ({grid[0]} x {grid[1]}), looking from each point"
            save(draw_over_image(image, points, maps, title), args.out / f"{path.stem}_attention.png")
    if args.tables or (args.attention and detector.flags.enc_rpe2d):
        save(draw_tables(detector.encoder, REACH, REACH), args.out / "encodings.png")


class _Inputs:
    """Keeps what an encoder layer's attention is called with."""

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.inputs: tuple = ()
        self.handle = layer.register_forward_pre_hook(self._keep)

    def _keep(self, _module: nn.Module, inputs: tuple) -> None:
        self.inputs = inputs


def read_image(path: Path) -> Image.Image:
    """An RGB image, turned as its EXIF orientation says."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:
        raise OSError(f"{path}: not an image that can be read ({error})") from error


def labels_of(found: dict[str, Tensor], names: dict[int, str]) -> list[str]:
    """``"cat 0.97"`` for each object."""
    return [
        f"{names.get(label, label)} {score:.2f}"
        for label, score in zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)
    ]


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
    for entry, mask in zip(objects, found.get("masks", ()), strict=False):
        from pycocotools import mask as coco_mask

        encoded = coco_mask.encode(np.asfortranarray(mask.numpy()))
        entry["segmentation"] = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    return {"image": str(path), "width": image.width, "height": image.height, "objects": objects}


def read_truth(path: Path) -> dict[str, list[dict]]:
    """COCO annotations by the name of the image file."""
    content = json.loads(path.read_text())
    names = {image["id"]: Path(image["file_name"]).name for image in content["images"]}
    truth: dict[str, list[dict]] = {name: [] for name in names.values()}
    for annotation in content["annotations"]:
        truth[names[annotation["image_id"]]].append(annotation)
    return truth


def draw_truth(image: Image.Image, truth: dict[str, list[dict]], path: Path, names: dict[int, str]) -> Image.Image:
    """The image with the objects that its annotations name."""
    if path.name not in truth:
        raise ValueError(f"--annotations: no image called {path.name} there.")
    categories = [annotation["category_id"] for annotation in truth[path.name]]
    boxes = torch.tensor([annotation["bbox"] for annotation in truth[path.name]]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]  # COCO has the left upper corner and the size
    return draw_objects(image, boxes, categories, [names.get(c, str(c)) for c in categories])


def centres(boxes: Tensor, image: Image.Image) -> list[tuple[float, float]]:
    """Where to look from when no point is given: inside the best detections, or the middle of the image."""
    limit = torch.tensor([image.width, image.height]) - 1
    points = xyxy_to_cxcywh(boxes[:MOST_POINTS])[:, :2].clamp(min=0).minimum(limit).tolist()
    return [tuple(point) for point in points] or [(image.width / 2, image.height / 2)]


def _check_names(images: Sequence[Path]) -> None:
    stems = [path.stem for path in images]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise ValueError(
            f"more than one image is called {', '.join(twice)}, and one result would overwrite the other: "
            "predict them one folder at a time."
        )


def _point(text: str) -> tuple[float, float]:
    x, _, y = text.partition(",")
    return float(x), float(y)


def get_predict_parser() -> argparse.ArgumentParser:
    """The parser of ``python -m detr_irpe.predict``."""
    parser = argparse.ArgumentParser(
        "python -m detr_irpe.predict",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    add = parser.add_argument
    add("images", nargs="*", type=Path, metavar="IMG", help="image files")
    add("--resume", required=True, metavar="X.pth", help="checkpoint of a training run, or a published one")
    add("--out", required=True, type=Path, metavar="DIR", help="where pictures and JSON go")
    add("--threshold", type=fraction, default=0.5, help="lowest score shown (default 0.5)")
    add("--annotations", type=Path, metavar="FILE", help="COCO annotations of the images: ground truth on the left")
    add("--attention", action="store_true", help="also draw encoder attention and the learned encodings")
    add("--tables", action="store_true", help="also draw the learned encodings (needs no image)")
    add(
        "--point",
        type=_point,
        action="append",
        metavar="X,Y",
        help="pixel to look from, may be repeated (default: the centres of the best detections)",
    )
    add("--device", default="cuda", help="cuda falls back to the CPU (default cuda)")
    return parser


if __name__ == "__main__":
    launch(main, get_predict_parser())
