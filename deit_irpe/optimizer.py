# SPDX-License-Identifier: Apache-2.0
"""What is optimised and how fast: DeiT's parameter groups, optimizer and learning-rate schedule."""

from timm.optim import create_optimizer_v2
from timm.scheduler import TanhLRScheduler, create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn, optim

from irpe_train.errors import blamed_on


def scaled_lr(lr: float, batch_size: int, world_size: int, accumulate: int = 1) -> float:
    """Linear scaling: ``lr`` is meant for 512 images an update. Source: Goyal et al., 2017; DeiT."""
    return lr * batch_size * world_size * accumulate / 512


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups, without and with weight decay, in the order of the published checkpoints.

    Not decayed: 1-D tensors, biases, ``pos_embed``, ``cls_token``. Lookup tables are decayed, and so is ``dist_token``,
    which timm's own list would spare. Without weight decay there is one group, as published.
    """
    if not weight_decay:
        return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": 0.0}]
    groups = [{"params": [], "weight_decay": 0.0}, {"params": [], "weight_decay": weight_decay}]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim <= 1 or name.endswith(".bias") or name in ("pos_embed", "cls_token")
            groups[0 if spared else 1]["params"].append(parameter)
    return groups


def build_optimizer(
    model: nn.Module,
    *,
    name: str = "adamw",
    lr: float,
    weight_decay: float = 0.05,
    eps: float | None = 1e-8,
    betas: tuple[float, ...] | None = None,
    momentum: float = 0.9,
) -> optim.Optimizer:
    """timm's optimizer of that name over ``parameter_groups``; ``None`` leaves the optimizer's own default."""
    options = {key: value for key, value in (("eps", eps), ("betas", betas)) if value is not None}
    groups = parameter_groups(model, weight_decay)
    with blamed_on(f"--opt {name} with lr {lr:g}, momentum {momentum:g}, {options}"):
        return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=weight_decay, momentum=momentum, **options)


def build_scheduler(
    optimizer: optim.Optimizer,
    *,
    name: str = "cosine",
    epochs: int,
    warmup_epochs: int = 5,
    warmup_lr: float = 1e-6,
    min_lr: float = 1e-5,
    decay_epochs: float = 30,
    decay_rate: float = 0.1,
    noise: list[float] | None = None,
    noise_pct: float = 0.67,
    noise_std: float = 1.0,
    seed: int = 0,
) -> Scheduler:
    """Warm-up, then ``name``; to be stepped with the number of the epoch just finished.

    As published, epoch ``e`` therefore runs at the schedule's value for ``e - 1``, and epochs 0 and 1 at ``warmup_lr``.
    """
    with blamed_on(
        f"--sched {name} with {epochs} epochs, {warmup_epochs} of warm-up, from {warmup_lr:g} to {min_lr:g}"
    ):
        if name == "tanh":
            span = [share * epochs for share in noise or ()]
            return TanhLRScheduler(
                optimizer,
                epochs,
                lb=-6.0,  # the published bounds; in today's timm -7 and 3
                ub=4.0,
                lr_min=min_lr,
                warmup_t=warmup_epochs,
                warmup_lr_init=warmup_lr,
                noise_range_t=span if len(span) > 1 else next(iter(span), None),
                noise_pct=noise_pct,
                noise_std=noise_std,
                noise_seed=seed,
            )
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=name,
            num_epochs=epochs,
            warmup_epochs=warmup_epochs,
            warmup_lr=warmup_lr,
            min_lr=min_lr,
            decay_epochs=decay_epochs,
            decay_rate=decay_rate,
            noise=noise,
            noise_pct=noise_pct,
            noise_std=noise_std,
            noise_seed=seed,
        )
    return scheduler
