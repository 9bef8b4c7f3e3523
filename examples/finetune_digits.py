# SPDX-License-Identifier: Apache-2.0
"""A plain DeiT gains iRPE by fine-tuning, on scikit-learn's handwritten digits.

    python examples/finetune_digits.py --out outputs/finetune_digits [--epochs 6]

1. Train a plain DeiT. 2. Add an encoding whose tables are zero: the accuracy does not change. 3. Fine-tune it with the
encoding and, for comparison, equally long without. This is a single small run: see docs/ablate.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from deit_irpe.args import get_args_parser
from deit_irpe.train import main
from irpe_lab.plots import plot_runs
from irpe_train.config import parse_args

REPOSITORY = Path(__file__).resolve().parents[1]
SPEC = "rpe-1.9-product-ctx-1-k"


def deit(data: Path, output_dir: Path, *flags: str) -> None:
    """``python -m deit_irpe`` with the demo's config, in this process."""
    fixed = ["--config", str(REPOSITORY / "configs/deit/demo.yaml"), "--num_workers", "0", "--no-tensorboard"]
    where = ["--data-path", str(data), "--output_dir", str(output_dir)]
    main(parse_args(get_args_parser(), [*fixed, *where, *flags]))


def accuracy(output_dir: Path) -> float:
    return json.loads((output_dir / "log.txt").read_text().splitlines()[-1])["test_acc1"]


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, required=True, help="folder to write to")
parser.add_argument("--data", type=Path, default=REPOSITORY / "demo_data/digits", help="created if missing")
parser.add_argument("--epochs", type=int, default=6, help="of each training run")
args = parser.parse_args()

if not args.data.is_dir():
    make = [sys.executable, REPOSITORY / "scripts/make_demo_data.py", "--task", "classification", "--out"]
    subprocess.run([*make, args.data.parent], check=True)

length = ["--epochs", str(args.epochs)]
deit(args.data, args.out / "plain", "--rpe", "none", *length)
start = ["--finetune", str(args.out / "plain/checkpoint.pth")]

print("\nThe same weights with an encoding that is zero:")
deit(args.data, args.out / "start", "--rpe", SPEC, *start, "--eval")
print(f"(the plain model ended with {accuracy(args.out / 'plain'):.3f})\n")

deit(args.data, args.out / "with_irpe", "--rpe", SPEC, *start, *length)
deit(args.data, args.out / "without", "--rpe", "none", *start, *length)
plot_runs([args.out / "with_irpe", args.out / "without"], args.out / "finetune.png")
print(
    f"fine-tuned for {args.epochs} epochs: {accuracy(args.out / 'with_irpe'):.1f}% with the encoding, "
    f"{accuracy(args.out / 'without'):.1f}% without; curves: {args.out / 'finetune.png'}"
)
