"""The pictures of irpe_ops.visualize: their data, and that a file is written."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from irpe_ops import build_rpe, get_bucket_ids_2d, parse_rpe_spec, visualize
from irpe_ops.args import end_with
from tests.helpers.full_disk import full_disk

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "irpe.svg"


def test_bucket_map_is_the_querys_row_of_the_ids():
    maps = visualize.bucket_maps(parse_rpe_spec("rpe-1.9-product-ctx-1-k"), 2, 3, 0, 0)
    assert maps["product"].tolist() == [[24, 23, 22], [17, 16, 15]]  # worked by hand from the formula
    ids, _ = get_bucket_ids_2d("cross_cols", 4, 5, 0, 20, 40, 160)
    maps = visualize.bucket_maps(parse_rpe_spec("rpe-20-cross-ctx-1-k"), 4, 5, 2, 3)
    assert list(maps) == ["cross_rows", "cross_cols"]
    assert torch.equal(maps["cross_cols"], ids[13].view(4, 5))


def test_query_outside_the_grid():
    with pytest.raises(ValueError, match="query 4,0: outside the 4x5 grid"):
        visualize.bucket_maps(parse_rpe_spec("rpe-1.9-product-ctx-1-k"), 4, 5, 4, 0)


@pytest.mark.parametrize("spec", ["rpe-1.9-product-bias-0-k", "rpe-2.0-cross-ctx-0-qkv", "rpe-2.0-euc-ctx-1-qk"])
@pytest.mark.parametrize("skip", [0, 1])
def test_learned_tables_are_laid_out_by_offset(spec, skip):
    config = parse_rpe_spec(spec, skip)
    encodings = nn.ModuleDict({role: rpe for role, rpe in zip("qkv", build_rpe(config, 8, 2), strict=True) if rpe})
    for parameter in encodings.parameters():
        nn.init.normal_(parameter)
    tables = visualize.learned_tables(encodings, 3, 4)
    assert {name.split(".")[0] for name in tables} == set(config.rpe_on)
    for name, values in tables.items():
        module = encodings.get_submodule(name)
        assert values.shape == (1 if config.shared_head else 2, 5, 7)
        ids, _ = get_bucket_ids_2d(module.method, 3, 4, skip, config.ratio, 2 * config.ratio, 8 * config.ratio)
        bucket = ids[skip + 1 * 4 + 2, skip + 2 * 4 + 0]  # the key is one row below the query, two columns left of it
        entry = module.table[:, bucket] if config.mode == "bias" or module.role == "v" else module.table[:, :, bucket]
        expected = entry if config.mode == "bias" else entry.norm(dim=-1)
        torch.testing.assert_close(values[:, 2 + 1, 3 - 2], expected.detach())


def test_a_model_without_encoding_has_no_tables():
    with pytest.raises(ValueError, match="this model has no relative position encoding"):
        visualize.draw_tables(nn.Linear(2, 2), 3, 4)


class Layer(nn.Module):
    """The encodings of an attention, with tables that are not zero."""

    def __init__(self, spec):
        super().__init__()
        self.rpe_q, self.rpe_k, _ = build_rpe(parse_rpe_spec(spec, 1), 4, 2)
        for parameter in self.parameters():
            nn.init.normal_(parameter)


def colours(figure):
    """The content of each map of a figure, and its scale: (values, colour map, smallest, largest)."""
    images = [axis.images[0] for axis in figure.axes if axis.images]
    return [(image.get_array(), image.get_cmap().name, *image.get_clim()) for image in images]


def test_one_scale_a_row_and_zero_looks_alike():
    pytest.importorskip("matplotlib")
    first = torch.tensor([[[0.0, 1.0]], [[4.0, 2.0]]])
    figure = visualize.draw_maps({"a.b": first, "c": torch.zeros(1, 1, 2)}, title="t", mark=(0, 1))
    assert [entry[1:] for entry in colours(figure)] == [("viridis", 0, 4), ("viridis", 0, 4), ("viridis", 0, 1)]
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:3] == ["head 0", "head 1", "all heads"] and figure.axes[0].get_ylabel() == "a\nb"
    boxes = [patch.get_bbox().bounds for axis in figure.axes[:3] for patch in axis.patches]
    assert boxes == [(0.5, -0.5, 1, 1)] * 3  # around the query of every map: column 1, row 0
    figure = visualize.draw_maps({"a": first - 3, "c": torch.zeros(2, 1, 2)}, title="t", signed=True)
    assert [entry[1:] for entry in colours(figure)] == [("RdBu_r", -3, 3)] * 2 + [("RdBu_r", -1, 1)] * 2


def test_maps_without_heads_and_of_numpy_are_drawn_and_none_is_an_error():
    maps = visualize.bucket_maps("rpe-1.9-cross-ctx-1-k", 4, 5, 1, 2)
    assert maps.keys() == {"cross_rows", "cross_cols"}
    figure = visualize.draw_maps({name: ids.numpy() for name, ids in maps.items()}, title="x", numbers=True)
    drawn = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert [array.tolist() for array in drawn[:2]] == [ids.tolist() for ids in maps.values()]
    with pytest.raises(ValueError, match="draw_maps: no maps to draw"):
        visualize.draw_maps({}, title="x")


@pytest.mark.parametrize(("spec", "height"), [("rpe-1.9-product-ctx-1-k", 14), ("rpe-20-cross-ctx-1-k", 13)])
def test_labels_are_inside_the_picture(spec, height):
    agg = pytest.importorskip("matplotlib.backends.backend_agg")
    maps = visualize.bucket_maps(parse_rpe_spec(spec), height, 14, 7, 7)
    figure = visualize.draw_maps({name: ids[None] for name, ids in maps.items()}, title="t", numbers=True)
    canvas = agg.FigureCanvasAgg(figure)
    canvas.draw()
    labels = [axis.yaxis.label.get_window_extent() for axis in figure.axes if axis.get_ylabel()]
    assert len(labels) == len(maps) and min(label.x0 for label in labels) >= 0


def test_learned_biases_are_signed_and_lengths_are_not():
    pytest.importorskip("matplotlib")
    for spec, name in (("rpe-1.9-product-bias-0-k", "RdBu_r"), ("rpe-1.9-product-ctx-1-k", "viridis")):
        assert {entry[1] for entry in colours(visualize.draw_tables(Layer(spec), 4, 6))} == {name}


def test_maps_over_an_image():
    image = pytest.importorskip("PIL.Image").new("RGB", (60, 40))
    maps = [{"one": torch.ones(2, 3), "two": torch.rand(2, 3)}, {"one": torch.zeros(2, 3), "two": torch.zeros(2, 3)}]
    figure = visualize.draw_over_image(image, [(5, 5), (59, 39)], maps, "title")
    assert [axis.get_title() for axis in figure.axes] == ["from 5, 5", "one", "two", "from 59, 39", "one", "two"]
    points = [tuple(line.get_xydata()[0]) for axis in figure.axes for line in axis.lines]
    assert points == [(5, 5)] * 3 + [(59, 39)] * 3
    assert figure.axes[1].images[1].get_clim() == figure.axes[2].images[1].get_clim() == (0, 1)


def test_a_grey_image_stays_grey_below_its_maps():
    image = pytest.importorskip("PIL.Image").linear_gradient("L")
    figure = visualize.draw_over_image(image, [(5, 5)], [{"one": torch.ones(2, 3).numpy()}], "title")
    shown = torch.from_numpy(figure.axes[0].images[0].get_array().data.copy())
    assert torch.equal(shown, torch.arange(256, dtype=torch.uint8)[:, None, None].expand(256, 256, 3))


def test_names_are_shown_as_they_stand(tmp_path):
    name = "$5_and_$6 {\udce9.jpg"
    image = pytest.importorskip("PIL.Image").new("RGB", (60, 40))
    visualize.save(visualize.draw_over_image(image, [(5, 5)], [{name: torch.ones(2, 3)}], name), tmp_path / "a.png")
    visualize.save(visualize.draw_maps({name: torch.ones(1, 2, 3)}, title=name), tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_text().count("$5_and_$6 {\ufffd") == 2


def test_a_notebooks_backend_stays():
    code = (
        "import matplotlib, sys; before = dict.get(matplotlib.rcParams, 'backend')\n"
        "from irpe_ops import visualize\n"
        "visualize.draw_overview()\n"
        "assert dict.get(matplotlib.rcParams, 'backend') is before and 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_line_draws(tmp_path):
    pytest.importorskip("matplotlib")
    for number, arguments in enumerate(
        (["rpe-1.9-product-bias-0-k", "--grid", "5x7"], ["rpe-20-cross-ctx-1-k", "--query", "2,3"])
    ):
        picture = tmp_path / "new" / f"{number}.png"
        visualize.main([*arguments, "-o", str(picture)])
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 1000
    for arguments, words in (
        (["rpe-1-prodct-ctx-1-k"], r"^python -m irpe_ops.visualize: ValueError: rpe spec .* unknown method"),
        (["rpe-1-euc-ctx-1-k", "--grid", "0x3"], "--grid 0x3: expected 1 to 1000 patches per side"),
        (["rpe-1-euc-ctx-1-k", "--grid", "3x100000"], "--grid 3x100000: expected 1 to 1000"),
        (["rpe-1-euc-ctx-1-k", "--query", "14,0"], "query 14,0: outside the 14x14 grid"),
        (["rpe-1-euc-ctx-1-k", "-o", str(tmp_path / "a.doc")], "a.doc: expected a picture's suffix, one of"),
    ):
        with pytest.raises(SystemExit, match=words):
            visualize.main(arguments)


def test_what_is_printed_is_what_was_written(tmp_path, capsys):
    longest = "x" * 250 + ".png"
    for name, written in (("plain", "plain.png"), ("a.svg", "a.svg"), ("v1.pdf", "v1.pdf"), (longest, longest)):
        visualize.main(["-o", str(tmp_path / name)])
        assert capsys.readouterr().out.strip() == str(tmp_path / written) and (tmp_path / written).stat().st_size > 0
    assert b"/Type3" not in (tmp_path / "v1.pdf").read_bytes()  # fonts that many conferences refuse


def test_a_full_disk_is_told_with_the_file_and_keeps_the_old_picture(tmp_path):
    (tmp_path / "a.png").write_text("old")
    with full_disk(1000), pytest.raises(OSError, match="a.png"):
        visualize.save(visualize.draw_overview(), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").read_text() == "old"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["-o", "."], "IsADirectoryError: . is a folder; name a file in it"),
        (["-o", "there.txt/x.png"], "there.txt"),
        (["-o", "x.xyz"], "x.xyz: expected a picture's suffix, one of"),
        (["-o", "x.pgf"], "x.pgf: expected a picture's suffix"),
        (["--grid", "3x3"], "--grid and --query need an encoding: name one"),
        (["--query", "1,1"], "--grid and --query need an encoding: name one"),
        (["rpe-1.9-product-ctx-1-k", "--grid", "0x3"], "--grid 0x3: expected 1 to 1000"),
    ],
)
def test_a_wrong_command_line_ends_in_one_line(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    Path("there.txt").write_text("")
    with pytest.raises(SystemExit, match=re.escape(words)):
        visualize.main(flags)
    assert [path.name for path in tmp_path.iterdir()] == ["there.txt"]


def test_the_picture_of_the_readme_is_current(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    kept = PICTURE.read_text()
    if f"Matplotlib v{matplotlib.__version__}," not in kept:
        pytest.skip("another version of matplotlib draws the same picture in other words")
    visualize.main(["-o", str(tmp_path / "irpe.svg")])
    same = kept == (tmp_path / "irpe.svg").read_text()  # a bool: to show where two long lines differ takes minutes
    assert same, "python -m irpe_ops.visualize -o docs/irpe.svg"


def test_matplotlib_is_only_needed_to_draw():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from irpe_ops import visualize\n"
        "visualize.main(['rpe-1.9-product-ctx-1-k'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install matplotlib" in done.stderr and "Traceback" not in done.stderr


def test_a_console_without_the_letters_of_a_name_shows_them_escaped(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    with pytest.raises(SystemExit) as ended:
        end_with(lambda: print("öut.png"))
    assert not ended.value.code and console.buffer.getvalue() == b"\\xf6ut.png\n"
