"""Writes docs/same_numbers.md: runs of this code beside those of the published code, and the effect of recipe changes.

usage: python -m tests.evidence.same_numbers -o docs/same_numbers.md
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

from timm.scheduler.scheduler import Scheduler

from deit_irpe import optimizer
from irpe_ops.modules import IRPE
from tests.helpers.trajectories import Difference, differences, replay

CASES: dict[str, dict] = json.loads((Path(__file__).parent / "trajectories.json").read_text())["cases"]
HEAD = """# The same numbers as the published code

Whole training runs of the published code, on tiny models with inputs made by NumPy alone, are repeated here with the
same pictures, weights and order of samples, and nothing random. `tests/evidence/trajectories.json` holds the published
results at every step (PyTorch 2.15, timm 1.0.31, CPU); `tests/helpers/trajectories.py` makes the inputs and compares.
The test suite runs all cases. This command writes the page:

```bash
python -m tests.evidence.same_numbers -o docs/same_numbers.md
```

## Case by case

| case | what | numbers | largest difference | tolerance |
|---|---|---|---|---|
"""
TOLERANCES = """
Differences of losses and of `log.txt` are relative to 1 + the published value, those of rates to the published rate.
Weights are compared by sum (over the root of the number of elements), norm and distance from the start, each relative
to the published distance from the start. Largest differences are rounded up; they vary a little with the processor.
The keys of the log and their order, the counts of steps and tensors, the tensors that changed, and the epoch must match
exactly.

Why these tolerances: two runs of the published code whose starting weights differ by a relative 2e-7 (rounding) end up
to 2e-6 (losses) and 5e-5 (weights) apart for DeiT, and 2e-5 and 1.4e-3 for DETR, whose matching amplifies rounding. The
tolerances are 3.5 to 20 times that, and still small enough to show the changes below.

## What a change of the recipe does

A check that cannot fail shows nothing. Each row is a run with one thing changed (`pytest -m slow tests/evidence`).

| change | case | seen in | times the tolerance, at most |
|---|---|---|---|
"""
TAIL = """
## What this does not show

* The cases have encodings on keys only. Queries and values, like all methods, are tested against loops in fp64
  (`tests/ops`): a query encoding that is not transposed fails over 50 tests of `test_attention.py`.
* Random numbers (dropout, stochastic depth, augmentation, Mixup) are off: their order is not the published one.
* DeiT's clipping norm: AdamW divides by the size of the gradient, so 0.525 for 0.5 stays within the tolerances there.
* Half precision, GPUs, several processes, real data: [evaluate.md](evaluate.md) compares with a published row.
* Parameters whose gradient is only rounding noise are left out, because AdamW scales it to full steps: biases of keys;
  the first decoder layer's self-attention, where all values are equal at first; encodings of DeiT's last block.
"""


def spare_tables() -> None:
    groups = optimizer.parameter_groups

    def spared(model, weight_decay):
        tables = {id(parameter) for name, parameter in model.named_parameters() if "lookup_table" in name}
        plain, decayed = groups(model, weight_decay)
        plain["params"] += [p for p in decayed["params"] if id(p) in tables]
        decayed["params"] = [p for p in decayed["params"] if id(p) not in tables]
        return [plain, decayed]

    optimizer.parameter_groups = spared


def schedule_one_epoch_on() -> None:
    step = Scheduler.step
    Scheduler.step = lambda self, epoch, *rest: step(self, epoch + 1, *rest)


def read_ids_transposed() -> None:
    bucket_ids = IRPE.bucket_ids
    IRPE.bucket_ids = lambda self, *where: bucket_ids(self, *where).T.contiguous()


K, EUC, SGD, DETR = (name for name in CASES if name.split()[1] in ("k,", "euc", "SGD,", "product"))
CHANGES: dict[str, tuple[str, Callable | None, list[str]]] = {
    "tables without weight decay": (EUC, spare_tables, []),
    "schedule one epoch on": (K, schedule_one_epoch_on, []),
    "bucket ids of (j, i) for those of (i, j), as an encoding that should be transposed and is not": (
        K,
        read_ids_transposed,
        [],
    ),
    "`--model-ema-decay 0.899` for 0.9": (K, None, ["--model-ema-decay", "0.899"]),
    "`--momentum 0.79` for 0.8": (SGD, None, ["--momentum", "0.79"]),
    "`--bbox_loss_coef 5.05` for 5": (DETR, None, ["--bbox_loss_coef", "5.05"]),
    "`--eos_coef 0.101` for 0.1": (DETR, None, ["--eos_coef", "0.101"]),
    "`--lr_drop 3` for 2": (DETR, None, ["--lr_drop", "3"]),
    "`--clip_max_norm 0.105` for 0.1": (DETR, None, ["--clip_max_norm", "0.105"]),
}


def run_case(name: str, change: Callable | None = None, flags: tuple[str, ...] | list[str] = ()) -> list[Difference]:
    """The differences of a case, perhaps with a change of the recipe."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        return differences(case, replay(case | {"flags": [*case["flags"], *flags]}, Path(folder) / "run", change))


def case_lines(name: str, found: list[Difference]) -> list[str]:
    tolerances = [f"{d.tolerance:.0e}" if d.tolerance else "exact" for d in found]
    return [
        f"| {name} | {d.kind} | {d.compared} | {upwards(d)} | {tolerance} |"
        for d, tolerance in zip(found, tolerances, strict=True)
    ]


def change_line(title: str, found: list[Difference]) -> str:
    outside = [d for d in found if not d.within]
    times = max((d.largest / d.tolerance for d in outside if d.tolerance), default=0)
    return f"| {title} | {CHANGES[title][0]} | {', '.join(d.kind for d in outside)} | {float(f'{times:.0e}'):,.0f} |"


def upwards(difference: Difference) -> str:
    """Rounded up to one digit, so that another machine's rounding does not change the page."""
    value = difference.largest
    if not difference.tolerance:
        return "none" if value == 0 else "**differs**"
    if value == 0:
        return "0"
    size = 10.0 ** math.floor(math.log10(value))
    return f"{math.ceil(value / size - 1e-9) * size:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/same_numbers.md"), help="the page")
    output = parser.parse_args().output
    cases = [line for name in CASES for line in case_lines(name, run_case(name))]
    changes = [change_line(title, run_case(*change)) for title, change in CHANGES.items()]
    output.write_text(HEAD + "\n".join(cases) + "\n" + TOLERANCES + "\n".join(changes) + "\n" + TAIL)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
