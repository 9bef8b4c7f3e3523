"""Several gloo processes: all stop together, none hangs, and evaluation counts each image once."""

import importlib
import json
import os
import socket
import time
from functools import partial

import pytest
import torch

from irpe_train import distributed
from irpe_train.checkpoint import read_checkpoint
from irpe_train.errors import RunError
from irpe_train.preemption import STOP
from tests.helpers import tiny_run
from tests.helpers.processes import run_ranks

QUIET = ["--device", "cpu", "--no-tensorboard"]


def tiny(folder, *flags, **options):
    return run_ranks(
        tiny_run.main,
        tiny_run.get_parser,
        [*QUIET, "--output_dir", str(folder), *flags],
        folder.parent / "outputs",
        **options,
    )


@pytest.mark.distributed
def test_loss_not_finite_on_one_rank_stops_both(tmp_path):
    results = tiny(tmp_path / "run", "--save-interval", "1", "--nan-at", "1", "1", "3", world_size=2)
    assert time.time() - (tmp_path / "run" / "nonfinite_loss.json").stat().st_mtime < 10  # since it was found
    for ended in results:
        assert ended.code == 1, ended.text
        assert "NonFiniteLoss: loss is not finite on rank 1 at epoch 1, step 3: loss nan" in ended.text
        assert "Traceback" not in ended.text
    (report,) = json.loads((tmp_path / "run" / "nonfinite_loss.json").read_text())
    assert report["rank"] == 1 and len(report["samples"]) == 4 and report["samples"][0].startswith("images/")
    # The checkpoint is the one before the bad step, and training resumes from there.
    progress = read_checkpoint(tmp_path / "run" / "checkpoint.pth")["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 3)


def with_another_rpe_on_rank_1(package, args):
    """Paths may differ: each machine has its own."""
    args.rpe = args.enc_rpe2d = "rpe-1.9-product-ctx-1-k" if os.environ["RANK"] == "1" else ""
    args.data_path = args.coco_path = __file__ if os.environ["RANK"] == "1" else "/"
    importlib.import_module(f"{package}.train").main(args)


@pytest.mark.distributed
@pytest.mark.parametrize(("package", "flag"), [("deit_irpe", "rpe"), ("detr_irpe", "enc_rpe2d")])
def test_ranks_with_different_flags_all_name_the_flag(tmp_path, package, flag):
    parser = importlib.import_module(f"{package}.args").get_args_parser
    for ended in run_ranks(partial(with_another_rpe_on_rank_1, package), parser, QUIET, tmp_path, world_size=2):
        assert ended.code == 1 and "Traceback" not in ended.text, ended.text
        assert f"RunError: --{flag} is '' on rank 0 and 'rpe-1.9-product-ctx-1-k' on rank 1: start e" in ended.text


@pytest.mark.distributed
def test_a_rank_that_dies_ends_the_other_with_a_message(tmp_path):
    survivor, dead = tiny(tmp_path / "run", "--die-at", "1", "0", "2", world_size=2, timeout=50)
    assert dead.code == 9
    assert survivor.code == 1, survivor.text
    assert "RankLost: rank 0 of 2: another process died or was silent for too long" in survivor.text


@pytest.mark.distributed
def test_a_rank_that_never_comes_ends_the_other_with_a_message(tmp_path):
    began = time.monotonic()
    (waiting,) = tiny(tmp_path / "run", "--dist_timeout", "1", world_size=2, missing=(1,), timeout=50)
    assert time.monotonic() - began < 40
    assert waiting.code == 1, waiting.text
    assert "RankLost: rank 0 of 2: could not join the others within 1 s" in waiting.text
    assert "MASTER_ADDR" in waiting.text


def test_a_port_that_is_taken_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=taken.getsockname()[1])
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(RunError, match=rf"MASTER_PORT {place['MASTER_PORT']}.*another program uses this port"):
            distributed.start(device="cpu")


def rank_1_is_silent(args):
    distributed.start(device="cpu", timeout=args.dist_timeout)
    if distributed.rank() == 1:
        time.sleep(3)
    else:
        distributed.gather("here")


