# SPDX-License-Identifier: Apache-2.0
"""Queue a run on SLURM: ``python -m deit_irpe.run_with_submitit --nodes 2 --ngpus 8``, then the usual flags."""

from deit_irpe.args import get_args_parser
from deit_irpe.train import main
from irpe_train.launch import submit

if __name__ == "__main__":
    submit(main, get_args_parser())
