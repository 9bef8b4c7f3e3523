# SPDX-License-Identifier: Apache-2.0
"""The rows of an ablation on the console, and as CSV, Markdown, LaTeX and a plot."""

import csv
import io
import os
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from irpe_lab.figures import Figure
from irpe_lab.plots import plot_intervals
from irpe_lab.results import Row, bootstrap_interval, spread
from irpe_train.errors import RunError
from irpe_train.outputs import writable_folder
from irpe_train.text_files import read_text, write_text

RED, PLAIN = "\x1b[31m", "\x1b[0m"
NOT_PUBLISHED = "not published here"
NAMES = tuple(f"table.{kind}" for kind in ("csv", "md", "tex", "png", "pdf"))


def cells(row: Row, figure: Figure, *, baseline: str | None = None, evaluations: Sequence[str] = ()) -> dict[str, str]:
    """One row as text, by column; a failed or unfinished run says so in place of its figure."""
    model, speed, memory, seconds = row.model, *map(row.median, ("images_per_second", "memory", "seconds"))
    shown = {
        "run": row.run,
        "buckets": str(model.get("buckets", "-")),
        "parameters": f"{model['n_parameters']:,}" if "n_parameters" in model else "-",
        "MACs (M)": f"{model['macs_M']:.1f}" if model.get("macs_M") else "-",
        "img/s": "-" if speed is None else f"{speed:.0f}",
        "memory (MiB)": "-" if memory is None else f"{memory:.0f}",
        "time": "-" if seconds is None else duration(seconds),
        f"{figure.title}, last epoch": result(row, figure),
        "best epoch": figure.text(statistics.fmean(row.best)) if row.best else "-",
    }
    for evaluation in (None, *evaluations):
        where = f" {evaluation}" if evaluation is not None else ""
        if where:
            shown[figure.title + where] = mean_and_spread(list(row.figures(evaluation).values()), figure) or "-"
        if baseline is not None:
            shown[f"minus {baseline}{where} [95%]"] = difference(row.differences(evaluation), figure)
    shown["seeds"] = f"{row.states.count('done')}/{len(row.states)}"
    shown["published"] = NOT_PUBLISHED if row.published is None else figure.text(row.published)
    return shown


def result(row: Row, figure: Figure) -> str:
    """Mean and standard deviation over seeds, after the last epoch; or why there are none."""
    shown = mean_and_spread(list(row.figures().values()), figure)
    if "failed" not in row.states:
        return shown or "not run"
    return ", ".join(filter(None, [shown, f"failed: {row.reason}"]))


def mean_and_spread(values: Sequence[float], figure: Figure) -> str:
    """Empty for no values."""
    if not values:
        return ""
    deviation = spread(values)
    return figure.text(statistics.fmean(values)) + ("" if deviation is None else f" ± {figure.text(deviation)}")


def difference(values: Sequence[float], figure: Figure) -> str:
    """The mean over seeds of run minus baseline, and its bootstrap interval; ``[-]`` for too few seeds."""
    if not values:
        return "-"
    numbers = [statistics.fmean(values), *(bootstrap_interval(values) or ())]
    mean, *interval = (f"{'-' if value < 0 else '+'}{figure.text(abs(value))}" for value in numbers)
    return f"{mean} [{', '.join(interval) or '-'}]"