@pytest.mark.distributed
def test_a_rank_that_falls_silent_ends_the_other_with_a_message(tmp_path):
    results = run_ranks(
        rank_1_is_silent, tiny_run.get_parser, ["--dist_timeout", "2"], tmp_path, world_size=2, timeout=30
    )
    assert results[0].code == 1 and "in gather" in results[0].text, results[0].text


@pytest.mark.distributed
def test_unreadable_images_of_all_ranks_count(tmp_path):
    """Two bad images, one on each rank; the limit allows one in all."""
    for ended in tiny(tmp_path / "run", "--unreadable", "3", "4", "20", "21", "--max-bad", "0.03", world_size=2):
        assert ended.code == 1, ended.text
        assert "of 48 training images are unreadable, and --max-bad 0.03 allows 1: images/" in ended.text


@pytest.mark.distributed
def test_figures_are_the_same_for_one_two_and_three_ranks(tmp_path):
    tiny(tmp_path / "run", "--epochs", "1")
    figures = []
    for world_size in (1, 2, 3):
        ended = tiny(tmp_path / "run", "--eval", "--resume", "auto", "--test-images", "13", world_size=world_size)
        assert all(e.code == 0 for e in ended), ended
        figures.append({line for e in ended for line in e.text.splitlines() if line.startswith("{'acc1'")})
    assert len(figures[0]) == 1 and figures[0] == figures[1] == figures[2]


def gather_and_reduce(args):
    distributed.start(device="cpu", timeout=20)
    me = distributed.rank()
    assert distributed.gather({"rank": me}) == [{"rank": 0}, {"rank": 1}]
    assert distributed.from_main(f"from {me}") == "from 0"
    value = torch.tensor([1.0, 2.0]) * (me + 1)
    assert distributed.reduce_mean(value).tolist() == [1.5, 3.0] and value.tolist() == [me + 1, 2 * (me + 1)]
    from irpe_train.metrics import MetricLogger

    meters = MetricLogger()
    if me == 1:  # rank 0 saw nothing
        meters.update(acc1=80.0, n=5)
    assert meters.averages() == {"acc1": 80.0}
    meters.update(acc1=20.0, n=5)
    assert meters.averages() == {"acc1": 40.0}


@pytest.mark.distributed
def test_ranks_tell_each_other(tmp_path):
    for ended in run_ranks(gather_and_reduce, tiny_run.get_parser, [], tmp_path, world_size=2):
        assert ended.code == 0, ended.text


def ends_later_on_rank_1(args):
    STOP.install()
    distributed.start(device="cpu", timeout=20)
    time.sleep(0.5 * distributed.rank())
    distributed.end()
    time.sleep(0.5)


@pytest.mark.distributed
def test_no_rank_asks_a_store_that_has_ended(tmp_path):
    """PyTorch would print a warning with a C++ stack at the end of a good run: under srun rank 0 has the store."""
    for ended in run_ranks(ends_later_on_rank_1, tiny_run.get_parser, [], tmp_path, world_size=2):
        assert ended.code == 0 and "TCPStore" not in ended.text, ended.text


def test_one_process_needs_no_group():
    assert distributed.gather(3) == [3] and distributed.from_main(3) == 3
    assert distributed.reduce_mean(torch.ones(2)).tolist() == [1, 1] and distributed.world_size() == 1


