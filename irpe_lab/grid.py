# SPDX-License-Identifier: Apache-2.0
"""A grid file of the ablation runner: values to combine, single runs, seeds, and the run to compare with.

package: deit_irpe                     # python -m deit_irpe
config: configs/deit/small.yaml        # shared by all runs: beside the grid, in the working folder, or a shipped one
flags: {epochs: 100}                   # what this grid changes in all runs
grid:                                  # all combinations; braces in a value expand too
  rpe: [none, "rpe-1.9-product-{ctx,bias}-{0,1}-k"]
  repeated-aug: [true, false]
runs:                                  # and/or single runs: a name and its flags
  small images: {input-size: 112, rpe: none}
seeds: [0, 1, 2]
baseline: none                         # the run that others are compared with, seed by seed; by default "none"
published: {rpe-1.9-product-ctx-1-k: NAME IN THE MODEL ZOO}
evaluations:                           # of every trained run, without training again: a name and its flags
  at 288 pixels: {input-size: 288}

Names and values are those of a ``--config`` file; each run is written as one. All are checked before any starts.
"""

import argparse
import contextlib
import fnmatch
import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from irpe_lab.figures import TASKS, Task
from irpe_lab.jobs import slug
from irpe_train.arguments import LARGEST_SEED
from irpe_train.config import ConfigError, find_config, flags_of, read_yaml, refuse_repeated, same_name
from irpe_train.zoo import read_zoo

KEYS = ("package", "config", "flags", "grid", "runs", "seeds", "baseline", "published", "evaluations")
SET_BY_RUNNER = ("seed", "output_dir", "resume", "eval", "config", "print_config")  # for each run
MOST_RUNS = 10_000


@dataclass(frozen=True)
class Grid:
    """The content of a grid file: ``runs`` maps each run's name to all its flags, including the config's, in order.

    ``chosen``: the names of the runs to be started, without those that ``--only`` leaves out.
    """

    name: str
    task: Task
    runs: dict[str, dict]
    seeds: tuple[int, ...] = (0,)
    published: dict[str, str] = field(default_factory=dict)
    baseline: str | None = None
    evaluations: dict[str, list[str]] = field(default_factory=dict)  # typed after the run's own flags, with --eval
    chosen: tuple[str, ...] = ()

    def flags(self, run: str) -> list[str]:
        """A run as a command line, without seed and folder. Raises: ConfigError: an unusable name or value."""
        return flags_of(self.task.parser(), self.runs[run], f"grid {self.name}: run {run}")


def read_grid(
    path: str | Path, extra: dict | None = None, *, seeds: str | None = None, only: str | Sequence[str] | None = None
) -> Grid:
    """Read a grid file, looked for in the working folder and then among the shipped ones.

    Args:
        extra: flags for all runs, which override the file's.
        seeds: ``"0,1,2"``, replaces the file's.
        only: a glob or several; chooses the runs whose name matches one.
    Raises: ConfigError: no such file, an unknown key, no runs, two runs with the same name, a run that does not parse.
    """
    source = f"grid {path}"
    path = find_config(path, source=source)
    raw = read_yaml(path, source)
    if unknown := [str(key) for key in raw if key not in KEYS]:
        raise ConfigError(f"{source}: unknown key {', '.join(sorted(unknown))}; expected {', '.join(KEYS)}")
    if raw.get("package") not in list(TASKS):
        raise ConfigError(f"{source}: package: {raw.get('package')!r:.80}; expected one of {', '.join(TASKS)}")
    base = {}
    if raw.get("config") is not None:
        config = find_config(str(raw["config"]), path.parent, source=f"{source}: config")
        base = read_yaml(config, f"{source}: config {raw['config']}")
    runs = _runs(raw, base, extra or {}, source)
    only = [only] if isinstance(only, str) else only  # else its letters would be the globs
    kept = tuple(name for name in runs if only is None or any(fnmatch.fnmatchcase(name, glob) for glob in only))
    if not kept:
        raise ConfigError(f"{source}: no run name matches {' or '.join(only)}; the runs are {', '.join(runs)}")
    same = {}
    for name in kept:
        if (first := same.setdefault(repr(runs[name]), name)) != name:
            raise ConfigError(f"{source}: {name}: the same flags as {first}; does --set override what they vary?")
    published = {
        _known(name, runs, f"{source}: published"): row for name, row in _mapping(raw, "published", source).items()
    }
    for row in published.values():
        try:
            found = read_zoo().find(str(row)[:80])
        except ValueError as error:
            raise ConfigError(f"{source}: published: {error}") from error
        if found.package != raw["package"]:
            raise ConfigError(f"{source}: published: {row} belongs to {found.package}, not to {raw['package']}")
    baseline = raw.get("baseline", "none" if "none" in runs else None)
    if baseline is not None:
        baseline = _known(baseline, runs, f"{source}: baseline")
    chosen = _seeds(raw.get("seeds", [0]) if seeds is None else seeds, source)
    if len(kept) * len(chosen) > MOST_RUNS:
        raise ConfigError(f"{source}: {len(kept)} runs with {len(chosen)} seeds; expected at most {MOST_RUNS} in all")
    task = TASKS[raw["package"]]
    evaluations = _evaluations(raw, task.parser(), source)
    grid = Grid(path.stem, task, runs, chosen, published, baseline, evaluations, kept)
    _parse_all(grid, source)
    return grid


