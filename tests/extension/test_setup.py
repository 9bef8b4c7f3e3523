"""What rpe_ops_cuda/setup.py decides before anything is compiled."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest
import setuptools
import torch

SETUP = Path(__file__).parents[2] / "rpe_ops_cuda" / "setup.py"


@pytest.fixture
def built(monkeypatch):
    """Run setup.py up to the call of setuptools; returns its one extension."""
    extensions = []
    monkeypatch.setattr(setuptools, "setup", lambda ext_modules, **_: extensions.extend(ext_modules))
    monkeypatch.setenv("FORCE_CUDA", "0")

    def run(platform):
        monkeypatch.setattr(sys, "platform", platform)
        names = runpy.run_path(str(SETUP))
        return extensions.pop(), names

    return run


def test_linux_has_threads_and_says_why_it_is_for_the_cpu_alone(built, capsys):
    extension, _ = built("linux")
    assert "-fopenmp" in extension.extra_compile_args["cxx"] and extension.extra_link_args == ["-fopenmp"]
    assert "building for CPU only (FORCE_CUDA=0)" in capsys.readouterr().err


def test_macos_builds_without_openmp_and_says_so(built, capsys):
    extension, _ = built("darwin")
    assert "-fopenmp" not in [*extension.extra_compile_args["cxx"], *extension.extra_link_args]
    assert "will run on one thread" in capsys.readouterr().err


def test_windows_stops_before_compiling(built):
    with pytest.raises(SystemExit, match="need GCC or Clang .* irpe_ops runs without this package"):
        built("win32")


@pytest.mark.parametrize(
    ("known", "wanted"),
    [
        ("compute_75 compute_80 compute_86 compute_90 compute_100 compute_120", "7.5;8.0;8.6;9.0;10.0;12.0+PTX"),
        ("compute_70 compute_75 compute_80 compute_86 compute_90", "7.5;8.0;8.6;9.0+PTX"),
        ("compute_80 compute_120 compute_130", "8.0;12.0+PTX"),
    ],
)
def test_a_build_without_a_gpu_is_for_all_that_the_toolkit_knows(built, monkeypatch, known, wanted):
    _, names = built("linux")
    monkeypatch.setitem(names["architectures"].__globals__, "_nvcc", lambda option: known.replace(" ", "\n"))
    assert names["architectures"]() == wanted


@pytest.mark.skipif(shutil.which("nvcc") is None or torch.version.cuda is None, reason="needs a CUDA toolkit")
def test_this_toolkit_knows_the_gpus_of_the_documentation(built):
    _, names = built("linux")
    assert {"8.0", "9.0"} <= set(names["architectures"]().removesuffix("+PTX").split(";"))
