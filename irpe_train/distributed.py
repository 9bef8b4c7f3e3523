# SPDX-License-Identifier: Apache-2.0
"""One process or several (torchrun, SLURM; gloo, nccl), and how they communicate.

Every function also works in a single process, so callers need not check.
"""

import contextlib
import datetime
import os
import re

import torch
import torch.distributed as dist

from irpe_train.errors import RankLost, RunError, blamed_on, first_line, in_one_line
from irpe_train.freed_memory import keep_freed_memory
from irpe_train.logger import logger, set_up_logging
from irpe_train.preemption import STOP

LOST_RANK = re.compile(  # in the words of gloo, NCCL and the store
    r"connection (closed|reset|refused)|broken pipe|timed out|timeout|socket|nccl|connect\(\) failed", re.IGNORECASE
)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def start(*, device: str = "cuda", dist_url: str = "env://", timeout: float = 600.0) -> torch.device:
    """Join the process group if there is one, choose this process's device, and set up the logger.

    Reads ``RANK, WORLD_SIZE, LOCAL_RANK`` (torchrun, submitit) or the variables of ``srun``.

    Args:
        device: ``cuda`` falls back to the CPU with a note; ``cuda:1`` or ``cpu`` are used as given.
        dist_url: where the processes meet.
        timeout: seconds after which a missing or silent process ends the others.
    Raises:
        RankLost: not all processes arrived within ``timeout``. RunError: the port is taken.
        ValueError: more processes than GPUs on this machine.
    """
    my_rank, world, local_rank = _rank_from_environment()
    set_up_logging(my_rank)
    lone = {"RANK", "WORLD_SIZE"} & os.environ.keys()
    if world == 1 and len(lone) == 1:
        logger.warning(f"{lone.pop()} is set without the other of RANK and WORLD_SIZE: running as a single process")
    chosen = choose_device(device, local_rank if world > 1 else None)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    else:
        keep_freed_memory()
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        logger.info(f"process {my_rank} of {world}, {backend} at {dist_url}")
        try:
            limit = datetime.timedelta(seconds=timeout)
            store, _, _ = next(dist.rendezvous(dist_url, my_rank, world, timeout=limit))
            STOP.share(dist.PrefixStore("stop", store.clone()), my_rank, world)
            groups = dist.PrefixStore("groups", store)
            # With device_id, NCCL connects at once and need not guess the GPU at the first barrier.
            gpu = chosen if chosen.type == "cuda" else None
            dist.init_process_group(backend, store=groups, rank=my_rank, world_size=world, timeout=limit, device_id=gpu)
            dist.barrier()
        except ValueError as error:  # PyTorch's, about a port or an address
            raise ValueError(f"--dist_url {dist_url}, MASTER_ADDR, MASTER_PORT: {error}") from error
        except RuntimeError as error:
            STOP.leave_if_asked()
            if "EADDRINUSE" in str(error):
                port = f"MASTER_PORT {os.environ.get('MASTER_PORT')}, --dist_url {dist_url}"
                raise RunError(f"{port}: another program uses this port; choose one that is free") from error
            raise RankLost(
                f"rank {my_rank} of {world}: could not join the others within {timeout:g} s ({in_one_line(error)}). "
                "Start all of them, with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE."
            ) from error
    return chosen


def end() -> None:
    """Leave the process group, if there is one, once no rank needs the store, which ends with rank 0."""
    if dist.is_initialized():
        STOP.end_watch()
        dist.barrier()
        dist.destroy_process_group()


def _rank_from_environment() -> tuple[int, int, int]:
    """Rank, world size and local rank."""
    env, place = os.environ, (0, 1, 0)
    with blamed_on("environment (RANK, WORLD_SIZE, ..., which torchrun or srun set; unset them for one process)"):
        if "RANK" in env and "WORLD_SIZE" in env:
            place = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
        elif int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # only srun sets it: not a batch script's own shell
            env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
            env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 40000))
            alone = torch.cuda.device_count() == 1  # --gpus-per-task=1 shows each process its own GPU, as number 0
            local = 0 if alone else int(env["SLURM_LOCALID"])
            place = int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), local
        if not 0 <= place[0] < place[1]:
            raise ValueError(f"rank {place[0]} of {place[1]}; ranks are counted from 0")
    return place


def first_host(node_list: str) -> str:
    """The first host of a SLURM node list: ``gpu[07-09,12]`` gives ``gpu07``."""
    if not (found := re.match(r"([^,\[]+)(?:\[(\d+))?", node_list)):
        raise ValueError(f"SLURM_STEP_NODELIST is {node_list!r}, which names no host")
    return found[1] + (found[2] or "")


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device ``name``; the CPU, with a note, if CUDA is requested but absent.

    Args: local_rank: which GPU of this machine this process takes; None for a single process.
    Raises: ValueError: no such device, or more processes than GPUs.
    """
    if not re.fullmatch(r"cpu(:0)?|cuda(:[1-9]?[0-9])?", name):
        raise ValueError(f"--device {name!r}: expected cuda, cuda:N or cpu")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if device.index is None and not torch.cuda.is_available():
        logger.info(f"--device {name}: no CUDA device here, so this runs on the CPU (--device cpu hides this note)")
        return torch.device("cpu")
    if local_rank is None:
        if (device.index or 0) >= (count := torch.cuda.device_count()):
            where = f"there are {count} GPUs, counted from cuda:0" if count else "there is no GPU; use cpu"
            raise ValueError(f"--device {name}: {where}")
        return torch.device("cuda", device.index or 0)
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank} on this machine needs GPU {local_rank}, but there are {torch.cuda.device_count()}: "
            "start fewer processes (--nproc_per_node), or add --device cpu"
        )
    return torch.device("cuda", local_rank)


def wrap(
    model: torch.nn.Module, device: torch.device, *, compile: bool = False, deterministic: bool = False
) -> torch.nn.Module:
    """``model`` ready for training: compiled if requested, in DistributedDataParallel if there are several processes.

    The caller keeps ``model`` itself for evaluation, the moving average and checkpoints.
    """
    if compile:
        model = torch.compile(model)
    if world_size() == 1:
        return model
    # DistributedDataParallel reorders its buckets after the first step, unless it looks for unused parameters. A
    # resumed run would then sum its first step in another order than the uninterrupted one, and differ in the last bit.
    devices = [device] if device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(model, devices, find_unused_parameters=deterministic)


def gather(value) -> list:
    """Every rank's ``value`` (anything that can be pickled), in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    with report_lost_ranks("gather"):
        dist.all_gather_object(values, value)
    return values


def from_main(value):
    """Rank 0's ``value``, on every rank."""
    values = [value]
    if world_size() > 1:
        with report_lost_ranks("broadcast"):
            dist.broadcast_object_list(values, src=0)
    return values[0]


def reduce_mean(value: torch.Tensor) -> torch.Tensor:
    """The mean over ranks of a tensor with the same shape on each, on every rank; the argument is unchanged."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    with report_lost_ranks("reduce_mean"):
        dist.all_reduce(total)
    return total / world_size()


@contextlib.contextmanager
def report_lost_ranks(where: str):
    """Turns an error of gloo, NCCL or the store into ``RankLost`` if it is about a dead or silent peer."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RunError) or world_size() == 1 or not LOST_RANK.search(str(error)):
            raise
        STOP.leave_if_asked()  # the peer has left first
        raise RankLost(
            f"rank {rank()} of {world_size()}: another process died or was silent for too long (in {where}: "
            f"{first_line(error)}). Look for the first error on the other ranks; restart with --resume auto."
        ) from error
