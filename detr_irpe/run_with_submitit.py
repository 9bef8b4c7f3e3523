# SPDX-License-Identifier: Apache-2.0
"""Queue a run on SLURM: ``python -m detr_irpe.run_with_submitit --nodes 2 --ngpus 8``, then the usual flags."""

from detr_irpe.args import get_args_parser
from detr_irpe.train import main
from irpe_train.launch import submit

if __name__ == "__main__":
    submit(main, get_args_parser(), nodes=4, timeout=60)
