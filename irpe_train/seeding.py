# SPDX-License-Identifier: Apache-2.0
"""Randomness as a function of the position in the run.

Resume is exact in the middle of an epoch, with any number of workers, because no generator carries a history: every
step and every sample starts from a seed made of its own coordinates, and nothing needs to be saved.
"""

import contextlib
import hashlib
import os
import random

import numpy as np
import torch
from torch.utils.data import get_worker_info

from irpe_train.arguments import LARGEST_SEED


def mix(*coordinates: int | str) -> int:
    """A 32-bit seed for the given coordinates; neighbours give unrelated seeds (BLAKE2b)."""
    return int.from_bytes(hashlib.blake2b(repr(coordinates).encode(), digest_size=4).digest(), "little")


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seed ``random``, NumPy, PyTorch and every CUDA device.

    Args: deterministic: also allow only deterministic kernels; an operator without one raises.
    """
    if not -(2**63) <= seed <= LARGEST_SEED:
        raise ValueError(f"--seed {seed}: expected {-(2**63)} to {LARGEST_SEED}")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        torch.use_deterministic_algorithms(True)


def seed_step(seed: int, *, rank: int, step: int) -> None:
    """Seed one training step; ``step`` counts from the start of the run, ``rank`` makes dropout differ."""
    seed = mix("step", seed, rank, step)
    _seed_cpu(seed)
    if torch.cuda.is_initialized():  # else torch.manual_seed would queue the seed, with a stack trace, at every step
        torch.cuda.manual_seed(seed)


def _seed_cpu(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def sample_randomness(*coordinates: int | str):
    """Inside: CPU generators seeded by ``coordinates``. Afterwards: restored, so 0 workers equal 2.

    CUDA is left alone: data loading never draws from it, and a forked worker must not touch it. In a worker nothing is
    restored, because nothing else draws there.
    """
    seed = mix("sample", *coordinates)
    if get_worker_info() is not None:
        _seed_cpu(seed)
        yield
        return
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    _seed_cpu(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])
