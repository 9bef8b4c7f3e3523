"""Failures of a training run, made to happen at a chosen step."""

import os
import signal

from irpe_train import distributed
from irpe_train.steps import Steps


def change_a_loss(main, number, rank, do, args):
    """Run ``main(args)``; ``do(loss)`` replaces the loss of one rank's step, counted from 0 in this process."""
    watch, seen = Steps.watch, []

    def counted(self, loss, **options):
        seen.append(1)
        if len(seen) == number + 1 and distributed.rank() == rank:
            loss = do(loss)
        return watch(self, loss, **options)

    Steps.watch = counted
    main(args)


def be_stopped(loss):
    os.kill(os.getpid(), signal.SIGTERM)
    return loss


def make_infinite(loss):
    return loss * float("inf")
