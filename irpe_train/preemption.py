# SPDX-License-Identifier: Apache-2.0
"""Requests to stop: SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal is gone), SIGXCPU (the limit on
processor time), SIGUSR1, SIGUSR2.

The handler only notes the signal. During training ``Steps`` saves and stops all ranks after the same step. Evaluation
stops between two batches. Anything else, such as listing the data or building the model, is ended by a thread after
``GRACE`` seconds, which is safe: the state on disk is complete. The threads share the request through the ranks' store,
so that all ranks stop together.
"""

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time

from irpe_train.errors import Preempted
from irpe_train.logger import logger

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1, signal.SIGUSR2)
GRACE = 3.0  # seconds for a run to reach a point where it can stop by itself
PAUSE = 0.1  # seconds between two reads of the ranks' store


class Preemption:
    """The stop request of this process. There is one instance, ``STOP``, because signals belong to the process.

    An earlier handler, such as submitit's, which requeues the job in SLURM, is called once the state is
    saved. SIGTERM is left to such a handler: submitit ignores it on purpose. SIGHUP stays ignored under nohup.

    Attributes:
        signal: the last one noted, here or on another rank; None before.
        training: True while an epoch trains, until its end is saved.
    """

    def __init__(self):
        self.signal: int | None = None
        self.training = False
        self._before: dict[int, object] = {}
        self._writing = False
        self._store = self._watcher = None
        self._ended, self._all_heard = threading.Event(), threading.Event()

    def install(self) -> None:
        """Note signals from now on. A second call changes nothing, nor does one outside the main thread, as of a
        notebook's widget or a Ray worker: Python notes signals in the main thread alone.
        """
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            before = signal.getsignal(number)
            if number == signal.SIGTERM and callable(before) or number == signal.SIGHUP and before == signal.SIG_IGN:
                continue
            self._before[number] = before if before is not signal.default_int_handler else None
            signal.signal(number, self._note)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing)  # tells the thread at once; this one may be waiting for other ranks
        self._watcher = threading.Thread(target=self._watch, args=(reading, self._ended), daemon=True)
        self._watcher.start()
        atexit.register(self.end_watch)  # a thread still inside the store at exit aborts the process

    def uninstall(self) -> None:
        """Put the earlier handlers back, and forget any request."""
        self._ended.set()
        if self._before:
            os.close(signal.set_wakeup_fd(-1))
        for number, before in self._before.items():
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, before or default)
        self.__init__()

    @contextlib.contextmanager
    def noting(self):
        """Signals are noted inside. Afterwards Ctrl-C interrupts a notebook again; but one of many ranks, or a program
        that was asked to stop, goes on noting until it ends: the others may leave first, and it may be asked twice.
        """
        self.install()
        try:
            yield
        finally:
            leaves = self._store is not None or self.signal is not None and not hasattr(sys, "ps1")  # a notebook has it
            if not leaves and threading.current_thread() is threading.main_thread():
                self.uninstall()

    def end_watch(self) -> None:
        """Stop using the ranks' store. Signals that come again while Python ends do not change how it ends."""
        self._ended.set()
        for number in self._before if self.signal is not None else ():
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_IGN)
        if self._watcher is not None:
            self._watcher.join(5)

    def share(self, store, rank: int, world_size: int) -> None:
        """Share requests with the other ranks through a ``torch.distributed`` store."""
        self._heard = [f"irpe/heard/{r}" for r in range(world_size)]
        self._rank, self._store = rank, store

    @contextlib.contextmanager
    def writing(self):
        """Inside, a file is being written that must not be left half written."""
        self._writing = True
        try:
            yield
        finally:
            self._writing = False

    def leave_if_asked(self) -> None:
        """Leave here if asked to: the state on disk is complete."""
        if self.signal is not None:
            self.leave()

    def leave(self) -> None:
        """Raise ``Preempted``, once the other ranks have heard; the state is on disk."""
        if self._store is not None:
            self._all_heard.wait(5)  # a rank waiting for this one must know why it is gone
        if callable(before := self._before.get(self.signal)):  # None on a rank that saw no signal itself
            before(self.signal, None)  # rank 0 leaves here under submitit, once the job is queued again
            time.sleep(20)  # the others must not leave first: SLURM might then kill rank 0 in mid-request
        self._announce()
        raise Preempted

    def _note(self, number, frame) -> None:
        self.signal = number

    def _watch(self, pipe: int, ended: threading.Event) -> None:
        ignored_since, interrupts = None, 0
        while not ended.is_set():
            if select.select([pipe], [], [], PAUSE)[0]:
                numbers = [number for number in os.read(pipe, 99) if number in self._before]
                self.signal = numbers[-1] if numbers else self.signal
                interrupts += numbers.count(signal.SIGINT)
                if interrupts > 1:
                    os._exit(128 + signal.SIGINT)
            self._sync_with_ranks()
            if self.signal is None or self.training or self._writing:
                ignored_since = None
            elif ignored_since is None:
                ignored_since = time.monotonic()
            elif time.monotonic() - ignored_since > GRACE:
                self._force_exit()
        os.close(pipe)

    def _sync_with_ranks(self) -> None:
        """Pass a request on to the other ranks, or take one from them."""
        if (store := self._store) is None:
            return
        try:
            if self.signal is None and store.check(["irpe/stop"]):
                self.signal = int(store.get("irpe/stop"))
            if self.signal is not None and not self._all_heard.is_set():
                store.set("irpe/stop", str(int(self.signal)))
                store.set(self._heard[self._rank], "")
                if store.check(self._heard):
                    self._all_heard.set()
        except RuntimeError:  # the process with the store is gone
            self._all_heard.set()
            self._store = None

    def _force_exit(self) -> None:
        self._announce()
        if callable(before := self._before.get(self.signal)):
            with contextlib.suppress(BaseException):
                before(self.signal, None)
        os._exit(Preempted.EXIT_CODE)

    def _announce(self) -> None:
        name = signal.Signals(self.signal or signal.SIGTERM).name
        logger.warning(f"stopped by {name}; the same command with --resume auto continues")


STOP = Preemption()


@contextlib.contextmanager
def held_back():
    """Blocks signals inside. Data loading workers started inside inherit this, and never see one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals_from_others() -> None:
    """In a data loading worker: obey a stop signal only if the main process sent it.

    torchrun, SLURM and terminals signal whole process groups, and the main process needs its workers to finish a step.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return

    def wait():
        while signal.sigwaitinfo(SIGNALS).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=wait, daemon=True).start()
