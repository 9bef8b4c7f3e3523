# SPDX-License-Identifier: Apache-2.0
"""Reads the runs of an ablation: figures, cost, and the difference from the baseline, seed by seed."""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from irpe_lab import jobs
from irpe_lab.console_log import images_per_second, peak_memory, read_detail, read_log
from irpe_lab.figures import Figure
from irpe_train.errors import BadData


@dataclass(frozen=True)
class Outcome:
    """One run with one seed, so far. ``state``: waiting, running, done, failed.

    ``model`` is what the run wrote about its model (``model.json``): n_parameters, buckets, macs_M.
    """

    state: str
    epochs: int = 0
    last: float | None = None
    best: float | None = None
    reason: str | None = None
    seconds: float | None = None
    images_per_second: float | None = None
    memory: int | None = None  # MiB
    model: dict = field(default_factory=dict)
    evaluations: dict[str, float] = field(default_factory=dict)


def read_outcome(folder: Path, figure: Figure, evaluations: tuple[str, ...] = ()) -> Outcome:
    """The state of the run in ``folder`` and the ``evaluations`` after it."""
    outcome = jobs.done(folder)
    text = folder / "log.txt"
    epochs = text.read_bytes().count(b"\n") if text.is_file() else 0
    if outcome is None:
        return Outcome("running" if folder.is_dir() and jobs.busy(folder) else "waiting", epochs)
    if outcome["rc"]:
        return Outcome("failed", epochs, reason=outcome["reason"], seconds=outcome["seconds"])
    try:
        log = read_log(folder)
        values = [figure.of(epoch) for epoch in log]
        if values[-1] is None or not math.isfinite(values[-1]):
            raise BadData(f"the last epoch in its log has no finite {figure.key}")
    except BadData as error:
        return Outcome("failed", epochs, reason=str(error), seconds=outcome["seconds"])
    known = {"n_parameters": log[-1].get("n_parameters")} | jobs.read_json(folder / "model.json")
    model = {key: value for key in known if (value := Figure(key, key, key).of(known)) is not None}
    evaluated = {}
    for name in evaluations:
        printed = read_detail(jobs.evaluation_log(folder, name))
        if printed and (value := figure.of(printed[-1])) is not None:
            evaluated[name] = value
    best, console = max(value for value in values if value is not None and math.isfinite(value)), folder / "detail.log"
    seconds, rate, memory = outcome["seconds"], images_per_second(console), peak_memory(console)
    return Outcome("done", epochs, values[-1], best, None, seconds, rate, memory, model, evaluated)


@dataclass(frozen=True)
class Row:
    """One run of the grid over all its seeds. ``baseline``: the row to compare it with."""

    run: str
    flags: str
    outcomes: dict[int, Outcome]
    published: float | None = None
    baseline: "Row | None" = None

    def figures(self, evaluation: str | None = None) -> dict[int, float]:
        """Figures after the last epoch (or of an evaluation after it), by seed, of finished runs."""
        done = {seed: one for seed, one in self.outcomes.items() if one.state == "done"}
        if evaluation is None:
            return {seed: one.last for seed, one in done.items()}
        return {seed: one.evaluations[evaluation] for seed, one in done.items() if evaluation in one.evaluations}

    @property
    def best(self) -> list[float]:
        """Figures of the best epoch, which was chosen on the same test data; one per finished seed."""
        return [one.best for one in self.outcomes.values() if one.state == "done"]

    @property
    def states(self) -> list[str]:
        return [one.state for one in self.outcomes.values()]

    @property
    def reason(self) -> str | None:
        """Why the first failed seed failed."""
        return next((one.reason for one in self.outcomes.values() if one.state == "failed"), None)

    @property
    def epochs(self) -> int:
        """Epochs logged so far, over all seeds."""
        return sum(one.epochs for one in self.outcomes.values())

    @property
    def model(self) -> dict:
        """What the runs wrote about their model; the same for all seeds."""
        return next((one.model for one in self.outcomes.values() if one.model), {})

    def median(self, name: str) -> float | None:
        """``seconds``, ``images_per_second`` or ``memory``: the median over the seeds that finished."""
        known = [getattr(one, name) for one in self.outcomes.values() if one.state == "done"]
        known = [value for value in known if value is not None]
        return statistics.median(known) if known else None

    def differences(self, evaluation: str | None = None) -> list[float]:
        """Differences from the baseline, seed by seed; empty for the baseline itself."""
        theirs = self.baseline.figures(evaluation) if self.baseline is not None else {}
        return [figure - theirs[seed] for seed, figure in self.figures(evaluation).items() if seed in theirs]


FEWEST_SEEDS = 5  # for an interval: with normal values it covers the mean 83 times in 100; with two seeds, 50 times


def spread(values: list[float]) -> float | None:
    """Standard deviation (n - 1); None for fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def bootstrap_interval(
    values: list[float], *, level: float = 0.95, samples: int = 10_000
) -> tuple[float, float] | None:
    """The bootstrap interval of the mean at confidence ``level``: percentiles of the means of resampled values.

    Returns: low, high; the same for the same values (the generator is seeded). None for fewer than ``FEWEST_SEEDS``.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13. Somewhat too narrow with ten values.
    """
    if len(values) < FEWEST_SEEDS:
        return None
    means = np.random.default_rng(0).choice(np.asarray(values), (samples, len(values))).mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
