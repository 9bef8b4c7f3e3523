#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Draw the curves of one or more runs: python scripts/plot_logs.py RUN... -o curves.png. The same as ``irpe plot``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from irpe_lab.plots import main  # noqa: E402

if __name__ == "__main__":
    main()
