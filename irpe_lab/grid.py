"""A grid file of the ablation runner: a list or product of flags, seeds, and what to compare with.

package: deit_irpe                     # python -m deit_irpe
config: configs/deit/small.yaml        # what all runs share; relative to the repository
flags: {epochs: 100}                   # and what this grid changes for all of them
grid:                                  # a product; braces in a value multiply too
  rpe: [none, "rpe-1.9-product-{ctx,bias}-{0,1}-k"]
runs:                                  # or (and) a list: a name and its flags
  small images: {input-size: 112, rpe: none}
seeds: [0, 1, 2]
published: {rpe-1.9-product-ctx-1-k: NAME OF THE MODEL ZOO}
"""

import fnmatch
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from irpe_train.errors import RunError
from irpe_train.zoo import ROOT

KEYS = ("package", "config", "flags", "grid", "runs", "seeds", "published", "classes")
# What the packages log as their main figure: the key of log.txt, and what to call it.
FIGURES = {"deit_irpe": ("test_acc1", "top-1 (%)"), "detr_irpe": ("test_coco_eval_bbox", "AP")}


class GridError(RunError, ValueError):
    """A grid file that makes no list of runs; the message names file and key."""


@dataclass(frozen=True)
class Grid:
    """What a grid file says: ``runs`` maps each run's name to the flags it adds, in order."""

    name: str
    package: str
    config: Path
    runs: dict[str, dict]
    seeds: tuple[int, ...] = (0,)
    published: dict[str, str] = field(default_factory=dict)
    classes: int | None = None  # of the data set, to count a classifier's parameters without it

    @property
    def figure(self) -> tuple[str, str]:
        """The key of ``log.txt`` that is compared, and its title."""
        return FIGURES[self.package]

    def flags(self, run: str) -> list[str]:
        """The command line of a run, after the package and without seed and output folder."""
        return ["--config", str(self.config), *as_flags(self.runs[run])]


def read_grid(
    path: str | Path, extra: dict | None = None, *, seeds: str | None = None, only: str | None = None
) -> Grid:
    """Read a grid file.

    Args:
        extra: flags for all runs, over those of the file.
        seeds: ``"0,1,2"``, instead of those of the file.
        only: a glob; keeps the runs whose name fits.
    Raises: GridError: no such file, an unknown key, no runs, two runs of one name.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise GridError(f"grid {path}: cannot be read ({error})") from error
    if not isinstance(raw, dict) or (unknown := raw.keys() - set(KEYS)):
        raise GridError(
            f"grid {path}: unknown key {', '.join(sorted(map(str, unknown)))}; expected {', '.join(KEYS)}"
            if isinstance(raw, dict)
            else f"grid {path}: expected keys {', '.join(KEYS)}"
        )
    if raw.get("package") not in FIGURES:
        raise GridError(f"grid {path}: package: {raw.get('package')!r}; expected one of {', '.join(FIGURES)}")
    config = ROOT / str(raw.get("config"))
    if not config.is_file():
        raise GridError(f"grid {path}: config: no file {config}")
    common = raw.get("flags") or {}
    runs = {}
    for name, flags in [*_product(raw.get("grid") or {}), *(raw.get("runs") or {}).items()]:
        name = slug(str(name))
        if name in runs:
            raise GridError(f"grid {path}: two runs are called {name}")
        runs[name] = {**common, **(flags or {}), **(extra or {})}
    if not runs:
        raise GridError(f"grid {path}: neither 'grid' nor 'runs' names a run")
    published = raw.get("published") or {}
    if strange := [name for name in published if name not in runs]:
        raise GridError(f"grid {path}: published: no run is called {strange[0]!r}; there are {', '.join(runs)}")
    kept = {name: flags for name, flags in runs.items() if only is None or fnmatch.fnmatchcase(name, only)}
    if not kept:
        raise GridError(f"grid {path}: no run is called like {only!r}; there are {', '.join(runs)}")
    published = {name: row for name, row in published.items() if name in kept}
    try:
        chosen = tuple(int(seed) for seed in (seeds.split(",") if seeds else raw.get("seeds") or [0]))
    except (TypeError, ValueError) as error:
        raise GridError(f"grid {path}: seeds: expected whole numbers such as 0,1,2 ({error})") from error
    return Grid(path.stem, raw["package"], _short(config), kept, chosen, published, raw.get("classes"))


def expand(text: str) -> list[str]:
    """``"a-{b,c}-{0,1}"`` -> the four strings, the last brace fastest."""
    parts = re.split(r"\{([^{}]*)\}", text)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def as_flags(values: dict) -> list[str]:
    """``{"epochs": 3, "no-abs-pos": True}`` -> ``["--epochs", "3", "--no-abs-pos"]``; false and null drop a flag."""
    argv = []
    for key, value in values.items():
        if value is True:
            argv.append(f"--{key}")
        elif isinstance(value, (list, tuple)):
            argv += [f"--{key}", *map(str, value)]
        elif value is not None and value is not False:
            argv += [f"--{key}", str(value)]
    return argv


def _short(path: Path) -> Path:
    """Relative where that is below the current folder: what a log quotes should not depend on whose machine it was."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def slug(name: str) -> str:
    """``name`` as it can stand in a file name."""
    return re.sub(r"[^\w.=+-]+", "_", name).strip("_")


def _product(grid: dict) -> list[tuple[str, dict]]:
    """All combinations; a run is called by its values alone, as specs and model names speak for themselves."""
    options = []
    for key, values in grid.items():
        values = values if isinstance(values, list) else [values]
        expanded = [one for value in values for one in (expand(value) if isinstance(value, str) else [value])]
        options.append([(key, one) for one in expanded])
    if not options:
        return []
    return [
        ("_".join(str(value) or "none" for _, value in combination), dict(combination))
        for combination in itertools.product(*options)
    ]
