# SPDX-License-Identifier: Apache-2.0
"""How ``auto`` picks a backend: by a fixed order, or on a GPU the fastest correct one, checked and timed once.

On CUDA the first call of each kind (see `_kind`) runs every candidate forward and backward on a small grid against the
definition in fp64, then times it at the call's own shape. A candidate that fails to compile, runs out of memory or
differs is left out with one warning. The result is cached in the process and in the user's cache folder, by GPU,
PyTorch, Triton and backend version; within a process group the rank that measures first tells the others.
Under deterministic algorithms the first correct one is taken: times vary, and two runs must choose alike.
``IRPE_ATTENTION_TUNING=0`` keeps to the fixed order, as do ``torch.compile``, export and CUDA graphs without a warm-up,
because nothing can be measured inside them.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from irpe_ops.attention_call import AttentionCall
from irpe_ops.backends import eager, module_of
from irpe_ops.backends.measure import Measurement, measure, trains
from irpe_ops.modules import autocast_dtype
from irpe_ops.rpe_index import extension_file, is_plain, under_function_transform
from irpe_ops.whole_file import whole_file

# Without measuring, the first that can run the call is taken.
FIXED = {"cpu": ("compiled", "eager"), "meta": ("eager",)}
FIXED_ELSEWHERE = ("sdpa", "eager")
# On an AMD EPYC with one thread, sdpa took 0.4 to 0.6 of eager's time forward, and 1.0 to 1.3 of it with backward.
FIXED_INFERENCE = {"cpu": ("compiled", "sdpa", "eager")}
# On an NVIDIA H200 triton took 0.5 of sdpa's time in bf16, and 2.6 times as long in fp32, without tensor cores.
MEASURED = {"cuda": ("compiled", "triton", "sdpa", "eager")}
MEASURED_FP32 = {"cuda": ("sdpa", "eager", "triton")}

logger = logging.getLogger(__name__)
_known: dict[str, "Measurement"] = {}
_warned: set[tuple[str, str]] = set()


def choose(call: AttentionCall) -> str:
    """The name of the backend that ``auto`` means for this call."""
    if torch.compiler.is_exporting():
        return "eager"
    if call.q.device.type in MEASURED and may_measure(call) and (found := measurement(call)):
        fixed = torch.are_deterministic_algorithms_enabled()
        order = _by_dtype(call) if fixed else sorted(found.ms, key=found.ms.get)
        return next((name for name in order if name in found.ms and can_run(name, call)), "eager")
    return next(name for name in _order(call) if can_run(name, call))


def _order(call: AttentionCall, compiled: bool = False) -> tuple[str, ...]:
    device = call.q.device.type
    if device in MEASURED and (compiled or torch.compiler.is_compiling()):
        return _by_dtype(call)  # compiled code on a GPU is Triton's too, so it works there
    if device in FIXED_INFERENCE and not trains(call):
        return FIXED_INFERENCE[device]
    return FIXED.get(device, FIXED_ELSEWHERE)


def _by_dtype(call: AttentionCall) -> tuple[str, ...]:
    """The candidates on a GPU, usually fastest first."""
    return (MEASURED_FP32 if call.q.dtype == torch.float32 else MEASURED)[call.q.device.type]


def can_run(name: str, call: AttentionCall) -> bool:
    """Whether a backend is available and can run the call."""
    return module_of(name).missing() is None and module_of(name).why_not(call) is None


def may_measure(call: AttentionCall) -> bool:
    """Whether measuring is possible (an ordinary eager call) and not switched off."""
    if not is_plain(call.q) or under_function_transform():  # a mode that records operators must not record ours
        return False
    return call.q.numel() > 0 and os.environ.get("IRPE_ATTENTION_TUNING") != "0"


def _is_captured(call: AttentionCall) -> bool:
    return call.q.is_cuda and torch.cuda.is_current_stream_capturing()


def measurement(call: AttentionCall) -> Measurement | None:
    """The measurement for this kind of call: from this process, the group or the cache, or made now.

    A CUDA graph being captured uses the measurement of its warm-up; None if there was none, or only one candidate.
    """
    kind = _kind(call)
    if kind not in _known:
        names = MEASURED[call.q.device.type]
        candidates = {name: module_of(name).attention for name in names if can_run(name, call)}
        if len(candidates) < 2 or _is_captured(call):
            return None
        _known[kind] = _agreed(kind, lambda: _cached(kind, lambda: measure(call, candidates, eager.attention)))
        logger.info("attention %s: %s", kind, _known[kind])
        for name, reason in _known[kind].left_out.items():
            if (name, reason) not in _warned:
                _warned.add((name, reason))
                warnings.warn(f"attention backend {name!r} is left out on this machine: {reason}", stacklevel=4)
    return _known[kind]


def _kind(call: AttentionCall) -> str:
    """Calls of one kind share one measurement: device, dtypes, D, encodings, masks, dropout, size class, training."""
    encodings = [
        f"{role}:{part.mode}:{part.num_buckets}:{'shared' if part.shared_head else 'heads'}:{part.table.dtype}"
        for role, rpe in zip("qkv", (call.rpe_q, call.rpe_k, call.rpe_v), strict=True)
        for part in (rpe.parts if rpe is not None else ())
    ]
    batch, heads, length, head_dim = call.q.shape
    mask = "none" if call.attn_mask is None else str(call.attn_mask.dtype)
    masks = f"padding={call.key_padding_mask is not None} mask={mask} dropout={call.dropout_p > 0}"
    sizes = f"D={head_dim} L<={1 << (length - 1).bit_length()} planes<={1 << (batch * heads - 1).bit_length()}"
    work = "training" if trains(call) else "inference"
    device = _gpu_name(call.q.device.index) if call.q.is_cuda else call.q.device.type
    return f"{device} {call.q.dtype} {sizes} {' '.join(encodings)} {masks} {work}"


def _agreed(kind: str, find: Callable[[], Measurement]) -> Measurement:
    """The measurement that all ranks use: from the first rank to make it, shared through the process group's store.

    No rank waits for another: ranks with images of other sizes may never ask for this kind.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return find()
    store, key = torch.distributed.distributed_c10d._get_default_store(), f"irpe_attention {kind}"
    if not store.check([key]):
        store.compare_set(key, "", json.dumps(find()))
    return Measurement(*json.loads(store.get(key)))


