# SPDX-License-Identifier: Apache-2.0
"""The ablation runner: a grid file in, trained runs and one table out.

Each run is ``python -m deit_irpe`` or ``python -m detr_irpe`` with its own folder. Kill it whenever you like and start
it again: finished runs are not repeated, interrupted ones resume from a checkpoint, failed ones are tried once more.
A failed run is a red row with its reason. Beside the runs: table.csv, table.md, table.tex, table.png, table.pdf.
"""

import argparse
import dataclasses
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import yaml

from irpe_lab import jobs, tables
from irpe_lab.grid import Grid, read_grid
from irpe_lab.results import Outcome, Row, read_outcome
from irpe_train.arguments import positive_int
from irpe_train.config import ROOT, ConfigError, parse_yaml
from irpe_train.errors import RunError, reported_by
from irpe_train.flags import FlagParser
from irpe_train.outputs import writable_folder
from irpe_train.text_files import complete
from irpe_train.zoo import read_zoo


class Ablation:
    """A grid and the folder of its runs."""

    def __init__(self, grid: Grid, folder: Path):
        self.grid, self.folder = grid, folder
        self.folders = {(run, seed): folder / f"{run}_seed{seed}" for run in grid.runs for seed in grid.seeds}
        self.chosen = {place: folder for place, folder in self.folders.items() if place[0] in grid.chosen}
        # The table is made every second, so finished runs are read only once.
        self._finished: dict[Path, Outcome] = {}
        self._flags = {run: shlex.join(grid.flags(run)) for run in grid.runs}
        zoo = read_zoo() if grid.published else None
        self._published = {run: zoo.find(name).expect[grid.task.figure.name] for run, name in grid.published.items()}

    def commands(self, seed: int, processes: int = 1) -> tuple[list[str], dict[str, list[str]]]:
        """The command line of a run, and those of its evaluations by name; without the interpreter, see `jobs`."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        start = torchrun if processes > 1 else []
        start += ["-m", self.grid.task.package, "--config", f"{jobs.FOLDER}/flags.yaml", "--seed", str(seed)]
        trained = ["--eval", "--resume", f"{jobs.FOLDER}/checkpoint.pth", "--output_dir", ""]
        evaluations = {name: [*start, *flags, *trained] for name, flags in self.grid.evaluations.items()}
        return [*start, "--output_dir", jobs.FOLDER, "--resume", "auto"], evaluations

    def prepare(self, processes: int = 1, *, keep: bool = False) -> None:
        """Write the files of every chosen run; see `jobs.prepare`."""
        for (run, seed), folder in self.chosen.items():
            command, then = self.commands(seed, processes)
            jobs.prepare(folder, command, self._written(run), then, keep=keep)

    def rows(self) -> list[Row]:
        """The table, from the results on disk: the chosen runs, and any others that have finished."""
        rows = {}
        for run in self.grid.runs:
            outcomes = {seed: self._outcome(run, seed) for seed in self.grid.seeds}
            row = Row(run, self._flags[run], outcomes, self._published.get(run))
            if run in self.grid.chosen or "done" in row.states:
                rows[run] = row
        baseline = rows.get(self.grid.baseline)
        return [row if row is baseline else dataclasses.replace(row, baseline=baseline) for row in rows.values()]

    def _written(self, run: str) -> str:
        return yaml.safe_dump(self.grid.runs[run], sort_keys=False, allow_unicode=True)

    def _outcome(self, run: str, seed: int) -> Outcome:
        folder = self.folders[run, seed]
        if folder in self._finished:
            return self._finished[folder]
        then, now = jobs.read_json(folder / "job.json").get("then"), self.commands(seed)[1]
        old = then if isinstance(then, dict) else {}

        def is_same(name: str) -> bool:  # the command ends the same with any number of processes
            return name not in old or isinstance(old[name], list) and old[name][-len(now[name]) :] == now[name]

        same = tuple(filter(is_same, now))
        outcome = read_outcome(folder, self.grid.task.figure, same)
        if outcome.state != "done":
            return outcome
        if (flags := folder / "flags.yaml").is_file() and not jobs.same_flags(flags, self._written(run)):
            return Outcome("failed", reason=f"{folder} holds the results of other flags (see its flags.yaml)")
        self._finished[folder] = outcome
        return outcome

    def work(self, pool: jobs.LocalPool | jobs.SlurmPool, *, processes: int = 1) -> None:
        """Run everything unfinished. Returns when every run has an outcome or was stopped."""
        self.prepare(processes)
        waiting = [folder for folder in self.chosen.values() if not jobs.finished(folder)]
        display = tables.Display(self.grid.task.figure)
        try:
            while waiting or pool.working():
                while waiting and pool.free():
                    folder = min(waiting, key=jobs.busy)  # last come runs that another runner's worker still runs
                    waiting.remove(folder)
                    pool.start(folder)
                display.show(self.rows())
                time.sleep(pool.poll_seconds)
            display.show(self.rows())
        finally:
            pool.stop()

    def write(self) -> list[Path]:
        """Write the tables and the plot; returns their paths."""
        names = tuple(self.grid.evaluations)
        return tables.write(self.rows(), self.folder, self.grid.task.figure, title=self.grid.name, evaluations=names)

    def published_files(self) -> dict[str, Path]:
        """The files that ``publish`` copies, by new name (as in the published zoo); the table first."""
        files = {name: self.folder / name for name in tables.NAMES}
        for (run, seed), folder in self.folders.items():
            name = f"{run}_seed{seed}"
            files |= {f"log_{name}.txt": folder / "log.txt", f"detail_{name}.log": folder / "detail.log"}
            files[f"{name}.yaml"] = folder / "config.yaml"
            for evaluation in self.grid.evaluations:
                console = jobs.evaluation_log(folder, evaluation)
                files[f"{console.stem}_{name}.log"] = console
        return files

    def refuse_to_replace(self, logs: Path | None) -> None:
        """Raises RunError: tables, or files that ``publish`` copies to ``logs``, would replace other files."""
        tables.refuse_to_replace(self.folder, tables.NAMES, self.grid.runs)
        if logs is not None:
            writable_folder(logs, "--logs")
            tables.refuse_to_replace(logs, self.published_files(), self.grid.runs)

    def publish(self, logs: Path) -> None:
        """Copy tables, logs and flags of the finished runs to ``logs``."""
        for name, path in self.published_files().items():
            if path.is_file() and (path.parent == self.folder or jobs.finished(path.parent)):
                with complete(logs / name) as (copy,):
                    shutil.copyfile(path, copy)


def gpu_slots(jobs_at_once: int, gpus_per_run: int) -> list[dict[str, str]]:
    """Which GPUs each concurrent run sees; without GPUs, ``jobs_at_once`` runs share the CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        visible = ",".join(str(i) for i in range(torch.cuda.device_count()))
    gpus = [gpu for gpu in visible.split(",") if gpu.strip() and not gpu.strip().startswith("-")]  # -1: none
    groups = [",".join(gpus[i : i + gpus_per_run]) for i in range(0, len(gpus) - gpus_per_run + 1, gpus_per_run)]
    return [{"CUDA_VISIBLE_DEVICES": group} for group in groups] or [{} for _ in range(jobs_at_once)]


