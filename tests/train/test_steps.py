"""One step: the finite check before the update, accumulation, clipping, loss scaling, saves in between."""

import argparse
import json
import weakref

import pytest
import torch
from torch.utils.data import SequentialSampler

from irpe_train.arguments import parse_save_interval
from irpe_train.distributed import set_up_logging
from irpe_train.errors import BadData, NonFiniteLoss
from irpe_train.loader import TrainLoader
from irpe_train.precision import Precision
from irpe_train.run_folder import Checkpoints
from irpe_train.state import TrainState
from irpe_train.steps import Steps

CPU = torch.device("cpu")


class Rows:
    """Fixed rows, and a file name for each."""

    def __init__(self, count, unreadable=()):
        self.samples = [(f"row{i}.png", 0) for i in range(count)]
        self.rows = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
        self.unreadable = unreadable

    def name(self, index):
        return self.samples[index][0]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if index in self.unreadable:
            raise OSError("truncated")
        return self.rows[index]


def set_up(folder="", count=12, batch_size=2, amp="none", unreadable=(), **options):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    state = TrainState(model, optimizer, scheduler)
    rows = Rows(count, unreadable)
    loader = TrainLoader(rows, SequentialSampler(rows), batch_size=batch_size, seed=0)
    checkpoints = Checkpoints(folder, ("model",))
    return state, Steps(loader, state, checkpoints, seed=0, **options), Precision(amp, CPU)


def loss_of(model, rows):
    return model(rows).square().mean()


def one_step(state, steps, precision, loss, clip=None, terms=None):
    """As the two engines do it; whether the weights were updated."""
    steps.watch(loss, lr=state.optimizer.param_groups[0]["lr"], terms=terms)
    precision.backward(loss / steps.group_size)
    steps.confirm()
    if steps.group_ends:
        precision.update(state.optimizer, state.model.parameters(), clip=clip)
    return steps.group_ends


def train(state, steps, precision, clip=None):
    return sum(one_step(state, steps, precision, loss_of(state.model, rows), clip) for rows in steps)


def test_accumulated_batches_equal_one_large_batch():
    state, steps, precision = set_up(batch_size=2, accumulate=3)
    assert train(state, steps, precision) == 2
    large, large_steps, precision = set_up(batch_size=6)
    assert train(large, large_steps, precision) == 2
    torch.testing.assert_close(state.model.weight, large.model.weight)


def test_last_smaller_group_is_a_mean_too():
    """5 batches in groups of 3: the second group has 2, and its gradient is the mean of 2."""
    state, steps, precision = set_up(count=10, batch_size=2, accumulate=3)
    assert train(state, steps, precision) == 2
    reference, reference_steps, _ = set_up(count=10, batch_size=2)
    rows = reference_steps.loader.dataset.rows
    for group in (rows[:6], rows[6:]):
        reference.optimizer.zero_grad()
        loss_of(reference.model, group).backward()
        reference.optimizer.step()
    torch.testing.assert_close(state.model.weight, reference.model.weight)


def test_clipping_bounds_the_update():
    state, steps, precision = set_up(count=2, batch_size=2)
    before = torch.cat([p.detach().flatten().clone() for p in state.model.parameters()])
    train(state, steps, precision, clip=1e-3)
    after = torch.cat([p.detach().flatten() for p in state.model.parameters()])
    assert torch.isclose((after - before).norm(), torch.tensor(0.1 * 1e-3), rtol=1e-2)


