"""Run a ``main(args)`` in forked processes, one or several ranks; forking spares each the import of torch."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  (an optimizer imports it: better once here than in every child)

from irpe_train.launch import launch
from irpe_train.preemption import SIGNALS


@dataclass
class Ended:
    """How a process ended: exit status (negative: the signal), and all it printed."""

    code: int | None
    text: str


class Ranks:
    """``world_size`` processes of one run, started at once.

    Args:
        main, parser: as ``launch`` takes them.
        argv: the flags, the same on each rank.
        missing: ranks that are not started.
    """

    def __init__(self, main, parser, argv: list[str], folder: Path, *, world_size: int = 1,
                 missing: tuple[int, ...] = ()):
        folder.mkdir(parents=True, exist_ok=True)
        fork = multiprocessing.get_context("fork")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.outputs = [folder / f"output_{time.monotonic_ns()}_{r}.txt" for r in range(world_size) if r not in missing]
        self.processes = [
            fork.Process(target=_child, args=(main, parser, argv, output, r, world_size, port))
            for r, output in zip([r for r in range(world_size) if r not in missing], self.outputs, strict=True)]
        for process, output in zip(self.processes, self.outputs, strict=True):
            output.touch()
            process.start()

    def wait(self, timeout: float = 60) -> list[Ended]:
        """How each rank ended; one that hangs is killed and reported with ``code=None``."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [process.is_alive() for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return [Ended(None if stuck else process.exitcode, output.read_text())
                for process, output, stuck in zip(self.processes, self.outputs, hung, strict=True)]


def run_ranks(main, parser, argv: list[str], folder: Path, *, world_size: int = 1, timeout: float = 60,
              missing: tuple[int, ...] = ()) -> list[Ended]:
    """Start the ranks and wait for them."""
    return Ranks(main, parser, argv, folder, world_size=world_size, missing=missing).wait(timeout)


def _child(main, parser, argv, output, rank, world_size, port):
    os.setpgrp()
    # PyTorch renews its thread pool at the first call after a fork; that call must not come from two threads at once.
    torch.set_num_threads(1)
    for number in SIGNALS:  # a library that an earlier test imported may have left a handler in this process
        signal.signal(number, signal.SIG_DFL)
    stream = open(output, "w", buffering=1)  # noqa: SIM115
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    if world_size > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
    launch(main, parser, argv)
