"""``python`` without its five seconds of importing PyTorch: programs run in processes forked from a server that has it.

Nothing of this repository is imported before the fork, so what runs is the copy that the program itself would find.
"""

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import inspect
import json
import multiprocessing
import multiprocessing.connection
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

STANDS_FOR = {"python": [], "torchrun": ["-m", "torch.distributed.run"], "irpe": ["-m", "irpe"]}
IMPORTED = (
    "torch._dynamo",
    "torch.distributed.launcher",
    "torch.onnx",
    "torch.utils.tensorboard",
    "torchvision",
    "timm",
    "scipy.optimize",
    "pycocotools.coco",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "onnxruntime",
    "onnxscript",
)
# The second line is a command of the shell, and text for Python: a #! takes no path with spaces.
STAND_IN = """#!/bin/sh
"exec" "{python}" "-IS" "$0" "$@"
import json, os, socket, sys
words = {words} + [word for word in sys.argv[1:] if word not in ("-u", "-B")]
if not words or words[0] not in ("-c", "-m") and words[0].startswith("-"):
    os.execv({python!r}, [{python!r}, *words])
files = [n for n in map(int, os.listdir("/dev/fd")) if os.path.lexists(f"/dev/fd/{{n}}") and os.get_inheritable(n)]
with socket.socket(socket.AF_UNIX) as door:
    door.connect({door!r})
    socket.send_fds(door, [b"."], files)
    door.sendall(json.dumps([files, {stand_in!r}, words, os.getcwd(), dict(os.environ)]).encode() + b"\\n")
    code = int(door.makefile().readline())
sys.exit(code if code >= 0 else 128 - code)
"""


@functools.cache
def quick_programs() -> Path:
    """A folder to put first in ``PATH``: each program of ``STANDS_FOR`` passes its arguments to the server.

    The processes that pytest-xdist starts share the server of the first, which ``tests/conftest.py`` names to them.
    """
    if "QUICK_PROGRAMS" in os.environ:
        return Path(os.environ["QUICK_PROGRAMS"])
    folder = Path(tempfile.mkdtemp(prefix="quick_python_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, words in STANDS_FOR.items():
        file = folder / name
        given = dict(python=sys.executable, words=words, door=str(folder / "door"), stand_in=str(folder / "python"))
        file.write_text(STAND_IN.format(**given))
        file.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(folder / "door"))
        door.listen(64)
        options = dict(pass_fds=[door.fileno()], env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
        command = [sys.executable, "-I", __file__, str(door.fileno())]
        # It ends with this process, which holds the other end of its standard input.
        quick_programs.server = subprocess.Popen(command, stdin=subprocess.PIPE, **options)
    return folder


def serve(door: socket.socket) -> None:
    """Fork for each stand-in that connects, and tell it the exit status. Ends this process when nobody needs it."""
    if sys.stdin in select.select([door, sys.stdin], [], [])[0]:  # imports only when somebody needs it
        return
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    fork = multiprocessing.get_context("fork")
    multiprocessing.set_start_method("fork")
    multiprocessing.get_context = lambda method=None: fork  # nor do the processes that a program spawns wait
    inspect.getmodule(sys._getframe())  # fills a cache that the import of our operators needs
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    os.fsync = lambda handle: None  # as quick_disk.py
    # A program tells its end by SIGCHLD: multiprocessing's sentinel may have a number that it needs for its own files.
    ended, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes.fileno())
    programs, clients = [], {}  # clients: the program of each stand-in, ready when the stand-in has ended
    while True:
        ready = multiprocessing.connection.wait([door, sys.stdin, ended, *clients])
        if sys.stdin in ready:
            for program in programs:  # those of a test session that was interrupted
                program.terminate()
            os._exit(0)
        if ended in ready:
            ended.recv(4096)
        for client in clients.keys() & ready:
            clients.pop(client).terminate()
        for client in [client for client, program in clients.items() if program.exitcode is not None]:
            with client, contextlib.suppress(BrokenPipeError):
                client.sendall(b"%d\n" % clients.pop(client).exitcode)
        programs = [program for program in programs if program.exitcode is None]
        if door in ready:
            client = door.accept()[0]
            with contextlib.suppress(ValueError):  # a stand-in that was killed before it asked
                clients[client] = start(client)
                programs.append(clients[client])


def start(client: socket.socket) -> multiprocessing.Process:
    """Run in a fork what a stand-in asks for."""
    _, streams, _, _ = socket.recv_fds(client, 1, 253)
    try:
        request = client.makefile().readline()
        program = multiprocessing.Process(target=run, args=(streams, *json.loads(request)))
        program.start()
    finally:
        for stream in streams:
            os.close(stream)
    return program


def run(
    streams: list[int], numbers: list[int], stand_in: str, words: list[str], folder: str, environment: dict[str, str]
) -> None:
    """What ``python WORDS`` does."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    above = [fcntl.fcntl(stream, fcntl.F_DUPFD_CLOEXEC, max(numbers) + 1) for stream in streams]
    for stream in streams:
        os.close(stream)
    for number, stream in zip(numbers, above, strict=True):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.executable, sys.orig_argv, sys.argv = stand_in, [stand_in, *words], words
    sys.path[:0] = [folder if words[0] in ("-c", "-m") else str(Path(words[0]).resolve().parent)]
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = ["-m", *words[2:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
