# SPDX-License-Identifier: Apache-2.0
"""From the command line to ``main(args)``: on this machine, or as a SLURM job through submitit."""

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from irpe_train.arguments import positive_int
from irpe_train.config import parse_args
from irpe_train.distributed import end, report_lost_ranks
from irpe_train.errors import RunError, WorkerLost, blamed_on, first_line, import_optional, reported_by

# PyTorch's words.
OUT_OF_MEMORY = re.compile("allocate memory|out of memory|ALLOC_FAILED")  # on the CPU and with CUDA
NO_COMPILER = re.compile(r"No working C\+\+ compiler|Failed to find C compiler")
LOST_WORKER = re.compile(r"DataLoader worker \(pids?(?:\(s\))? ([\d, ]+)\) ([^.\n]*)")


def launch(
    main: Callable[[argparse.Namespace], int | None], parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> None:
    """Parse the flags and run ``main``; its errors end it as `reported_by` says.

    A nonzero return value of ``main`` is the exit status.
    """
    if sys.stdout is None:  # closed before the start
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see `answer_early`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Twice: PyTorch's handler of dead workers can raise while their first error is on its way out.
    with reported_by(parser.prog), report_shortage(), report_lost_ranks(parser.prog), report_shortage():
        status = main(parse_args(parser, argv))
        end()
    if status:
        sys.exit(status)


@contextlib.contextmanager
def report_shortage():
    """Turns PyTorch's errors about what the machine lacks, and about killed workers, into messages."""
    print_unraisable, print_of_thread, pinning = sys.unraisablehook, threading.excepthook, []

    def unless_of_workers(unraisable) -> None:  # raised inside a callback or destructor; the loader raises it again
        half_made = isinstance(unraisable.exc_value, AttributeError) and "DataLoaderIter" in repr(unraisable.object)
        if not (half_made or LOST_WORKER.search(str(unraisable.exc_value))):
            print_unraisable(unraisable)

    def unless_pinning(failed) -> None:  # the thread that fetches batches for a GPU; the loader says "exited" alone
        if "_pin_memory_loop" in str(failed.thread):
            pinning.append(failed.exc_value)
        else:
            print_of_thread(failed)

    sys.unraisablehook = unless_of_workers  # stays after an error, which keeps iterators alive beyond this
    threading.excepthook = unless_pinning
    try:
        yield
        sys.unraisablehook, threading.excepthook = print_unraisable, print_of_thread
    except RunError:  # a message already
        raise
    except (OSError, EOFError, AssertionError, RuntimeError, MemoryError) as error:
        cause = pinning[0] if pinning and "Pin memory thread" in str(error) else error
        if told := _in_words(cause):
            raise told from cause
        if cause is error:
            raise
        raise cause from error


def _in_words(error: Exception) -> RunError | None:
    """What ran out or was lost, and what to do; None for an error of another kind."""
    text = str(error)
    if "Too many open files" in text or "ancdata" in text:  # PyTorch's words
        return RunError("too many open files: raise the limit (ulimit -n), or use fewer --num_workers")
    if isinstance(error, (OSError, EOFError, AssertionError)):  # of a killed worker, or of a start
        files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
        if not all(any(part in file for file in files) for part in ("utils/data", "multiprocessing")):
            return None
        if isinstance(error, (ConnectionError, EOFError)) or any("resource_sharer" in file for file in files):
            return WorkerLost(_worker_lost("unknown", f"is gone ({first_line(error)})"))
        return RunError(f"no data loading worker can be started ({error}): use fewer --num_workers")
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(text):
        return RunError(f"out of memory ({first_line(error)}). Try smaller batches, images or models.")
    if NO_COMPILER.search(text):
        return RunError("--compile and --attn-backend triton need a C and a C++ compiler: install gcc and g++")
    if "can't start new thread" in text:
        return RunError("no thread can be started: raise the limit on processes (ulimit -u) or memory (ulimit -v)")
    if "</torch_" in text and "No space left" in text:  # the names of its shared memory
        remedy = "enlarge /dev/shm (docker run --shm-size=8g), or use fewer --num_workers"
        return RunError(f"shared memory is full: {remedy}")
    found = LOST_WORKER.search(text)
    return found and WorkerLost(_worker_lost(found[1], found[2].strip()))


def _worker_lost(process: str, how: str) -> str:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise again, at any line
    return (
        f"a data loading worker (process {process}) {how}. Unless it said why, memory ran out: try "
        "fewer --num_workers or smaller batches. --resume auto continues from the last checkpoint."
    )


class SlurmJob:
    """The callable that submitit runs in each task; after a preemption it is requeued and resumes automatically."""

    def __init__(self, main: Callable[[argparse.Namespace], None], args: argparse.Namespace):
        self.main, self.args = main, args

    def __call__(self) -> None:
        import submitit

        job = submitit.JobEnvironment()
        # What torchrun would set; MASTER_ADDR is the first host, the port follows from the job id.
        os.environ.update(
            RANK=str(job.global_rank),
            WORLD_SIZE=str(job.num_tasks),
            LOCAL_RANK=str(job.local_rank),
            MASTER_ADDR=job.hostnames[0],
            MASTER_PORT=str(20000 + sum(map(ord, job.job_id)) * 37 % 40000),
        )
        self.args.output_dir = str(self.args.output_dir).replace("%j", str(job.job_id))
        status = self.main(self.args)
        end()
        if status:
            sys.exit(status)

    def checkpoint(self):
        """The job to requeue: submitit asks on preemption or timeout, after our own handler has saved."""
        import submitit

        self.args.resume = "auto"
        return submitit.helpers.DelayedSubmission(self)


def submit(
    main: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    argv: list[str] | None = None,
    *,
    nodes: int = 2,
    timeout: int = 2800,
) -> None:
    """Queue ``main`` on SLURM with the published flags; the training flags follow on the same line.

    Args: nodes, timeout (minutes): the published defaults of the task.
    Raises: SystemExit: as ``launch``, also if submitit is not installed.
    """
    slurm = parser.add_argument_group("SLURM")
    slurm.add_argument("--ngpus", default=8, type=positive_int, help="GPUs, and processes, per node")
    slurm.add_argument("--nodes", default=nodes, type=positive_int, help="number of nodes")
    slurm.add_argument("--timeout", default=timeout, type=positive_int, help="minutes")
    slurm.add_argument("--job_dir", default="", help="folder of the job and its output; default: ./submitit/<job id>")
    slurm.add_argument("--partition", default=None, help="SLURM partition; default: the cluster's")
    slurm.add_argument("--use_volta32", action="store_true", help="only on nodes with the feature volta32gb")
    slurm.add_argument("--comment", default="", help="passed to SLURM, for priority")
    slurm.add_argument("--executor", default="slurm", choices=("slurm", "local"), help="local: try it on this machine")
    launch(partial(_queue, main, parser.prog.split()[-1]), parser, argv)


def _queue(main: Callable[[argparse.Namespace], None], name: str, args: argparse.Namespace) -> None:
    submitit = import_optional("submitit", "SLURM jobs go through submitit")
    job_dir = Path(args.job_dir or "submitit/%j").absolute()
    constraint = "volta32gb" if args.use_volta32 else None
    asked = {"slurm_partition": args.partition, "slurm_comment": args.comment, "slurm_constraint": constraint}
    with blamed_on(f"--executor {args.executor}"):
        executor = submitit.AutoExecutor(folder=job_dir, cluster=args.executor, slurm_max_num_timeout=30)
        executor.update_parameters(
            name=name,
            nodes=args.nodes,
            tasks_per_node=args.ngpus,
            gpus_per_node=args.ngpus if args.device.startswith("cuda") else 0,
            cpus_per_task=10,
            timeout_min=args.timeout,
            **{name: value for name, value in asked.items() if value},
        )
    args.output_dir = args.output_dir or str(job_dir)
    job = executor.submit(SlurmJob(main, args))
    print(f"submitted job {job.job_id}; output in {str(job_dir).replace('%j', job.job_id)}")
