"""See the encoding: bucket maps, learned tables, and the attention bias of one patch, as PNG.

    python -m irpe_ops.visualize rpe-1.9-product-ctx-1-k --grid 14x14 --query 7,7       buckets around a patch
    python -m irpe_ops.visualize rpe-1.9-product-ctx-1-k --checkpoint X.pth             the table of each layer and head
    python -m irpe_ops.visualize rpe-1.9-product-bias-0-k --checkpoint X.pth --query 7,7    what each key is given
    python -m irpe_ops.visualize --checkpoint X.pth --query 7,7 --image I.png --build deit_irpe.model_stats:build_model

A bias is the table itself. A contextual encoding is a product of the table with the patch's own vector: without an
image its table is drawn as the length of each bucket's vector, and the last form runs the model that PACKAGE:FUNCTION
makes of the checkpoint's flags (an argparse.Namespace). The figures of Wu et al., ICCV 2021 are such. Needs matplotlib.
"""

import argparse
import importlib
import pathlib
import pickle
import re
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from irpe_ops.buckets import count_buckets, get_bucket_ids_2d
from irpe_ops.config import RPEConfig, parse_rpe_spec
from irpe_ops.modules import IRPE, IRPESum

TABLE_KEY = re.compile(
    r"(?:module\.)?(?P<layer>.*)\.rpe_(?P<role>[qkv])(?:\.rp_(?P<part>rows|cols))?\.lookup_table_(?:weight|bias)"
)


@dataclass(frozen=True)
class Table:
    """One learned table: ``values`` is ``(H or 1, N)`` (bias), ``(H or 1, D, N)`` (q, k) or ``(H or 1, N, D)`` (v)."""

    layer: str
    role: str
    part: str | None  # rows or cols, for cross
    values: Tensor

    @property
    def strength(self) -> Tensor:
        """``(H or 1, N)``: the bias itself, or the length of each bucket's vector."""
        if self.values.dim() == 2:
            return self.values
        return self.values.norm(dim=2 if self.role == "v" else 1)


def bucket_maps(config: RPEConfig, height: int, width: int, row: int, col: int) -> dict[str, Tensor]:
    """The bucket that each patch of the grid has for the query at ``(row, col)``.

    Returns: ``(height, width)`` int64 by the name of the map; two maps for ``cross``, one for any other method.
    Raises: ValueError: for a query outside the grid.
    """
    if not (0 <= row < height and 0 <= col < width):
        raise ValueError(f"query {row},{col}: outside the {height}x{width} grid (rows and columns count from 0)")
    names = ("cross_rows", "cross_cols") if config.method == "cross" else (config.method,)
    maps = {}
    for name in names:
        ids, _ = get_bucket_ids_2d(name, height, width, 0, *(config.ratio * factor for factor in (1, 2, 8)))
        maps[name] = ids[row * width + col].view(height, width)
    return maps


