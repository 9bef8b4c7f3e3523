"""Times whole training steps and inference of DeiT with each encoding against plain timm DeiT, side by side.

Usage:
    python scripts/benchmark_models.py [--device cpu] [--dtype fp32] [--threads 1] [--batch-size 16] [--quick]
                                       [--model deit_small_patch16_224] [--output docs/benchmarks]

A step is forward, loss, backward and AdamW. At zero tables (a new model) the encoded model must give the plain model's
logits, which is checked first. Rounds and clock are those of benchmark_ops.py.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

import deit_irpe

sys.path.insert(0, str(Path(__file__).resolve().parent))

from benchmark_ops import DTYPES, FIELDS, Bench, check, describe, write_csv  # noqa: E402


def encoded_copy(plain: torch.nn.Module, name: str, rpe_on: str) -> torch.nn.Module:
    """The same DeiT with product encoding on ``rpe_on``, its tables still zero."""
    model = deit_irpe.create_model(name, rpe=f"rpe-1.9-product-ctx-1-{rpe_on}")
    result = model.load_state_dict(plain.state_dict(), strict=False)
    wrong = [key for key in result.missing_keys if "lookup_table" not in key] + result.unexpected_keys
    if wrong:
        raise SystemExit(f"{name}: timm's model and ours differ in {', '.join(wrong)}")
    return model


def training_step(model: torch.nn.Module, images, labels, dtype: torch.dtype) -> Callable:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def inference(model: torch.nn.Module, images, dtype: torch.dtype) -> Callable:
    def run() -> torch.Tensor:
        model.eval()
        with torch.no_grad(), torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return model(images)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help="of autocast; fp32: none")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--model", default="deit_small_patch16_224", help="any of timm's DeiT")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--quick", action="store_true", help="batch of 2, two rounds: does it run?")
    parser.add_argument("--output", type=Path, help="folder to write a CSV into")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    batch = 2 if args.quick else args.batch_size
    bench = Bench(device, 2 if args.quick else args.rounds)
    print(describe(device))
    plain = timm.create_model(args.model).to(device)
    models = {"timm": plain}
    for rpe_on in ("k", "qk", "qkv"):
        models[rpe_on] = encoded_copy(plain, args.model, rpe_on).to(device)
    images = torch.randn(batch, 3, 224, 224, device=device)
    labels = torch.randint(1000, (batch,), device=device)
    runs = {name: inference(model, images, dtype) for name, model in models.items()}
    for name, run in runs.items():
        check(f"{args.model} {name}", run(), runs["timm"](), 500 * torch.finfo(dtype).eps)
    shape = f"{args.model} B{batch}"
    bench.compare("inference", shape, args.dtype, "timm", runs)
    for model in models.values():  # tables that matter, as in training
        for key, parameter in model.named_parameters():
            if "lookup_table" in key:
                torch.nn.init.normal_(parameter, std=0.02)
    steps = {name: training_step(model, images, labels, dtype) for name, model in models.items()}
    bench.compare("training step", shape, args.dtype, "timm", steps)
    if args.output:
        print(write_csv(args.output, f"models_{args.dtype}", device, FIELDS, bench.rows))


if __name__ == "__main__":
    main()
