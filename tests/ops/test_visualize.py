"""The pictures of irpe_ops.visualize: the numbers behind them, and that a file comes out."""

import argparse
import pathlib
import subprocess
import sys

import pytest
import torch
from torch import nn

from irpe_ops import build_rpe, get_bucket_ids_2d, get_rpe_config, parse_rpe_spec, rpe_attention, visualize


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
def test_tables_are_read_from_a_state_dict_and_laid_out_by_bucket(spec, skip):
    config = parse_rpe_spec(spec, skip)
    attn = nn.Module()
    for name, rpe in zip(("rpe_q", "rpe_k", "rpe_v"), build_rpe(config, 8, 2), strict=True):
        setattr(attn, name, rpe)
    for parameter in attn.parameters():
        nn.init.normal_(parameter)
    model = nn.ModuleDict({"attn": attn})
    tables = visualize.read_tables({f"module.{key}": value for key, value in model.state_dict().items()})
    assert {table.role for table in tables} == set(config.rpe_on)
    for table in tables:
        assert table.layer == "attn"
        values = visualize.table_maps(table, config, 3, 4, 1, 2)
        assert values.shape == (1 if config.shared_head else 2, 3, 4)
        name = f"cross_{table.part}" if table.part else config.method
        ids, _ = get_bucket_ids_2d(name, 3, 4, skip, config.ratio, 2 * config.ratio, 8 * config.ratio)
        module = getattr(attn, f"rpe_{table.role}")
        module = getattr(module, f"rp_{table.part}") if table.part else module
        bucket = ids[skip + 1 * 4 + 2, skip + 2 * 4 + 0]
        entry = module.table[:, bucket] if config.mode == "bias" or table.role == "v" else module.table[:, :, bucket]
        expected = entry if config.mode == "bias" else entry.norm(dim=-1)
        torch.testing.assert_close(values[:, 2, 0], expected.detach())


def test_table_of_another_spec_is_refused():
    rpe = build_rpe(get_rpe_config(ratio=1.9), 8, 2)[1]
    (table,) = visualize.read_tables({"blocks.0.attn.rpe_k." + key: value for key, value in rpe.state_dict().items()})
    with pytest.raises(ValueError, match=r"a table of 49 buckets is not rpe-2-product-ctx-1-k \(81, or 82"):
        visualize.table_maps(table, get_rpe_config(ratio=2.0), 3, 3, 1, 1)
    with pytest.raises(ValueError, match="no relative position encoding in these weights"):
        visualize.read_tables({"head.weight": torch.ones(2)})


class Layer(nn.Module):
    """Attention of identity projections over a 2 x 3 grid and one leading token."""

    def __init__(self, spec):
        super().__init__()
        self.attn_backend = "auto"
        self.rpe_q, self.rpe_k, _ = build_rpe(parse_rpe_spec(spec, 1), 4, 2)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x):
        return rpe_attention(x, x, x, self.rpe_q, self.rpe_k, None, height=2, width=3, backend=self.attn_backend)


@pytest.mark.parametrize("spec", ["rpe-1.9-product-ctx-0-qk", "rpe-1.9-cross-bias-1-qk"])
def test_attention_bias_is_what_the_scores_get(spec):
    layer, x = Layer(spec), torch.randn(1, 2, 7, 4)
    found = visualize.attention_bias(layer, x, 2, 3, 1, 0)
    scaled, token = x * 4**-0.5, 1 + 1 * 3 + 0
    torch.testing.assert_close(found["rpe_k"].flatten(1), layer.rpe_k(scaled, 2, 3)[0, :, token, 1:].detach())
    torch.testing.assert_close(found["rpe_q"].flatten(1), layer.rpe_q(scaled, 2, 3)[0, :, 1:, token].detach())
    assert layer.attn_backend == "auto" and layer.training
    with pytest.raises(ValueError, match="7 tokens, and the grid 3x3 has 9"):
        visualize.attention_bias(layer, x, 3, 3, 1, 0)
    with pytest.raises(ValueError, match="no relative position encoding"):
        visualize.attention_bias(nn.Linear(4, 4), x, 2, 3, 0, 0)


