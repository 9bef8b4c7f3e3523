"""Builds rpe_ops_cuda._C: CPU code always, CUDA code when its sources and a CUDA toolkit are there.

FORCE_CUDA=1   fail instead of leaving the CUDA code out (and build it where no GPU is present)
FORCE_CUDA=0   leave the CUDA code out
CUDA_HOME      the toolkit; /usr/local/cuda is found by itself
IRPE_CXXFLAGS  more flags for the C++ compiler, after ours: "-O1 -g -fsanitize=address"
TORCH_CUDA_ARCH_LIST   default: the GPUs present, "8.0;9.0" where there is none
"""

import os
import sys
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent


def cuda_home() -> Path | None:
    """The toolkit: CUDA_HOME, else /usr/local/cuda. An ``nvcc`` on PATH may be a wrapper script outside the toolkit,
    from which torch would guess a folder without headers and libraries, so PATH is not asked."""
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


def toolkit_version() -> str:
    import re
    import subprocess

    text = subprocess.run([cuda_home() / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found.group(1) if found else "unknown"


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def extension() -> setuptools.Extension:
    reason = why_no_cuda()
    if reason and os.environ.get("FORCE_CUDA") == "1":
        raise SystemExit(f"rpe_ops_cuda: FORCE_CUDA=1, but the CUDA code cannot be built: {reason}")
    print(
        f"rpe_ops_cuda: building for CPU only ({reason})"
        if reason
        else f"rpe_ops_cuda: building for CPU and CUDA ({cuda_home()})",
        file=sys.stderr,
    )
    if not reason:  # before the import below, which looks for the toolkit once
        os.environ["CUDA_HOME"] = str(cuda_home())
    from torch.utils import cpp_extension

    # -fopenmp: at::parallel_for is a header template and would run on one thread without it.
    # -ffp-contract=fast: a * b + c is one fused instruction where the machine has one.
    cxx = [
        "-O3",
        "-fopenmp",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wno-psabi",
        "-g0",
        *os.environ.get("IRPE_CXXFLAGS", "").split(),
    ]
    if reason:
        return cpp_extension.CppExtension(
            "rpe_ops_cuda._C",
            sources("csrc/*.cpp", "csrc/cpu/*.cpp"),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": cxx},
            extra_link_args=["-fopenmp"],
        )
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
    return cpp_extension.CUDAExtension(
        "rpe_ops_cuda._C",
        sources("csrc/*.cpp", "csrc/cpu/*.cpp", "csrc/cuda/*.cpp", "csrc/cuda/*.cu"),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("IRPE_WITH_CUDA", None)],
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3"]},
        extra_link_args=["-fopenmp"],
    )


def build_ext():
    from torch.utils import cpp_extension

    return cpp_extension.BuildExtension


setuptools.setup(ext_modules=[extension()], cmdclass={"build_ext": build_ext()})