def test_gradients_are_clipped_in_their_own_scale():
    """Under fp16 the loss is scaled, by 65,536 at first; the norm that is clipped is the gradient's own."""
    weights = []
    for scale in (65536.0, 1.0):
        state, steps, precision = set_up(count=4, batch_size=2)
        precision.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        train(state, steps, precision, clip=0.1)
        weights.append(state.model.weight.detach().clone())
    start = set_up()[0].model.weight
    assert (weights[0] - start).norm() > 1e-3  # a norm taken in the scaled gradients leaves 65,536 times less
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_weights_are_only_touched_at_the_end_of_a_group(accumulate):
    state, steps, precision = set_up(count=8, batch_size=2, accumulate=accumulate)
    changed = []
    for rows in steps:
        before = state.model.weight.detach().clone()
        changed.append(one_step(state, steps, precision, loss_of(state.model, rows)))
        assert changed[-1] != torch.equal(before, state.model.weight)
    assert changed == [accumulate == 1, True] * 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_stops_before_the_update(tmp_path, bad):
    state, steps, precision = set_up(tmp_path)
    state.epoch = 4
    batches = iter(steps)
    one_step(state, steps, precision, loss_of(state.model, next(batches)))
    loss = loss_of(state.model, next(batches)) * bad
    before = [p.detach().clone() for p in state.model.parameters()]
    words = r"not finite on rank 0 at epoch 4, step 1: loss (nan|inf), loss_giou 3, lr 0.1. The weights were not "
    words += r"changed \(report: .*nonfinite_loss.json; --resume auto continues from the last checkpoint\). Try a lower"
    with pytest.raises(NonFiniteLoss, match=words):
        one_step(state, steps, precision, loss, terms={"loss_giou": torch.tensor(3.0)})
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
    (report,) = json.loads((tmp_path / "nonfinite_loss.json").read_text())
    assert report["samples"] == ["row2.png", "row3.png"]
    assert (report["epoch"], report["step"], report["lr"], report["terms"]["loss_giou"]) == (4, 1, 0.1, 3.0)


def test_the_reason_is_given_even_if_there_is_nowhere_to_write_the_report(tmp_path, monkeypatch):
    def full(path, text):
        raise OSError("no space left on device")

    monkeypatch.setattr("irpe_train.steps.write_text", full)
    for folder, words in (("", "no --output_dir, so no report"), (tmp_path, "report: ")):
        state, steps, precision = set_up(folder)
        with pytest.raises(NonFiniteLoss, match=rf"The weights were not changed \({words}"):
            one_step(state, steps, precision, loss_of(state.model, next(iter(steps))) * float("nan"))


def test_the_graph_of_a_loss_is_not_kept_for_the_report():
    state, steps, _ = set_up()
    loss = loss_of(state.model, next(iter(steps)))
    steps.watch(loss, lr=0.1, terms={"loss": loss})
    kept = weakref.ref(loss)
    del loss
    assert kept() is None


@pytest.mark.parametrize(("unreadable", "max_bad", "stops"), [((3,), 0.2, False), ((3, 7), 0.2, True), ((3,), 0, True)])
def test_too_many_unreadable_images_stop_the_run(unreadable, max_bad, stops):
    state, steps, precision = set_up(count=8, unreadable=unreadable, max_bad=max_bad)
    if not stops:
        assert train(state, steps, precision) == 4
        return
    with pytest.raises(
        BadData,
        match=rf"{len(unreadable)} of 8 training images are unreadable, and --max-bad "
        rf"{max_bad:g} allows \d: row3.png \(OSError: truncated\)",
    ):
        train(state, steps, precision)


def test_the_seed_of_a_step_counts_from_the_start_of_the_run(monkeypatch):
    """Dropout of an epoch's first step is not that of the epoch before."""
    seen = []
    monkeypatch.setattr("irpe_train.steps.seed_step", lambda seed, *, rank, step: seen.append((seed, rank, step)))
    state, steps, precision = set_up(count=6, batch_size=2)
    for state.epoch in (0, 1):
        state.step = 0
        train(state, steps, precision)
    assert seen == [(0, 0, step) for step in range(6)]


def test_each_step_draws_other_numbers_and_the_same_ones_again():
    def draws(epoch, step):
        state, steps, _ = set_up(count=6, batch_size=2)
        state.epoch, state.step = epoch, step
        next(iter(steps))
        return torch.rand(3).tolist()

    numbers = {(epoch, step): draws(epoch, step) for epoch in (0, 1) for step in range(3)}
    assert len({tuple(drawn) for drawn in numbers.values()}) == 6 and numbers[1, 2] == draws(1, 2)


