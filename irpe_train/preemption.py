"""Signals that ask a run to stop: SIGTERM, SIGUSR1, SIGUSR2.

While ``deferred`` (in an epoch's training, until its end is saved) a signal is only noted, and ``Steps`` stops all
ranks after one and the same step. At any other time the state on disk is complete, and the signal ends the process.
"""

import contextlib
import os
import signal
import threading
import time

from irpe_train.distributed import logger
from irpe_train.errors import Preempted

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))


class Preemption:
    """Notes stop signals; ``install`` once in the main thread.

    A handler that was there before, as submitit's, which puts the job back into SLURM's queue, is called once the
    state is saved. SIGTERM is left to such a handler altogether: submitit ignores it on purpose.
    """

    def __init__(self):
        self.signal: int | None = None
        self.deferred = False
        self._before: dict[int, object] = {}

    def install(self) -> "Preemption":
        for number in SIGNALS:
            before = signal.getsignal(number)
            if number == signal.SIGTERM and callable(before):
                continue
            self._before[number] = before
            signal.signal(number, self._note)
        return self

    def uninstall(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()

    def _note(self, number, frame) -> None:
        self.signal = number
        if not self.deferred:
            self.stop()

    def stop(self):
        """Leave the process; the state is on disk."""
        before = self._before.get(self.signal)  # None on a rank that saw no signal itself
        if callable(before):
            before(self.signal, None)  # rank 0 leaves here under submitit, once the job is queued again
            time.sleep(20)  # the others must not be the first to leave: SLURM may then kill rank 0 in mid-request
        with contextlib.suppress(RuntimeError):  # a handler that interrupts a print cannot print
            logger.warning(
                f"stopped by {signal.Signals(self.signal or signal.SIGTERM).name}; the same command with "
                "--resume auto goes on"
            )
        raise Preempted


def obey_parent_alone(worker_id: int = 0) -> None:
    """In a data loading worker: heed a stop signal only if it comes from the main process.

    torchrun and SLURM signal whole process groups, and the main process needs its workers to finish the step.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return

    def wait():
        while signal.sigwaitinfo(SIGNALS).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=wait, daemon=True).start()
