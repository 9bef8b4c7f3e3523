# SPDX-License-Identifier: Apache-2.0
"""Builds rpe_ops_cuda._C: CPU code always, CUDA code if its sources and a CUDA toolkit are found.

FORCE_CUDA=1   fail instead of leaving the CUDA code out (and build it without a GPU)
FORCE_CUDA=0   leave the CUDA code out
CUDA_HOME      the toolkit; /usr/local/cuda is found automatically
IRPE_CXXFLAGS  more flags for the C++ compiler, after ours: "-O1 -g -fsanitize=address"
TORCH_CUDA_ARCH_LIST   default: the GPUs present, else all of ARCHITECTURES that the toolkit knows
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0")  # their binaries run on later minor versions too


def cuda_home() -> Path | None:
    """The toolkit: CUDA_HOME, else /usr/local/cuda. PATH is not searched: an ``nvcc`` there may be a wrapper script
    outside the toolkit, from which torch would guess a folder without headers and libraries."""
    for candidate in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if candidate and (Path(candidate) / "bin" / "nvcc").exists():
            return Path(candidate)
    return None


def why_no_cuda() -> str | None:
    """The reason to leave the CUDA code out, None to build it."""
    import torch

    if os.environ.get("FORCE_CUDA") == "0":
        return "FORCE_CUDA=0"
    if not list((ROOT / "csrc" / "cuda").glob("*.cu")):
        return "no CUDA sources in csrc/cuda"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if cuda_home() is None:
        return "no CUDA toolkit: CUDA_HOME is not set and /usr/local/cuda has no bin/nvcc"
    toolkit_major, torch_major = toolkit_version().split(".")[0], torch.version.cuda.split(".")[0]
    if toolkit_major != torch_major:
        return f"the toolkit {cuda_home()} is CUDA {toolkit_version()}, torch was built with CUDA {torch.version.cuda}"
    return None


def _nvcc(option: str) -> str:
    return subprocess.run([cuda_home() / "bin" / "nvcc", option], capture_output=True, text=True).stdout


def toolkit_version() -> str:
    found = re.search(r"release (\d+\.\d+)", _nvcc("--version"))
    return found.group(1) if found else "unknown"


def architectures() -> str:
    """The architectures to build for without a GPU: all that the toolkit knows, and PTX of the last for newer ones."""
    known = _nvcc("--list-gpu-arch").split()
    return ";".join(a for a in ARCHITECTURES if f"compute_{a.replace('.', '')}" in known) + "+PTX"


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def openmp() -> list[str]:
    """The flag for threads: at::parallel_for is a header template and would run on one thread without it."""
    if sys.platform == "win32":
        raise SystemExit(
            "rpe_ops_cuda: its kernels need GCC or Clang (vector types), and PyTorch on Windows builds with neither. "
            "irpe_ops runs without this package, in plain PyTorch."
        )
    if sys.platform == "darwin":
        print("rpe_ops_cuda: Apple's clang has no OpenMP: the kernels will run on one thread", file=sys.stderr)
        return []
    return ["-fopenmp"]


def extension() -> setuptools.Extension:
    threads = openmp()
    reason = why_no_cuda()
    if reason and os.environ.get("FORCE_CUDA") == "1":
        raise SystemExit(f"rpe_ops_cuda: FORCE_CUDA=1, but the CUDA code cannot be built: {reason}")
    parts = f"CPU only ({reason})" if reason else f"CPU and CUDA ({cuda_home()})"
    print(f"rpe_ops_cuda: building for {parts}", file=sys.stderr)
    if not reason:  # before the import below, which looks for the toolkit only once
        os.environ["CUDA_HOME"] = str(cuda_home())
    from torch.utils import cpp_extension

    # -ffp-contract=fast: a * b + c becomes one fused instruction if the machine has one.
    cxx = ["-O3", *threads, "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-g0"]
    cxx += os.environ.get("IRPE_CXXFLAGS", "").split()
    files, flags = sources("csrc/*.cpp", "csrc/cpu/*.cpp"), {"cxx": cxx}
    how = dict(include_dirs=[str(ROOT / "csrc")], extra_compile_args=flags, extra_link_args=threads)
    if reason:
        return cpp_extension.CppExtension("rpe_ops_cuda._C", files, **how)
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures())
    flags["nvcc"], files = ["-O3"], sorted(files + sources("csrc/cuda/*.cpp", "csrc/cuda/*.cu"))
    return cpp_extension.CUDAExtension("rpe_ops_cuda._C", files, define_macros=[("IRPE_WITH_CUDA", None)], **how)


def version() -> str:
    """The version of the last tag, if setuptools-scm is installed and this is a checkout."""
    try:
        from setuptools_scm import get_version

        return get_version(ROOT.parent, fallback_version="0.1.0")
    except (ImportError, LookupError):
        return "0.1.0"


extensions = [extension()]
from torch.utils.cpp_extension import BuildExtension  # noqa: E402  after CUDA_HOME is set

setuptools.setup(version=version(), ext_modules=extensions, cmdclass={"build_ext": BuildExtension})