def _evaluations(raw: dict, parser: argparse.ArgumentParser, source: str) -> dict[str, list[str]]:
    evaluations = {}
    for name, flags in _mapping(raw, "evaluations", source).items():
        where = f"{source}: evaluations: {name}"
        taken = {slug(other).casefold() for other in ("", *evaluations)}  # some file systems ignore case
        if not isinstance(flags, dict) or slug(str(name)).casefold() in taken:
            raise ConfigError(f"{where}: expected a unique name and its flags, {{input-size: 288}}")
        _refuse_odd_names(flags, where)
        evaluations[str(name)] = flags_of(parser, flags, where)
    return evaluations


def _runs(raw: dict, base: dict, extra: dict, source: str) -> dict[str, dict]:
    """All runs by name, each with the flags of the config, of the grid, its own, and those of ``--set``."""
    common = _mapping(raw, "flags", source)
    singles = [(str(name), flags) for name, flags in _mapping(raw, "runs", source).items()]
    runs, taken = {}, set()
    for name, flags in [*_product(_mapping(raw, "grid", source), source), *singles]:
        if not isinstance(flags, dict | None):
            raise ConfigError(f"{source}: runs: {name}: expected its flags, {{epochs: 3}}; got {flags!r:.80}")
        if not (name := slug(name)):
            raise ConfigError(f"{source}: runs: a name needs letters or digits, because folders are named after it")
        if name.casefold() in taken:  # some file systems ignore case
            raise ConfigError(f"{source}: two runs are called {name} (capitals do not count)")
        taken.add(name.casefold())
        for added in (common, flags or {}, extra):
            _refuse_odd_names(added, f"{source}: {name}")
        runs[name] = _merged(base, common, flags or {}, extra)
    if not runs:
        raise ConfigError(f"{source}: neither 'grid' nor 'runs' names a run")
    return runs


def _refuse_odd_names(flags: dict, where: str) -> None:
    refuse_repeated(map(same_name, map(str, flags)), where)
    if own := [key for key in flags if same_name(str(key)) in SET_BY_RUNNER]:
        raise ConfigError(f"{where}: {own[0]} is set by the runner (see 'seeds' and --output)")


def _merged(*layers: dict) -> dict:
    """Later layers win, and come last: ``no-x: true`` over ``x: true`` is read last, as a typed flag would be."""
    merged: dict[str, tuple] = {}
    for key, value in (item for layer in layers for item in layer.items()):
        merged.pop(same_name(str(key)), None)
        merged[same_name(str(key))] = (key, value)
    return dict(merged.values())


