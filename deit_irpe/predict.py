"""The five most likely classes of images, as pictures and JSON.

    python -m deit_irpe.predict IMG... --resume X.pth --out DIR [--attention [ROW,COL ...]]

The model is built from the flags kept in the checkpoint; ``--model`` and ``--rpe`` tell them where they are not. Writes
``DIR/<image>.png`` and ``DIR/predictions.json``; with ``--attention`` also where the chosen patches look
(``<image>_attention.png``) and what their encodings add to the scores (``<image>_encoding.png``); with ``--tables``,
which needs no image, and ``--attention`` the learned tables (``tables.png``).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.models import VisionTransformer
from torch import Tensor

from deit_irpe.args import image_size
from deit_irpe.data import build_transform
from deit_irpe.load_model import load_model
from irpe_ops.attention import attention_weights
from irpe_ops.attention_call import AttentionCall
from irpe_ops.modules import IRPE
from irpe_ops.visualize import attention_bias, draw_maps, draw_tables, save
from irpe_train.distributed import choose_device, set_up_logging
from irpe_train.flags import FlagParser
from irpe_train.launch import launch
from irpe_train.pixels import read_image


def attention_maps(model: VisionTransformer, images: Tensor, row: int, col: int) -> Tensor:
    """Where the patch at (row, col) looks in the last block: its attention weights on the patches.

    Args:
        images: ``(1, 3, H, W)``.
    Returns: ``(heads, height, width)``; what is missing to a sum of one is on the leading tokens.
    """
    seen = []
    attn = model.blocks[-1].attn
    handle = attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        model(images)
    finally:
        handle.remove()
    height, width = model.patch_embed.grid_size
    q, k, v = attn.qkv(seen[0]).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)  # (B, H, L, D)
    rpe_q, rpe_k = (getattr(attn, role, None) for role in ("rpe_q", "rpe_k"))
    q, k, scale = attn.q_norm(q), attn.k_norm(k), attn.scale
    call = AttentionCall(q, k, v, rpe_q, rpe_k, height=height, width=width, scale=scale)
    skip = model.num_prefix_tokens
    return attention_weights(call)[0, :, skip + row * width + col, skip:].unflatten(-1, (height, width))


def draw_top(image: Image.Image, names: Sequence[str], shares: Sequence[float], path: Path) -> None:
    """Save the image beside bars of its most likely classes."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    left.imshow(image)
    left.axis("off")
    right.barh(range(len(names)), [100 * share for share in shares], color="tab:blue")
    right.set_yticks(range(len(names)), [name.split(",")[0] for name in names])
    right.invert_yaxis()
    right.set_xlim(0, 100)
    right.set_xlabel("%")
    figure.savefig(path, dpi=100)


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    """The command line of the module's docstring."""
    if not (args.images or args.tables):
        raise ValueError("nothing to predict: name images, or ask for --tables")
    set_up_logging(0)
    device = choose_device(args.device)
    model, flags, classes = load_model(
        args.resume, ema=args.ema, model=args.model, rpe=args.rpe, input_size=args.input_size
    )
    model.to(device)
    transform = build_transform(False, image_size(flags.input_size))
    args.out.mkdir(parents=True, exist_ok=True)
    encoded = any(isinstance(module, IRPE) for module in model.modules())
    if args.attention is not None and not isinstance(model, VisionTransformer):
        raise ValueError(f"--attention: {flags.model} has no attention between patches")
    if args.tables or (encoded and args.attention is not None):
        save(draw_tables(model, *model.patch_embed.grid_size), args.out / "tables.png")
    predictions = []
    for file in args.images:
        image = read_image(file)
        pixels = transform(image)[None].to(device)
        shares, numbers = model(pixels).float().softmax(1)[0].topk(min(5, len(classes)))
        names = [classes[number] for number in numbers.tolist()]
        draw_top(image, names, shares.tolist(), args.out / f"{file.stem}.png")
        predictions.append(
            {
                "image": str(file),
                "top": [
                    {"class": name, "number": number, "probability": share}
                    for name, number, share in zip(names, numbers.tolist(), shares.tolist(), strict=True)
                ],
            }
        )
        print(f"{file}: " + ", ".join(f"{one['class']} {one['probability']:.1%}" for one in predictions[-1]["top"]))
        if args.attention is not None:
            draw_attention(model, pixels, args.attention, file.stem, args.out)
    if args.images:
        (args.out / "predictions.json").write_text(json.dumps(predictions, indent=1) + "\n")
    print(f"{'pictures and predictions.json are' if args.images else 'tables.png is'} in {args.out}")


def draw_attention(
    model: VisionTransformer, pixels: Tensor, points: Sequence[tuple[int, int]], name: str, out: Path
) -> None:
    """Save where each of ``points`` (the middle, if none) looks, and what its encodings add to the scores."""
    height, width = model.patch_embed.grid_size
    for row, col in points or [(height // 2, width // 2)]:
        if not (row < height and col < width):
            raise ValueError(f"--attention {row},{col}: outside the {height}x{width} patches (counted from 0,0)")
        at = f"{row}-{col}"
        looks = {"last block": attention_maps(model, pixels, row, col)}
        figure = draw_maps(looks, mark=(row, col), title=f"{name}: where patch {row},{col} looks, by head")
        save(figure, out / f"{name}_attention_{at}.png")
        if any(getattr(model.blocks[0].attn, role, None) is not None for role in ("rpe_q", "rpe_k")):
            added = attention_bias(model, pixels, height, width, row, col)
            title = f"{name}: added to the scores of patch {row},{col}, by layer and head"
            save(draw_maps(added, mark=(row, col), signed=True, title=title), out / f"{name}_encoding_{at}.png")


def _point(text: str) -> tuple[int, int]:
    row, comma, col = text.partition(",")
    if not (comma and row.isdigit() and col.isdigit()):
        raise argparse.ArgumentTypeError(f"expected ROW,COL of a patch, got {text!r}")
    return int(row), int(col)


def get_parser() -> argparse.ArgumentParser:
    parser = FlagParser("deit_irpe.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="*", type=Path, metavar="IMG")
    add("--resume", required=True, metavar="PATH|URL", help="checkpoint")
    add("--out", type=Path, default=Path("predictions"), metavar="DIR")
    add("--ema", action="store_true", help="its moving average")
    add("--attention", nargs="*", type=_point, metavar="ROW,COL", help="also draw attention (default: middle patch)")
    add("--tables", action="store_true", help="also draw the learned tables (needs no image)")
    add("--model", default=None, help="where the checkpoint does not say")
    add("--rpe", default=None, help="where the checkpoint does not say")
    add("--input-size", default=None, type=int, help="pixels, where the checkpoint does not say")
    add("--device", default="cuda", help="cuda (the CPU if there is none), cuda:N or cpu")
    return parser


if __name__ == "__main__":
    launch(main, get_parser(), sys.argv[1:])
