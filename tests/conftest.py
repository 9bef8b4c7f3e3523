"""Shared by every test: one thread per worker, no GPU tests without a GPU, Ctrl-C restored, no waiting
for disks."""

import gc
import os

import pytest

import tests.helpers.quick_disk  # noqa: F401
from tests.helpers.quick_python import quick_programs

# PyTorch is imported below: the process that hands out the tests can do without.


def pytest_configure():
    gc.disable()  # nothing that imports create is ever garbage
    os.environ["QUICK_PROGRAMS"] = str(quick_programs())  # one server for all workers


def pytest_collection_finish():
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)  # the usual 700 take 7% of the time
    gc.enable()


def pytest_collection_modifyitems(items):
    import torch

    torch.set_num_threads(1)
    items.sort(key=lambda item: "long" not in item.keywords)  # the longest begin first: no worker waits for them
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def signals_as_they_were():
    """A test may call the main function of a tree in this process, which then notes signals."""
    from irpe_train.preemption import STOP

    yield
    STOP.uninstall()