def _cached(kind: str, find: Callable[[], Measurement]) -> Measurement:
    """A measurement from the user's cache folder, or a new one, stored there. An unusable folder is not an error."""
    try:
        path = cache_file()
    except (RuntimeError, OSError):  # no home, as for an unknown user in a container; rpe_ops_cuda is being rebuilt
        return find()
    try:
        entry = _entries(path)[kind]
        return Measurement(dict(entry["ms"]), dict(entry["left_out"]))
    except (KeyError, TypeError, ValueError):
        found = find()
    # Next time there may be more memory. A relative path is not a cache: an unknown home stays "~".
    if any(reason.startswith("OutOfMemory") for reason in found.left_out.values()) or not path.is_absolute():
        return found
    with contextlib.suppress(OSError), whole_file(path) as part:
        part.write_text(json.dumps(_entries(path) | {kind: found._asdict()}, indent=1))
    return found


def _entries(path: Path) -> dict:
    """The current entries of the cache file, read again because other processes may have written it."""
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}  # reading a pipe would never end
    except (OSError, ValueError, TypeError):
        return {}


def cache_file() -> Path:
    """Where measurements are kept: one file per GPU, PyTorch, Triton, backend version and rpe_ops_cuda build."""
    try:
        import triton

        compiler = triton.__version__
    except ImportError:
        compiler = "none"
    files = [*sorted(Path(__file__).parent.glob("*.py")), *filter(None, [extension_file])]
    code = hashlib.sha256(b"".join(Path(file).read_bytes() for file in files))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    name = f"{device} torch {torch.__version__} triton {compiler} {code.hexdigest()[:12]}"
    folder = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(folder) / "irpe_ops" / f"attention {name}.json".replace("/", "_").replace(" ", "_")


@functools.lru_cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def describe(
    model: nn.Module,
    *,
    batch: int,
    height: int,
    width: int,
    padding: bool = False,
    dropout_p: float = 0.0,
    compiled: bool = False,
) -> str:
    """Which backend the encoded attention of ``model`` will take, and why: for the banner of a run.

    Args:
        model: with attention layers that keep ``attn_backend`` and ``rpe_q, rpe_k, rpe_v``.
        batch, height, width: of a typical step on this device, in images and tokens.
        padding, dropout_p: whether the layers get padding masks, and the dropout of attention weights.
        compiled: whether the model runs inside ``torch.compile``.

    Call it under the run's autocast.
    """
    for layer in model.modules():
        encodings = [getattr(layer, f"rpe_{role}", None) for role in "qkv"]
        if hasattr(layer, "attn_backend") and any(encodings):
            break
    else:
        return "no relative position encoding"
    if layer.attn_backend != "auto":
        return f"{layer.attn_backend}, as requested"
    part = next(filter(None, encodings)).parts[0]
    device, dtype = part.table.device, autocast_dtype(part.table.device) or part.table.dtype
    measures = device.type in MEASURED and not compiled
    shape = (batch if measures else 1, part.num_heads, height * width + part.skip, part.head_dim)
    q, k, v = torch.zeros(3, *shape, device=device, dtype=dtype).requires_grad_().unbind()
    mask = torch.zeros(shape[0], shape[2], dtype=torch.bool, device=device) if padding else None
    call = AttentionCall(q, k, v, *encodings, height, width, mask, None, dropout_p, part.head_dim**-0.5)
    order = _order(call, compiled)
    name = choose(call) if measures else next(name for name in order if can_run(name, call))
    measured = _known.get(_kind(call))
    if measured is None:
        return f"{name} (the first of {', '.join(order)} that can run here)"
    if torch.are_deterministic_algorithms_enabled():
        return f"{name} (deterministic: the first of {', '.join(_by_dtype(call))} that is correct here)"
    return f"{name}, measured here: {measured}"
