# SPDX-License-Identifier: Apache-2.0
"""Classes are identities: a category id must mean the same in a checkpoint as in the data."""

import unicodedata
from collections.abc import Mapping

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from irpe_train.checkpoint import Checkpoint
from irpe_train.errors import BadCheckpoint
from irpe_train.logger import logger


def classes_in(checkpoint: Checkpoint) -> int:
    """The number of outputs of the class head of a DETR, without "no object"."""
    bias = next((value for key, value in checkpoint.weights().items() if key.endswith("class_embed.bias")), None)
    if bias is None or bias.ndim != 1 or len(bias) < 2:
        missing = "no class head (class_embed.bias) in it; it is not from a DETR"
        raise BadCheckpoint(f"checkpoint {checkpoint.source}: {missing}")
    return len(bias) - 1


def categories_of(checkpoint: Checkpoint) -> dict[int, str]:
    """The categories (id -> name) a checkpoint was trained on: its own, or COCO's if it has as many classes.

    The published checkpoints name none. Empty if nothing is known.
    """
    given = checkpoint.contents.get("categories")
    if given is not None:
        named = isinstance(given, dict) and all(type(i) is int and isinstance(n, str) for i, n in given.items())
        if not named or not all(0 <= i < 2**31 for i in given):
            raise BadCheckpoint(f"checkpoint {checkpoint.source}: its 'categories' are not names by category id")
        return given
    coco = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    if classes_in(checkpoint) != len(coco):
        return {}
    return {i: name for i, name in enumerate(coco) if name not in ("__background__", "N/A")}


def plain_name(name: str) -> str:
    """A name for comparison: ignores case, surrounding spaces and Unicode variants of accents."""
    return unicodedata.normalize("NFC", name).strip().casefold()


def same_name(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and plain_name(one) == plain_name(other)


def differences(trained: Mapping[int, str], here: Mapping[int, str]) -> list[str]:
    """The ids of the data whose meaning in a checkpoint differs, as text."""
    return [
        f"{i} is {name!r} here and {trained[i]!r} there" if i in trained else f"{i} {name!r} is not there"
        for i, name in here.items()
        if not same_name(trained.get(i), name)
    ]


def compare_for_evaluation(checkpoint: Checkpoint, here: Mapping[int, str]) -> None:
    """Log how the classes of a checkpoint differ from those of the data it is evaluated on.

    Raises: BadCheckpoint: the same names have other ids, so that correct predictions would count as wrong.
    """
    source, trained = checkpoint.source, categories_of(checkpoint)
    if not trained:
        logger.info(f"checkpoint {source} does not name its classes, so nothing checks that its ids mean the same here")
        return
    ids = {plain_name(name): i for i, name in trained.items()}
    moved = [
        f"{name!r} is {i} here and {ids[plain]} there"
        for i, name in here.items()
        if (plain := plain_name(name)) in ids and not same_name(trained.get(i), name)
    ]
    if moved:
        how = f"{'; '.join(moved[:5])}. Number the categories of the annotations as it does."
        raise BadCheckpoint(f"checkpoint {source} numbers its categories differently from this data: {how}")
    if odd := differences(trained, here):
        logger.warning(f"checkpoint {source} was trained on other categories than this data has: {'; '.join(odd[:5])}")
    elif len(here) < len(trained):
        some = f"{len(here)} of the {len(trained)} categories of checkpoint {source} are in this data"
        logger.info(f"{some}; the others are not scored")


def compare_for_resume(checkpoint: Checkpoint, here: Mapping[int, str], *, same_run: bool = True) -> None:
    """Raises BadCheckpoint: a run would continue with other classes than it started with.

    Args: same_run: it is the same run; otherwise other categories are only a warning.
    """
    trained = categories_of(checkpoint)
    other = differences(trained, here) + [f"{i} {name!r} is there only" for i, name in trained.items() if i not in here]
    if trained and other:
        how = f"{'; '.join(other[:5])}. Start a new run from it with --finetune."
        how = f"checkpoint {checkpoint.source} was trained on other categories than this data has: {how}"
        if same_run:
            raise BadCheckpoint(how)
        logger.warning(how)
