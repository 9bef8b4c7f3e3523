"""What a run remembers: published keys, positions, and states that are refused on loading."""

import argparse
import copy
import math
import pathlib

import pytest
import torch

from irpe_train.checkpoint import Checkpoint, read_checkpoint
from irpe_train.errors import BadCheckpoint
from irpe_train.logger import set_up_logging
from irpe_train.run_folder import Checkpoints
from irpe_train.state import TrainState, plain

DEIT = ("model", "optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args")


DETR = ("model", "optimizer", "lr_scheduler", "epoch", "args")


def a_state(**options):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    return TrainState(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1), **options)


def whole_checkpoint():
    state = a_state()
    state.model(torch.ones(1, 3)).sum().backward()
    state.optimizer.step()
    return state.to_dict(DETR)


@pytest.mark.parametrize(
    "progress",
    [
        3,
        [],
        None,
        {"step": "4"},
        {"step": -1},
        {"step": 9, "fits": [8, 1, 0]},
        {"epoch": 1.5},
        {"epoch": -1},
        {"epoch": None},
        {"best": "high"},
        {"train_stats": [1]},
        {"train_stats": {"loss": "low"}},
        {"fits": 3},
        {"fits": ["a"]},
        {"meters": 3},
        {"meters": [{"loss": 3}]},
        {"meters": [{"loss": {"total": 1.0, "count": 1, "window": [None]}}]},
        {"meters": [{"loss": {"total": 1.0, "count": 1}}]},
        {"format": "1"},
    ],
    ids=str,
)
def test_a_position_that_makes_no_sense_is_refused(progress):
    contents = whole_checkpoint()
    contents["progress"] = contents["progress"] | progress if isinstance(progress, dict) else progress
    with pytest.raises(BadCheckpoint, match="a.pth: its position .* makes no sense"):
        a_state().load(Checkpoint("a.pth", contents))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("lr_scheduler", {"last_epoch": "three"}),
        ("lr_scheduler", {"step": 3}),
        ("lr_scheduler", {"base_lrs": 0.1}),
        ("optimizer", {"param_groups": 3}),
        ("optimizer", {"state": []}),
        ("optimizer", {"param_groups": [{"lr": "fast", "params": [0, 1]}]}),
    ],
)
def test_a_state_of_another_form_is_refused_before_it_is_used(part, change):
    contents = whole_checkpoint()
    contents[part] = contents[part] | change
    with pytest.raises(BadCheckpoint, match=f"a.pth: its {part} does not fit this run"):
        a_state().load(Checkpoint("a.pth", contents))


def changed(contents, where, change):
    """``contents`` with ``change`` at the place ``where``; None removes the entry."""
    *path, last = where
    place = contents
    for key in path:
        place = place[key]
    if change is None:
        del place[last]
    else:
        place[last] = change
    return contents


GROUP, MOMENTS = ("optimizer", "param_groups", 0), ("optimizer", "state", 0)


MISFITS = {
    "no lr": ((*GROUP, "lr"), None),
    "no betas": ((*GROUP, "betas"), None),
    "one beta": ((*GROUP, "betas"), (0.9,)),
    "lr of NaN": ((*GROUP, "lr"), math.nan),
    "capturable on a CPU": ((*GROUP, "capturable"), True),
    "no first moment": ((*MOMENTS, "exp_avg"), None),
    "moment of another shape": ((*MOMENTS, "exp_avg"), torch.ones(2, 2)),
    "moment that broadcasts": ((*MOMENTS, "exp_avg"), torch.ones(2, 1)),
    "moment of NaN": ((*MOMENTS, "exp_avg"), torch.full((2, 3), math.nan)),
    "negative second moment": ((*MOMENTS, "exp_avg_sq"), -torch.ones(2, 3)),
    "negative step": ((*MOMENTS, "step"), torch.tensor(-5.0)),
    "step of many": ((*MOMENTS, "step"), torch.ones(3)),
    "no dict": (MOMENTS, torch.ones(3)),
    "parameter by name": (("optimizer", "state", "0"), {"step": torch.tensor(1.0)}),
    "another optimizer": (("optimizer", "state"), {0: {"momentum_buffer": torch.ones(2, 3)}}),
    "no tensor but a set": (("optimizer",), {1, 2}),
    "a tensor": (("optimizer",), torch.ones(3)),
    "optimizer in a schedule": (("lr_scheduler", "optimizer"), 3),
    "schedule of NaN": (("lr_scheduler", "last_epoch"), math.nan),
    "schedule of steps of 0": (("lr_scheduler", "step_size"), 0),
    "schedule of two groups": (("lr_scheduler", "base_lrs"), [0.1, 0.1]),
    "another schedule": (("lr_scheduler",), {"t_initial": 3, "warmup_t": 0}),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_state_that_would_fail_later_is_refused_when_it_is_loaded(name):
    where, change = MISFITS[name]
    contents = changed(whole_checkpoint(), where, change)
    with pytest.raises(BadCheckpoint, match=f"a.pth: its {where[0]} does not fit this run .*; use the flags") as error:
        a_state().load(Checkpoint("a.pth", contents))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["Adam", "SGD", "RMSprop", "Adagrad", "Adadelta", "NAdam", "Adafactor"])
def test_the_trial_step_changes_nothing(kind):
    """Neither weights nor state change, and every stored optimizer loads again."""
    states = [a_state(), a_state()]
    for state in states:
        state.optimizer = getattr(torch.optim, kind)(state.model.parameters(), lr=0.1)
        state.lr_scheduler = torch.optim.lr_scheduler.StepLR(state.optimizer, 2)
    for _ in range(3):
        states[0].model(torch.ones(1, 3)).sum().backward()
        states[0].optimizer.step()
    states[0].lr_scheduler.step()
    stored = copy.deepcopy(states[0].to_dict(DETR))
    assert states[1].load(Checkpoint("a.pth", copy.deepcopy(stored)))
    for key in ("model", "optimizer", "lr_scheduler"):
        torch.testing.assert_close(states[1].to_dict(DETR)[key], stored[key], rtol=0, atol=0)