def duration(seconds: float) -> str:
    """``h:mm:ss``."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table; ``|`` inside a cell is escaped, and a line break is a space."""
    lines = [header, ["---"] * len(header), *body]
    cells = ([" ".join(str(cell).replace("|", "\\|").split()) for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def latex(header: Sequence[str], body: Sequence[Sequence[str]], failed: Sequence[bool]) -> str:
    """A booktabs table; failed rows are red."""

    def row(line: Sequence[str], style: str = "{}") -> str:
        return " & ".join(style.format(_escape(cell)) for cell in line) + " \\\\"

    rows = [row(line, "\\textcolor{{red}}{{{}}}" if bad else "{}") for line, bad in zip(body, failed, strict=True)]
    begin = ["% \\usepackage{booktabs, xcolor}", "\\begin{tabular}{l" + "r" * (len(header) - 1) + "}", "\\toprule"]
    return "\n".join([*begin, row(header), "\\midrule", *rows, "\\bottomrule", "\\end{tabular}", ""])


def _escape(text: str) -> str:
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$"}
    escaped = "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in str(text))
    return re.sub(r"(?<![\w.-])-(?=\d)", "$-$", escaped)  # a minus, not the hyphen of a name


def refuse_to_replace(folder: Path, names: Iterable[str], runs: Iterable[str]) -> None:
    """Raises RunError: one of the files exists, and no table.csv in ``folder`` shows that it belongs to ``runs``."""
    table = folder / NAMES[0]
    header, *lines = (table.is_file() and read_text(table).splitlines()) or [""]
    ours = header.startswith("run,flags,") and not {line.partition(",")[0] for line in lines}.isdisjoint(runs)
    if found := [] if ours else [folder / name for name in names if os.path.lexists(folder / name)]:
        raise RunError(f"{found[0]}: already there, and not from these runs; give another folder, or move it away")


def write(
    rows: Sequence[Row], folder: Path, figure: Figure, *, title: str, evaluations: Sequence[str] = ()
) -> list[Path]:
    """``table.csv`` (full precision, every seed), ``.md``, ``.tex``, and the plot as ``.png`` and ``.pdf``."""
    from irpe_ops.visualize import save  # here: it imports PyTorch, and --help must not wait for it

    writable_folder(folder, "-o")
    paths = [folder / name for name in NAMES]
    lines = [_full_precision(row, evaluations) for row in rows]
    out = csv.DictWriter(text := io.StringIO(newline=""), lines[0])
    out.writeheader()
    out.writerows(lines)
    write_text(paths[0], text.getvalue())  # first: it marks the others as ours
    baseline = next((row.baseline.run for row in rows if row.baseline is not None), None)
    body = [cells(row, figure, baseline=baseline, evaluations=evaluations) for row in rows]
    header, lines = list(body[0]), [list(line.values()) for line in body]
    write_text(paths[1], markdown(header, lines))
    write_text(paths[2], latex(header, lines, ["failed" in row.states for row in rows]))
    canvas = plot_intervals(rows, title=title, figure=figure, evaluations=evaluations)
    for path in paths[3:]:
        save(canvas, path, dpi=300)
    return paths


def _full_precision(row: Row, evaluations: Sequence[str]) -> dict:
    return {
        "run": row.run,
        "flags": row.flags,
        **{key: row.model.get(key) for key in ("buckets", "n_parameters", "macs_M")},
        **{name: row.median(name) for name in ("images_per_second", "memory", "seconds")},
        **_statistics(row, None, ""),
        "best_epoch": statistics.fmean(row.best) if row.best else None,
        **{key: value for name in evaluations for key, value in _statistics(row, name, f"{name}: ").items()},
        "published": row.published,
        "states": " ".join(row.states),
        "reason": row.reason,
    }


def _statistics(row: Row, evaluation: str | None, prefix: str) -> dict:
    figures, differences = row.figures(evaluation), row.differences(evaluation)
    low, high = bootstrap_interval(differences) or (None, None)
    values = list(figures.values())
    return {
        f"{prefix}mean": statistics.fmean(values) if values else None,
        f"{prefix}spread": spread(values),
        f"{prefix}difference": statistics.fmean(differences) if differences else None,
        f"{prefix}low": low,
        f"{prefix}high": high,
        f"{prefix}seeds": " ".join(map(str, figures)),
        f"{prefix}figures": " ".join(map(repr, values)),
    }


class Display:
    """The table while runs go on: a line whenever a row's state changes."""

    def __init__(self, figure: Figure):
        self.figure, self._seen = figure, {}

    def show(self, rows: Sequence[Row]) -> None:
        longest = max(len(row.run) for row in rows)
        for row in rows:
            if self._seen.get(row.run) != row.states:
                self._seen[row.run] = row.states
                print(self._line(row, longest), flush=True)

    def _line(self, row: Row, longest: int) -> str:
        counts = {state: row.states.count(state) for state in ("done", "running", "waiting", "failed")}
        states = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        text = f"{row.run:{longest}}  {states}  {row.epochs} epoch(s) in all  {result(row, self.figure)}"
        return f"{RED}{text}{PLAIN}" if "failed" in row.states and sys.stdout.isatty() else text
