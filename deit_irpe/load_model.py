# SPDX-License-Identifier: Apache-2.0
"""A trained classifier: a checkpoint's model, built from the flags it was trained with, or an exported ONNX file."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torchvision.transforms import Compose

from deit_irpe.args import get_args_parser, image_size, image_size_text, keywords
from deit_irpe.data.classes import stored_classes
from deit_irpe.data.transforms import MEAN, STD, build_transform
from deit_irpe.models import build_model
from deit_irpe.models.finetune import head_prefixes, resample_positions, trained_grid
from irpe_train.checkpoint import Checkpoint, load_matching
from irpe_train.errors import BadCheckpoint, in_one_line
from irpe_train.export import read_onnx
from irpe_train.logger import logger
from irpe_train.pixels import to_rgb
from irpe_train.run_log import changed_flags

# A checkpoint may come from anyone, so only its flags that describe the network are read.
MODEL_FLAGS = dict(model=str | None, rpe=str | None, no_abs_pos=bool, model_kwargs=list, input_size=int | str)
LARGEST_INPUT = 4096  # pixels per side that a checkpoint may ask for; a larger size must be given as a flag


class Classifier:
    """A trained model with its class names and its preprocessing.

    Attributes:
        classes: their names, in the order of the outputs.
        seen: maps an RGB image to the resized and cropped part that the model sees.
    """

    def __init__(self, source: str, device: torch.device, **flags):
        """Args: flags: see ``load_model``; an ONNX file needs none."""
        self.source, self.device = source, device
        if Path(source).suffix.lower() == ".onnx":
            if any(flags.values()):
                raise ValueError(f"{source} is already exported: leave out --model, --rpe, --ema and --input-size")
            self._model, self.classes, size = load_onnx(Path(source))
        else:
            self._model, args, self.classes = load_model(source, **flags)
            self._model.to(device)
            size = image_size(args.input_size)
        *geometry, to_tensor, normalise = build_transform(False, size).transforms
        self.seen, self._to_pixels = Compose(geometry), Compose([to_tensor, normalise])

    @property
    def model(self) -> nn.Module:
        """Raises ValueError: an exported file has no modules to inspect."""
        if not isinstance(self._model, nn.Module):
            raise ValueError("--attention and --tables inspect a model: give the checkpoint, not the exported file")
        return self._model

    def pixels(self, image: Image.Image) -> Tensor:
        """The model's input for an image: ``(1, 3, H, W)``."""
        return self._to_pixels(self.seen(to_rgb(image)))[None].to(self.device)

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> Tensor:
        """The probability of each class, ``(C,)``, on the CPU."""
        probabilities = self._model(self.pixels(image)).float().softmax(1)[0].cpu()
        if not probabilities.isfinite().all():
            raise BadCheckpoint(f"checkpoint {self.source}: its output has values that are NaN or infinite")
        return probabilities


