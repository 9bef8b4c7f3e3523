"""From the command line to main: messages without tracebacks, and SLURM jobs that are requeued."""

import argparse
import contextlib
import errno
import gc
import multiprocessing
import os
import re
import signal
import sys
import threading

import pytest
from torch.utils.data import DataLoader

from irpe_train.errors import BadData, RankLost, RunError, import_optional
from irpe_train.launch import SlurmJob, launch, report_shortage, submit
from irpe_train.logger import logger, set_up_logging
from tests.helpers import tiny_run


def raising(error):
    def main(args):
        raise error

    return main


@pytest.mark.parametrize("kind", [BadData, ValueError, FileNotFoundError, BrokenPipeError])
def test_a_users_mistake_is_one_line(kind):
    with pytest.raises(SystemExit) as end:
        launch(raising(kind("the file \x1b\n is broken")), tiny_run.get_parser(), [])
    # Python prints it, and ends with status 1.
    assert end.value.code == f"tiny_run: {kind.__name__}: the file \\x1b\\n is broken"


def test_a_working_folder_that_is_gone_is_told(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit, match="No such file .*: is the working folder gone. cd to one that exists"):
        launch(lambda args: None, tiny_run.get_parser(), [])


def test_a_process_that_has_lost_its_peer_ends_at_once(monkeypatch, capsys):
    """Python's own end would now and then be aborted by one of gloo's threads, with status 134."""
    monkeypatch.setattr(os, "_exit", sys.exit)
    worker = multiprocessing.get_context("fork").Process(target=signal.pause, daemon=True)
    worker.start()
    with pytest.raises(SystemExit) as end:
        launch(raising(RankLost("rank 1 has died")), tiny_run.get_parser(), [])
    worker.join(timeout=10)
    assert worker.exitcode == -signal.SIGKILL  # nor does a worker hold the console open
    assert end.value.code == 1 and capsys.readouterr().err == "tiny_run: RankLost: rank 1 has died\n"


def test_a_package_that_is_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half_there.py").write_text("import no_such_part")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"^x needs it \(No module named 'no_such_part'\): pip install half-there$"):
        import_optional("half_there", "x needs it")
    with pytest.raises(ImportError, match="^x needs it: pip install not-there$"):
        import_optional("not_there", "x needs it")


@pytest.mark.parametrize(
    "words, told",
    [
        (
            "Too many open files. Communication with the workers is no longer possible. Please ...",
            "too many open files: raise the limit (ulimit -n), or use fewer --num_workers",
        ),
        (
            "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback ...\nRuntimeError: "
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)",
            "shared memory is full: enlarge /dev/shm (docker run --shm-size=8g), or use fewer --num_workers",
        ),
        (
            "can't start new thread",
            "no thread can be started: raise the limit on processes (ulimit -u) or memory (ulimit -v)",
        ),
        (
            "unable to mmap 48 bytes from file </torch_1_2_3>: Cannot allocate memory (12)",
            "out of memory (unable to mmap 48 bytes from file </torch_1_2_3>: Cannot allocate memory (12)). "
            "Try smaller batches, images or models.",
        ),
        (
            "CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously",  # an AcceleratorError
            "out of memory (CUDA error: out of memory). Try smaller batches, images or models.",
        ),
        (
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "out of memory (CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`). "
            "Try smaller batches, images or models.",
        ),
        (
            "InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')",
            "--compile and --attn-backend triton need a C and a C++ compiler: install gcc and g++",
        ),
    ],
)
def test_what_pytorch_says_about_limits_of_the_machine_is_one_line(words, told):
    with pytest.raises(SystemExit) as end:
        launch(raising(RuntimeError(words)), tiny_run.get_parser(), [])
    assert end.value.code == f"tiny_run: RunError: {told}"
    lost = RuntimeError("unable to open shared memory object </torch_1_2_3> in read-write mode: No such file (2)")
    with pytest.raises(RuntimeError, match="No such file"):  # is not full
        launch(raising(lost), tiny_run.get_parser(), [])


@pytest.mark.parametrize("how", ["nobody reads it", "full disk"])
def test_a_closed_or_full_console_gives_no_traceback(how, monkeypatch, capfd):
    reading, console = os.pipe()
    os.close(reading)
    if how == "full disk":
        os.dup2(os.open("/dev/full", os.O_WRONLY), console)
    monkeypatch.setattr(sys, "stdout", os.fdopen(console, "w"))
    set_up_logging(0)
    for _ in range(3):
        logger.info("a line")
    with pytest.raises(SystemExit) as end:
        launch(raising(BadData("the file x is broken")), tiny_run.get_parser(), [])
    sys.stdout.flush()
    assert end.value.code == "tiny_run: BadData: the file x is broken" and capfd.readouterr().err == ""