class Surprise:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_checkpoints_are_read_without_running_them(tmp_path, capsys):
    flags = argparse.Namespace(enc_rpe2d="rpe-2.0-product-ctx-1-k", output_dir=pathlib.PosixPath("out"))
    torch.save({"model": {"a": torch.ones(1)}, "args": flags}, tmp_path / "good.pth")
    weights, found = visualize.read_checkpoint(tmp_path / "good.pth")
    assert list(weights) == ["a"] and found == flags
    torch.save({"model": Surprise()}, tmp_path / "bad.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    for name in ("bad.pth", "text.pth"):
        with pytest.raises(ValueError, match="not a checkpoint that can be read safely"):
            visualize.read_checkpoint(tmp_path / name)
    assert capsys.readouterr().out == ""


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 1000


def test_the_command_line_draws(tmp_path):
    pytest.importorskip("matplotlib")
    spec = "rpe-1.9-product-bias-0-k"
    layers = nn.ModuleDict({"layers": nn.ModuleList([Layer(spec), Layer(spec)])})
    torch.save({"model": layers.state_dict(), "args": argparse.Namespace(rpe=spec)}, tmp_path / "x.pth")
    table = ["--checkpoint", str(tmp_path / "x.pth")]
    for number, arguments in enumerate(
        (
            [spec, "--grid", "5x7"],
            ["rpe-20-cross-ctx-1-k", "--query", "2,3"],
            [*table, "--grid", "4x4"],
            [spec, *table, "--grid", "4x6", "--query", "1,5"],
        )
    ):
        picture = tmp_path / f"{number}.png"
        visualize.main([*arguments, "-o", str(picture)])
        assert is_png(picture)
    for arguments, message in (
        ([], "nothing to draw"),
        (["rpe-1-prodct-ctx-1-k"], "unknown method"),
        ([*table, "--image", "x.png"], "--image needs --build"),
    ):
        with pytest.raises(SystemExit, match=message):
            visualize.main(arguments)


SEEN = """
import torch
from irpe_ops import build_rpe, parse_rpe_spec, rpe_attention

class Tiny(torch.nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.rpe_q, self.rpe_k, _ = build_rpe(parse_rpe_spec(spec), 3, 1)
        self.attn_backend = "auto"

    def forward(self, images):
        x = torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(2).transpose(1, 2)[:, None]
        return rpe_attention(x, x, x, self.rpe_q, self.rpe_k, backend=self.attn_backend)

def build(args):
    return Tiny(args.rpe)
"""


def test_the_bias_of_a_patch_of_an_image(tmp_path, monkeypatch):
    image = pytest.importorskip("matplotlib.image")
    (tmp_path / "seen.py").write_text(SEEN)
    monkeypatch.syspath_prepend(tmp_path)
    import seen

    flags = argparse.Namespace(rpe="rpe-1.9-product-ctx-1-k", input_size=8)
    torch.save({"model": seen.build(flags).state_dict(), "args": flags}, tmp_path / "x.pth")
    image.imsave(tmp_path / "in.png", torch.rand(12, 10, 3).numpy())
    visualize.main(
        [
            "--checkpoint",
            str(tmp_path / "x.pth"),
            "--image",
            str(tmp_path / "in.png"),
            "--grid",
            "4x4",
            "--query",
            "1,2",
            "--build",
            "seen:build",
            "-o",
            str(tmp_path / "out.png"),
        ]
    )
    assert is_png(tmp_path / "out.png")


def test_matplotlib_is_only_needed_to_draw():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from irpe_ops import visualize\n"
        "visualize.main(['rpe-1.9-product-ctx-1-k'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install matplotlib" in done.stderr and "Traceback" not in done.stderr
