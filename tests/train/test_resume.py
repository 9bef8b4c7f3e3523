"""Exact resume: stopped anywhere and started again, a run equals the uninterrupted one bit for bit."""

import gc
import itertools
import json
import multiprocessing.synchronize
import os
import random
import signal
import time

import pytest
import torch

from irpe_train import checkpoint
from irpe_train.checkpoint import read_checkpoint
from irpe_train.errors import Preempted
from irpe_train.loader import TrainLoader
from irpe_train.run_folder import Checkpoints
from tests.helpers import tiny_run
from tests.helpers.processes import Ranks, run_ranks, wait_for

QUIET = ["--device", "cpu", "--no-tensorboard"]


def tiny(folder, *flags, main=tiny_run.main, **options):
    return run_ranks(
        main, tiny_run.get_parser, [*QUIET, "--output_dir", str(folder), *flags], folder.parent / "outputs", **options
    )


def assert_same(a, b, where=""):
    """Equal bit for bit, through all containers; flags are left out, because they count the resumes."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert a.numpy().tobytes() == b.numpy().tobytes(), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            if key != "args":
                assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{index}")
    else:
        assert a == b, where


def assert_same_run(ours, uninterrupted):
    assert (ours / "log.txt").read_text() == (uninterrupted / "log.txt").read_text()
    for name in ("checkpoint.pth", "best.pth"):
        assert_same(read_checkpoint(ours / name), read_checkpoint(uninterrupted / name), name)


def cuts(seed, steps):
    """Where to stop a run of 3 epochs of ``steps``: 3 random steps, the last of one epoch, the first of another."""
    drawn = random.Random(seed).sample([(epoch, step) for epoch in range(3) for step in range(1, steps - 1)], 3)
    return sorted({*drawn, (0, steps - 1), (2, 0)})


def stop_at(output_dir, places, *flags, later, rank=0, world_size=1):
    """Stop at each of ``places`` by a signal to one rank and resume; a stop comes at most ``later`` steps after that.

    All ranks stop together, and never within the steps of one accumulated update.
    """
    reached = (0, 0)
    for epoch, step in places:
        if (epoch, step) < reached:  # the stop before this one came later than that
            continue
        for ended in tiny(
            output_dir, *flags, "--resume", "auto", "--term-at", str(rank), str(epoch), str(step), world_size=world_size
        ):
            assert ended.code == Preempted.EXIT_CODE, (epoch, step, ended.text)
            assert "--resume auto continues" in ended.text
        progress = read_checkpoint(output_dir / "checkpoint.pth")["progress"]
        reached = (progress["epoch"], progress["step"])
        assert (epoch, step) < reached <= (epoch, 1 + step + later)


@pytest.mark.parametrize(
    ("workers", "flags"),
    [(0, ()), (2, ()), (2, ("--accumulate", "5")), (0, ("--amp", "bf16"))],
    ids=["no-workers", "two-workers", "accumulate", "bf16"],
)
def test_stopped_in_mid_epoch_equals_uninterrupted(tmp_path, workers, flags):
    places = cuts(f"{workers} {flags}", 12)
    flags = [*flags, "--deterministic"]
    assert tiny(tmp_path / "whole", *flags)[0].code == 0
    flags = [*flags, "--num_workers", str(workers)]
    stop_at(tmp_path / "cut", places, *flags, later=4 if "--accumulate" in flags else 0)
    (ended,) = tiny(tmp_path / "cut", *flags, "--resume", "auto")
    assert ended.code == 0, ended.text
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_stopped_in_mid_epoch_equals_uninterrupted_on_several_ranks(tmp_path, world_size):
    flags = ["--deterministic", "--images", "60", "--num_workers", "0" if world_size == 3 else "1"]
    for ended in tiny(tmp_path / "whole", *flags, world_size=world_size):
        assert ended.code == 0, ended.text
    # The signal reaches one rank only.
    stop_at(tmp_path / "cut", cuts(world_size, 60 // (4 * world_size)), *flags, later=1, rank=1, world_size=world_size)
    for ended in tiny(tmp_path / "cut", *flags, "--resume", "auto", world_size=world_size):
        assert ended.code == 0, ended.text
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_number_of_workers_changes_nothing(tmp_path):
    assert tiny(tmp_path / "none", "--epochs", "1")[0].code == 0
    assert tiny(tmp_path / "two", "--epochs", "1", "--num_workers", "2")[0].code == 0
    assert_same_run(tmp_path / "two", tmp_path / "none")


def main_stopped_while_evaluating(args):
    evaluate = tiny_run.evaluate

    def evaluate_and_be_stopped(*arguments):
        os.kill(os.getpid(), signal.SIGUSR1)
        return evaluate(*arguments)

    tiny_run.evaluate = evaluate_and_be_stopped
    tiny_run.main(args)


def test_stop_during_evaluation_leaves_at_once_and_resumes_there(tmp_path):
    tiny(tmp_path / "whole")
    (ended,) = tiny(tmp_path / "cut", main=main_stopped_while_evaluating)
    assert ended.code == Preempted.EXIT_CODE and "SIGUSR1" in ended.text
    assert not (tmp_path / "cut" / "log.txt").exists()
    (ended,) = tiny(tmp_path / "cut", "--resume", "auto")
    assert "epoch 0, step 12, to be evaluated" in ended.text
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_whole_process_group_is_told_to_stop(tmp_path):
    """torchrun and SLURM signal the data loading workers too; the step is finished all the same."""
    ranks = Ranks(
        tiny_run.main,
        tiny_run.get_parser,
        [*QUIET, "--output_dir", str(tmp_path / "run"), "--num_workers", "2", "--step-time", "0.05", "--epochs", "50"],
        tmp_path / "outputs",
    )
    wait_for(lambda: "Epoch: [1]" in ranks.outputs[0].read_text())
    os.killpg(ranks.processes[0].pid, signal.SIGTERM)
    (ended,) = ranks.wait(30)
    assert ended.code == Preempted.EXIT_CODE, ended.text
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pth")["progress"]["epoch"] >= 1


def kill_and_restart(folder, kills, flags):
    """SIGKILL at random moments; each restart finds a checkpoint at most one save interval old. Returns the kills."""
    generator, newest, killed = random.Random(0), (0, 0), 0
    while killed < kills:
        ranks = Ranks(
            tiny_run.main,
            tiny_run.get_parser,
            [*QUIET, "--output_dir", str(folder), "--resume", "auto", *flags],
            folder.parent / "outputs",
        )
        wait_for(lambda: "Epoch: [" in ranks.outputs[0].read_text() or not ranks.processes[0].is_alive())  # noqa: B023
        time.sleep(generator.uniform(0, 0.1))
        ranks.processes[0].kill()
        (ended,) = ranks.wait(30)
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.text
        killed += 1
        found = []
        for name in ("checkpoint.pth", "checkpoint_previous.pth"):
            if (folder / name).exists():
                progress = read_checkpoint(folder / name)["progress"]
                found.append((progress["epoch"], progress["step"]))
        assert all(position >= newest for position in found[:1]), "went back"
        newest = max([newest, *found])
    return killed


def test_killed_at_random_moments_equals_uninterrupted(tmp_path):
    flags = ["--images", "200", "--epochs", "4"]
    tiny(tmp_path / "whole", *flags)
    assert kill_and_restart(tmp_path / "cut", 6, [*flags, "--save-interval", "1"]) >= 3
    (ended,) = tiny(tmp_path / "cut", *flags, "--resume", "auto")
    assert ended.code == 0, ended.text
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
def test_killed_a_hundred_times_equals_uninterrupted(tmp_path):
    flags = ["--images", "1200", "--epochs", "10"]
    tiny(tmp_path / "whole", *flags, timeout=600)
    assert kill_and_restart(tmp_path / "cut", 100, [*flags, "--save-interval", "1"]) == 100
    (ended,) = tiny(tmp_path / "cut", *flags, "--resume", "auto", timeout=600)
    assert ended.code == 0, ended.text
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_kill_between_saves_loses_at_most_one_interval(tmp_path):
    (ended,) = tiny(tmp_path / "run", "--save-interval", "5", "--die-at", "0", "1", "9")
    assert ended.code == 9
    progress = read_checkpoint(tmp_path / "run" / "checkpoint.pth")["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 5)


def test_auto_starts_resumes_and_knows_when_it_is_finished(tmp_path):
    (ended,) = tiny(tmp_path / "run", "--resume", "auto")
    assert "no checkpoint" in ended.text and ended.code == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    (ended,) = tiny(tmp_path / "run", "--resume", "auto")
    assert "epoch 3, step 0" in ended.text and "Epoch: [" not in ended.text
    assert (tmp_path / "run" / "log.txt").read_text() == log
    assert "other flags" not in ended.text
    (ended,) = tiny(tmp_path / "run", "--resume", "auto", "--epochs", "4", "--lr", "0.5")
    others = (
        "flags differ from the checkpoint's: epochs=4 (stored: 3), lr=0.5 (stored: 0.05). Its optimizer and schedule"
    )
    assert others in ended.text
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    assert epochs == [0, 1, 2, 3]


def test_a_run_without_epochs_says_so(tmp_path):
    (ended,) = tiny(tmp_path / "run", "--start_epoch", "3")
    assert "warning: --start_epoch 3 --epochs 3: nothing to train" in ended.text


def test_another_batch_size_restarts_the_epoch(tmp_path):
    tiny(tmp_path / "run", "--term-at", "0", "1", "3")
    (ended,) = tiny(tmp_path / "run", "--resume", "auto", "--batch-size", "8")
    assert ended.code == 0 and "this epoch starts again" in ended.text
    assert [json.loads(line)["epoch"] for line in (tmp_path / "run" / "log.txt").read_text().splitlines()] == [0, 1, 2]


def test_auto_falls_back_to_the_checkpoint_before(tmp_path):
    tiny(tmp_path / "whole")
    tiny(tmp_path / "cut", "--term-at", "0", "2", "3")
    newest = tmp_path / "cut" / "checkpoint.pth"
    newest.write_bytes(newest.read_bytes()[:4000])
    (ended,) = tiny(tmp_path / "cut", "--resume", "auto")
    assert ended.code == 0
    assert f"checkpoint {newest}: damaged or truncated" in ended.text and "Falling back to" in ended.text
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_kill_after_the_fall_back_leaves_the_good_checkpoint(tmp_path):
    folder = tmp_path / "run"
    tiny(folder, "--epochs", "2")
    (folder / "checkpoint.pth").unlink()  # which is best.pth too
    (folder / "checkpoint.pth").write_bytes(b"damaged")
    checkpoints = Checkpoints(folder, tiny_run.KEYS)
    good = checkpoints.open("auto").contents
    checkpoint.write_checkpoint(good, folder / "checkpoint.pth", previous=folder / "checkpoint_previous.pth")
    (folder / "checkpoint.pth").unlink()  # as a kill between the two renames
    assert checkpoints.open("auto").source.endswith("checkpoint_previous.pth")


def test_auto_does_not_restart_over_two_bad_checkpoints(tmp_path):
    tiny(tmp_path / "run", "--epochs", "1")
    for name in ("checkpoint.pth", "checkpoint_previous.pth"):
        (tmp_path / "run" / name).write_bytes(b"")
    (ended,) = tiny(tmp_path / "run", "--resume", "auto")
    assert ended.code == 1 and "no usable checkpoint" in ended.text and "the file is empty" in ended.text


@pytest.mark.parametrize("name", ["checkpoint.pth", "checkpoint_previous.pth", "best.pth", "checkpoint0099.pth"])
@pytest.mark.parametrize("flags", [(), ("--resume", "elsewhere.pth")])
def test_a_folder_with_checkpoints_is_not_trained_over(tmp_path, name, flags):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("of a run of last week")
    (ended,) = tiny(tmp_path / "run", *flags)
    last = "auto" if name in ("checkpoint.pth", "checkpoint_previous.pth") else tmp_path / "run" / name
    words = f"--output_dir {tmp_path / 'run'} holds {name} of another run. Continue it with --resume {last}, or"
    assert ended.code == 1 and words in ended.text
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", name]
    assert (tmp_path / "run" / name).read_text() == "of a run of last week"


@pytest.mark.parametrize("name", ["best.pth", "checkpoint0099.pth"])
def test_auto_does_not_restart_over_kept_checkpoints(tmp_path, name):
    tiny(tmp_path / "run", "--epochs", "1")
    (tmp_path / "run/checkpoint.pth").replace(kept := tmp_path / "run" / name)
    for path in tmp_path.glob("run/*.pth"):
        if path != kept:
            path.unlink()
    before = kept.read_bytes()
    (ended,) = tiny(tmp_path / "run", "--resume", "auto")
    words = f"--resume auto: no checkpoint.pth in {tmp_path / 'run'}, but {name}: name one"
    assert ended.code == 1 and words in ended.text and kept.read_bytes() == before
    (ended,) = tiny(tmp_path / "run", "--resume", str(kept), "--epochs", "2")
    assert ended.code == 0 and "epoch 1, step 0" in ended.text, ended.text


@pytest.mark.parametrize("gone", ["optimizer", "epoch"])
def test_weights_alone_do_not_begin_a_new_run_over_the_old_one(tmp_path, gone):
    tiny(tmp_path / "run", "--epochs", "1")
    contents = torch.load(tmp_path / "run/checkpoint.pth", weights_only=False)
    del contents[gone]
    torch.save(contents, tmp_path / "run/checkpoint.pth")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("run/*.pth")}
    (ended,) = tiny(tmp_path / "run", "--resume", "auto", "--epochs", "2")
    assert ended.code == 1 and "would replace best.pth, checkpoint.pth" in ended.text, ended.text
    assert {path.name: path.read_bytes() for path in tmp_path.glob("run/*.pth")} == before
    (ended,) = tiny(tmp_path / "new", "--resume", str(tmp_path / "run/checkpoint.pth"), "--epochs", "1")
    assert ended.code == 0, ended.text


def test_auto_does_not_restart_over_a_link_to_an_unmounted_disk(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint.pth").symlink_to(tmp_path / "disk/checkpoint.pth")
    (ended,) = tiny(tmp_path / "run", "--resume", "auto")
    assert ended.code == 1 and "no usable checkpoint" in ended.text and "checkpoint.pth: no such file" in ended.text


def test_a_run_may_go_on_from_any_checkpoint_of_its_own_folder(tmp_path):
    tiny(tmp_path / "run", "--epochs", "2")
    (ended,) = tiny(tmp_path / "run", "--resume", str(tmp_path / "run/checkpoint_previous.pth"))
    assert ended.code == 0 and "epoch 1, step 12, to be evaluated" in ended.text


def test_a_second_run_in_one_folder_is_refused_until_the_first_has_ended(tmp_path):
    argv = [*QUIET, "--output_dir", str(tmp_path / "run"), "--resume", "auto", "--num_workers", "1"]
    argv += ["--step-time", "0.05", "--epochs", "99"]
    first = Ranks(tiny_run.main, tiny_run.get_parser, argv, tmp_path / "outputs")
    wait_for(lambda: "Epoch: [0]" in first.outputs[0].read_text())
    (second,) = tiny(tmp_path / "run", "--resume", "auto")
    words = f"--output_dir {tmp_path / 'run'}: another run is writing there (process {first.processes[0].pid} on"
    assert second.code == 1 and words in second.text, second.text
    first.processes[0].kill()  # its data loading worker lives a little longer, without holding the lock
    first.processes[0].join()
    (second,) = tiny(tmp_path / "run", "--resume", "auto", "--epochs", "1")
    assert second.code == 0, second.text


def test_the_lock_is_closed_with_the_run(tmp_path, recwarn):
    checkpoints = Checkpoints(tmp_path, tiny_run.KEYS)
    checkpoints.open("auto")
    del checkpoints
    gc.collect()
    assert not [str(one.message) for one in recwarn if one.category is ResourceWarning]


def main_killed_before_the_second_name(args):
    def link(path, copy):
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.link = link
    tiny_run.main(args)


@pytest.mark.parametrize("where", ["auto", "cut/checkpoint.pth"])
def test_a_kill_between_writing_and_naming_is_repaired(tmp_path, where, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny(tmp_path / "cut", "--epochs", "1", main=main_killed_before_the_second_name)
    assert not (tmp_path / "cut" / "best.pth").exists()
    (ended,) = tiny(tmp_path / "cut", "--resume", where, "--epochs", "1")  # nothing is left to do
    assert ended.code == 0, ended.text
    assert (tmp_path / "cut/best.pth").samefile(tmp_path / "cut/checkpoint.pth")


def test_a_run_continued_elsewhere_keeps_the_log_that_is_there(tmp_path):
    tiny(tmp_path / "one", "--epochs", "1")
    (tmp_path / "two").mkdir()
    old = '{"epoch": 0}\n{"epoch": 1}\n{"epoch": 2}\n'
    (tmp_path / "two/log.txt").write_text(old)
    flags = ["--resume", str(tmp_path / "one/checkpoint.pth"), "--lr", "0", "--epochs", "2"]  # no epoch is better
    (ended,) = tiny(tmp_path / "two", *flags)
    assert ended.code == 0 and (tmp_path / "two/log.1.txt").read_text() == old, ended.text
    assert (tmp_path / "two/best.pth").samefile(tmp_path / "two/checkpoint.pth")
    assert [json.loads(line)["epoch"] for line in (tmp_path / "two/log.txt").read_text().splitlines()] == [1]


@pytest.mark.parametrize("name", ["../out.pth", "/tmp/out.pth", "notes.txt", 3, "folder/x.pth"])
def test_names_in_a_checkpoint_stay_in_its_folder(tmp_path, name):
    folder = tmp_path / "run"
    tiny(folder, "--epochs", "1")
    contents = read_checkpoint(folder / "checkpoint.pth")
    contents["progress"]["also"] = [name]
    checkpoint.write_checkpoint(contents, folder / "checkpoint.pth")
    before = sorted(tmp_path.rglob("*"))
    assert Checkpoints(folder, tiny_run.KEYS).open("auto").contents["progress"]["also"] == [name]
    assert sorted(tmp_path.rglob("*")) == before


def main_that_loses_a_worker(args):
    batches = TrainLoader.batches

    def kill_one(self, epoch, start=0):
        for batch in batches(self, epoch, start):
            yield batch
            if start == 0 and epoch == 1:
                os.kill(self._loader._iterator._workers[0].pid, signal.SIGKILL)

    TrainLoader.batches = kill_one
    tiny_run.main(args)


def main_whose_worker_takes_a_lock_along(args):
    """As where it is killed while it asks, before each batch, whether the run has ended."""
    read, reads = tiny_run.Points.__getitem__, itertools.count(1)

    def die(self, index):
        if self.train and next(reads) == 20:
            for event in gc.get_objects():
                if isinstance(event, multiprocessing.synchronize.Event):
                    event._cond.acquire()
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)

    tiny_run.Points.__getitem__ = die
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # it is found by a timeout, as where this comes late
    tiny_run.main(args)


@pytest.mark.parametrize("main", [main_that_loses_a_worker, main_whose_worker_takes_a_lock_along])
def test_a_killed_worker_is_one_message_and_the_run_goes_on_from_its_save(tmp_path, main):
    flags = ["--num_workers", "2", "--save-interval", "1", "--deterministic"]
    (ended,) = tiny(tmp_path / "cut", *flags, main=main)
    assert ended.code == 1 and "Traceback" not in ended.text, ended.text
    assert ended.text.splitlines()[-1].startswith("tiny_run: WorkerLost: a data loading worker (process ")
    tiny(tmp_path / "cut", *flags, "--resume", "auto")
    tiny(tmp_path / "whole", *flags)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_two_deterministic_runs_are_equal(tmp_path):
    for name in ("a", "b"):
        assert tiny(tmp_path / name, "--deterministic", "--epochs", "2")[0].code == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_seed_that_pytorch_cannot_take_is_refused():
    from irpe_train.seeding import seed_everything

    with pytest.raises(ValueError, match=f"--seed {2**63}: expected -"):
        seed_everything(2**63)
