# SPDX-License-Identifier: Apache-2.0
"""Draw encodings: buckets around a patch, learned tables, and attention maps. Needs matplotlib.

To draw a trained model, use ``python -m deit_irpe.predict`` and ``python -m detr_irpe.predict`` (``--tables``,
``--attention``), which call the functions in this file. Each returns a matplotlib figure: save it as PNG, PDF or SVG,
or show it in a notebook.
"""

import re
import sys
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from irpe_ops.args import end_with, get_visualize_parser
from irpe_ops.config import RPEConfig, parse_rpe_spec
from irpe_ops.methods import bucket_map_named, coefficients, maps_of, offset_ids, piecewise_index
from irpe_ops.modules import IRPE
from irpe_ops.whole_file import whole_file

LARGEST_SIDE = 1000  # in patches; more cannot be seen in a picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def bucket_maps(config: str | RPEConfig, height: int, width: int, row: int, col: int) -> dict[str, Tensor]:
    """The bucket of each patch of the grid for the query at ``(row, col)``.

    Args: config: or a spec string.
    Returns: ``(height, width)`` int64 by the name of the map; two maps for ``cross``, one for any other method.
    Raises: ValueError: for a query outside the grid.
    """
    config = parse_rpe_spec(config) if isinstance(config, str) else config
    if not (0 <= row < height and 0 <= col < width):
        raise ValueError(f"query {row},{col}: outside the {height}x{width} grid (rows and columns count from 0)")
    rows, cols = (slice(side - 1 - at, 2 * side - 1 - at) for side, at in ((height, row), (width, col)))
    return {name: _centred_ids(name, config.ratio, height, width)[rows, cols] for name in maps_of(config.method)}


def _centred_ids(name: str, ratio: float, height: int, width: int) -> Tensor:
    """The bucket of every offset, ``(2 height - 1, 2 width - 1)``: the keys around a query in the middle."""
    ids = offset_ids(bucket_map_named(name), coefficients(ratio), height, width, name)
    return ids.flip(0, 1)  # an offset is query minus key


def learned_tables(model: nn.Module, height: int, width: int) -> dict[str, Tensor]:
    """What each table of a model holds for every offset on a grid: the bias, or the length of the bucket's vector.

    Returns: ``(H or 1, 2 height - 1, 2 width - 1)`` by module name, the query in the middle.
    Raises: ValueError: the model has no encoding.
    """
    maps = {}
    for name, module in model.named_modules():
        if isinstance(module, IRPE):
            table = module.table.detach().float().cpu()
            strength = table.norm(dim=2 if module.role == "v" else 1) if table.dim() == 3 else table  # (H or 1, N)
            maps[name] = strength[:, _centred_ids(module.method, module.ratio, height, width)]
    if not maps:
        raise ValueError("this model has no relative position encoding")
    return maps


def draw_maps(
    rows: Mapping[str, Tensor],
    *,
    title: str,
    mark: tuple[int, int] | None = None,
    signed: bool = False,
    numbers: bool = False,
) -> "Figure":
    """A picture of maps: one row per name, with its own colour scale, and one column per head.

    Args:
        rows: ``(heads, height, width)`` or ``(height, width)`` by name, tensors or arrays. Names and ``title`` are
            shown literally (`plain_text`).
        mark: (row, col) of the query, outlined in every map.
        signed: values may be negative: zero is white, blue is below and red above. Else zero is the darkest colour.
        numbers: values are bucket ids, without heads: write each into its cell if there is room.
    """
    if not rows:
        raise ValueError("draw_maps: no maps to draw")
    rows = {name: torch.as_tensor(values).detach().float().cpu() for name, values in rows.items()}
    rows = {name: values.reshape(-1, *values.shape[-2:]) for name, values in rows.items()}
    columns = max(values.shape[0] for values in rows.values())
    cell = 4.5 if len(rows) * columns <= 2 else 1.5
    width = cell * columns + 1.2
    figure = _figure(width, cell * len(rows) + 0.8)
    figure.set_layout_engine("compressed")  # the other one cuts labels off, since cells are square
    from matplotlib.patches import Rectangle

    figure.suptitle(textwrap.fill(plain_text(title), int(13 * width)), fontsize=9)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, values) in zip(axes, rows.items(), strict=True):
        most = float(values.abs().max()) or 1.0  # a table of zeros gets the colour of zero
        scale = {"cmap": "RdBu_r", "vmin": -most} if signed else {"cmap": "viridis", "vmin": 0.0}
        for head, axis in enumerate(line):
            if head >= values.shape[0]:
                axis.axis("off")
                continue
            image = axis.imshow(values[head].numpy(), vmax=most, **scale)
            axis.set(xticks=[], yticks=[])
            if mark:
                axis.add_patch(Rectangle((mark[1] - 0.5, mark[0] - 0.5), 1, 1, fill=False, edgecolor="red"))
            if head == 0:
                axis.set_ylabel(plain_text(name.replace(".", "\n")), fontsize=6)
            if not numbers:
                axis.set_title(f"head {head}" if values.shape[0] > 1 else "all heads", fontsize=6)
            elif max(values.shape[1:]) <= 20:
                _write_numbers(axis, values[head], lambda value, image=image: image.norm(value) > 0.6)
        bar = figure.colorbar(image, ax=line.tolist(), shrink=0.8, format="%.2g")
        bar.ax.tick_params(labelsize=5)
    return figure


