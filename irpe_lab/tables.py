"""The rows of an ablation as a live table on the console, CSV, Markdown, LaTeX and a plot."""

import csv
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

RED, PLAIN = "\x1b[31m", "\x1b[0m"
NOT_PUBLISHED = "not published here"
COLUMNS = ("run", "buckets", "parameters", "MACs (M)", "img/s", "{figure}", "seeds", "published")


@dataclass
class Row:
    """One run of the grid over all its seeds, as far as it has come."""

    run: str
    flags: str
    figures: list[float]  # of the seeds that finished
    states: list[str]  # of all seeds: waiting, running, done, failed
    epochs: int  # logged so far, by all seeds
    reason: str | None  # why the first failed seed failed
    images_per_second: float | None
    facts: dict  # n_parameters, macs_M, buckets, where the package can tell
    published: float | None

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.figures) if self.figures else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds (n - 1); None for fewer than two."""
        return statistics.stdev(self.figures) if len(self.figures) > 1 else None


def cells(row: Row, figure: str) -> dict[str, str]:
    """One row as text, by column; a failed or unfinished run says so where its figure would be."""
    failed, done = row.states.count("failed"), row.states.count("done")
    shown = number(row.mean) + (f" ± {number(row.spread, like=row.mean)}" if row.spread is not None else "")
    if failed:
        shown = f"{shown + ', ' if done else ''}failed: {row.reason}"
    elif not done:
        shown = "not run"
    facts = row.facts
    return {
        "run": row.run,
        "buckets": str(facts.get("buckets", "-")),
        "parameters": f"{facts['n_parameters']:,}" if "n_parameters" in facts else "-",
        "MACs (M)": f"{facts['macs_M']:.1f}" if facts.get("macs_M") else "-",
        "img/s": f"{row.images_per_second:.0f}" if row.images_per_second else "-",
        figure: shown,
        "seeds": f"{done}/{len(row.states)}",
        "published": NOT_PUBLISHED if row.published is None else number(row.published),
    }


def number(value: float | None, like: float | None = None) -> str:
    """Percent with two decimals, fractions with three; ``like`` is the figure that a spread belongs to."""
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value if like is None else like) > 1 else f"{value:.3f}"


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table; ``|`` inside a cell is escaped."""
    lines = [header, ["---"] * len(header), *body]
    return (
        "\n".join(
            "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
            for line in lines
        )
        + "\n"
    )


def latex(header: Sequence[str], body: Sequence[Sequence[str]], failed: Sequence[bool]) -> str:
    """A booktabs table; failed rows are red (needs the packages booktabs and xcolor)."""
    lines = ["\\begin{tabular}{l" + "r" * (len(header) - 1) + "}", "\\toprule", _tex(header), "\\midrule"]
    for line, bad in zip(body, failed, strict=True):
        red = [f"\\textcolor{{red}}{{{_escape(cell)}}}" for cell in line]
        lines.append(_tex(red, escape=False) if bad else _tex(line))
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def _tex(line: Sequence[str], escape: bool = True) -> str:
    return " & ".join(_escape(cell) if escape else cell for cell in line) + " \\\\"


def _escape(text: str) -> str:
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in str(text))


def write(rows: Sequence[Row], folder: Path, *, title: str, figure: str) -> list[Path]:
    """``table.csv`` (full precision, every seed), ``table.md``, ``table.tex`` and ``table.png`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"table.{kind}" for kind in ("csv", "md", "tex", "png")]
    with open(paths[0], "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(
            [
                "run",
                "flags",
                "buckets",
                "n_parameters",
                "macs_M",
                "images_per_second",
                "mean",
                "spread",
                "seeds",
                "figures",
                "published",
                "states",
                "reason",
            ]
        )
        for row in rows:
            facts = [row.facts.get(key) for key in ("buckets", "n_parameters", "macs_M")]
            out.writerow(
                [
                    row.run,
                    row.flags,
                    *facts,
                    row.images_per_second,
                    row.mean,
                    row.spread,
                    len(row.figures),
                    " ".join(map(repr, row.figures)),
                    row.published,
                    " ".join(row.states),
                    row.reason,
                ]
            )
    header = [column.format(figure=figure) for column in COLUMNS]
    body = [[cells(row, figure)[column] for column in header] for row in rows]
    paths[1].write_text(markdown(header, body))
    paths[2].write_text(latex(header, body, ["failed" in row.states for row in rows]))
    plot(rows, paths[3], title=title, figure=figure)
    return paths


def plot(rows: Sequence[Row], path: Path, *, title: str, figure: str) -> None:
    """One line a run: its mean with the spread over seeds, every seed, and the published figure where there is one."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(8, 0.9 + 0.34 * len(rows)), layout="constrained")
    axis = canvas.subplots()
    for y, row in enumerate(rows):
        axis.plot(row.figures, [y] * len(row.figures), ".", color="C0", alpha=0.4)
        if row.mean is not None:
            axis.errorbar(row.mean, y, xerr=row.spread, fmt="o", color="C0", capsize=3)
        if row.published is not None:
            axis.plot(row.published, y, "D", color="C1", fillstyle="none")
    names = [f"{row.run} (failed)" if "failed" in row.states else row.run for row in rows]
    axis.set_yticks(range(len(rows)), names, fontsize="small")
    for label, row in zip(axis.get_yticklabels(), rows, strict=True):
        label.set_color("red" if "failed" in row.states else "black")
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set(title=title, xlabel=f"{figure}: mean and standard deviation over seeds; diamonds: published")
    axis.grid(axis="x", alpha=0.3)
    canvas.savefig(path, dpi=120)


class Display:
    """The live table: redrawn in place on a terminal that it fits; else a line whenever a row's state changes."""

    def __init__(self, figure: str):
        self.figure, self._drawn, self._seen = figure, 0, {}
        self._terminal = sys.stdout.isatty()

    def show(self, rows: Sequence[Row]) -> None:
        width, height = shutil.get_terminal_size()
        in_place = self._terminal and len(rows) < height
        longest = max(len(row.run) for row in rows)
        lines = {row.run: self._line(row, longest, width if in_place else None) for row in rows}
        if in_place:
            sys.stdout.write(f"\x1b[{self._drawn}F\x1b[J" if self._drawn else "")
            print("\n".join(lines.values()), flush=True)
            self._drawn = len(lines)
            return
        for row in rows:
            if self._seen.get(row.run) != row.states:
                self._seen[row.run] = row.states
                print(lines[row.run], flush=True)

    def _line(self, row: Row, longest: int, width: int | None) -> str:
        states = ", ".join(
            f"{row.states.count(state)} {state}"
            for state in ("done", "running", "waiting", "failed")
            if state in row.states
        )
        text = f"{row.run:{longest}}  {states}  {row.epochs} epochs  {cells(row, self.figure)[self.figure]}"[:width]
        return f"{RED}{text}{PLAIN}" if "failed" in row.states and self._terminal else text
