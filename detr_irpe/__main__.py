# SPDX-License-Identifier: Apache-2.0
"""``python -m detr_irpe``, and the console command ``detr-irpe``: train or evaluate."""

import contextlib

from detr_irpe.args import get_args_parser
from irpe_train.config import ConfigError, parse_args


def run() -> None:
    """Train or evaluate, as the command line says; help and mistakes do not wait for PyTorch."""
    parser = get_args_parser()
    with contextlib.suppress(ConfigError):  # launch reports it
        parse_args(parser)

    from detr_irpe.train import main
    from irpe_train.launch import launch

    launch(main, parser)


if __name__ == "__main__":  # a spawned worker imports this file again
    run()
