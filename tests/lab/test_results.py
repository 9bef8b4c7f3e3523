"""Figures of runs, their spread, and the bootstrap interval of differences paired by seed."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from irpe_lab.console_log import read_log
from irpe_lab.figures import TASKS
from irpe_lab.results import Outcome, Row, bootstrap_interval, read_outcome, spread
from irpe_lab.tables import cells, write


def done(**figures):
    return {
        int(seed[1:]): Outcome("done", 2, value, value, evaluations={"at 48": value / 2})
        for seed, value in figures.items()
    }


def test_differences_are_paired_by_seed():
    """Only seeds that both have; the order and the other seeds of the baseline do not matter."""
    baseline = Row("none", "", done(s2=80.0, s0=70.0, s7=10.0) | {3: Outcome("failed", reason="x")})
    row = Row("irpe", "", done(s0=71.0, s2=84.0, s3=99.0, s5=99.0), baseline=baseline)
    assert row.differences() == [1.0, 4.0] and row.differences("at 48") == [0.5, 2.0]
    assert baseline.differences() == [] and row.differences("nowhere") == []


def test_the_interval_is_that_of_all_resamples():
    """Five values have 3125 equally likely resamples: the percentiles of their means are known exactly."""
    values = [0.0, 1.0, 2.0, 3.0, 5.0]
    means = sorted(np.mean(choice) for choice in itertools.product(values, repeat=5))
    assert bootstrap_interval(values, level=0.8) == pytest.approx(
        (np.quantile(means, 0.1), np.quantile(means, 0.9)), abs=0.1
    )
    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    """Ten differences each from a normal distribution around 1; the percentile interval is somewhat too narrow."""
    rng = np.random.default_rng(3)
    intervals = [bootstrap_interval(list(rng.normal(1.0, 2.0, 10)), samples=500) for _ in range(400)]
    assert 0.85 < np.mean([low <= 1.0 <= high for low, high in intervals]) < 0.96


@given(st.lists(st.floats(-1e6, 1e6), min_size=5, max_size=12))
def test_the_interval_holds_the_mean_and_stays_within_the_values(values):
    low, high = bootstrap_interval(values, samples=200)
    slack = 1e-9 * max(map(abs, values))
    assert min(values) - slack <= low <= high <= max(values) + slack
    shifted = bootstrap_interval([value + 3.0 for value in values], samples=200)
    assert shifted == pytest.approx((low + 3, high + 3), abs=1e-6 + slack)


def test_few_values_have_no_interval():
    assert bootstrap_interval([]) is bootstrap_interval([1.0, 2.0, 3.0, 4.0]) is None
    assert spread([1.0]) is None and spread([1.0, 3.0]) == pytest.approx(2**0.5)


def test_an_outcome_is_what_the_folder_says(tmp_path):
    figure = TASKS["deit_irpe"].figure
    assert read_outcome(tmp_path / "nothing", figure) == Outcome("waiting")
    figures = [45.0, 50.0, 40.0]
    lines = [{"epoch": epoch, "test_acc1": value, "n_parameters": 9} for epoch, value in enumerate(figures)]
    (tmp_path / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_outcome(tmp_path, figure) == Outcome("waiting", 3)
    (tmp_path / "done.json").write_text('{"rc": 0, "seconds": 5.0, "reason": null}')
    (tmp_path / "detail.log").write_text(
        "Epoch:  [0]  8 img/s  max mem: 7\nTest:  900 img/s\nEpoch:  [1]  10 img/s  max mem: 9\n"
    )
    (tmp_path / "eval_at_48.log").write_text("* Acc@1 30.000 Acc@5 80.000 loss 2.000\n")
    (tmp_path / "model.json").write_text('{"n_parameters": 9, "buckets": 50}')
    outcome = read_outcome(tmp_path, figure, ("at 48", "at 64"))
    model = {"n_parameters": 9, "buckets": 50}
    assert outcome == Outcome("done", 3, 40.0, 50.0, None, 5.0, 9.0, 9, model, {"at 48": 30.0})
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n')
    assert read_outcome(tmp_path, figure).reason == "the last epoch in its log has no finite test_acc1"
    (tmp_path / "done.json").write_text('{"rc": 1, "seconds": 5.0, "reason": "broke"}')
    assert read_outcome(tmp_path, figure) == Outcome("failed", 1, reason="broke", seconds=5.0)


def finished(folder, figures, **model):
    folder.mkdir()
    lines = [{"epoch": epoch, "test_acc1": value} for epoch, value in enumerate(figures)]
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "done.json").write_text('{"rc": 0, "seconds": 5, "reason": null}')
    (folder / "model.json").write_text(json.dumps(model))
    return read_outcome(folder, TASKS["deit_irpe"].figure)


NO_NUMBERS = [None, "73", [73.0], {}, True, float("nan"), float("inf"), -float("inf"), 10**400]


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_invalid_figures_fail_a_run_at_its_end_and_are_ignored_before(tmp_path, value, coarse_pictures):
    figure = TASKS["deit_irpe"].figure
    lost = finished(tmp_path / "lost", [50.0, value])
    assert lost.state == ("done" if isinstance(value, list) else "failed") and lost.epochs == 2
    kept = finished(tmp_path / "kept", [value, 50.0, 40.0], n_parameters=value, buckets=value, macs_M=value)
    assert (kept.state, kept.last, kept.best) == ("done", 40.0, 73.0 if isinstance(value, list) else 50.0)
    row = Row("x", "", {0: kept, 1: lost, 2: kept})
    shown = cells(row, figure)
    assert shown["top-1 (%), last epoch"].startswith("51.00" if isinstance(value, list) else "40.00 ± 0.00, failed: ")
    write([row], tmp_path, figure, title="x")


@pytest.mark.parametrize("text", ["", "null\n", "{}\n", '{"epoch": "1"}\n', "\x00\n", '{"epoch": 1'])
def test_an_invalid_log_fails_its_own_run_alone(tmp_path, text):
    assert finished(tmp_path / "run", [1.0]).state == "done"
    (tmp_path / "run/log.txt").write_text(text)
    outcome = read_outcome(tmp_path / "run", TASKS["deit_irpe"].figure)
    assert outcome.state == "failed" and "log.txt: " in outcome.reason


def test_of_an_epoch_that_is_logged_twice_the_last_counts(tmp_path):
    assert finished(tmp_path / "run", [10.0, 20.0]).last == 20.0
    with (tmp_path / "run/log.txt").open("a") as log:
        log.write('{"epoch": 0, "test_acc1": 11.0, "note": "line\u2028separator"}\n')
    assert [epoch["test_acc1"] for epoch in read_log(tmp_path / "run")] == [11.0, 20.0]
