"""Requests to stop: noted wherever they arrive, known to all ranks, and ending whatever is going on."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import irpe_train.preemption
from irpe_train import distributed
from irpe_train.errors import Preempted
from irpe_train.loader import EvalLoader, TrainLoader
from irpe_train.preemption import STOP, Preemption, held_back
from tests.helpers import tiny_run
from tests.helpers.processes import Ranks, run_ranks, wait_for

QUIET = ["--device", "cpu", "--no-tensorboard"]


@pytest.fixture
def preemption():
    made = Preemption()
    yield made
    made.uninstall()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGXCPU])
def test_a_signal_is_noted_and_heeded_where_the_run_can_leave(preemption, number):
    preemption.install()
    preemption.leave_if_asked()
    signal.raise_signal(number)  # Ctrl-C is a request like the others
    assert preemption.signal == number
    with pytest.raises(Preempted) as end:
        preemption.leave_if_asked()
    assert end.value.code == 75


ENDS_SLOWLY = """
import resource, time
from irpe_train.preemption import STOP

def work(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

class Teardown:
    def __del__(self, work=work):
        work(1.3)

teardown = Teardown()
resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1, resource.RLIM_INFINITY))
with STOP.noting():
    while True:
        work(0.1)
        STOP.leave_if_asked()
"""


COMES_TWICE = """
import os, sys
from irpe_train.preemption import STOP

class Teardown:
    def __del__(self, kill=os.kill, number=int(sys.argv[1]), process=os.getpid()):
        kill(process, number)

teardown = Teardown()
with STOP.noting():
    os.kill(os.getpid(), int(sys.argv[1]))
    STOP.leave_if_asked()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_second_signal_while_python_ends_changes_nothing(number):
    """torchrun and SLURM may both send one."""
    heard = dict(preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))  # nohup, around the tests, ignores SIGHUP
    command = [sys.executable, "-c", COMES_TWICE, str(int(number))]
    ended = subprocess.run(command, capture_output=True, text=True, **heard)
    assert ended.returncode == 75, ended.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="Linux repeats SIGXCPU every second")
def test_a_run_that_is_out_of_processor_time_is_not_killed_while_python_ends():
    ended = subprocess.run([sys.executable, "-c", ENDS_SLOWLY], capture_output=True, text=True)
    assert ended.returncode == 75, ended.stderr


def test_signals_are_held_back_no_longer_than_workers_start():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with held_back():
        assert {signal.SIGTERM, signal.SIGINT} <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_a_handler_that_was_there_is_called_once_the_state_is_saved(preemption):
    """submitit's handler asks SLURM to queue the job again; it must not run in mid-step, nor be lost."""
    called = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}

    def requeue(number, frame):
        called.append(number)
        sys.exit(3)

    def ignore(number, frame):
        called.append("ignored")

    try:
        signal.signal(signal.SIGUSR2, requeue)
        signal.signal(signal.SIGTERM, ignore)
        preemption.install()
        preemption.training = True
        signal.raise_signal(signal.SIGUSR2)
        assert called == [] and preemption.signal == signal.SIGUSR2
        with pytest.raises(SystemExit) as end:
            preemption.leave()
        assert end.value.code == 3 and called == [signal.SIGUSR2]
        signal.raise_signal(signal.SIGTERM)
        assert called[1:] == ["ignored"]
        preemption.uninstall()
        assert signal.getsignal(signal.SIGUSR2) is requeue
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_closed_terminal_is_a_request_unless_started_under_nohup(preemption):
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        preemption.install()
        signal.raise_signal(signal.SIGHUP)
        assert preemption.signal is None
        preemption.uninstall()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        preemption.install()
        signal.raise_signal(signal.SIGHUP)
        assert preemption.signal == signal.SIGHUP
    finally:
        preemption.uninstall()
        signal.signal(signal.SIGHUP, before)


def test_uninstalled_handlers_are_as_they_were():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    STOP.install()
    STOP.install()  # changes nothing
    STOP.uninstall()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert STOP.signal is None


@pytest.mark.parametrize("error", [ValueError, Preempted, None])
def test_a_notebook_can_be_interrupted_again_after_a_run(error, monkeypatch):
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    before = signal.getsignal(signal.SIGINT)

    @STOP.noting()
    def main():
        signal.raise_signal(signal.SIGINT)
        assert STOP.signal == signal.SIGINT
        if error is not None:
            raise error

    for _ in range(2):  # the second run forgets what the first was told
        with contextlib.nullcontext() if error is None else pytest.raises(error):
            main()
        assert signal.getsignal(signal.SIGINT) is before and STOP.signal is None


def test_a_program_that_is_asked_twice_leaves_as_if_asked_once():
    @STOP.noting()
    def main():
        signal.raise_signal(signal.SIGTERM)
        STOP.leave_if_asked()

    with pytest.raises(Preempted):
        main()
    # torchrun sends one after that of a whole process group
    assert signal.getsignal(signal.SIGTERM) == STOP._note


def test_training_in_another_thread_leaves_signals_alone(preemption):
    before, failed = signal.getsignal(signal.SIGINT), []

    def install():
        try:
            preemption.install()
        except ValueError as error:
            failed.append(error)

    thread = threading.Thread(target=install)
    thread.start()
    thread.join()
    assert not failed and signal.getsignal(signal.SIGINT) is before
    preemption.install()  # the main thread's next run notes them
    assert signal.getsignal(signal.SIGINT) == preemption._note


