# SPDX-License-Identifier: Apache-2.0
"""Checks a backend on a small grid, and times it at the shape of the call."""

import contextlib
import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from irpe_ops.attention_call import AttentionCall, Encoding

ALLOWED = 4.0  # times the error of plain PyTorch in the same dtype


class Measurement(NamedTuple):
    """The result for one kind of call: milliseconds of each correct candidate, and why others are left out."""

    ms: dict[str, float]
    left_out: dict[str, str]

    def __str__(self) -> str:
        return ", ".join(f"{name} {self.ms[name]:.3g} ms" for name in sorted(self.ms, key=self.ms.get))


def trains(call: AttentionCall) -> bool:
    """Whether backward will follow. Dropout is a sign too: reentrant checkpointing runs forward without gradients."""
    tensors = [call.q, call.k, call.v, *(part.table for rpe in call.encodings for part in rpe.parts)]
    return call.dropout_p > 0 or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def measure(
    call: AttentionCall, candidates: Mapping[str, Callable[[AttentionCall], Tensor]], eager: Callable
) -> Measurement:
    """Check every candidate on a small grid, and time it at the shape of ``call``.

    Raises: RuntimeError: a candidate has left the GPU unusable for this process.
    """
    training, device = trains(call), call.q.device
    ms, left_out = {}, {}
    # Hides the tensors saved for backward here from the run's own hooks, such as activation checkpointing.
    unhooked = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    devices = [device] if call.q.is_cuda else []
    with (
        torch.random.fork_rng(devices),
        torch.inference_mode(False),
        torch.set_grad_enabled(training),
        unhooked,
        _nondeterministic(),
    ):
        small = _small_copy(call, training)
        with torch.autocast(device.type, enabled=False):
            exact = run(eager, in_double(small), training)
        allowed = ALLOWED * max(distance(run(eager, small, training), exact), torch.finfo(call.q.dtype).eps)
        for name, attention in candidates.items():
            try:
                error = distance(run(attention, small, training), exact)
                if not error <= allowed:  # not `>`, which a NaN would pass
                    raise ArithmeticError(f"relative error {error:.1e}; {allowed:.1e} is allowed")
                ms[name] = _milliseconds(functools.partial(run, attention, _copy(call, training), training), device)
            except Exception as error:  # from a compiler, driver or kernel: the run continues without it
                words = str(error).strip().splitlines()
                left_out[name] = f"{type(error).__name__}: {words[0] if words else 'no message'}"
                _check_device(device, name, left_out[name])
    if call.q.is_cuda:  # neither the memory used here nor its peak belongs to the run
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return Measurement(ms, left_out)


@contextlib.contextmanager
def _nondeterministic() -> Iterator[None]:
    """Deterministic algorithms off: plain PyTorch, the reference, may have no deterministic ones."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _check_device(device: torch.device, name: str, reason: str) -> None:
    try:
        wait(device)
    except RuntimeError as error:
        raise RuntimeError(
            f"attention backend {name!r} has left {device} unusable for this process ({reason}); "
            "restart with another backend: backend='eager', or --attn-backend eager"
        ) from error


def wait(device: torch.device) -> None:
    """Until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _copy(call: AttentionCall, training: bool, copied: Callable[[Tensor], Tensor] = torch.clone) -> AttentionCall:
    """The call with its own leaf tensors and modules, so that the run's graph is not touched."""
    q, k, v = (copied(x.detach()).requires_grad_(training) for x in (call.q, call.k, call.v))
    mask = call.attn_mask
    if mask is not None:
        change = torch.clone if mask.dtype == torch.bool else copied
        mask = change(mask.detach()).requires_grad_(mask.requires_grad)
    return call._replace(q=q, k=k, v=v, attn_mask=mask, **_own_encodings(call, copied))


def _own_encodings(call: AttentionCall, copied: Callable[[Tensor], Tensor] = torch.clone) -> dict[str, Encoding | None]:
    """Copies of rpe_q, rpe_k and rpe_v. Their tables may be non-leaf tensors: replicas, views of one flat parameter."""
    tables = [part.table for rpe in call.encodings for part in rpe.parts]
    own = {id(t): nn.Parameter(copied(t.detach()), requires_grad=t.requires_grad) for t in tables}
    return {name: copy.deepcopy(getattr(call, name), own) for name in ("rpe_q", "rpe_k", "rpe_v")}


def _small_copy(call: AttentionCall, training: bool) -> AttentionCall:
    """A call of the same kind on a small grid, with random inputs and tables, and no dropout."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(like: Tensor, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(like)

    batch, heads, length, head_dim = call.q.shape
    height, width, skip = None, None, 0
    if call.height is not None:
        height, width, skip = 5, 7, length - call.height * call.width
    length = height * width + skip if height is not None else 40
    batch = min(batch, 2)
    q, k, v = (normal(call.q, batch, heads, length, head_dim).requires_grad_(training) for _ in range(3))
    padding, mask = None, None
    if call.key_padding_mask is not None:
        padding = torch.zeros(batch, length, dtype=torch.bool, device=call.q.device)
        padding[:, length - length // 4 :] = True
    if call.attn_mask is not None:
        mask = torch.randn(length, length, generator=generator, device="cpu").to(call.q.device)
        mask = mask > 1 if call.attn_mask.dtype == torch.bool else mask.to(call.attn_mask.dtype)
        mask.requires_grad_(call.attn_mask.requires_grad)
    sizes = {"height": height, "width": width, "key_padding_mask": padding, "attn_mask": mask, "scale": call.scale}
    small = AttentionCall(q, k, v, **_own_encodings(call), **sizes)
    with torch.no_grad():
        for rpe in small.encodings:
            for part in rpe.parts:
                part.table.copy_(normal(part.table, *part.table.shape) * 0.2)
    return small


def in_double(call: AttentionCall) -> AttentionCall:
    """The same call in fp64, with its own leaf tensors and modules."""
    return _copy(call, call.q.requires_grad, Tensor.double)


def run(attention: Callable[[AttentionCall], Tensor], call: AttentionCall, training: bool) -> list[Tensor]:
    """The output and, when training, the gradients of all inputs and tables for the sum of squares."""
    out = attention(call)
    if not training:
        return [out]
    tables = [part.table for rpe in call.encodings for part in rpe.parts]
    leaves = [x for x in (call.q, call.k, call.v, call.attn_mask, *tables) if x is not None and x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]


def distance(ours: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error of a tensor, in the L2 norm; NaN if any is, which Python's ``max`` may drop."""
    pairs = [(x.double(), y.double()) for x, y in zip(ours, exact, strict=True)]
    return float(torch.stack([(x - y).norm() / y.norm().clamp_min(1e-30) for x, y in pairs]).max())


def _milliseconds(run: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """The median of a few rounds after two for warm-up: on a GPU the device's own time, without launch overhead."""
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        run()
        wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    if device.type == "cuda":
        return gpu_milliseconds(run, launched_within=2 * statistics.median(times), rounds=rounds)
    return statistics.median(times[2:])


def gpu_milliseconds(run: Callable[[], object], launched_within: float, rounds: int) -> float:
    """The median of a few rounds. The GPU sleeps until each is fully launched, so its queue is full, as in training."""
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(launched_within * 2_000_000))  # cycles, at about 2 GHz
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