def load_model(source: str, *, ema: bool = False, **flags) -> tuple[nn.Module, argparse.Namespace, list[str]]:
    """The trained model of a checkpoint, in evaluation mode, on the CPU. Nothing but the checkpoint is downloaded.

    Args:
        source: path or address; ema: use its moving average.
        flags: ``model``, ``rpe``, ``input_size``, ...; they override those in the checkpoint unless None.
    Returns: model, all flags, class names.
    Raises: TypeError: a flag is unknown. ValueError: neither the checkpoint nor ``flags`` name a model. BadCheckpoint:
        its flags describe no model, or one that its weights do not fit; found before memory is allocated for it.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    defaults = vars(get_args_parser().parse_args([])) | {"model": None, "drop": 0.0, "drop_path": 0.0}
    if unknown := given.keys() - defaults:
        raise TypeError(
            f"load_model: unknown flag {', '.join(sorted(unknown))}; known are those of deit_irpe, such as rpe"
        )
    checkpoint = Checkpoint.read(source)
    weights = checkpoint.weights("model_ema" if ema else "model")
    known = _stored_flags(checkpoint)
    args = argparse.Namespace(**defaults | known | given)
    stored = {name: known[name] for name in given if known.get(name) is not None}
    if others := changed_flags(get_args_parser(), args, stored=stored):
        logger.warning(f"flags differ from the checkpoint's: {', '.join(others)}. Those given now are used")
    if args.model is None:
        detector = "; a DETR is for irpe detect" if any(key.startswith("transformer.") for key in weights) else ""
        raise ValueError(f"{source} does not say which model it is: add --model NAME (and --rpe SPEC){detector}")
    if ":" in args.model and "model" not in given:
        raise BadCheckpoint(f"checkpoint {source}: its model is {args.model!r}, from elsewhere: give it with --model")
    try:
        heads = [f"{prefix}bias" for prefix in head_prefixes(_shapes(args, 1000, weights))]
        num_classes = next((len(weights[name]) for name in heads if name in weights), 1000)
        shapes = _shapes(args, num_classes, weights)
    except Exception as error:  # the flags may be anything
        raise BadCheckpoint(f"checkpoint {source}: its flags describe no model ({in_one_line(error)})") from error
    if "input_size" in stored:  # for another size, positions are resampled as in evaluation
        weights, notes = resample_positions(shapes, weights, trained_grid(shapes, checkpoint), source=source)
        for key, note in notes.items():
            logger.info(f"--input-size {args.input_size}: {key} {note}")
    load_matching(shapes, {key: value.to("meta") for key, value in weights.items()}, source=source)
    model = build_model(args, num_classes)
    load_matching(model, weights, source=source)
    classes = stored_classes(checkpoint) or class_names(num_classes)
    if len(classes) != num_classes:
        raise BadCheckpoint(f"checkpoint {source}: it names {len(classes)} classes, its class head has {num_classes}")
    return model.eval(), args, classes


def _stored_flags(checkpoint: Checkpoint) -> dict:
    """The checkpoint's flags that describe the network."""
    source, stored = checkpoint.source, checkpoint.contents.get("args")
    stored = argparse.Namespace() if stored is None else stored
    if not isinstance(stored, argparse.Namespace):
        raise BadCheckpoint(f"checkpoint {source}: its 'args' are a {type(stored).__name__}, not flags")
    stored = {name: value for name, value in vars(stored).items() if value not in (None, "", {})}  # timm's, and ours
    flags = {name: stored[name] for name in MODEL_FLAGS if name in stored}
    for name, value in flags.items():
        if not isinstance(value, MODEL_FLAGS[name]):
            raise BadCheckpoint(f"checkpoint {source}: its flags describe no model: {name} is {value!r:.100}")
    if "input_size" in flags:
        stored_size(flags["input_size"], source=source)
    return flags


def stored_size(size: object, *, source: str) -> tuple[int, int]:
    """The ``input_size`` of a checkpoint or exported file, as `image_size` gives it. Raises: BadCheckpoint."""
    try:
        sides = image_size(image_size_text(str(size)))
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise BadCheckpoint(f"checkpoint {source}: its input_size: {error}; give --input-size") from error
    if max(sides) > LARGEST_INPUT:
        raise BadCheckpoint(f"checkpoint {source}: its input_size is {size}; if that is right, give --input-size")
    return sides


def _shapes(args: argparse.Namespace, num_classes: int, weights: dict[str, Tensor]) -> nn.Module:
    """The model on the meta device. Raises ValueError if it has far more parameters than the checkpoint."""
    elements, made = sum(value.numel() for value in weights.values()), 0
    if any(isinstance(value, int | float) and value > elements for value in keywords(args.model_kwargs).values()):
        raise ValueError(f"a model_kwargs larger than the {elements} numbers in it")  # some are loop counts in timm

    def count(*_) -> None:
        nonlocal made
        made += 1
        if made > 100 + 4 * len(weights):
            raise ValueError(f"a model of far more than the {len(weights)} tensors in it")

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            return build_model(args, num_classes)
    finally:
        hook.remove()


def class_names(count: int) -> list[str]:
    """Names for the classes of a checkpoint without any: ImageNet's if there are 1000, else numbers."""
    if count != 1000:
        return [f"class {number}" for number in range(count)]
    imagenet = ImageNetInfo("imagenet-1k")
    return [imagenet.index_to_description(number) for number in range(count)]


def load_onnx(path: Path) -> tuple[Callable[[Tensor], Tensor], list[str], tuple[int, int]]:
    """An exported classifier: a function from images to logits, its classes, and the height and width of its images.

    Raises: ImportError, BadCheckpoint: onnxruntime is missing; ``deit_irpe.export`` did not write the file.
    """
    with read_onnx(path, "classifier that deit_irpe.export wrote") as exported:
        metadata = {key: json.loads(value) for key, value in exported.metadata.items()}
        classes = stored_classes(Checkpoint(str(path), metadata))
        size = stored_size(metadata["input_size"], source=str(path))
        if (metadata["mean"], metadata["std"]) != (list(MEAN), list(STD)):
            raise ValueError(f"mean {metadata['mean']} and std {metadata['std']} are not those of this program")
        if classes is None:
            raise ValueError("it names no classes")

        def model(images: Tensor) -> Tensor:
            return exported.run(["logits"], images=images)[0]

        if (answer := model(torch.zeros(1, 3, *size)).shape) != (1, len(classes)):
            raise ValueError(f"it has {len(classes)} classes, but its output for one image is {tuple(answer)}")
    return model, classes, size