def test_a_file_that_is_being_written_is_finished_first(preemption, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(preemption, "_force_exit", ended.set)
    monkeypatch.setattr(irpe_train.preemption, "GRACE", 0.02)
    preemption.install()
    with preemption.writing():
        signal.raise_signal(signal.SIGTERM)
        assert not ended.wait(0.3)
    assert ended.wait(5)


def busy(args):
    """What lists data, builds a model, reads a checkpoint: nothing that looks at ``STOP``. Rank 1 waits for rank 0."""
    irpe_train.preemption.GRACE = 0.5  # in this process alone
    STOP.install()
    distributed.start(device="cpu", timeout=20)
    print("at it")
    if distributed.is_main():
        time.sleep(30)
    distributed.gather("done")


@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "told"), [(1, 0), (2, 0), (2, 1)])
def test_what_takes_long_is_cut_short_on_all_ranks(tmp_path, world_size, told):
    ranks = Ranks(busy, tiny_run.get_parser, [], tmp_path, world_size=world_size)
    wait_for(lambda: all("at it" in output.read_text() for output in ranks.outputs))
    os.kill(ranks.processes[told].pid, signal.SIGTERM)
    for ended in ranks.wait(15):
        assert ended.code == Preempted.EXIT_CODE and "stopped by SIGTERM" in ended.text, ended.text


def stubborn(args):
    STOP.install()
    STOP.training = True
    print("at it")
    time.sleep(30)
    time.sleep(30)


def test_a_second_interrupt_leaves_at_once(tmp_path):
    ranks = Ranks(stubborn, tiny_run.get_parser, [], tmp_path)
    wait_for(lambda: "at it" in ranks.outputs[0].read_text())
    os.kill(ranks.processes[0].pid, signal.SIGINT)
    time.sleep(0.5)
    assert ranks.processes[0].is_alive()  # an epoch is being trained: one request waits for the end of its step
    os.kill(ranks.processes[0].pid, signal.SIGINT)
    (ended,) = ranks.wait(10)
    assert ended.code == 128 + signal.SIGINT and "Traceback" not in ended.text


def stopped_while_workers_start(args):
    """The signal comes between two forks, where what a handler raises is swallowed."""
    forks = []

    def before_fork():
        forks.append(1)
        if len(forks) == 2:
            # The whole group, as torchrun and SLURM do: the first worker too. What its parent sends, it obeys.
            subprocess.run(["kill", "-TERM", "--", f"-{os.getpgrp()}"], check=True)

    STOP.install()
    STOP.training = not args.eval
    os.register_at_fork(before=before_fork)
    data = tiny_run.Points(16, train=True)
    if args.eval:
        loader = iter(EvalLoader(data, batch_size=4, num_workers=2))
    else:
        order = torch.utils.data.SequentialSampler(data)
        loader = TrainLoader(data, order, batch_size=4, seed=0, num_workers=2).batches(0)
    for _ in loader:
        assert STOP.signal == signal.SIGTERM and not args.eval  # evaluation leaves; training asks at its step
    print("all batches came")


@pytest.mark.parametrize("flags", [[], ["--eval"]], ids=["training", "evaluation"])
def test_a_signal_while_workers_start_is_neither_lost_nor_their_end(tmp_path, flags):
    (ended,) = run_ranks(stopped_while_workers_start, tiny_run.get_parser, flags, tmp_path)
    assert ended.code == (75 if flags else 0) and ("all batches came" in ended.text) == (not flags), ended.text


def stopped_on_rank_1_in_evaluation(args):
    step = tiny_run.Points.__getitem__

    def slow(self, index):
        if not self.train and distributed.rank() == 1 and index > 20 and STOP.signal is None:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0 if self.train else 0.05)
        return step(self, index)

    tiny_run.Points.__getitem__ = slow
    tiny_run.main(args)


@pytest.mark.distributed
def test_a_request_to_one_rank_in_evaluation_stops_both_and_both_resume(tmp_path):
    flags = [*QUIET, "--epochs", "1", "--test-images", "200", "--images", "16", "--deterministic"]

    def tiny(name, *more, main=tiny_run.main):
        argv = [*flags, "--output_dir", str(tmp_path / name), *more]
        return run_ranks(main, tiny_run.get_parser, argv, tmp_path / "outputs", world_size=2)

    for ended in tiny("cut", main=stopped_on_rank_1_in_evaluation):
        assert ended.code == Preempted.EXIT_CODE, ended.text
    for name in ("cut", "whole"):
        for ended in tiny(name, "--resume", "auto"):
            assert ended.code == 0, ended.text
    assert (tmp_path / "cut/log.txt").read_text() == (tmp_path / "whole/log.txt").read_text()


def test_the_watching_thread_ends_before_python_does():
    """Inside the ranks' store it would abort a finished process."""
    code = (
        "import atexit\n"
        "from irpe_train.preemption import STOP\n"
        "atexit.register(lambda: print(STOP._watcher.is_alive()))\n"  # the last to be called
        "STOP.install()\n"
        "assert STOP._watcher.is_alive()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "False\n"), ended.stderr
