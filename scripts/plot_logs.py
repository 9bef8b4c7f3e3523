#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Draw the curves of one or more runs: python scripts/plot_logs.py RUN... -o curves.png

RUN is a run's folder or its log.txt; logs of the published code work too. Solid: training. Dashed: test. Seeds of a run
(x_seed0, x_seed1, ...) are drawn as their mean, in a band from lowest to highest.
All runs of an ablation are outputs/ablation/NAME/*; those without a log yet are left out.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from irpe_lab.plots import plot_runs  # noqa: E402
from irpe_lab.tables import NAMES  # noqa: E402
from irpe_train.errors import RunError  # noqa: E402


def drawn(run: str) -> bool:
    """Whether it has curves: not a table beside an ablation's runs, nor a run that failed or waits."""
    folder = Path(run)
    return folder.name not in NAMES and ((folder / "log.txt").exists() or not (folder / "flags.yaml").exists())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.{png,pdf,svg}")
    args = parser.parse_args()
    try:
        panels = [axis.get_title() for axis in plot_runs(list(filter(drawn, args.runs)) or args.runs, args.output).axes]
        print(f"{args.output}: {', '.join(panels)}")
    except (RunError, OSError, ValueError) as error:
        sys.exit(f"plot_logs.py: {error}")