def test_no_console_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    launch(lambda args: print("into nothing"), tiny_run.get_parser(), [])


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("IRPE_TRACEBACK", "1")
    with pytest.raises(BadData):
        launch(raising(BadData("x")), tiny_run.get_parser(), [])


def test_the_unforeseen_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        launch(raising(ZeroDivisionError()), tiny_run.get_parser(), [])


@pytest.mark.parametrize(
    "argv",
    [
        ["--config", "none.yaml"],
        ["--batch-sise", "3"],
        ["--seed", "x"],
        ["--resume", "none.pth"],
        ["--batch-size", "-3"],
        ["--eval", "--resume", "auto"],
        ["--accumulate", "0"],
        ["--device", "banana"],
        ["--save-interval", "0"],
        ["--images", "2"],
    ],
)
def test_bad_flags_end_in_a_message(argv, capsys):
    with pytest.raises(SystemExit) as end:
        launch(tiny_run.main, tiny_run.get_parser(), ["--device", "cpu", *argv])
    error = capsys.readouterr().err if end.value.code == 2 else end.value.code
    assert "tiny_run: " in error and "Traceback" not in error


def main_for_slurm(args):
    print(f"ran with lr {args.lr} into {args.output_dir}")


def test_slurm_job_runs_and_comes_back_resuming(tmp_path, monkeypatch, capsys):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setenv("RANK", "0")  # restored afterwards: the job sets them
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")

    class Environment:
        job_id, global_rank, local_rank, num_tasks, hostnames = "77", 1, 1, 2, ["first", "second"]

    monkeypatch.setattr(submitit, "JobEnvironment", Environment)
    job = SlurmJob(main_for_slurm, argparse.Namespace(lr=0.1, output_dir="out/%j", resume=""))
    job()
    assert capsys.readouterr().out == "ran with lr 0.1 into out/77\n"
    with pytest.raises(SystemExit, match="^1$"):  # --expect missed: SLURM must see a failure
        SlurmJob(lambda args: 1, argparse.Namespace(output_dir=""))()
    import os

    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"]) == ("1", "2", "first")
    again = job.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission) and again.function.args.resume == "auto"


@pytest.mark.slow
def test_submit_runs_a_job_on_this_machine(tmp_path, capsys):
    pytest.importorskip("submitit")
    submit(
        tiny_run.main,
        tiny_run.get_parser(),
        [
            "--executor",
            "local",
            "--nodes",
            "1",
            "--ngpus",
            "2",
            "--timeout",
            "5",
            "--job_dir",
            str(tmp_path / "%j"),
            "--device",
            "cpu",
            "--no-tensorboard",
            "--epochs",
            "1",
        ],
    )
    assert "submitted job" in capsys.readouterr().out
    import time

    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/log.txt")):
        assert time.monotonic() < deadline, [p.read_text() for p in tmp_path.glob("*/*log.*")]
        time.sleep(0.5)


class Executor:
    """Replaces submitit's: records its arguments."""

    def __init__(self, folder, cluster, slurm_max_num_timeout):
        Executor.asked = {"folder": str(folder), "cluster": cluster}

    def update_parameters(self, **parameters):
        Executor.asked |= parameters

    def submit(self, job):
        Executor.asked["job"] = job
        return argparse.Namespace(job_id="77")


def test_submit_takes_the_published_flags(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit, "AutoExecutor", Executor)
    submit(main_for_slurm, tiny_run.get_parser(), ["--job_dir", str(tmp_path)])
    asked = Executor.asked
    assert (asked["nodes"], asked["tasks_per_node"], asked["timeout_min"]) == (2, 8, 2800)
    assert not [name for name in asked if name.startswith("slurm_")]
    argv = ["--partition", "learnfair", "--use_volta32", "--comment", "ICCV", "--nodes", "3", "--lr", "0.5"]
    submit(main_for_slurm, tiny_run.get_parser(), argv, nodes=4, timeout=60)
    asked = Executor.asked
    assert (asked["nodes"], asked["timeout_min"], asked["job"].args.lr) == (3, 60, 0.5)
    slurm = {name: value for name, value in asked.items() if name.startswith("slurm_")}
    assert slurm == {"slurm_partition": "learnfair", "slurm_comment": "ICCV", "slurm_constraint": "volta32gb"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "tiny_run: BadFlags: --executor slurm: Could not detect .srun."),  # this is not a cluster
        (["--executor", "local"], "--executor local: .*nodes=1"),
        (["--config", "none.yaml"], "--config none.yaml: no file none.yaml"),
        (["--nodes", "0"], "--nodes: expected 1 or more, got 0"),
        (None, "pip install submitit"),
    ],
)
def test_what_cannot_be_queued_is_one_message(monkeypatch, tmp_path, capsys, argv, words):
    if argv is None:
        monkeypatch.setitem(sys.modules, "submitit", None)
    else:
        pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        submit(tiny_run.main, tiny_run.get_parser(), argv or [])
    assert re.search(words, capsys.readouterr().err if end.value.code == 2 else end.value.code)


