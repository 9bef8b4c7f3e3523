# SPDX-License-Identifier: Apache-2.0
"""``python -m deit_irpe``: train or evaluate."""

from deit_irpe.args import get_args_parser
from deit_irpe.train import main
from irpe_train.launch import launch

if __name__ == "__main__":  # a spawned worker imports this file again
    launch(main, get_args_parser())