def test_absent_cuda_falls_back_to_the_cpu_with_a_note(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.start(device="cuda").type == "cpu"
    assert "--device cuda: no CUDA device here, so this runs on the CPU" in capsys.readouterr().out
    assert distributed.start(device="cpu").type == "cpu" and capsys.readouterr().out == ""
    for named in ("cuda:0", "cuda:9"):  # a numbered GPU does not fall back
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        with pytest.raises(ValueError, match=f"--device {named}: there is no GPU; use cpu"):
            distributed.choose_device(named)


def test_the_gpu_of_a_single_process_is_made_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", current.append, raising=False)
    assert [str(distributed.start(device=name)) for name in ("cuda", "cuda:1")] == ["cuda:0", "cuda:1"]
    assert current == [0, 1]


def test_nccl_is_told_the_gpu_of_its_process(monkeypatch):
    joined = {}
    monkeypatch.setattr(distributed, "_rank_from_environment", lambda: (1, 2, 1))
    monkeypatch.setattr(distributed, "choose_device", lambda name, local_rank: torch.device("cuda", local_rank))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed.STOP, "share", lambda *args: None)
    store = torch.distributed.HashStore()
    monkeypatch.setattr(distributed.dist, "rendezvous", lambda *args, **kwargs: iter([(store, 1, 2)]))
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, **kwargs: joined.update(kwargs))
    monkeypatch.setattr(distributed.dist, "barrier", lambda: None)
    assert distributed.start() == joined["device_id"] == torch.device("cuda", 1)


def test_the_cpu_has_one_number():
    assert distributed.choose_device("cpu:0").type == "cpu"


def test_more_processes_than_gpus_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.choose_device("cuda", 1) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="process 2 on this machine needs GPU 2, but there are 2"):
        distributed.choose_device("cuda", 2)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cuda:2", "--device cuda:2: there are 2 GPUs, counted from cuda:0"),
        ("cpu:7", "--device 'cpu:7': expected cuda, cuda:N or cpu"),
        ("mps", "--device 'mps': expected cuda, cuda:N or cpu"),
        ("cuda:999", "--device 'cuda:999': expected cuda, cuda:N or cpu"),
        ("cuda:٣", "--device 'cuda:٣': expected cuda, cuda:N or cpu"),
        ("banana", "--device 'banana': expected cuda, cuda:N or cpu"),
        ("cuda:-1", "--device 'cuda:-1': expected cuda, cuda:N or cpu"),
        ("", "--device '': expected cuda, cuda:N or cpu"),
    ],
)
def test_devices_that_are_not_there_are_refused(monkeypatch, name, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=words):
        distributed.choose_device(name)


@pytest.mark.parametrize(("nodes", "first"), [("gpu[07-09,12]", "gpu07"), ("a1,a2", "a1"), ("host", "host")])
def test_first_host_of_a_slurm_list(nodes, first):
    assert distributed.first_host(nodes) == first


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": ""},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"SLURM_STEP_NUM_TASKS": "two"},
        {"SLURM_STEP_NUM_TASKS": "2"},  # srun sets more
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": ""},
    ],
    ids=str,
)
def test_an_environment_that_makes_no_sense_is_refused(monkeypatch, variables):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"environment \(RANK, WORLD_SIZE, .*torchrun or srun set; unset them"):
        distributed.start(device="cpu")


def test_a_port_that_is_no_number_is_named(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="MASTER_PORT: invalid literal"):
        distributed.start(device="cpu")


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_one_of_two_variables_is_a_warning(monkeypatch, capsys, name):
    for one in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(one, raising=False)
    monkeypatch.setenv(name, "2")
    distributed.start(device="cpu")
    assert f"warning: {name} is set without the other of RANK and WORLD_SIZE" in capsys.readouterr().out


def test_place_under_slurm(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what is set below is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_NTASKS", "8")  # a batch script's own shell: one process
    assert distributed._rank_from_environment() == (0, 1, 0)
    for name, value in (
        ("STEP_NUM_TASKS", "8"),
        ("PROCID", "5"),
        ("LOCALID", "1"),
        ("JOB_ID", "123456"),
        ("STEP_NODELIST", "n[3-4]"),
    ):
        monkeypatch.setenv(f"SLURM_{name}", value)
    for visible, local_rank in ((0, 1), (8, 1), (1, 0)):  # srun --gpus-per-task=1: each process sees only its own
        monkeypatch.setattr(torch.cuda, "device_count", lambda visible=visible: visible)
        assert distributed._rank_from_environment() == (5, 8, local_rank)
    assert os.environ["MASTER_ADDR"] == "n3" and 20000 <= int(os.environ["MASTER_PORT"]) < 60000
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.delenv("MASTER_PORT")
