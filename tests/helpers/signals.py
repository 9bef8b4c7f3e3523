"""Undoes in a test process what a run does to its signals."""

import os
import signal

from irpe_train.preemption import Preemption


def uninstall(preemption: Preemption) -> None:
    """Put the earlier handlers back, and forget any request."""
    preemption._ended.set()
    if preemption._before:
        os.close(signal.set_wakeup_fd(-1))
    for number, before in preemption._before.items():
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, before or default)
    preemption.__init__()
