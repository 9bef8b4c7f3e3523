# SPDX-License-Identifier: Apache-2.0
"""Downloads into torch's cache: one process at a time, limited in size, whole or not at all."""

import contextlib
import fcntl
import hashlib
import http.client
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path

from irpe_train.errors import BadCheckpoint, RunError, in_one_line
from irpe_train.text_files import plain_file, read_text, write_text

CHUNK = 1 << 20
LARGEST_FILE = 4 << 30  # bytes; if no size is known, a response is cut off here
PATIENCE = 120.0  # seconds until a response begins


def cache_folder() -> Path:
    """Where torch.hub keeps checkpoints, by its documented rule; importing torch to ask would take seconds.

    Raises: RunError: the user has no home folder, like an unknown user in a container.
    """
    home = os.environ.get("TORCH_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torch")
    try:
        return Path(home).expanduser() / "hub" / "checkpoints"
    except RuntimeError as error:
        raise RunError("checkpoints are kept in the home folder, but there is none: set TORCH_HOME") from error


def local_file(path: str | Path) -> Path:
    """The local file: ``path``, or the file of an ``https://`` address in torch's cache, downloaded if missing.

    Raises: BadCheckpoint: it cannot be downloaded, does not match the SHA-256 in its name, or another address with the
        same last part was downloaded before.
    """
    url = str(path)
    if not url.startswith("https://"):
        if "://" in url:
            raise BadCheckpoint(f"checkpoint {url}: only https:// is read; download the file and give its path")
        return Path(path)
    address = url.split("?")[0]
    target = cache_folder() / address.rsplit("/", 1)[-1]
    origin = target.with_name(target.name + ".url")
    digest = re.search(r"-([0-9a-f]{8,})\.", target.name)  # the published names carry the start of their SHA-256

    def check(file: Path) -> None:
        if digest and not (found := sha256(file)).startswith(digest[1]):
            raise BadCheckpoint(f"checkpoint {file}: its sha256 is {found}, unlike its name; delete it, download again")

    def check_new(part: Path) -> None:
        check(part)
        write_text(origin, address + "\n")

    if target.exists():
        check(target)
        if not digest and origin.is_file() and (other := read_text(origin).strip()) != address:
            raise BadCheckpoint(f"checkpoint {url}: {target} is from {other}; give its path, or delete it for this one")
        return target
    try:
        fetch_once(url, target, check=check_new)
    except OSError as error:
        with contextlib.suppress(OSError):
            origin.unlink()  # its file was deleted
        remedy = f"Put it here by hand: {target}. For a cache elsewhere set TORCH_HOME."
        raise BadCheckpoint(f"checkpoint {url}: download failed ({error}). {remedy}") from error
    return target


def fetch_once(url: str, target: Path, *, check: Callable[[Path], None], most: int | None = None) -> None:
    """Download ``url`` to ``target``. Several processes may ask at once: one downloads, the others wait for it.

    Raises: OSError: the network failed; BadCheckpoint: more than ``most`` bytes (default: ``LARGEST_FILE``) came;
        what ``check`` raises for a wrong file. Nothing is kept then.
    """
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    with alone(target.parent):
        if target.exists():  # another process was faster and has checked it
            return
        plain_file(part)
        try:
            download(url, part, most=most or LARGEST_FILE)
            check(part)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def download(url: str, part: Path, *, most: int) -> None:
    """Write ``url`` to ``part``; the announced length must arrive.

    Raises: OSError: the connection broke; BadCheckpoint: more than ``most`` bytes are announced, or come.
    """
    arrived = 0
    try:
        with _answer(urllib.request.Request(url)) as response, part.open("wb") as file:
            announced = response.headers.get("Content-Length") or ""
            expected = int(announced) if announced.isdecimal() else None
            while (expected or 0) <= most and arrived <= most and (chunk := response.read(CHUNK)):
                file.write(chunk)
                arrived += len(chunk)
    except OSError as error:
        raise OSError(in_one_line(error)) from error
    except (http.client.HTTPException, ValueError) as error:
        why = "not an address, or no whole answer from a web server"
        raise OSError(f"{why}: {error!r:.100} after {arrived} bytes") from error
    if max(arrived, expected or 0) > most:
        raise BadCheckpoint(f"{url}: more than {most} bytes; that is not a checkpoint, and was not kept")
    if expected is not None and arrived != expected:
        raise OSError(f"the connection ended after {arrived} of {expected} bytes; run again")


def _answer(request: urllib.request.Request) -> http.client.HTTPResponse:
    """The response headers, within ``PATIENCE``: a server may send "100 Continue" forever."""
    answer: Future = Future()

    def ask() -> None:
        try:
            answer.set_result(urllib.request.urlopen(request, timeout=30))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(PATIENCE)
    except FutureTimeout as error:
        if answer.done():  # the connection's own timeout, after 30 s
            raise
        raise OSError(f"no answer within {PATIENCE:g} s") from error


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock ``folder`` against downloads by other processes; the lock ends with the process, even if killed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with plain_file(path).open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
