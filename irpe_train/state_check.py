# SPDX-License-Identifier: Apache-2.0
"""Checks stored states on loading: optimizers and schedulers accept anything, and fail an epoch later."""

import copy
import math
import warnings
from collections import defaultdict

import torch

from irpe_train.errors import some

MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def load_checked(part, given: dict, *, epoch: int) -> None:
    """``part.load_state_dict(given)`` for an optimizer, a scheduler or a scaler, and a trial of the next step.

    Args: epoch: the next one.
    Raises: one of MISFITS: its values differ in type from those of ``part``, or the next step would fail, or give
        weights or a learning rate that are not finite. Do not use ``part`` then.
    """
    own = part.state_dict()
    _check_form(own, given, "its state")
    if len(own.keys() & given.keys()) < len(own) / 2:
        raise ValueError(f"its state has no {some(sorted(own.keys() - given.keys()))}")
    for key in given:
        if key not in own and (key == "optimizer" or callable(getattr(type(part), str(key), None))):
            raise TypeError(f"{key} is not a value")
    if isinstance(part, torch.optim.Optimizer):
        known = {index for group in given["param_groups"] for index in group["params"]}
        if stray := [key for key in given["state"] if key not in known]:
            raise ValueError(f"its state is for {stray[0]!r:.80}, which is not one of its parameters")
        can_be_tried = _can_be_tried(part)
        part.load_state_dict(given)
        if can_be_tried:
            _try_step(part)
        return
    part.load_state_dict(given)
    if hasattr(part, "optimizer"):
        _try_schedule(part, epoch)


def _check_form(own, given, where: str) -> None:
    if isinstance(own, dict) and isinstance(given, dict):
        for key in own.keys() & given.keys():
            _check_form(own[key], given[key], f"{where} {key}")
    elif isinstance(own, (list, tuple)) and isinstance(given, (list, tuple)):
        if len(own) != len(given):
            raise ValueError(f"{where} has {len(given)} entries, not {len(own)}")
        for number, pair in enumerate(zip(own, given, strict=True)):
            _check_form(*pair, f"{where} {number}")
    elif isinstance(own, (int, float)) and isinstance(given, (int, float)):
        if math.isfinite(own) and not math.isfinite(given):
            raise ValueError(f"{where} is {given}")
    elif own is not None and given is not None and not isinstance(given, type(own)):
        raise TypeError(f"{where} is a {type(given).__name__}, not a {type(own).__name__}")


def _can_be_tried(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a copy of it can step: optimizers that wrap another cannot be copied."""
    try:
        _try_step(optimizer, first_only=True)
    except MISFITS:
        return False
    return True


def _try_step(optimizer: torch.optim.Optimizer, first_only: bool = False) -> None:
    """One update of a copy of each parameter, with zero gradients."""
    trial = copy.copy(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            tried = parameter.detach().clone().requires_grad_()
            tried.grad = torch.zeros_like(tried)
            trial.param_groups = [group | {"params": [tried]}]
            trial.state = defaultdict(dict, {tried: copy.deepcopy(optimizer.state.get(parameter, {}))})
            trial.step()
            if not tried.isfinite().all():
                raise ValueError("its next step would make weights that are not finite")
            if first_only:
                return


def _try_schedule(scheduler, epoch: int) -> None:
    """Compute the next learning rates with a copy."""
    trial = copy.copy(scheduler)
    trial.optimizer = copy.copy(scheduler.optimizer)
    trial.optimizer.param_groups = [dict(group) for group in scheduler.optimizer.param_groups]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "step() before optimizer.step()"
        trial.step(*([] if isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler) else [epoch]))
    for group in trial.optimizer.param_groups:
        if not -1e-9 < float(group["lr"]) < math.inf:  # rounding may leave less than zero at a schedule's end
            raise ValueError(f"its next learning rate is {float(group['lr']):g}")
