# SPDX-License-Identifier: Apache-2.0
"""Data loaders: training can start at any step of an epoch, and evaluation counts each image once.

``TrainLoader`` replaces an unreadable image with its neighbour, counts it and names it; ``EvalLoader`` never does.
"""

import copy
import multiprocessing.queues
import os
import struct
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence, Sized
from functools import partial
from itertools import chain
from zipfile import BadZipFile

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, default_collate

from irpe_train.distributed import rank, world_size
from irpe_train.errors import BadData
from irpe_train.logger import logger
from irpe_train.preemption import STOP, held_back, ignore_signals_from_others
from irpe_train.seeding import sample_randomness

# What decoders raise on damaged files. PIL raises SyntaxError on a broken PNG.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, BadZipFile, tarfile.TarError)
TRIES = 16  # neighbours that may stand in for an unreadable training image


def fitting_batch(wanted: int, samples: int, multiple: int = 1) -> int:
    """The batch size ``wanted``; if an epoch has fewer ``samples`` per process, with a warning what they fill.

    Args: multiple: of which the batch must be one, as ``wanted`` is. Returns: 0 if the samples do not fill one.
    """
    size = min(wanted, samples - samples % multiple)
    if 0 < size < wanted:
        logger.warning(f"{samples} training samples per process: the batch is {size}, not {wanted}")
    return size


class TrainLoader:
    """Batches of an epoch from any step on, the same however often the run was interrupted.

    Args:
        dataset: map-style; its method ``name(index)``, if it has one, names images in messages.
        sampler: any sampler of indices; ``set_epoch`` is called if it has one, and the generators are seeded from
            (seed, epoch), so that it may use ``torch.randperm`` or ``random`` freely.
        batch_size: per rank. A smaller last batch is dropped.
        seed: the run's seed; each sample is made under generators seeded from (seed, epoch, position).
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Sampler,
        *,
        batch_size: int,
        seed: int,
        collate_fn: Callable = default_collate,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        self.dataset, self.sampler, self.batch_size, self.seed = dataset, sampler, batch_size, seed
        self.bad: dict[str, str] = {}
        self._order = _Order(sampler, batch_size, seed)
        if len(self._order) == 0:
            raise ValueError(
                f"{len(sampler)} training samples per process and epoch do not fill a batch of "
                f"{batch_size}: lower the batch size or add images"
            )
        read = partial(_read_seeded, dataset, seed, rank(), world_size())
        how = dict(num_workers=num_workers, pin_memory=pin_memory, persistent_workers=num_workers > 0)
        self._loader = _loader(read, self._order, partial(_collate_and_report, collate_fn), **how)

    def __len__(self) -> int:
        """Steps in a whole epoch."""
        return len(self._order)

    def batches(self, epoch: int, start: int = 0) -> Iterator:
        """The batches of ``epoch`` from step ``start`` on, as ``collate_fn`` made them."""
        self._order.place(epoch, start)
        self.bad = {}
        if start == len(self):
            return
        for batch, bad in _start(self._loader):
            for name, reason in bad:
                if name not in self.bad:
                    logger.warning(f"unreadable training image, replaced by its neighbour: {name} ({reason})")
                self.bad[name] = reason
            if batch is None:
                last = f"{bad[-1][0]} ({bad[-1][1]}). Fix or remove them."
                raise BadData(f"{len(bad)} training images in a row are unreadable, the last: {last}")
            yield batch

    def samples(self, step: int) -> list[str]:
        """The names of the images of ``step`` in the epoch being read."""
        return [_name(self.dataset, index) for _, _, index in self._order.batch(step)]


class EvalLoader:
    """Every image of a set exactly once: rank ``r`` of ``n`` has batches ``r, r + n, ...``; nothing is repeated.

    The batches are those of a single process, so figures that depend on them (means over batches, padding) are the same
    for any number of processes.

    The ranks may have different numbers of batches, so a loop over it must not reduce or run a wrapped model
    (DistributedDataParallel broadcasts buffers in its forward): use the plain model and combine at the end.

    Args: shard: False gives every rank the whole set.
    Raises: BadData: on an unreadable image, with its name.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        collate_fn: Callable = default_collate,
        num_workers: int = 0,
        pin_memory: bool = False,
        shard: bool = True,
    ):
        self.dataset, self.batch_size = dataset, batch_size
        first, stride = (rank(), world_size()) if shard else (0, 1)
        self.batches = list(BatchSampler(range(len(dataset)), batch_size, drop_last=False))[first::stride]
        how = dict(num_workers=num_workers, pin_memory=pin_memory)
        collate = partial(_collate_and_report, collate_fn)
        self._loader = _loader(partial(_read_named, dataset), self.batches, collate, **how)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator:
        for batch, bad in _start(self._loader):
            STOP.leave_if_asked()
            if bad:
                name, reason = bad[0]
                remedy = "Every image counts, so none is skipped: fix or remove this file."
                raise BadData(f"evaluation cannot read {name} ({reason}). {remedy}")
            yield batch


