"""Run a ``main(args)`` in fresh processes, one or several ranks.

They are forked from a server that has imported this repository and done nothing since: neither threads, nor handlers,
nor a GPU that an earlier test has touched reach them. It is a fork of the server of ``quick_python.py``, and so has not
imported PyTorch itself.
"""

import faulthandler
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import tests.helpers.quick_disk  # noqa: F401
from irpe_train.launch import launch
from tests.helpers.quick_python import quick_programs

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["deit_irpe.train", "detr_irpe.train"])


@dataclass
class Ended:
    """How a process ended: exit status (negative: the signal), and all it printed."""

    code: int | None
    text: str


class Ranks:
    """``world_size`` processes of one run, started at once.

    Args:
        main, get_parser: what ``launch`` runs; functions of a module, so that pickle can send them.
        argv: the flags, the same on each rank.
        missing: ranks that are not started.
    """

    def __init__(
        self, main, get_parser, argv: list[str], folder: Path, *, world_size: int = 1, missing: tuple[int, ...] = ()
    ):
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.outputs = [folder / f"output_{time.monotonic_ns()}_{r}.txt" for r in range(world_size) if r not in missing]
        self.processes = [
            SERVER.Process(target=_child, args=(main, get_parser, argv, output, r, world_size, port, dict(os.environ)))
            for r, output in zip([r for r in range(world_size) if r not in missing], self.outputs, strict=True)
        ]
        multiprocessing.set_executable(str(quick_programs() / "python"))
        multiprocessing.forkserver.ensure_running()
        multiprocessing.set_executable(sys.executable)
        for process, output in zip(self.processes, self.outputs, strict=True):
            output.touch()
            process.start()

    def wait(self, timeout: float = 60) -> list[Ended]:
        """How each rank ended; one that hangs is killed and reported with ``code=None`` and where it hung."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [process.is_alive() for process in self.processes]
        for process, stuck in zip(self.processes, hung, strict=True):
            if stuck:
                os.killpg(process.pid, signal.SIGABRT)  # faulthandler prints the stacks, of its workers too
                process.join(5)
            process.kill()
            process.join()
        return [
            Ended(None if stuck else process.exitcode, output.read_text())
            for process, output, stuck in zip(self.processes, self.outputs, hung, strict=True)
        ]


def run_ranks(
    main,
    get_parser,
    argv: list[str],
    folder: Path,
    *,
    world_size: int = 1,
    timeout: float = 60,
    missing: tuple[int, ...] = (),
) -> list[Ended]:
    """Start the ranks and wait for them."""
    return Ranks(main, get_parser, argv, folder, world_size=world_size, missing=missing).wait(timeout)


def wait_for(condition, seconds: float = 60) -> None:
    """Ask until ``condition()`` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def _child(main, get_parser, argv, output, rank, world_size, port, environment):
    os.setpgrp()
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # data loading workers do not start another server per process
    stream = open(output, "w", buffering=1)  # noqa: SIM115
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    faulthandler.enable(stream)
    if world_size > 1:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    try:
        launch(main, get_parser(), argv)
    except KeyboardInterrupt:  # before or after launch, which ends this way too
        sys.exit(130)