def draw_tables(model: nn.Module, height: int, width: int) -> "Figure":
    """A picture of `learned_tables`, one row per table and one column per head.

    Raises: ValueError: the model has no encoding.
    """
    tables = learned_tables(model, height, width)
    signed = not next(module for module in model.modules() if isinstance(module, IRPE)).uses_tokens
    what = "bias" if signed else "length of the table's vector"
    title = f"{what}, for each offset from the patch in the middle"
    return draw_maps(tables, mark=(height - 1, width - 1), signed=signed, title=title)


def draw_over_image(
    image: Any, points: Sequence[tuple[float, float]], maps: Sequence[Mapping[str, Tensor]], title: str
):
    """One row per point: the image with the point, and beside it the point's maps over the image.

    Args:
        image: a PIL image. points: ``(x, y)`` in its pixels.
        maps: for each point ``(height, width)`` maps by title, tensors or arrays, the same titles for all.
        title: shown literally, like the titles of the maps (`plain_text`).
    """
    image = image.convert("RGB")  # matplotlib would colour a grey one
    columns = 1 + len(maps[0])
    figure = _figure(3 * columns, 3 * len(points) * min(image.height / image.width, 8) + 0.5)
    figure.suptitle(plain_text(title), fontsize=9)
    extent = (0, image.width, image.height, 0)
    for line, (x, y), of_point in zip(figure.subplots(len(points), columns, squeeze=False), points, maps, strict=True):
        most = max(float(values.max()) for values in of_point.values()) or 1.0
        for axis, (name, values) in zip(line, {f"from {x:.0f}, {y:.0f}": None, **of_point}.items(), strict=True):
            axis.imshow(image, extent=extent)
            if values is not None:
                values = torch.as_tensor(values).detach().float().cpu().numpy()
                axis.imshow(values, extent=extent, alpha=0.75, cmap="inferno", vmin=0.0, vmax=most)
            axis.plot(x, y, "o", color="cyan", markeredgecolor="black", markersize=5)
            axis.set_title(plain_text(name), fontsize=7)
            axis.set_axis_off()
    return figure