@pytest.mark.parametrize("gone", ["optimizer", "lr_scheduler", "epoch"])
@pytest.mark.parametrize("value", [None, {}])
def test_what_lacks_a_part_of_the_state_is_weights_alone(gone, value, capsys):
    set_up_logging(0)
    state = a_state()
    state.epoch = 4
    assert not state.load(Checkpoint("a.pth", whole_checkpoint() | {gone: value}))
    assert state.epoch == 4 and f"has weights only (no {gone}): training starts at epoch 4" in capsys.readouterr().out


def nest(levels):
    value = ["x"]
    for _ in range(levels):
        value = [value, value]
    return value


@pytest.mark.parametrize("where", [("args",), ("extra",), ("progress", "also"), (*MOMENTS, "x")])
@pytest.mark.parametrize("kind", ["many", "endless"])
def test_lists_that_stand_for_more_than_the_file_are_refused(tmp_path, where, kind):
    value = nest(50)
    if kind == "endless":
        value.append(value)
    torch.save(changed(whole_checkpoint(), where, value), tmp_path / "a.pth")
    with pytest.raises(BadCheckpoint, match=r"a\.pth: refused: it names more values than the [\d,]+ bytes of the file"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("keys", [DEIT, DETR], ids=["deit", "detr"])
def test_published_keys_come_first_in_the_published_order(tmp_path, keys):
    flags = argparse.Namespace(lr=0.1, path=pathlib.Path("x"), device=torch.device("cpu"))
    state = a_state(scaler=torch.amp.GradScaler("cpu", enabled=False), flags=flags, extra={"names": {1: "one"}})
    state.ema = argparse.Namespace(module=torch.nn.Linear(3, 2))
    Checkpoints(tmp_path, keys).save(state)
    contents = read_checkpoint(tmp_path / "checkpoint.pth")
    assert tuple(contents)[: len(keys)] == keys
    assert set(contents) == {*DEIT, "progress", "names"} and contents["names"] == {1: "one"}
    assert vars(contents["args"]) == {"lr": 0.1, "path": "x", "device": "cpu"}
    assert contents["epoch"] == -1  # none is finished yet


@pytest.mark.parametrize("now", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_a_run_goes_on_with_or_without_loss_scaling(before, now):
    """A run under fp16 with a non-finite loss is told to try ``--amp none``."""
    old = a_state(scaler=torch.amp.GradScaler("cpu", init_scale=8, enabled=before))
    new = a_state(scaler=torch.amp.GradScaler("cpu", init_scale=4, enabled=now))
    old.model(torch.ones(1, 3)).sum().backward()
    old.optimizer.step()
    assert new.load(Checkpoint("a.pth", old.to_dict(DEIT)))
    assert new.scaler.get_scale() == (8 if before and now else 4 if now else 1)


def test_the_means_of_an_epoch_go_on():
    old, new = a_state(), a_state()
    old.meters.update(loss=2.0)
    old.model(torch.ones(1, 3)).sum().backward()
    old.optimizer.step()
    new.load(Checkpoint("a.pth", old.to_dict(DETR)))
    new.meters.update(loss=3.0)
    assert new.meters.averages() == {"loss": 2.5}


def test_epoch_is_the_finished_one(tmp_path):
    state = a_state()
    state.epoch = 3
    for step, stats, finished in ((0, None, 2), (5, None, 2), (9, {"loss": 1.0}, 3)):
        state.step, state.train_stats = step, stats
        assert state.to_dict(DETR)["epoch"] == finished


def test_checkpoint_of_a_newer_program_is_refused():
    contents = a_state().to_dict(DETR)
    assert contents["progress"]["format"] == 1
    contents["progress"]["format"] = 99
    with pytest.raises(BadCheckpoint, match=r"newer version of this program \(format 99, expected at most 1\)"):
        a_state().load(Checkpoint("a.pth", contents))


def test_weights_alone_start_a_new_run(tmp_path):
    state = a_state()
    state.epoch = 2
    torch.save({"model": a_state().model.state_dict()}, tmp_path / "a.pth")
    found = Checkpoints("", DETR).open(str(tmp_path / "a.pth"))
    assert not state.load(found)
    assert state.epoch == 2


def test_published_position_is_the_next_epoch():
    contents = a_state().to_dict(DETR)
    del contents["progress"]
    contents["epoch"] = 149
    state = a_state()
    assert state.load(Checkpoint("a.pth", contents))
    assert (state.epoch, state.step, state.train_stats) == (150, 0, None)


def test_optimizer_of_another_run_is_refused():
    contents = a_state().to_dict(DETR)
    contents["optimizer"]["param_groups"].append(contents["optimizer"]["param_groups"][0])
    with pytest.raises(BadCheckpoint, match="a.pth: its optimizer does not fit this run"):
        a_state().load(Checkpoint("a.pth", contents))


def test_auto_needs_a_folder():
    with pytest.raises(BadCheckpoint, match="--resume auto looks in --output_dir"):
        Checkpoints("", DETR).open("auto")


def test_plain_keeps_what_can_be_read_back():
    import numpy as np

    value = plain({"a": np.float64(1.5), "b": [np.int64(2), (True, None)], "c": pathlib.Path("x"), 3: torch.ones(1)})
    assert value == {"a": 1.5, "b": [2, (True, None)], "c": "x", 3: torch.ones(1)}
    assert type(value["a"]) is float and type(value["b"][0]) is int