def _setting(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, parse_yaml(value, key)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def get_parser() -> argparse.ArgumentParser:
    parser = FlagParser("python -m irpe_lab.ablate", description=__doc__)
    add = parser.add_argument
    add("grid", type=Path, metavar="GRID.yaml", help="see docs/ablate.md")
    add("-o", "--output", type=Path, help="folder of all runs (default outputs/ablation/GRID)")
    add("--only", action="append", metavar="GLOB", help="start only runs whose name matches one, e.g. '*-product-*'")
    add("--seeds", help="replace the grid's seeds, e.g. 0,1,2")
    add("--set", dest="settings", type=_setting, action="append", default=[], metavar="FLAG=VALUE", help="for all runs")
    add("--jobs", type=positive_int, default=1, help="runs at once on a machine without GPUs (default 1)")
    add("--gpus-per-run", type=positive_int, default=1, metavar="N", help="processes and GPUs per run (default 1)")
    add("--slurm", action="store_true", help="submit each run as a SLURM job")
    add("--slurm-option", type=_setting, action="append", default=[], metavar="KEY=VALUE", help="for submitit")
    add("--dry-run", action="store_true", help="write each run's flags.yaml, print its command, start nothing")
    add("--logs", type=Path, metavar="DIR", help="also copy tables, logs and flags here, e.g. logs/ablation_demo")
    add("--table", action="store_true", help="write the tables from existing results, start nothing")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns: 1 if a run failed, or should have run and has no result; else 0."""
    parser = get_parser()
    with reported_by(parser.prog):
        return _ablate(parser.parse_args(argv))


def _ablate(args: argparse.Namespace) -> int:
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # An exit asks the runs to save; the default would end the runner at once.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        grid = read_grid(args.grid, dict(args.settings), seeds=args.seeds, only=args.only)
        ablation = Ablation(grid, args.output or Path("outputs/ablation") / grid.name)
        if args.dry_run:
            ablation.prepare(args.gpus_per_run, keep=True)
            for (_, seed), folder in ablation.chosen.items():
                command, then = ablation.commands(seed, args.gpus_per_run)
                for one in (command, *then.values()):
                    print(shlex.join([sys.executable, *jobs.in_folder(one, folder)]))
            return 0
        ablation.refuse_to_replace(args.logs)
        if not args.table:
            if args.slurm:
                options = {"gpus_per_node": args.gpus_per_run} | dict(args.slurm_option)
                pool = jobs.SlurmPool(ablation.folder / "slurm", options)
            else:
                pool = jobs.LocalPool(gpu_slots(args.jobs, args.gpus_per_run))
            ablation.work(pool, processes=args.gpus_per_run)
        for path in ablation.write():
            print(path)
        if args.logs:
            ablation.publish(args.logs)
    except KeyboardInterrupt:
        raise RunError("stopped; the same command continues") from None
    finally:
        signal.signal(signal.SIGTERM, before)
    states = {state for row in ablation.rows() if row.run in grid.chosen for state in row.states}
    return int("failed" in states or not args.table and states != {"done"})


if __name__ == "__main__":
    sys.exit(main())
