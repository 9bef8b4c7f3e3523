# SPDX-License-Identifier: Apache-2.0
"""A trained classifier, from images to class probabilities: from a checkpoint or an exported ONNX file."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Compose

from deit_irpe.args import image_size
from deit_irpe.data.classes import stored_classes
from deit_irpe.data.transforms import MEAN, STD, build_transform
from deit_irpe.load_model import load_model, stored_size
from irpe_train.errors import BadCheckpoint
from irpe_train.export import read_onnx


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
        """The model's input for an RGB image: ``(1, 3, H, W)``."""
        return self._to_pixels(self.seen(image))[None].to(self.device)

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> Tensor:
        """The probability of each class, ``(C,)``, on the CPU."""
        probabilities = self._model(self.pixels(image)).float().softmax(1)[0].cpu()
        if not probabilities.isfinite().all():
            raise BadCheckpoint(f"checkpoint {self.source}: its output has values that are NaN or infinite")
        return probabilities


def load_onnx(path: Path) -> tuple[Callable[[Tensor], Tensor], list[str], tuple[int, int]]:
    """An exported classifier: a function from images to logits, its classes, and the height and width of its images.

    Raises: ImportError, BadCheckpoint: onnxruntime is missing; ``deit_irpe.export`` did not write the file.
    """
    with read_onnx(path, "classifier that deit_irpe.export wrote") as exported:
        metadata = {key: json.loads(value) for key, value in exported.metadata.items()}
        classes = stored_classes(metadata, source=str(path))
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
