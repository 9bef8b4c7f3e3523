# SPDX-License-Identifier: Apache-2.0
"""``python -m detr_irpe``: train or evaluate."""

from detr_irpe.args import get_args_parser
from detr_irpe.train import main
from irpe_train.launch import launch

if __name__ == "__main__":  # a spawned worker imports this file again
    launch(main, get_args_parser())
