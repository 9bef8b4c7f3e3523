# SPDX-License-Identifier: Apache-2.0
"""Classes are an ordered list of names; this file compares those of data sets and checkpoints."""

from torch.utils.data import Dataset

from deit_irpe.data.images import same_text
from irpe_train.checkpoint import Checkpoint
from irpe_train.errors import BadCheckpoint, some
from irpe_train.logger import logger


def stored_classes(checkpoint: Checkpoint) -> list[str] | None:
    """The names of a checkpoint's classes, in the order of its outputs; None if it has none, like the published ones.

    Raises: BadCheckpoint: they are not a list of different names.
    """
    source, classes = checkpoint.source, checkpoint.contents.get("classes")
    if classes is None:
        return None
    names = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    classes = [same_text(name) for name in classes] if names else []
    if not classes or len(set(classes)) < len(classes):
        raise BadCheckpoint(f"checkpoint {source}: its 'classes' are not a list of different names")
    for name in classes:
        try:
            name.encode(errors="surrogateescape")  # like a folder's name that is not UTF-8
        except UnicodeEncodeError as error:
            raise BadCheckpoint(f"checkpoint {source}: its class {name!r} is not text ({error.reason})") from error
    return classes


def check_same_classes(one: list[str], other: list[str], names: tuple[str, str] = ("train", "val")) -> None:
    """Raises ValueError, naming the classes, unless both lists (of the data sets ``names``) have the same classes, and
    more than one: a single folder around all classes would give an accuracy of 100%.
    """
    only = []
    for name, missing in ((names[0], set(one) - set(other)), (names[1], set(other) - set(one))):
        if missing:
            only.append(f"only in {name}: {some(sorted(missing))}")
    if only:
        raise ValueError(f"{names[0]} and {names[1]} have different classes; {'; '.join(only)}")
    if len(one) == 1:
        raise ValueError(f"one class, {one[0]!r}, leaves nothing to learn; expected one folder per class, side by side")


def check_resumed_classes(stored: list[str] | None, classes: list[str], *, source: str) -> None:
    """Raises BadCheckpoint unless a resumed run has exactly the classes of its checkpoint."""
    if stored is None or stored == list(classes):
        return
    try:
        check_same_classes(stored, classes, ("the checkpoint", "the training data"))
    except ValueError as error:
        raise BadCheckpoint(f"checkpoint {source}: {error}. To start from its weights, use --finetune") from error
    raise BadCheckpoint(f"checkpoint {source}: the training data have its classes in another order; use --finetune")


def renumber(dataset: Dataset, classes: list[str], *, whose: str) -> None:
    """Renumber the labels of ``dataset`` as in ``classes``, and log any change.

    Args: whose: where ``classes`` are from, for messages. It may have more classes than the data.
    Raises: ValueError: the data have other classes, or their numbers are fixed.
    """
    own = list(dataset.classes)
    if own == list(classes):
        return
    if unknown := set(own) - set(classes):
        numbered = " Their classes are numbers: name them, see docs/data.md." if all(map(str.isdigit, own)) else ""
        raise ValueError(f"the validation data have classes that {whose} lacks: {some(sorted(unknown))}.{numbered}")
    if not hasattr(dataset, "relabel"):
        raise ValueError(f"the validation data and {whose} have the same classes in another order")
    dataset.relabel(classes)
    logger.info(f"labels are numbered as in {whose}: images of {len(own)} of its {len(classes)} classes")
