# SPDX-License-Identifier: Apache-2.0
"""``python -m deit_irpe``: train or evaluate. A program of your own calls ``run`` (docs/extend.md)."""

from deit_irpe.args import get_args_parser
from deit_irpe.train import main
from irpe_train.launch import launch


def run() -> None:
    launch(main, get_args_parser())


if __name__ == "__main__":  # a spawned worker imports this file again
    run()
