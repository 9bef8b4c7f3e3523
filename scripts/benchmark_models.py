# SPDX-License-Identifier: Apache-2.0
"""Times whole training steps and inference with each encoding against the same model without one, side by side.

Usage:
    python scripts/benchmark_models.py [--device cpu] [--dtype fp32] [--threads 1] [--batch-size 16] [--quick]
                                       [--model deit_small_patch16_224 | detr_resnet50] [--output docs/benchmarks]

DeiT is timed against timm's own, DETR against ours without encoding. A step is forward, loss, backward and AdamW. With
zero tables the encoded model must give the plain model's outputs, which is checked first. ``k deterministic`` is the
step of ``k`` under --deterministic. Rounds and clock are those of benchmark_ops.py.
"""

import argparse
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from benchmark_ops import DTYPES, FIELDS, begin, check, write_csv
from torch import Tensor, nn

import deit_irpe
import detr_irpe
from detr_irpe.args import get_args_parser

ENCODED = ("k", "qk", "qkv")


def deit(name: str, batch: int, device: torch.device) -> tuple[dict[str, nn.Module], Tensor, Callable, Callable]:
    """Models by name, the plain one first; images; outputs -> loss; outputs -> the tensor that must agree."""
    models = {"timm": timm.create_model(name)}
    models |= {on: deit_irpe.create_model(name, rpe=f"rpe-1.9-product-ctx-1-{on}") for on in ENCODED}
    labels = torch.randint(1000, (batch,), device=device)
    images = torch.randn(batch, 3, 224, 224, device=device)
    return models, images, lambda logits: F.cross_entropy(logits, labels), lambda logits: logits


def detr(name: str, batch: int, device: torch.device) -> tuple[dict[str, nn.Module], Tensor, Callable, Callable]:
    """The same for DETR, at 800 x 1088 pixels: 25 x 34 tokens in the encoder; ten objects per image."""
    flags = ["--backbone", name.removeprefix("detr_"), "--backbone_weights", "none"]
    parser = get_args_parser()
    plain, criterion, _ = detr_irpe.build_model(parser.parse_args(flags))
    criterion.to(device)
    models = {"none": plain}
    for on in ENCODED:
        models[on] = detr_irpe.build_model(parser.parse_args([*flags, "--enc_rpe2d", f"rpe-2.0-product-ctx-1-{on}"]))[0]
    targets = [
        {"labels": torch.randint(1, 91, (10,), device=device), "boxes": torch.rand(10, 4, device=device) * 0.4 + 0.1}
        for _ in range(batch)
    ]

    def loss_of(outputs: dict) -> Tensor:
        losses = criterion(outputs, targets)
        return sum(losses[term] * weight for term, weight in criterion.weight_dict.items() if term in losses)

    images = torch.randn(batch, 3, 800, 1088, device=device)
    return models, images, loss_of, lambda outputs: torch.cat([outputs["pred_logits"], outputs["pred_boxes"]], -1)


def set_tables(model: nn.Module, std: float) -> None:
    for name, parameter in model.named_parameters():
        if "lookup_table" in name:
            nn.init.normal_(parameter, std=std)


def training_step(
    model: nn.Module, images: Tensor, loss_of: Callable, dtype: torch.dtype, deterministic: bool = False
) -> Callable:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        torch.use_deterministic_algorithms(deterministic)
        model.train()
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            outputs = model(images)
        loss = loss_of(outputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def inference(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Callable:
    def run():
        torch.use_deterministic_algorithms(False)
        model.eval()
        with torch.no_grad(), torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return model(images)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--model", default="deit_small_patch16_224", help="any timm DeiT, or detr_ and a ResNet")
    args, bench = begin(parser, rounds=7)
    device, dtype, batch = bench.device, DTYPES[args.dtype], 2 if args.quick else args.batch_size
    build = detr if args.model.startswith("detr_") else deit
    models, images, loss_of, comparable = build(args.model, batch, device)
    base, plain = next(iter(models.items()))
    for name, model in models.items():
        result = model.to(device).load_state_dict(plain.state_dict(), strict=False)
        if wrong := [key for key in result.missing_keys if "lookup_table" not in key] + result.unexpected_keys:
            raise SystemExit(f"{name}: the plain model and ours differ in {', '.join(wrong)}")
        set_tables(model, std=0.0)
    shape = f"{args.model} B{batch}"
    runs = {name: inference(model, images, dtype) for name, model in models.items()}
    expected = comparable(runs[base]())
    for name, run in runs.items():
        check(f"{args.model} {name}", comparable(run()), expected, 500 * torch.finfo(dtype).eps)
    bench.compare("inference", shape, args.dtype, base, runs)
    for model in models.values():  # tables that change the output, as in training
        set_tables(model, std=0.02)
    steps = {name: training_step(model, images, loss_of, dtype) for name, model in models.items()}
    steps["k deterministic"] = training_step(models["k"], images, loss_of, dtype, deterministic=True)
    bench.compare("training step", shape, args.dtype, base, steps)
    if args.output:
        kind = "detr" if build is detr else "models"
        print(write_csv(args.output, f"{kind}_{args.dtype}", device, FIELDS, bench.rows, bench))


if __name__ == "__main__":
    main()
