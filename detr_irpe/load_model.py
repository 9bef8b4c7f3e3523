# SPDX-License-Identifier: Apache-2.0
"""A trained detector: a checkpoint's model, built from the flags it was trained with, or an exported ONNX file."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from detr_irpe.args import MODEL_FLAGS, get_args_parser
from detr_irpe.classes import categories_of, classes_in
from detr_irpe.data.transforms import prepare_image
from detr_irpe.models import build_model
from detr_irpe.models.postprocess import PostProcess
from irpe_train.checkpoint import Checkpoint, load_matching
from irpe_train.errors import BadCheckpoint, first_line
from irpe_train.export import read_onnx
from irpe_train.pixels import to_rgb

LARGEST_IMAGE_SIZE = 10_000  # pixels; a larger photo does not fit in memory


class Detector:
    """A trained model with its image size, category names and post-processing.

    Attributes: names: category id -> name.
    """

    def __init__(self, source: str, device: torch.device):
        self.device = device
        if Path(source).suffix.lower() == ".onnx":
            self.model, self.image_size, self.names = load_onnx(Path(source))
            self.postprocessors = {"bbox": PostProcess()}
        else:
            self.model, self.postprocessors, flags, self.names = load_model(source)
            self.model.to(device)
            self.image_size = flags.image_size

    @property
    def encoder(self) -> nn.Module:
        """Raises ValueError: an exported file has no modules to inspect."""
        if not isinstance(self.model, nn.Module):
            raise ValueError("--attention and --tables inspect a model: give the checkpoint, not the exported file")
        return getattr(self.model, "detr", self.model).transformer.encoder

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        """The detections in an image, best first, on the CPU: ``scores``, ``labels``, ``boxes`` (corners, in
        pixels), and with a mask head ``masks`` ``(N, height, width)``. Labels without a category are left out."""
        pixels = prepare_image(to_rgb(image), self.image_size).to(self.device)
        outputs = self.model([pixels])
        size = torch.tensor([[image.height, image.width]])
        results = self.postprocessors["bbox"](outputs, size)
        if "segm" in self.postprocessors:
            results = self.postprocessors["segm"](results, outputs, size, torch.tensor([pixels.shape[-2:]]))
            results[0]["masks"] = results[0]["masks"][:, 0]
        found = {kind: values.cpu() for kind, values in results[0].items()}
        order = found["scores"].argsort(descending=True)
        if self.names:  # otherwise every id may be a category
            order = order[torch.isin(found["labels"][order], torch.tensor(list(self.names)))]
        return {kind: values[order] for kind, values in found.items()}


def load_model(source: str) -> tuple[nn.Module, dict[str, nn.Module], argparse.Namespace, dict[int, str]]:
    """The trained model of a checkpoint, in evaluation mode, on the CPU. Nothing but the checkpoint is downloaded.

    Args: source: path or address.
    Returns: model (without auxiliary outputs), post-processors, the flags it was built from, and its categories.
    Raises: BadCheckpoint: it does not say how its model was built, or its weights belong to another model.
    """
    checkpoint = Checkpoint.read(source)
    weights, args = checkpoint.weights(), _flags(checkpoint)
    try:
        with torch.device("meta"):  # allocates nothing, whatever the flags ask for
            shapes = build_model(args)[0]
    except (TypeError, ValueError, RuntimeError, ArithmeticError, AssertionError) as error:
        raise BadCheckpoint(f"checkpoint {source}: its flags do not describe a DETR ({first_line(error)})") from error
    load_matching(shapes, {key: value.to("meta") for key, value in weights.items()}, source=source)
    model, _, postprocessors = build_model(args)
    load_matching(model, weights, source=source)
    return model.eval(), postprocessors, args, categories_of(checkpoint)


def _flags(checkpoint: Checkpoint) -> argparse.Namespace:
    source, trained = checkpoint.source, checkpoint.contents.get("args")
    if not isinstance(trained, argparse.Namespace) or not hasattr(trained, "backbone"):  # the published ones have it
        why = "these say how to build the model. Use one that training a DETR wrote; a classifier is for irpe classify"
        raise BadCheckpoint(f"checkpoint {source} has no 'args' with the flags of a DETR: {why}")
    args = get_args_parser().parse_args([])
    for name in MODEL_FLAGS:
        default, value = getattr(args, name), getattr(trained, name, getattr(args, name))
        wanted = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
            raise BadCheckpoint(f"checkpoint {source}: its flag {name} is {value!r:.80}, not {type(default).__name__}")
        setattr(args, name, value)
    if not 0 < args.image_size <= LARGEST_IMAGE_SIZE:
        raise BadCheckpoint(f"checkpoint {source}: its flag image_size is {args.image_size}, larger than any photo")
    if args.enc_layers + args.dec_layers > len(checkpoint.weights()):
        raise BadCheckpoint(f"checkpoint {source}: its flags name more layers than it has weights")
    args.eval, args.aux_loss = True, False  # no backbone weights are downloaded; only the last decoder layer
    args.num_classes = classes_in(checkpoint)
    return args


def load_onnx(path: Path) -> tuple[Callable[[list[Tensor]], dict], int, dict[int, str]]:
    """An exported detector, called like a DETR with one image; its image size; the categories.

    Raises: ImportError, BadCheckpoint: onnxruntime is missing; ``detr_irpe.export`` did not write the file.
    """
    with read_onnx(path, "detector that detr_irpe.export wrote") as exported:
        categories = {int(i): str(name) for i, name in json.loads(exported.metadata["categories"]).items()}
        image_size = int(exported.metadata["image_size"])
        if not 0 < image_size <= LARGEST_IMAGE_SIZE:
            raise ValueError(f"its image_size is {image_size}; expected 1 to {LARGEST_IMAGE_SIZE}")

    def model(images: list[Tensor]) -> dict[str, Tensor]:
        (image,) = images
        padding = torch.zeros(1, *image.shape[-2:], dtype=torch.bool)
        names = ["pred_logits", "pred_boxes"]
        return dict(zip(names, exported.run(names, images=image[None], padding=padding), strict=True))

    return model, image_size, categories