def try_all(read: Callable[[int], object], indices: Sequence[int], num_workers: int) -> Iterator[tuple[object, str]]:
    """(``read(index)``, "") for each of ``indices`` in order, or (None, why it cannot be read).

    They are read by up to ``num_workers`` processes; random generators are left unchanged.
    """
    batches = BatchSampler(indices, 64, drop_last=False)
    return chain.from_iterable(_start(_loader(partial(_tried, read), batches, list, num_workers=num_workers)))


def _tried(read: Callable[[int], object], index: int) -> tuple[object, str]:
    try:
        return read(index), ""
    except UNREADABLE as error:
        return None, str(error) or type(error).__name__


def _loader(read: Callable, batches: Sized, collate_fn: Callable, *, num_workers: int, **how) -> DataLoader:
    """Batches of what ``read`` returns, as ``collate_fn`` makes them; ``batches`` are lists of keys to read.

    No more workers are started than there are batches.
    """
    if workers := min(num_workers, len(batches)):
        how |= dict(num_workers=workers, multiprocessing_context=_context(), worker_init_fn=_init_worker)
    return DataLoader(_Read(read), batch_sampler=batches, collate_fn=collate_fn, generator=torch.Generator(), **how)


def _context() -> multiprocessing.context.BaseContext:
    """Python's, with another event: a killed worker may take the lock of Python's along, and the run waits forever."""
    context = copy.copy(multiprocessing.get_context())
    context.Event = lambda: _Event(context.RawValue("b"))
    return context


class _Event:
    """What PyTorch needs of a ``multiprocessing.Event``, without a lock. ``shared``: a byte in shared memory, 0."""

    def __init__(self, shared):
        self._shared = shared

    def is_set(self) -> bool:
        return self._shared.value != 0

    def set(self) -> None:
        self._shared.value = 1


def _init_worker(worker_id: int) -> None:
    # multiprocessing calls it in its own thread if the main process ends while fetching a tensor from here.
    sys.excepthook = lambda *_: None
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_leave)
    ignore_signals_from_others()


def _leave(error: Exception, batch: object) -> None:
    """End this worker, which cannot hand over its batch: Python would go on without, and the run would wait forever."""
    remedy = "It needs a TMPDIR that is writable and short, room in /dev/shm and open files (ulimit -n)."
    print(f"a data loading worker cannot hand over a batch ({error}). {remedy}", file=sys.stderr, flush=True)
    os._exit(1)


def _start(loader: DataLoader) -> Iterator:
    if sys.version_info < (3, 11) and world_size() > 1:
        # In Python 3.10 a forked worker hangs if a gloo thread, still cleaning up after the last collective, requests
        # the GIL during the fork (_PyThreadState_DeleteExcept takes a lock that is only reinitialized afterwards).
        time.sleep(0.05)
    with held_back():
        return iter(loader)


class _Order(Sampler):
    """Lists of (epoch, position, index): a batch sampler that knows its place."""

    def __init__(self, sampler: Sampler, batch_size: int, seed: int):
        self.sampler, self.batch_size, self.seed = sampler, batch_size, seed
        self.epoch = self.start = 0
        self.indices: list[int] = []

    def place(self, epoch: int, start: int) -> None:
        self.epoch, self.start = epoch, start
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
        with sample_randomness("order", self.seed, epoch):
            self.indices = [int(index) for index in self.sampler]

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    def batch(self, step: int) -> list[tuple[int, int, int]]:
        first = step * self.batch_size
        return [(self.epoch, first + k, i) for k, i in enumerate(self.indices[first : first + self.batch_size])]

    def __iter__(self):
        for step in range(self.start, len(self)):
            yield self.batch(step)


class _Read(Dataset):
    """A dataset whose item ``key``, of any type, is ``read(key)``."""

    def __init__(self, read: Callable):
        self.read = read

    def __getitem__(self, key):
        return self.read(key)


def _read_seeded(dataset: Dataset, seed: int, rank: int, world_size: int, key: tuple[int, int, int]):
    """(epoch, position, index) -> (sample, [(name, reason) of each unreadable image met]); None if all were."""
    epoch, position, index = key
    bad = []
    for attempt in range(min(TRIES, len(dataset))):
        with sample_randomness(seed, epoch, position * world_size + rank):
            sample, unreadable = _read_named(dataset, (index + attempt) % len(dataset))
        bad += unreadable
        if not unreadable:
            return sample, bad
    return None, bad


def _read_named(dataset: Dataset, index: int) -> tuple[object, list[tuple[str, str]]]:
    """(sample, []), or (None, [(name, reason)]) for an unreadable image: an error raised in a worker loses its type."""
    try:
        return dataset[index], []
    except UNREADABLE as error:
        reason = str(error).splitlines()[0][:200] if str(error) else "no details"
        return None, [(_name(dataset, index), f"{type(error).__name__}: {reason}")]


def _collate_and_report(collate_fn: Callable, items: list) -> tuple[object, list]:
    """[(sample, bad)] -> (batch, bad); an evaluation batch with a bad image is not collated."""
    samples, bad = [sample for sample, _ in items], [entry for _, entries in items for entry in entries]
    return (None if any(sample is None for sample in samples) else collate_fn(samples)), bad


def _name(dataset: Dataset, index: int) -> str:
    return dataset.name(index) if hasattr(dataset, "name") else f"image {index}"