class Dropped:
    """Python can only print what its destructor raises, as PyTorch's signal handler may in any callback."""

    def __init__(self, message):
        self.message = message

    def __del__(self):
        raise RuntimeError(self.message)


@pytest.mark.parametrize(
    ("message", "printed"),
    [("DataLoader worker (pid 7) is killed by signal: Killed. ", False), ("something else", True)],
)
def test_a_killed_worker_noticed_in_a_destructor_gives_no_traceback(message, printed, monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(str(unraisable.exc_value)))
    with report_shortage():
        Dropped(message)
    assert seen == [message] * printed
    Dropped(message)  # and the hook is restored
    assert len(seen) == 1 + printed


def test_an_iterator_that_lacks_some_of_its_workers_is_torn_down_without_a_traceback(monkeypatch):
    class HalfMadeDataLoaderIter:
        def __del__(self):
            raise AttributeError("'_MultiProcessingDataLoaderIter' object has no attribute '_workers_status'")

    def start():
        iterator = HalfMadeDataLoaderIter()
        raise RuntimeError(f"Too many open files {bool(iterator)}")

    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(str(unraisable.exc_value)))
    with pytest.raises(RunError, match="too many open files"), report_shortage():
        start()
    gc.collect()  # only now, after the message
    assert seen == []
    Dropped("something else")
    assert seen == ["something else"]


def test_workers_that_cannot_be_started_are_one_message(monkeypatch):
    def fork():
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    words = "no data loading worker can be started .*: use fewer --num_workers"
    with pytest.raises(RunError, match=words), report_shortage():
        iter(DataLoader([1, 2], num_workers=1, multiprocessing_context="fork"))
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # a worker of multiprocessing.Pool
    with pytest.raises(RunError, match=words.replace(".*", ".*daemonic.*")), report_shortage():
        iter(DataLoader([1, 2], num_workers=1, multiprocessing_context="fork"))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("torch/utils/data/dataloader.py", "multiprocessing/connection.py"), "(process unknown) is gone (E"),
        (("utils/data/dataloader.py", "multiprocessing/resource_sharer.py"), "is gone ([Errno 2] No such file"),
        (("utils/data/pin_memory.py", "multiprocessing/resource_sharer.py", "full"), "too many open files: raise"),
        (("utils/data/dataloader.py",), None),
    ],
)
@pytest.mark.parametrize("pinned", [False, True])
def test_a_worker_killed_while_its_batch_is_fetched_is_a_lost_worker(files, expected, pinned, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # PyTorch's handler stays for other tests
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    error = FileNotFoundError(2, "No such file") if "sharer" in files[-1] else EOFError()
    error = OSError(24, "Too many open files") if files[-1] == "full" else error

    def step():
        raise error

    for file in reversed(files):
        space = {"inner": step}
        exec(compile("def step(): inner()", file, "exec"), space)
        step = space["step"]
    with pytest.raises(RunError if expected else EOFError) as found, report_shortage():
        if not pinned:
            step()
        thread = threading.Thread(target=step, name="Thread-1 (_pin_memory_loop)")  # PyTorch's, with a GPU
        thread.start()
        thread.join()
        raise RuntimeError("Pin memory thread exited unexpectedly")
    assert expected is None or expected in str(found.value)


def test_pytorch_may_report_a_killed_worker_while_its_first_error_is_on_its_way_out(monkeypatch, capsys):
    words, ignored = "DataLoader worker (pid 7) is killed by signal: Killed. ", []

    @contextlib.contextmanager
    def interrupted(where):
        try:
            yield
        finally:
            raise RuntimeError(words)  # what the handler of SIGCHLD does, at any line

    monkeypatch.setattr("irpe_train.launch.report_lost_ranks", interrupted)
    monkeypatch.setattr(signal, "signal", lambda number, handler: ignored.append((number, handler)))
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="1"):
        launch(raising(RuntimeError(words)), tiny_run.get_parser(), [])
    assert "a data loading worker (process 7) is killed by signal: Killed" in capsys.readouterr().err
    assert ignored[-1] == (signal.SIGCHLD, signal.SIG_DFL)
