# SPDX-License-Identifier: Apache-2.0
"""Pictures of runs: the curves of ``log.txt`` files, published and ours, and the intervals of an ablation.

Every function returns its own ``matplotlib.figure.Figure``: a notebook's backend stays as it is.
"""

import argparse
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from irpe_lab.console_log import read_log
from irpe_lab.figures import PANELS, Figure
from irpe_lab.results import FEWEST_SEEDS, Row, bootstrap_interval, spread
from irpe_train.errors import BadData, reported_by
from irpe_train.flags import FlagParser

if TYPE_CHECKING:
    import matplotlib.figure

# Okabe and Ito, Color Universal Design (2008): distinguishable when colour-blind. Without yellow, faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("", "o", "s", "^", "D", "v", "x")  # lines differ in grey, and two of one colour differ
DPI = 300  # of curves saved as .png


def curve(epochs: list[dict], key: str | None) -> tuple[list[int], list[float]]:
    """Epoch numbers and values of ``key``; the first figure (AP) if the value is a list."""
    figure = Figure("", "", key)
    points = [(epoch["epoch"], value) for epoch in epochs if (value := figure.of(epoch)) is not None]
    return [x for x, _ in points], [float(y) for _, y in points]


def plot_runs(runs: Sequence[str | Path], out: str | Path | None = None) -> "matplotlib.figure.Figure":
    """Draw runs over each other: solid training, dashed test. Seeds of a run (``x_seed0``, ``x_seed1``) are drawn as
    their mean, in a band from lowest to highest.

    Args: out: also save it here, in the format of the suffix (.png at `DPI`, .pdf, .svg).
    Returns: the figure; the titles of its axes are those of the panels that have data.
    """
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

    from irpe_ops.visualize import plain_text, save  # here: it imports PyTorch, and --help must not wait for it

    groups: dict[str, list[list[dict]]] = defaultdict(list)
    for run, label in zip(runs, _labels(runs), strict=True):
        groups[label].append(read_log(run))
    every_log = [log for logs in groups.values() for log in logs]
    panels = [panel for panel in PANELS if any(curve(log, key)[0] for log in every_log for key in panel[1:])]
    if not panels:
        raise BadData(f"none of {', '.join(map(str, runs))} has a figure that can be drawn")
    styles = {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]}
        for i, name in enumerate(groups)
    }
    columns = min(len(panels), 3)
    rows, entries = -(-len(panels) // columns), min(3, len(groups))
    height = 3.6 * rows + 0.25 * -(-(len(groups) + 2) // entries)
    canvas = Canvas(figsize=(5 * columns, height), layout="constrained")
    axes = canvas.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, train, test) in zip(axes.flat, panels, strict=False):
        for name, logs in groups.items():
            for key, dashes in ((train, "-"), (test, "--")):
                _draw_seeds(axis, [curve(log, key) for log in logs], dashes, styles[name])
        axis.set(title=title, xlabel="epoch")
        axis.locator_params(axis="x", integer=True)
        axis.grid(alpha=0.3)
    legend = [Line2D([], [], label=plain_text(name), **style) for name, style in styles.items()]
    legend += [Line2D([], [], color="gray", linestyle=line, label=of) for line, of in (("-", "train"), ("--", "test"))]
    canvas.legend(handles=legend, loc="outside lower center", ncols=entries, fontsize="small")
    if out is not None:
        save(canvas, out, dpi=DPI)
    return canvas


def _draw_seeds(axis, curves: list[tuple[list[int], list[float]]], dashes: str, style: dict) -> None:
    """The mean line and band of the seeds that have reached each epoch."""
    at: dict[int, list[float]] = defaultdict(list)
    for x, y in curves:
        for epoch, value in zip(x, y, strict=True):
            if math.isfinite(value):  # a loss that became infinite cannot be drawn
                at[epoch].append(value)
    if not at:
        return
    x = sorted(at)
    marker, every = (style["marker"], 0.1) if len(x) > 2 else (style["marker"] or ".", 1)  # 0.1 of one point is none
    axis.plot(x, [statistics.fmean(at[e]) for e in x], dashes, color=style["color"], marker=marker, markevery=every)
    if len(curves) > 1:
        low, high = [min(at[e]) for e in x], [max(at[e]) for e in x]
        axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def plot_intervals(
    rows: Sequence[Row], *, title: str, figure: Figure, evaluations: Sequence[str] = ()
) -> "matplotlib.figure.Figure":
    """One line per run: every seed, mean and standard deviation, and the published figure if there is one.

    If rows have a baseline, a second panel shows run minus baseline, seed by seed, and the 95% bootstrap interval of
    the mean (from `FEWEST_SEEDS` on). Each of ``evaluations`` adds such panels.
    """
    from matplotlib.figure import Figure as Canvas

    from irpe_ops.visualize import plain_text

    baseline = next((row.baseline.run for row in rows if row.baseline is not None), None)
    compared = [None, baseline] if baseline else [None]
    panels = [(name, against) for name in (None, *evaluations) for against in compared]
    few = "" if any(bootstrap_interval(row.differences()) for row in rows) else f" from {FEWEST_SEEDS} seeds on"
    canvas = Canvas(figsize=(2.5 + 4.5 * len(panels), 1.4 + 0.34 * len(rows)), layout="constrained")
    axes = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (name, against) in zip(axes, panels, strict=True):
        colour = COLOURS[0] if against is None else COLOURS[2]
        for y, row in enumerate(rows):
            values = list(row.figures(name).values()) if against is None else row.differences(name)
            if not values:
                continue
            mean, error = statistics.fmean(values), spread(values)
            if against is not None:
                interval = bootstrap_interval(values)
                error = interval and [[mean - interval[0]], [interval[1] - mean]]
            axis.plot(values, [y] * len(values), ".", color=colour, alpha=0.4)
            axis.errorbar(mean, y, xerr=error, fmt="o", color=colour, capsize=3)
        if (name, against) == (None, None) and (known := [(r.published, y) for y, r in enumerate(rows) if r.published]):
            axis.plot(*zip(*known, strict=True), "D", color=COLOURS[1], fillstyle="none", label="published")
            axis.legend(fontsize="small")
        if against is not None:
            axis.axvline(0, color="black", linewidth=0.8)
        what = (
            "mean, standard deviation, seeds"
            if against is None
            else f"minus {against}, by seed: mean, 95% interval{few}"
        )
        axis.set(xlabel=plain_text(", ".join(filter(None, [figure.title, name])) + f"\n{what}"))
        axis.grid(axis="x", alpha=0.3)
    names = [plain_text(f"{row.run} (failed)" if "failed" in row.states else row.run) for row in rows]
    axes[0].set_yticks(range(len(rows)), names, fontsize="small")
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    canvas.suptitle(plain_text(title))
    return canvas


def _labels(runs: Sequence[str | Path]) -> list[str]:
    """A label for each run: the shortest unambiguous end of its path; seeds of one run share it."""
    paths = [path.parent if path.name == "log.txt" else path for path in (Path(run).resolve() for run in runs)]
    names = [re.sub(r"_seed\d+$", "", path.name.removesuffix(".txt").removeprefix("log_")) for path in paths]
    parts = [(*path.parts[:-1], name) for path, name in zip(paths, names, strict=True)]
    labels = []
    for own in parts:
        length = next((n for n in range(1, len(own)) if all(own == p or own[-n:] != p[-n:] for p in parts)), len(own))
        labels.append("/".join(own[-length:]))
    return labels


def drawn(run: Path) -> bool:
    """Whether it has curves: not a table beside an ablation's runs, nor a run that failed or waits."""
    return not run.name.startswith("table.") and ((run / "log.txt").exists() or not (run / "flags.yaml").exists())


def get_parser() -> argparse.ArgumentParser:
    parser = FlagParser("python -m irpe_lab.plots", description=(
        "Draw the curves of runs over each other: solid training, dashed test. Seeds of a run\n(x_seed0, x_seed1, ...) "
        "are drawn as their mean, in a band from lowest to highest."))  # fmt: skip
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder or its log.txt, published or ours; of an "
        "ablation outputs/ablation/NAME/*: runs without a log yet are left out")  # fmt: skip
    add("-o", "--output", type=Path, required=True, metavar="FILE.{png,pdf,svg}", help="write the picture here")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    with reported_by(parser.prog):
        args = parser.parse_args(argv)
        canvas = plot_runs(list(filter(drawn, args.runs)) or args.runs)
        from irpe_ops.visualize import save  # here: see `plot_runs`

        file = save(canvas, args.output, dpi=DPI)  # its suffix may be added
        print(f"{file}: {', '.join(axis.get_title() for axis in canvas.axes)}")


if __name__ == "__main__":
    main()
