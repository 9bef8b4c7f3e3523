# SPDX-License-Identifier: Apache-2.0
"""The lookup at the heart of iRPE and its adjoint, in plain PyTorch or with the compiled kernels."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

try:
    # In a checkout, a bare `import rpe_ops_cuda` would find the source folder and succeed.
    from rpe_ops_cuda import _C  # importing it registers torch.ops.irpe.*

    extension_error, extension_file = "", _C.__file__
except (ImportError, OSError) as error:
    extension_error, extension_file = str(error), None

INDEX_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _devices_with_kernels() -> tuple[str, ...]:
    if extension_error:
        return ()
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    return tuple(d for d, key in keys.items() if torch._C._dispatch_has_kernel_for_dispatch_key("irpe::rpe_index", key))


compiled_devices = _devices_with_kernels()


def rpe_index(input: Tensor, index: Tensor) -> Tensor:
    """Look up ``output[b, h, i, j] = input[b, h, i, index[i, j]]``.

    Args:
        input: ``(B, H, L_query, N)``; fp32, fp64, fp16 or bf16.
        index: ``(L_query, L_key)``, uint8, int16, int32 or int64, values in ``[0, N)``, on the device of ``input``.
    Returns: ``(B, H, L_query, L_key)``, the dtype of ``input``.
    Raises: ValueError: for shapes, dtypes or devices that do not fit; IndexError: for a value outside ``[0, N)``.
        Values are checked for CPU tensors, unless a compiler, ``torch.func`` or a dispatch mode is at work; on CUDA
        the check would have to synchronize, so a wrong value fails an assertion on the device.
    """
    _check(input, index, "rpe_index", "input", "N", 3)
    _check_range(index, input.shape[-1], "rpe_index")
    if has_kernel(input):
        return torch.ops.irpe.rpe_index(input, index)
    return input.gather(-1, index.long().expand(*input.shape[:2], -1, -1))


def rpe_index_adjoint(grad: Tensor, index: Tensor, num_buckets: int) -> Tensor:
    """Sum into buckets: ``output[b, h, i, n] = sum of grad[b, h, i, j] over the j with index[i, j] == n``.

    The gradient of `rpe_index` with respect to its input, and (applied to attention weights) the first half of the
    encoding on values.

    Args:
        grad: ``(B, H, L_query, L_key)``; the dtypes of `rpe_index`.
        index: ``(L_query, L_key)``, as in `rpe_index`.
        num_buckets: ``N``.
    Returns: ``(B, H, L_query, N)``, the dtype of ``grad``.
    Raises: see `rpe_index`.
    """
    _check(grad, index, "rpe_index_adjoint", "grad", "L_key", 4)
    _check_range(index, num_buckets, "rpe_index_adjoint")
    if has_kernel(grad):
        return torch.ops.irpe.rpe_index_adjoint(grad, index, num_buckets)
    zeros = grad.new_zeros(*grad.shape[:3], num_buckets)
    return zeros.scatter_add(-1, index.long().expand(*grad.shape[:2], -1, -1), grad)


def has_kernel(tensor: Tensor) -> bool:
    """Whether the lookup of this tensor goes through rpe_ops_cuda, rather than plain PyTorch."""
    return (
        tensor.device.type in compiled_devices
        and (tensor.device.type != "cuda" or built_for(tensor.device.index))
        and not under_function_transform()
        and not torch.compiler.is_exporting()  # exported programs run where our operators are unknown
    )


def constant_of_graphs(function: Callable) -> Callable:
    """``function``, cached; its result is a constant of a compiled graph.

    torch.compiler.assume_constant_result would import torch._dynamo, which takes seconds in every process. Dynamo
    would miss a mark on the cache itself.
    """
    cached = functools.lru_cache(function)

    def ask(*arguments):
        return cached(*arguments)

    ask._dynamo_marked_constant, ask.__doc__, ask.__wrapped__ = True, function.__doc__, function
    return ask


@constant_of_graphs
def built_for(device: int) -> bool:
    """Whether the extension has code for this CUDA device: it is built for some GPU generations, not all."""
    if not torch.cuda.is_available():  # a fake tensor's device
        return False
    return torch.ops.irpe.has_code_for(device) if hasattr(torch.ops.irpe, "has_code_for") else True


def missing_kernels(device_type: str, device: int = 0) -> str | None:
    """Why rpe_ops_cuda has no kernels for CPUs, or for this GPU, with the remedy; None if it has them."""
    build = "pip install ./rpe_ops_cuda"
    if extension_error:
        return f"rpe_ops_cuda does not load ({extension_error}); build it: {build}"
    if device_type == "cpu":
        return None
    if device_type not in compiled_devices:
        return f"rpe_ops_cuda was built without CUDA; with a CUDA toolkit installed: FORCE_CUDA=1 {build}"
    if not torch.cuda.is_available():
        return "rpe_ops_cuda is built, but torch sees no CUDA device (nvidia-smi shows whether there is a driver)"
    if not built_for(device):
        major, minor = torch.cuda.get_device_capability(device)
        return f"rpe_ops_cuda was built for other GPUs; build it here: TORCH_CUDA_ARCH_LIST={major}.{minor} {build}"
    return None


def under_function_transform() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is active: both need plain PyTorch.

    A ``torch.library`` operator only has a backward: ``torch.func.grad`` raises on it, and forward mode returns a zero
    tangent silently.
    """
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_plain(tensor: Tensor) -> bool:
    """Whether nothing but autograd is watching: no compiler, no mode that records operators, no fake tensor."""
    return not torch.compiler.is_compiling() and type(tensor) is Tensor and not torch._C._len_torch_dispatch_stack()


def not_dense(x: object) -> str | None:
    """What ``x`` is instead of a strided tensor; None if it is one."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    if torch.compiler.is_compiling():  # Dynamo refuses to read a layout in backward
        return None
    return "nested" if x.is_nested else None if x.layout == torch.strided else str(x.layout)


def _check(tensor: Tensor, index: Tensor, function: str, name: str, last: str, compared: int) -> None:
    for what, x in ((name, tensor), ("index", index)):
        if kind := not_dense(x):
            raise ValueError(f"{function}: {what} must be a dense tensor, not {kind}")
    if tensor.dim() != 4 or index.dim() != 2:
        got = f"got {name} {tuple(tensor.shape)} and index {tuple(index.shape)}"
        raise ValueError(f"{function}: expected {name} (B, H, L_query, {last}) and index (L_query, L_key); {got}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{function}: {name} must have a floating-point dtype, not {tensor.dtype}; use {name}.float()")
    if index.dtype not in INDEX_DTYPES:
        raise ValueError(f"{function}: index must be uint8, int16, int32 or int64, not {index.dtype}; use index.long()")
    if tensor.device != index.device:
        raise ValueError(
            f"{function}: {name} is on {tensor.device} and index on {index.device}; use index.to({name}.device)"
        )
    if tensor.shape[2:compared] != index.shape[: compared - 2]:
        raise ValueError(
            f"{function}: {name} {tuple(tensor.shape)} and index {tuple(index.shape)} differ in "
            f"{'L_query' if compared == 3 else 'L_query or L_key'}"
        )


def _check_range(index: Tensor, num_buckets: int, function: str) -> None:
    if index.device.type != "cpu" or index.numel() == 0 or not is_plain(index) or under_function_transform():
        return
    smallest, largest = map(int, index.aminmax())
    if smallest < 0 or largest >= num_buckets:
        wrong = smallest if smallest < 0 else largest
        raise IndexError(f"{function}: index holds {wrong}; {num_buckets} buckets allow 0 to {num_buckets - 1}")
