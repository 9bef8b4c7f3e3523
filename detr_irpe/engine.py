# SPDX-License-Identifier: Apache-2.0
"""One epoch of training, and one evaluation."""

import torch
from torch import Tensor, nn

from detr_irpe.data.coco_eval import CocoEvaluator
from detr_irpe.data.panoptic_eval import PanopticEvaluator
from irpe_train.loader import EvalLoader
from irpe_train.metrics import MetricLogger
from irpe_train.precision import Precision
from irpe_train.steps import Steps


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    steps: Steps,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    *,
    max_norm: float = 0.0,
) -> dict[str, float]:
    """Train for the rest of the epoch that ``steps`` is in.

    Args:
        model: from ``distributed.wrap``.
        criterion: (outputs, targets) -> losses by name; ``criterion.weight_dict`` weights them.
        max_norm: largest norm of the gradient; 0 does not clip.
    Returns: means over the epoch, in the published order: ``lr, class_error, loss``, weighted losses, unweighted ones.
    """
    model.train()
    criterion.train()
    meters = steps.state.meters
    for images, targets in steps.log_every(10):
        images, targets = to_device(images, targets, precision.device)
        with precision.autocast():
            outputs = model(images)
        losses = criterion(outputs, targets)
        loss, weighted = weigh(losses, criterion.weight_dict)
        lr = optimizer.param_groups[0]["lr"]
        steps.watch(loss, lr=lr, terms=weighted)
        precision.backward(loss / steps.group_size)
        steps.confirm()
        if steps.group_ends:
            precision.update(optimizer, model.parameters(), clip=max_norm)
        meters.update(lr=lr, **named_for_log(loss, weighted, losses))
    return meters.averages()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    criterion: nn.Module,
    postprocessors: dict[str, nn.Module],
    loader: EvalLoader,
    evaluator: CocoEvaluator,
    panoptic: PanopticEvaluator | None,
    precision: Precision,
) -> dict[str, float]:
    """Run a set through the plain model: losses go to the log, detections to the evaluators, which the caller scores.

    Returns: means over batches, in the published order: ``class_error, loss``, weighted losses, unweighted ones.
    """
    model.eval()
    criterion.eval()
    meters = MetricLogger()
    for images, targets in meters.log_every(loader, every=10, header="Test:"):
        images, targets = to_device(images, targets, precision.device)
        with precision.autocast():
            outputs = model(images)
        losses = criterion(outputs, targets)
        meters.update(**named_for_log(*weigh(losses, criterion.weight_dict), losses))

        sizes = torch.stack([target["size"] for target in targets])
        original_sizes = torch.stack([target["orig_size"] for target in targets])
        image_ids = [int(target["image_id"]) for target in targets]
        results = postprocessors["bbox"](outputs, original_sizes)
        if "segm" in postprocessors:
            results = postprocessors["segm"](results, outputs, original_sizes, sizes)
        evaluator.update(dict(zip(image_ids, results, strict=True)))
        if panoptic is not None:
            maps = postprocessors["panoptic"](outputs, sizes, original_sizes)
            for image_id, found in zip(image_ids, maps, strict=True):
                panoptic.update(image_id, found["png_string"], found["segments_info"])
    return meters.averages()


def to_device(images, targets: list[dict[str, Tensor]], device: torch.device) -> tuple:
    """A batch on ``device``, asynchronously if its memory is pinned."""
    moved = [{name: value.to(device, non_blocking=True) for name, value in target.items()} for target in targets]
    return images.to(device, non_blocking=True), moved


def weigh(losses: dict[str, Tensor], weights: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """The total loss, and the weighted terms that it sums; losses without a weight are only logged."""
    weighted = {name: loss * weights[name] for name, loss in losses.items() if name in weights}
    return sum(weighted.values()), weighted


def named_for_log(loss: Tensor, weighted: dict[str, Tensor], losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss terms by their names in ``log.txt``, in the published order."""
    unscaled = {f"{name}_unscaled": value for name, value in losses.items()}
    return {"class_error": losses["class_error"], "loss": loss} | weighted | unscaled
