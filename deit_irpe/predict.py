# SPDX-License-Identifier: Apache-2.0
"""``irpe classify predict``: the classes of images. Files, flags and results: `get_predict_parser`."""

import argparse
import json
import os
import time
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.layers import Attention
from timm.models import VisionTransformer
from torch import Tensor

from deit_irpe.args import get_predict_parser
from deit_irpe.load_model import Classifier
from irpe_ops.attention_call import AttentionCall
from irpe_ops.backends.eager import attention_weights
from irpe_ops.equip.timm_vit import RPEAttention
from irpe_ops.modules import buckets_of
from irpe_ops.visualize import draw_maps, draw_over_image, draw_tables, plain_text, save
from irpe_train.distributed import choose_device
from irpe_train.errors import BadData, shown
from irpe_train.launch import launch
from irpe_train.logger import logger, set_up_logging
from irpe_train.outputs import OutputFolder, result_names
from irpe_train.pixels import UnreadableImage, files_of, read_image
from irpe_train.text_files import read_text

PAUSE = 30.0  # seconds between two writes of predictions.json


def attention_calls(model: VisionTransformer, images: Tensor) -> list[AttentionCall]:
    """The attention of each block for ``images`` ``(1, 3, H, W)``, without encodings on values."""
    seen, calls = [], []
    handles = [block.attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for block in model.blocks]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    height, width = model.patch_embed.grid_size
    for attn, x in zip((block.attn for block in model.blocks), seen, strict=True):
        q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)  # (B, H, L, D)
        rpe_q, rpe_k = (getattr(attn, role, None) for role in ("rpe_q", "rpe_k"))
        q, k, scale = attn.q_norm(q), attn.k_norm(k), attn.scale
        calls.append(AttentionCall(q, k, v, rpe_q, rpe_k, height=height, width=width, scale=scale))
    return calls


def attention_maps(call: AttentionCall, row: int, col: int) -> Tensor:
    """The attention weights of the patch at (row, col) on all patches.

    Returns: ``(heads, height, width)``; these and the weights on the leading tokens sum to one.
    """
    return _from_patch(attention_weights(call), call, row, col)


def encoding_maps(calls: Sequence[AttentionCall], row: int, col: int) -> dict[str, Tensor]:
    """What each encoding on queries or keys adds to the scores of the patch at (row, col); empty without any.

    Returns: ``(heads or 1, height, width)`` by the name of the module.
    """
    found = {}
    for number, call in enumerate(calls):
        for role, encoding, x in (("rpe_q", call.rpe_q, call.k), ("rpe_k", call.rpe_k, call.q)):
            if encoding is not None:
                added = encoding(x * call.scale, call.height, call.width)  # (1, H or 1, L, L)
                added = added.transpose(2, 3) if role == "rpe_q" else added
                found[f"blocks.{number}.attn.{role}"] = _from_patch(added, call, row, col)
    return found


def _from_patch(scores: Tensor, call: AttentionCall, row: int, col: int) -> Tensor:
    """The row of a patch in ``(1, H, L, L)``, without leading tokens: ``(H, height, width)``."""
    skip = scores.shape[-1] - call.height * call.width
    return scores[0, :, skip + row * call.width + col, skip:].unflatten(-1, (call.height, call.width))