def _parse_all(grid: Grid, file: str) -> None:
    """Raise ConfigError for the first run or evaluation that would be refused, or whose name is too long for a file."""
    from irpe_ops import parse_rpe_spec  # imports PyTorch

    parser = grid.task.parser()
    for run, flags in grid.runs.items():
        source = f"{file}: run {run}"
        argv = flags_of(parser, flags, source)
        for name, more in {"": [], **grid.evaluations}.items():
            log, errors = f"detail_{slug(name)}_{run}_seed{max(grid.seeds)}.log", io.StringIO()
            if len(log.encode()) > 255:
                raise ConfigError(f"{source}, {name}: a file would be called {log:.100}...; expected shorter names")
            try:
                with contextlib.redirect_stderr(errors):
                    parsed = vars(parser.parse_args([*argv, *more]))
                for spec in {parsed.get("rpe"), parsed.get("enc_rpe2d")} - {None, "", "none"}:
                    parse_rpe_spec(spec)
            except (SystemExit, ValueError) as error:
                reason = (errors.getvalue() or str(error)).strip().splitlines()[-1]
                where = f"{source}, {name}" if name else source
                raise ConfigError(f"{where}: {reason.partition('error: ')[2] or reason}") from error


def _mapping(raw: dict, key: str, source: str) -> dict:
    value = {} if raw.get(key) is None else raw[key]
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: {key}: expected 'name: value' lines, got {value!r:.80}")
    return value


def _known(name: object, runs: dict, where: str) -> str:
    """The run's name, as ``_runs`` writes it."""
    if slug(str(name)) not in runs:
        raise ConfigError(f"{where}: no run is called {name!r:.80}; the runs are {', '.join(runs)}")
    return slug(str(name))


def _seeds(values: object, source: str) -> tuple[int, ...]:
    values = values.split(",") if isinstance(values, str) else values
    try:
        if not isinstance(values, list):
            raise TypeError(f"got {values!r:.80}")
        seeds = tuple(int(seed) for seed in values if not isinstance(seed, bool | float))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: seeds: expected whole numbers such as 0,1,2 ({error})") from error
    if not seeds or len(set(seeds)) < len(values) or not 0 <= min(seeds) <= max(seeds) <= LARGEST_SEED:
        raise ConfigError(f"{source}: seeds: expected different integers from 0 to {LARGEST_SEED}, got {values!r:.80}")
    return seeds


def expand(text: str) -> list[str]:
    """``"a-{b,c}-{0,1}"`` -> the four strings, the last brace varying fastest. Braces without a comma stay."""
    return ["".join(choice) for choice in itertools.product(*_choices(text))]


def _choices(text: str) -> list[list[str]]:
    parts = re.split(r"\{([^{}]*,[^{}]*)\}", text)
    return [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]


def _product(grid: dict, source: str) -> list[tuple[str, dict]]:
    """All combinations of values. A run is named after its values, or ``key=value`` for values that are not text."""
    options, count = [], 1
    for key, values in grid.items():
        values = values if isinstance(values, list) else [values]
        count *= sum(math.prod(map(len, _choices(v))) if isinstance(v, str) else 1 for v in values)
        if not 0 < count <= MOST_RUNS:
            raise ConfigError(f"{source}: grid: {key}: {count} runs so far; expected 1 to {MOST_RUNS}")
        options.append([(key, one) for v in values for one in (expand(v) if isinstance(v, str) else [v])])
    if not options:
        return []
    return [("_".join(_called(*pair) for pair in chosen), dict(chosen)) for chosen in itertools.product(*options)]


def _called(key: str, value: object) -> str:
    if isinstance(value, str):
        return value or "none"
    values = value if isinstance(value, list) else [value]
    shown = ",".join(repr(one) if isinstance(one, float) else str(one) for one in values)  # 0.10 is 0.1
    return f"{key}={shown if isinstance(value, list) else shown.lower()}"
