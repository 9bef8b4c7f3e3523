# SPDX-License-Identifier: Apache-2.0
"""One epoch of training, and one evaluation."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV2
from torch import Tensor, nn

from irpe_train.distributed import gather
from irpe_train.logger import logger
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
    mixup: Callable | None = None,
    max_norm: float | None = None,
    ema: ModelEmaV2 | None = None,
    train_mode: bool = True,
) -> dict[str, float]:
    """Train for the rest of the epoch that ``steps`` is in.

    Args:
        model: called with images ``(B, 3, H, W)``, on ``precision.device``.
        criterion: loss of (images, outputs, targets).
        mixup: (images, targets) to mixed images and soft targets ``(B, C)``.
        max_norm: gradients are clipped to this norm.
        ema: the moving average of the weights.
        train_mode: False trains without dropout and stochastic depth, as the published code does with ``--finetune``.
    Returns: means over the epoch's iterations: ``lr`` of the first parameter group, ``loss``.
    """
    model.train(train_mode)
    meters = steps.state.meters
    for images, targets in steps.log_every(10):
        images = images.to(precision.device, non_blocking=True)
        targets = targets.to(precision.device, non_blocking=True)
        if mixup is not None:
            images, targets = mixup(images, targets)
        with precision.autocast():
            loss = criterion(images, model(images), targets)
        lr = optimizer.param_groups[0]["lr"]
        steps.watch(loss, lr=lr)
        precision.backward(loss / steps.group_size)
        steps.confirm()
        if steps.group_ends:
            precision.update(optimizer, model.parameters(), clip=max_norm)
            if ema is not None:
                ema.update(model)
        meters.update(lr=lr, loss=loss)
    return meters.averages()


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], precision: Precision, confusion: Tensor | None = None
) -> dict[str, float]:
    """Accuracy over images and cross entropy over batches, over all processes.

    Args: confusion: ``(C, C)`` int64; this process's images are added to it: rows are true classes, columns
        predictions.
    Returns: ``loss``, the mean over equally weighted batches; ``acc1`` and ``acc5`` in percent. With fewer than five
        classes ``acc5`` is 100.
    """
    model.eval()
    meters = MetricLogger()
    correct = torch.zeros(2, dtype=torch.int64, device=precision.device)
    images_seen = 0
    for images, targets in meters.log_every(loader, every=10, header="Test:"):
        images = images.to(precision.device, non_blocking=True)
        targets = targets.to(precision.device, non_blocking=True)
        with precision.autocast():
            logits = model(images)
        logits = logits.float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5)
        hits = ranked == targets[:, None]
        correct += torch.stack([hits[:, :1].sum(), hits.sum()])
        images_seen += len(images)
        if confusion is not None:
            confusion.index_put_((targets.cpu(), ranked[:, 0].cpu()), torch.ones(len(targets), dtype=torch.int64), True)
        meters.update(loss=F.cross_entropy(logits, targets))
    counts = gather((*correct.tolist(), images_seen))  # integers: the same figure with any number of processes
    top1, top5, total = (sum(column) for column in zip(*counts, strict=True))
    stats = {**meters.averages(), "acc1": 100 * top1 / total, "acc5": 100 * top5 / total}
    if not math.isfinite(stats["loss"]):
        logger.warning("the outputs for some images are NaN or infinite, so these figures mean nothing")
    logger.info(f"* Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f} loss {stats['loss']:.3f}")
    return stats