@pytest.mark.parametrize(("accumulate", "expected"), [(1, [3, 6, 9]), (2, [4, 8])])
def test_saves_within_the_epoch_fall_on_updates(tmp_path, monkeypatch, accumulate, expected):
    state, steps, precision = set_up(tmp_path, count=24, batch_size=2, accumulate=accumulate, save_interval="3")
    saved = []
    monkeypatch.setattr(steps.checkpoints, "save", lambda state, also=(): saved.append(state.step))
    train(state, steps, precision)
    assert saved == expected  # every 3 batches is every 2 updates of 2; at 12 the epoch's end saves


def test_a_position_that_was_counted_with_another_seed_is_the_epochs_start():
    for seed, step in ((0, 2), (1, 0)):
        state, steps, _ = set_up()
        state.step = 2
        assert Steps(steps.loader, state, steps.checkpoints, seed=seed).state.step == step


def test_saves_by_the_clock(tmp_path, monkeypatch):
    from irpe_train import steps as steps_module

    now = iter(range(0, 10_000, 50))  # the clock advances 50 s at each reading
    monkeypatch.setattr(steps_module.time, "monotonic", lambda: next(now))
    state, steps, precision = set_up(tmp_path, count=16, save_interval="2m")
    saved = []
    monkeypatch.setattr(steps.checkpoints, "save", lambda state, also=(): saved.append(state.step))
    train(state, steps, precision)
    assert saved == [3, 6]


def test_the_remaining_time_is_that_of_later_epochs_and_of_all_that_lies_between_them(monkeypatch):
    now, asked = [0.0], {}
    monkeypatch.setattr("irpe_train.steps.time.monotonic", lambda: now[0])
    state, steps, _ = set_up(count=12, batch_size=2, epochs=5)
    state.epoch, state.step = 2, 1
    steps.finish_training({})
    now[0] = 7.0  # seconds until the next epoch begins
    next(iter(steps))
    monkeypatch.setattr(state.meters, "log_every", lambda steps, **options: asked.update(options))
    steps.log_every(4)
    assert (asked["every"], asked["start"], asked["images_per_step"]) == (4, 1, 2)
    assert asked["later"](2.0) == 2 * (6 * 2.0) + 3 * 7.0


@pytest.mark.parametrize("text", ["0", "-5", "often", "0m", "m", ""])
def test_save_interval_that_means_nothing_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"expected a number of steps .* above zero, got '{text}'"):
        parse_save_interval(text)


def test_save_interval():
    assert parse_save_interval("500") == (500, None) and parse_save_interval("1.5m") == (None, 90.0)


@pytest.mark.parametrize("amp", ["bf16", "fp16", "none"])
def test_number_formats(amp, capsys):
    set_up_logging(0)
    precision = Precision(amp, CPU)
    with precision.autocast():
        out = torch.nn.Linear(3, 2)(torch.ones(1, 3))
    assert out.dtype == (torch.bfloat16 if amp == "bf16" else torch.float32)  # fp16 is fp32 on the CPU, as published
    assert ("--amp fp16 needs CUDA; on the CPU this runs in fp32" in capsys.readouterr().out) == (amp == "fp16")
    assert precision.scaler.state_dict() == {}


def test_overflow_under_loss_scaling_skips_the_update_and_lowers_the_scale():
    """fp16 needs CUDA only for the forward pass; the scaler is the same everywhere."""
    state, steps, precision = set_up(count=2)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    before = state.model.weight.detach().clone()
    for rows in steps:
        one_step(state, steps, precision, 100 * loss_of(state.model, rows), clip=1.0)
    assert torch.equal(state.model.weight, before) and precision.scaler.get_scale() < 3e38
