"""The grids that compare position encodings: models differ only in positions; two resolutions."""

import pytest
import torch

from deit_irpe.args import get_args_parser
from deit_irpe.models import build_model
from deit_irpe.models.finetune import resample_positions
from irpe_lab.grid import read_grid
from irpe_ops import get_bucket_ids_2d, parse_rpe_spec
from irpe_train.checkpoint import load_matching
from irpe_train.config import parse_args
from irpe_train.metrics import count_parameters

GRIDS = {name: read_grid(f"configs/ablation/positions_{name}.yaml") for name in ("demo", "small")}
SIZES = {"demo": (32, 48), "small": (224, 288)}
# What each way adds to a model without positions; tokens T with the class token, heads H, width C, depth N.
ADDED = {
    "none": lambda T, H, C, N: 0,
    "learned": lambda T, H, C, N: T * C,
    "sine-cosine": lambda T, H, C, N: 0,
    "RoPE_axial": lambda T, H, C, N: 0,
    "RoPE_mixed": lambda T, H, C, N: C * N,
    "iRPE_k": lambda T, H, C, N: 50 * C // H * N,
    "iRPE_qk": lambda T, H, C, N: 2 * 50 * C // H * N,
    "iRPE_qkv": lambda T, H, C, N: 3 * 50 * C // H * N,
    "iRPE_k+learned": lambda T, H, C, N: 50 * C // H * N + T * C,
    "iRPE_k+RoPE_axial": lambda T, H, C, N: 50 * C // H * N,
}


def model_of(grid, run, *flags):
    return build_model(parse_args(get_args_parser(), [*GRIDS[grid].flags(run), *flags]), 10)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_models_differ_in_positions_alone(grid):
    tokens, heads, width, depth = {"demo": (17, 4, 64, 3), "small": (197, 6, 384, 12)}[grid]
    with torch.device("meta"):
        counts = {run: count_parameters(model_of(grid, run)) for run in GRIDS[grid].runs}
    assert counts.keys() - {"bias_per_offset_and_head"} == ADDED.keys()
    for run, added in ADDED.items():
        assert counts[run] - counts["none"] == added(tokens, heads, width, depth), run


@pytest.mark.parametrize("grid, side", [("demo", 4), ("small", 14)])
def test_the_bias_tells_every_offset_apart(grid, side):
    spec = GRIDS[grid].runs["bias_per_offset_and_head"]["rpe"]
    config = parse_rpe_spec(spec)
    ids, _ = get_bucket_ids_2d(config.method, side, side, 0, config.ratio, 2 * config.ratio, 8 * config.ratio)
    assert len(ids.unique()) == (2 * side - 1) ** 2 and not config.shared_head


@pytest.mark.parametrize("run", GRIDS["demo"].runs)
def test_every_way_goes_to_another_resolution(run):
    """What ``--eval --input-size 48`` does: the weights of 32 pixels in the model of 48."""
    torch.manual_seed(0)
    trained, larger = model_of("demo", run).eval(), model_of("demo", run, *GRIDS["demo"].evaluations["at 48 pixels"])
    weights, notes = resample_positions(larger, trained.state_dict(), (4, 4), source="x")
    load_matching(larger.eval(), weights, source="x")
    assert notes == ({"pos_embed": "resampled from 4x4 to 6x6 patches"} if run in RESAMPLED else {})
    image = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        assert larger(image).isfinite().all() and trained(image[..., :32, :32]).shape == (1, 10)


RESAMPLED = ("learned", "sine-cosine", "iRPE_k+learned")


@pytest.mark.parametrize("run", GRIDS["demo"].runs)
def test_only_without_positions_is_a_picture_a_bag_of_patches(run):
    """The patches in another order: the class token sees no difference without position information."""
    torch.manual_seed(0)
    model = model_of("demo", run).eval()
    for name, parameter in model.named_parameters():
        if "lookup_table" in name:  # zero at the start
            torch.nn.init.normal_(parameter)
    image = torch.randn(1, 3, 32, 32)
    moved = image.unflatten(-1, (4, 8)).roll(1, dims=-2).flatten(-2)  # columns of patches, one to the right
    with torch.no_grad():
        same = torch.allclose(model(image), model(moved), atol=1e-5)
    assert same == (run == "none")


def test_sine_and_cosine_are_those_of_row_and_column():
    model = model_of("demo", "sine-cosine", "--input-size", "32x48")
    table = model.pos_embed[0, 1:].unflatten(0, (4, 6))  # (4, 6, 64)
    assert not model.pos_embed.requires_grad and not model.pos_embed[0, 0].any()
    rates = 10000 ** -(torch.arange(16) / 16)
    row, column = 2, 5
    expected = torch.cat([wave(at * rates) for wave in (torch.sin, torch.cos) for at in (row, column)])
    found = table[row, column]
    assert torch.allclose(found.sort().values, expected.sort().values, atol=1e-6)
    with pytest.raises(ValueError, match="pos_embed=sincos: expected a width divisible by 4, got 66"):
        model_of("demo", "learned", "--model-kwargs", "pos_embed=sincos", "embed_dim=66", "num_heads=2")