def read_checkpoint(path: str | Path) -> tuple[Mapping[str, Tensor], argparse.Namespace | None]:
    """The weights of a checkpoint and the flags of the run, without executing anything the file contains.

    Accepts ours, the published ones, and a bare state dict. Raises: ValueError: a file with other objects in it.
    """
    paths = [(kind, f"pathlib.{kind.__name__}") for kind in (pathlib.PosixPath, pathlib.PurePosixPath)]
    try:
        with torch.serialization.safe_globals([argparse.Namespace, pathlib.PosixPath, *paths]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, ImportError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: not a checkpoint that can be read safely ({str(error).splitlines()[0]})") from error
    weights = content.get("model", content)
    return weights, content.get("args")


def read_tables(weights: Mapping[str, Tensor]) -> list[Table]:
    """All learned tables of a state dict, in its order. Raises: ValueError: there is none."""
    tables = []
    for key, value in weights.items():
        if match := TABLE_KEY.fullmatch(key):
            tables.append(Table(match["layer"], match["role"], match["part"], value.float()))
    if not tables:
        raise ValueError(
            "no relative position encoding in these weights: "
            "expected keys like 'blocks.0.attn.rpe_k.lookup_table_weight'"
        )
    return tables


def table_maps(table: Table, config: RPEConfig, height: int, width: int, row: int, col: int) -> Tensor:
    """What a table holds for each patch as the query at ``(row, col)`` sees it: ``(H or 1, height, width)``.

    Raises: ValueError: for a table with another number of buckets than the config's method and ratio give.
    """
    maps = bucket_maps(config, height, width, row, col)
    name = f"cross_{table.part}" if table.part else config.method
    strength = table.strength
    buckets, expected = strength.shape[1], count_buckets(name, 2 * config.ratio, 0)
    if name not in maps or buckets not in (expected, expected + 1):
        raise ValueError(
            f"{table.layer}.rpe_{table.role}: a table of {buckets} buckets is not {config.spec} "
            f"({expected}, or {expected + 1} with a class token)"
        )
    return strength[:, maps[name]]


def attention_bias(model: nn.Module, images: Tensor, height: int, width: int, row: int, col: int) -> dict[str, Tensor]:
    """What each encoding on queries or keys adds to the scores of the patch at ``(row, col)``, for one forward pass.

    Args:
        model: any model with iRPE modules (`equip`, deit_irpe, detr_irpe); images: what it takes, a batch of one.
        height, width: the token grid of that image; leading tokens are skipped.
    Returns: ``(H or 1, height, width)`` by module name. Raises: ValueError: no encoding there, or another grid.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str, role: str):
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            scores = output if role == "k" else output.transpose(2, 3)
            tokens, patches = scores.shape[-1], height * width
            skip = tokens - patches
            if skip < 0:
                raise ValueError(f"{name}: {tokens} tokens, and the grid {height}x{width} has {patches}")
            found[name] = scores[0, :, skip + row * width + col, skip:].view(-1, height, width).detach()

        return hook

    handles = [
        module.register_forward_hook(keep(name, module.role))
        for name, module in model.named_modules()
        if isinstance(module, (IRPE, IRPESum)) and not module.on_values and not name.endswith((".rp_rows", ".rp_cols"))
    ]
    training = model.training
    try:
        with _eager(model), torch.no_grad():
            model.eval()
            model(images)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError(
            "no relative position encoding on queries or keys was called; a model of your own must keep "
            "its backend as attn_backend, or call rpe_attention(..., backend='eager')"
        )
    return found


@contextmanager
def _eager(model: nn.Module):
    """Attention by the definition, which calls the encodings as modules; the fast backends read only their tables."""
    layers = [module for module in model.modules() if hasattr(module, "attn_backend")]
    before = [layer.attn_backend for layer in layers]
    try:
        for layer in layers:
            layer.attn_backend = "eager"
        yield
    finally:
        for layer, backend in zip(layers, before, strict=True):
            layer.attn_backend = backend


def draw_maps(
    rows: Mapping[str, Tensor],
    path: str | Path,
    *,
    title: str,
    mark: tuple[int, int] | None = None,
    numbers: bool = False,
) -> None:
    """Save a picture of maps: one row a name, with one scale of colours, and one column a head.

    Args:
        rows: ``(heads, height, width)`` by name. mark: (row, col) of the query, outlined in every map.
        numbers: write each value into its cell (bucket ids) where there is room.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ImportError("irpe_ops.visualize draws with matplotlib: pip install matplotlib") from error
    columns = max(values.shape[0] for values in rows.values())
    cell = 4.5 if len(rows) * columns <= 2 else 1.5
    figure = Figure(figsize=(max(cell * columns + 1.2, 5), cell * len(rows) + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, values) in zip(axes, rows.items(), strict=True):
        for head, axis in enumerate(line):
            axis.set_xticks([])
            axis.set_yticks([])
            if head >= values.shape[0]:
                axis.axis("off")
                continue
            image = axis.imshow(values[head].numpy(), cmap="viridis", vmin=values.min(), vmax=values.max())
            if head == 0:
                axis.set_ylabel(name.replace(".", "\n"), fontsize=6)
            if mark:
                axis.add_patch(Rectangle((mark[1] - 0.5, mark[0] - 0.5), 1, 1, fill=False, edgecolor="red"))
            if numbers and max(values.shape[1:]) <= 20:
                for (i, j), value in _cells(values[head]):
                    colour = "black" if image.norm(value) > 0.6 else "white"
                    axis.text(j, i, f"{value:g}", ha="center", va="center", fontsize=6, color=colour)
        figure.colorbar(image, ax=line.tolist(), shrink=0.8).ax.tick_params(labelsize=5)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _cells(values: Tensor):
    return (((i, j), values[i, j].item()) for i in range(values.shape[0]) for j in range(values.shape[1]))


def main(argv: list[str] | None = None) -> None:
    """The command line of the module's docstring."""
    parser = argparse.ArgumentParser(
        "python -m irpe_ops.visualize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("spec", nargs="?", help="which encoding; default: what the checkpoint's flags say")
    parser.add_argument("--grid", type=_pair("x"), default=(14, 14), metavar="HxW", help="patches (default 14x14)")
    parser.add_argument("--query", type=_pair(","), metavar="ROW,COL", help="the patch that looks (default: middle)")
    parser.add_argument("--checkpoint", type=Path, help="draw its learned tables")
    parser.add_argument("--image", type=Path, help="run the model on this image, resized to its flags' input_size")
    parser.add_argument("--build", metavar="PACKAGE:FUNCTION", help="for --image: makes the model of the run's flags")
    parser.add_argument("-o", "--output", type=Path, default=Path("encoding.png"))
    args = parser.parse_args(argv)
    try:
        draw(args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(args.output)


def draw(args: argparse.Namespace) -> None:
    """What ``main`` was asked for, into ``args.output``."""
    height, width = args.grid
    row, col = query = args.query or (height // 2, width // 2)
    if args.checkpoint is None:
        if args.spec is None:
            raise ValueError("nothing to draw: give a spec such as rpe-1.9-product-ctx-1-k, or --checkpoint FILE")
        maps = bucket_maps(parse_rpe_spec(args.spec), height, width, row, col)
        draw_maps(
            {name: ids[None] for name, ids in maps.items()},
            args.output,
            mark=query,
            numbers=True,
            title=f"{args.spec}: buckets around patch {row},{col} of {height}x{width}",
        )
        return
    weights, flags = read_checkpoint(args.checkpoint)
    if args.image is not None:
        if args.build is None:
            raise ValueError("--image needs --build PACKAGE:FUNCTION, which makes the model of the run's flags")
        model, image = _build(args.build, flags, weights), _read_image(args.image, flags)
        biases = attention_bias(model, image, height, width, row, col)
        draw_maps(biases, args.output, mark=query, title=f"{args.image.name}: added to the scores of patch {row},{col}")
        return
    spec = args.spec or getattr(flags, "rpe", None) or getattr(flags, "enc_rpe2d", None)
    if not spec:
        raise ValueError(f"{args.checkpoint}: its flags name no encoding; give the spec, e.g. rpe-1.9-product-ctx-1-k")
    config = parse_rpe_spec(spec)
    tables = read_tables(weights)
    if args.query is None:  # every offset of the grid, around the query in the middle
        height, width = 2 * height - 1, 2 * width - 1
        row, col = height // 2, width // 2
    rows = {
        f"{table.layer}.rpe_{table.role}" + (f".{table.part}" if table.part else ""): table_maps(
            table, replace(config, skip=0), height, width, row, col
        )
        for table in tables
    }
    what = "bias" if config.mode == "bias" else "length of the vector"
    draw_maps(rows, args.output, mark=(row, col), title=f"{spec}: {what} of each offset, layer and head")


def _build(name: str, flags: argparse.Namespace | None, weights: Mapping[str, Tensor]) -> nn.Module:
    module, _, function = name.partition(":")
    built = getattr(importlib.import_module(module), function)(flags)
    model = built[0] if isinstance(built, tuple) else built
    model.load_state_dict(weights)
    return model


def _read_image(path: Path, flags: argparse.Namespace | None) -> Tensor:
    """``(1, 3, S, S)``, ImageNet mean and deviation, S of the run's ``input_size`` (224 without)."""
    from matplotlib.image import imread

    pixels = torch.from_numpy(imread(path).copy())
    pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    if pixels.dim() == 2:
        pixels = pixels[..., None].expand(-1, -1, 3)
    side = getattr(flags, "input_size", 224)
    image = pixels[None, ..., :3].permute(0, 3, 1, 2)
    image = nn.functional.interpolate(image, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    return (image - mean) / deviation


def _pair(separator: str):
    def parse(text: str) -> tuple[int, int]:
        first, _, second = text.partition(separator)
        return int(first), int(second)

    parse.__name__ = f"A{separator}B"
    return parse


if __name__ == "__main__":
    main()
