# SPDX-License-Identifier: Apache-2.0
"""Builds the model, its losses and its initial weights from the flags."""

import argparse
from collections.abc import Collection

from torch import nn

from detr_irpe.args import MODEL_FLAGS, get_args_parser
from detr_irpe.classes import categories_of, compare_for_evaluation, differences
from detr_irpe.models.criterion import SetCriterion
from detr_irpe.models.detr import create_model
from detr_irpe.models.finetune import load_for_finetuning
from detr_irpe.models.matcher import HungarianMatcher
from detr_irpe.models.postprocess import PostProcess, PostProcessPanoptic, PostProcessSegm
from irpe_train import zoo
from irpe_train.checkpoint import Checkpoint, load_matching
from irpe_train.distributed import is_main
from irpe_train.errors import BadCheckpoint
from irpe_train.logger import logger
from irpe_train.run import warn_of_other_flags

# Largest category id plus one; COCO's thing ids end at 90. Any other data set had 20 in the published code.
PUBLISHED_NUM_CLASSES = {"coco": 91, "coco_panoptic": 250}
MAY_CHANGE = {"num_queries", "masks", "dataset_file", "image_size"}  # between a detector and a run that starts from it
PUBLISHED_THINGS = range(91)
SIZES = (  # flags with the names of `create_model`
    *("hidden_dim", "nheads", "enc_layers", "dec_layers", "dim_feedforward", "dropout", "pre_norm"),
    *("position_embedding", "dilation", "aux_loss", "masks"),
)
FILL = ("eval", "resume", "pretrained", "finetune", "frozen_weights")  # flags that name a checkpoint of the whole model


def build_model(
    args: argparse.Namespace, *, filled: bool | None = None, things: Collection[int] = PUBLISHED_THINGS
) -> tuple[nn.Module, SetCriterion, dict[str, nn.Module]]:
    """Model, losses and post-processors for the flags of a run; missing flags take their defaults. All on the CPU.

    Args:
        filled: a checkpoint will fill the model, so ``--backbone_weights`` is not needed; None: as the flags say.
        things: the countable categories of a panoptic set.
    """
    defaults = vars(get_args_parser().parse_args([]))
    args = argparse.Namespace(**{name: getattr(args, name, default) for name, default in defaults.items()})
    if filled is None:
        filled = any(getattr(args, flag) for flag in FILL)
    num_classes = args.num_classes
    if not isinstance(num_classes, int):  # "auto", or None in namespaces from elsewhere
        num_classes = PUBLISHED_NUM_CLASSES.get(args.dataset_file, 20)
    model = create_model(
        args.backbone,
        args.enc_rpe2d,
        num_classes,
        args.num_queries,
        _pretrained_backbone(args, filled),
        **{name: getattr(args, name) for name in SIZES},
        train_backbone=args.lr_backbone > 0,
        freeze_detr=bool(args.frozen_weights),
        attn_backend=args.attn_backend,
    )

    weights = {"loss_ce": 1.0, "loss_bbox": args.bbox_loss_coef, "loss_giou": args.giou_loss_coef}
    if args.masks:
        weights |= {"loss_mask": args.mask_loss_coef, "loss_dice": args.dice_loss_coef}
    if args.aux_loss:
        weights |= {f"{name}_{layer}": w for layer in range(args.dec_layers - 1) for name, w in weights.items()}
    matcher = HungarianMatcher(args.set_cost_class, args.set_cost_bbox, args.set_cost_giou)
    criterion = SetCriterion(num_classes, matcher, weights, args.eos_coef, masks=args.masks)

    postprocessors = {"bbox": PostProcess()}
    if args.masks:
        postprocessors["segm"] = PostProcessSegm()
        if args.dataset_file == "coco_panoptic":
            postprocessors["panoptic"] = PostProcessPanoptic({i: i in things for i in range(num_classes)})
    return model, criterion, postprocessors


def _pretrained_backbone(args: argparse.Namespace, filled: bool) -> bool | str:
    if filled or args.backbone_weights == "none":
        return False
    # The other processes get ImageNet's from rank 0, when DDP starts.
    return is_main() if args.backbone_weights == "imagenet" else str(args.backbone_weights)


def starting_checkpoints(args: argparse.Namespace) -> tuple[Checkpoint | None, Checkpoint | None]:
    """The checkpoint of ``--pretrained`` or ``--finetune``, and that of ``--frozen_weights``; None where not given."""
    start = str(zoo.fetch(args.pretrained)) if args.pretrained else args.finetune
    return tuple(Checkpoint.read(file) if file else None for file in (start, args.frozen_weights))


def start_from(
    model: nn.Module,
    args: argparse.Namespace,
    start: Checkpoint | None,
    frozen: Checkpoint | None,
    categories: dict[int, str],
) -> None:
    """Load the `starting_checkpoints`, and log what did not carry over.

    Raises: BadCheckpoint: a part that starts fresh would be evaluated.
    """
    for source in filter(None, (start, frozen)):
        only = set(MODEL_FLAGS) - (MAY_CHANGE if not args.eval else {"masks"} if source is frozen else set())
        warn_of_other_flags(get_args_parser(), args, source, "Those given now are used", only=only)
    if start is not None:
        trained = categories_of(start)
        same = args.eval or not trained or not differences(trained, categories)
        report = load_for_finetuning(model, start.weights(), source=start.source, same_classes=same)
        for key, what in report.items():
            logger.info(f"{'--pretrained' if args.pretrained else '--finetune'}: {key} {what}")
        if args.eval:
            if fresh := [f"{key} {what}" for key, what in report.items() if "fresh" in what]:
                raise BadCheckpoint(f"--eval: a part of this model was never trained ({fresh[0]}); train first")
            compare_for_evaluation(start, categories)
    if frozen is not None:
        load_matching(model.detr, frozen.weights(), source=frozen.source)
        compare_for_evaluation(frozen, categories)  # its class head is no longer trained
