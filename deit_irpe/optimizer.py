# SPDX-License-Identifier: Apache-2.0
"""DeiT's parameter groups, optimizer and learning-rate schedule."""

import argparse
import difflib

from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay
from timm.scheduler import TanhLRScheduler, create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn, optim

from irpe_train.errors import BadFlags, blamed_on


def scaled_lr(lr: float, batch_size: int, world_size: int, accumulate: int = 1) -> float:
    """Linear scaling: ``lr`` is for 512 images per update. Source: Goyal et al., 2017; DeiT."""
    return lr * batch_size * world_size * accumulate / 512


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups, without and with weight decay, in the order of the published checkpoints.

    Not decayed: 1-D tensors, biases, ``pos_embed``, ``cls_token``. Lookup tables are decayed, and so is ``dist_token``,
    unlike in timm. Without weight decay there is one group, as published.
    """
    if not weight_decay:
        return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": 0.0}]
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=("pos_embed", "cls_token"))


def build_optimizer(args: argparse.Namespace, model: nn.Module, lr: float) -> optim.Optimizer:
    """timm's optimizer ``--opt`` over ``parameter_groups``; its own defaults without ``--opt-eps``, ``--opt-betas``."""
    options = {key: value for key, value in (("eps", args.opt_eps), ("betas", args.opt_betas)) if value is not None}
    options |= dict(weight_decay=args.weight_decay, momentum=args.momentum)
    known = list_optimizers()
    if args.opt.lower().removeprefix("lookahead_") not in known:
        close = difflib.get_close_matches(args.opt.lower(), known)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.optim.list_optimizers() lists all"
        raise BadFlags(f"--opt {args.opt}: timm has no such optimizer; {hint}")
    with blamed_on(f"--opt {args.opt} with lr {lr:g}, {options}"):
        optimizer = create_optimizer_v2(parameter_groups(model, args.weight_decay), opt=args.opt, lr=lr, **options)
        if getattr(optimizer, "is_second_order", False):
            raise ValueError("it needs second derivatives, which training does not compute")
        return optimizer


def build_scheduler(args: argparse.Namespace, optimizer: optim.Optimizer) -> Scheduler:
    """Warm-up, then ``--sched``; step it with the number of the epoch just finished.

    As published, epoch ``e`` therefore runs at the schedule's value for ``e - 1``, and epochs 0 and 1 at
    ``--warmup-lr``.
    """
    noise = dict(noise_pct=args.lr_noise_pct, noise_std=args.lr_noise_std, noise_seed=args.seed)
    course = f"{args.epochs} epoch(s), {args.warmup_epochs} of warm-up, from {args.warmup_lr:g} to {args.min_lr:g}"
    with blamed_on(f"--sched {args.sched} with {course}"):
        if args.sched == "tanh":
            span = [share * args.epochs for share in args.lr_noise or ()]
            return TanhLRScheduler(
                optimizer,
                args.epochs,
                lb=-6.0,  # the published bounds; timm now has -7 and 3
                ub=4.0,
                lr_min=args.min_lr,
                warmup_t=args.warmup_epochs,
                warmup_lr_init=args.warmup_lr,
                noise_range_t=span if len(span) > 1 else next(iter(span), None),
                **noise,
            )
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=args.sched,
            num_epochs=args.epochs,
            warmup_epochs=args.warmup_epochs,
            warmup_lr=args.warmup_lr,
            min_lr=args.min_lr,
            decay_epochs=args.decay_epochs,
            decay_rate=args.decay_rate,
            noise=args.lr_noise,
            **noise,
        )
    return scheduler