def draw_top(image: Image.Image, names: Sequence[str], shares: Sequence[float]) -> Figure:
    """The image beside bars of its most likely classes."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    left.imshow(image)
    left.axis("off")
    right.barh(range(len(names)), [100 * share for share in shares], color="tab:blue")
    right.set_yticks(range(len(names)), [plain_text(name.split(",")[0][:60]) for name in names])
    right.invert_yaxis()
    right.set_xlim(0, 100)
    right.set_xlabel("%")
    return figure


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    """Predict for every image of ``args.images``. A file that it may not replace is refused before any work."""
    if not (args.images or args.tables):
        raise ValueError("nothing to predict: name images, or give --tables")
    set_up_logging(0)
    names = result_names(files_of(args.images, besides=args.out))
    out = OutputFolder(args.out, names)
    pictures = [f"{name}.png" for name in names.values()] + (["predictions.json"] if names else [])
    out.refuse_to_replace(pictures)
    flags = dict(ema=args.ema, model=args.model, rpe=args.rpe, input_size=args.input_size)
    classifier = Classifier(args.resume, choose_device(args.device), **flags)
    points = points_of(classifier.model, args.attention) if args.attention is not None else []
    encoded = (args.tables or points) and buckets_of(classifier.model)
    if args.tables and not encoded:
        raise ValueError(f"--tables: {args.resume} has no relative position encoding")
    maps = [f"{name}_{kind}_{r}-{c}.png" for name in names.values() for kind in MAPS for r, c in points]
    tables = ["tables.png"] if encoded else []
    out.refuse_to_replace(pictures + maps + tables)

    if tables:
        _save(draw_tables(classifier.model, *classifier.model.patch_embed.grid_size), out, "tables.png")
    predictions, unreadable, written_at = [], [], time.monotonic()
    try:
        for file, name in names.items():
            try:
                image = read_image(file)
            except UnreadableImage as error:  # the other images are still predicted
                logger.error(str(error))
                unreadable.append(str(error))
                continue
            shares, numbers = (best.tolist() for best in classifier(image).topk(min(5, len(classifier.classes))))
            labels = [classifier.classes[number] for number in numbers]
            _save(draw_top(image, labels, shares), out, f"{name}.png")
            top = [
                {"class": label, "number": number, "probability": share}
                for label, number, share in zip(labels, numbers, shares, strict=True)
            ]
            predictions.append({"image": os.path.abspath(file), "top": top})
            logger.info(f"{shown(file)}: " + ", ".join(f"{one['class']} {one['probability']:.1%}" for one in top))
            calls = attention_calls(classifier.model, classifier.pixels(image)) if points else []
            for point in points:
                draw_attention(classifier.seen(image), calls, point, name, out)
            if time.monotonic() - written_at > PAUSE:  # for a kill
                _add(predictions, out)
                written_at = time.monotonic()
    finally:  # for an error or Ctrl-C
        _add(predictions, out)
    if predictions or tables:
        logger.info(f"{'pictures and predictions.json are' if predictions else 'tables.png is'} in {args.out}")
    if unreadable:
        raise BadData(f"{len(unreadable)} of {len(names)} images could not be predicted: {'; '.join(unreadable[:3])}")


def _add(predictions: list[dict], out: OutputFolder) -> None:
    """Add to ``predictions.json``, if there are any; an earlier call's remain, as its pictures do."""
    if predictions:
        before, again = out.folder / "predictions.json", {entry["image"] for entry in predictions}
        earlier = json.loads(read_text(before)) if before.exists() else []
        kept = [one for one in earlier if os.path.abspath(one["image"]) not in again]
        with out.writing(before.name) as (file,):
            file.write_text(json.dumps(kept + predictions, indent=1) + "\n")


MAPS = ("attention", "encoding")  # the pictures of a patch


def points_of(model: torch.nn.Module, asked: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The patches (row, col) whose attention is drawn: the requested ones, else the middle."""
    kinds = {type(model)}
    if isinstance(model, VisionTransformer):
        kinds = {type(getattr(block, "attn", block)) for block in model.blocks}
    if others := kinds - {Attention, RPEAttention}:  # they may compute attention differently
        raise ValueError(f"--attention draws timm's Attention, with or without iRPE, not {others.pop().__name__}")
    height, width = model.patch_embed.grid_size
    for row, col in asked:
        if not (row < height and col < width):
            raise ValueError(f"--attention {row},{col}: outside the {height}x{width} patches (counted from 0,0)")
    return list(dict.fromkeys(asked)) or [(height // 2, width // 2)]


def draw_attention(
    seen: Image.Image, calls: Sequence[AttentionCall], point: tuple[int, int], name: str, out: OutputFolder
) -> None:
    """Save a patch's attention over the image, and what the encodings of keys and queries add to its scores.

    Args: seen: what the model sees of the image; calls: from `attention_calls`.
    """
    row, col = point
    height, width, heads = calls[-1].height, calls[-1].width, attention_maps(calls[-1], row, col)
    maps = {"mean of the heads": heads.mean(0)} | {f"head {number}": one for number, one in enumerate(heads)}
    centre = ((col + 0.5) * seen.width / width, (row + 0.5) * seen.height / height)
    title = f"{name}: attention of patch {row},{col} in the last block"
    _save(draw_over_image(seen, [centre], [maps], title), out, f"{name}_attention_{row}-{col}.png")
    if added := encoding_maps(calls, row, col):
        title = f"{name}: added to the scores of patch {row},{col}, by layer and head"
        figure = draw_maps(added, mark=(row, col), signed=True, title=title)
        _save(figure, out, f"{name}_encoding_{row}-{col}.png")


def _save(figure: Figure, out: OutputFolder, name: str) -> None:
    with out.writing(name) as (file,):
        save(figure, file)


if __name__ == "__main__":
    launch(main, get_predict_parser())