def draw_overview(ratio: float = 1.9, reach: int = 5) -> "Figure":
    """The picture of iRPE: the piecewise index g(x), and the buckets of every published method around a patch."""
    figure = _figure(9.6, 6.2)
    curve, *axes = figure.subplots(2, 3).flatten()
    distances = torch.arange(-20, 21)
    curve.axhline(0, color="0.85", linewidth=0.8)
    curve.plot(distances, distances, color="0.75", linestyle=":", label="no bucket shared")
    for each, colour in ((ratio, "#0072b2"), (2 * ratio, "#d55e00")):
        index = piecewise_index(distances, each, 2 * each, 8 * each)
        curve.plot(distances, index, drawstyle="steps-mid", color=colour, label=f"ratio {each:g}")
    curve.set(xlim=(-20, 20), ylim=(-9, 9), xlabel="offset x, in patches", ylabel="bucket g(x)")
    curve.set_title("piecewise index: exact near, coarse far", fontsize=10)
    curve.legend(fontsize=7, loc="upper left", frameon=False)
    side = 2 * reach + 1
    names = [name for method in ("product", "euc", "quant", "cross") for name in maps_of(method)]
    for axis, name in zip(axes, names, strict=True):
        ids = _centred_ids(name, ratio, reach + 1, reach + 1)
        values = ids.unique(return_inverse=True)[1]  # 0, 1, ...: neighbouring ids get neighbouring colours
        axis.pcolormesh(values.numpy(), cmap="viridis", edgecolors="face", linewidth=0.2)
        rows, cols = (ids[1:] != ids[:-1]).nonzero().T
        axis.hlines(rows + 1, cols, cols + 1, color="white", linewidth=1.2)
        rows, cols = (ids[:, 1:] != ids[:, :-1]).nonzero().T
        axis.vlines(cols + 1, rows, rows + 1, color="white", linewidth=1.2)
        axis.invert_yaxis()
        axis.set_aspect("equal")
        axis.set(xticks=[], yticks=[])
        axis.text(reach + 0.5, reach + 0.5, "×", ha="center", va="center", color="red", fontsize=14)
        axis.set_title(f"{name}: {len(ids.unique())} buckets on {side} × {side}", fontsize=10)
    return figure


def plain_text(text: str) -> str:
    """``text`` escaped for matplotlib, which reads ``$...$`` as a formula and cannot draw invalid UTF-8."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text).replace("$", r"\$")


def save(figure: "Figure", path: str | Path, *, dpi: int = 150) -> Path:
    """Write a figure in the format of its suffix (PNG, PDF, SVG...; default PNG); the same figure gives the same file.

    Returns: the path written. Raises: OSError: if it cannot be written; ValueError: for an unknown suffix.
    """
    from matplotlib import rc_context

    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    path = path if path.suffix else path.with_suffix(".png")
    known = figure.canvas.get_supported_filetypes().keys() - {"pgf"}  # it runs LaTeX
    if (kind := path.suffix[1:].lower()) not in known:
        raise ValueError(f"{path}: expected a picture's suffix, one of {', '.join(sorted(known))}")
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with rc_context({"svg.hashsalt": "irpe", "svg.fonttype": "none", "pdf.fonttype": 42}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # each is drawn as a box; one warning per box
        warnings.filterwarnings("ignore", ".*layout not applied")  # a picture of one row of pixels is drawn anyway
        with whole_file(path) as part:
            figure.savefig(part, dpi=dpi, metadata=undated)
    return path


def _figure(width: float, height: float) -> "Figure":
    """A figure without a window or a notebook backend."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("irpe_ops.visualize draws with matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def _write_numbers(axis, values: Tensor, is_light) -> None:
    for i, line in enumerate(values.tolist()):
        for j, value in enumerate(line):
            colour = "black" if is_light(value) else "white"
            axis.text(j, i, f"{value:g}", ha="center", va="center", fontsize=6, color=colour)


def main(argv: list[str] | None = None) -> None:
    """``python -m irpe_ops.visualize``."""
    parser = get_visualize_parser()
    args = parser.parse_args(argv)
    try:
        if args.spec is None:
            if args.grid or args.query:
                raise ValueError("--grid and --query need an encoding: name one, such as rpe-1.9-product-ctx-1-k")
            figure = draw_overview()
        else:
            height, width = grid = args.grid or (14, 14)
            if not 1 <= min(grid) <= max(grid) <= LARGEST_SIDE:
                raise ValueError(f"--grid {height}x{width}: expected 1 to {LARGEST_SIDE} patches per side")
            row, col = query = args.query or (height // 2, width // 2)
            maps = bucket_maps(args.spec, height, width, row, col)
            title = f"{args.spec}: buckets around patch {row},{col} of {height}x{width}"
            figure = draw_maps(maps, mark=query, numbers=True, title=title)
        path = save(figure, args.output)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{parser.prog}: {type(error).__name__}: {error}")
    print(path)


if __name__ == "__main__":
    end_with(main)
