"""Figures of runs, their spread, and the bootstrap interval of differences that are paired by seed."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from irpe_lab.figures import TASKS
from irpe_lab.results import Outcome, Row, bootstrap_interval, read_outcome, spread


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
    """Of three values there are 27 resamples, each as likely: the percentiles of their means are known exactly."""
    values = [0.0, 1.0, 5.0]
    means = sorted(np.mean(choice) for choice in itertools.product(values, repeat=3))
    assert bootstrap_interval(values, level=0.8) == pytest.approx(
        (np.quantile(means, 0.1), np.quantile(means, 0.9)), abs=0.1
    )
    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    """Ten differences each from a normal distribution around 1; the percentile interval is somewhat too narrow."""
    rng = np.random.default_rng(3)
    intervals = [bootstrap_interval(list(rng.normal(1.0, 2.0, 10)), samples=500) for _ in range(400)]
    assert 0.85 < np.mean([low <= 1.0 <= high for low, high in intervals]) < 0.96


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12))
def test_the_interval_holds_the_mean_and_stays_within_the_values(values):
    low, high = bootstrap_interval(values, samples=200)
    slack = 1e-9 * max(map(abs, values))
    assert min(values) - slack <= low <= high <= max(values) + slack
    shifted = bootstrap_interval([value + 3.0 for value in values], samples=200)
    assert shifted == pytest.approx((low + 3, high + 3), abs=1e-6 + slack)


def test_one_value_has_no_interval():
    assert bootstrap_interval([1.0]) is None and bootstrap_interval([]) is None
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
    assert read_outcome(tmp_path, figure).reason == "its log has no test_acc1"
    (tmp_path / "done.json").write_text('{"rc": 1, "seconds": 5.0, "reason": "broke"}')
    assert read_outcome(tmp_path, figure) == Outcome("failed", 1, reason="broke", seconds=5.0)
