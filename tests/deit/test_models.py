"""The registered names: keys, shapes, counts of the published models, and weights from other runs."""

import argparse
import json
import math
from pathlib import Path

import pytest
import timm
import torch

from deit_irpe import create_model
from deit_irpe.models import RPE_MODELS
from deit_irpe.models.finetune import load_pretrained_weights, resize_pos_embed, start_from
from deit_irpe.optimizer import parameter_groups
from irpe_ops import get_rpe_config

PUBLISHED = json.loads((Path(__file__).parent / "published_state_dicts.json").read_text())
TINY = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=4)


def published_entries(name):
    model = PUBLISHED["models"][name]
    for item in PUBLISHED["structures"][model["structure"]]:
        yield tuple(item[0:1] + [tuple(item[1]), item[2]])
        for key, shape, dtype in model["insert_after"].get(item[0], []):
            yield key, tuple(shape), dtype


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return create_model(name, **kwargs)


@pytest.mark.parametrize("name", PUBLISHED["models"])
def test_keys_shapes_dtypes_and_parameters_are_the_published_ones(name):
    model = on_meta(name)
    ours = {
        key: (tuple(value.shape), str(value.dtype).removeprefix("torch.")) for key, value in model.state_dict().items()
    }
    published = {key: (shape, dtype) for key, shape, dtype in published_entries(name)}
    assert ours == published
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == PUBLISHED["models"][name]["n_parameters"]
    assert list(ours) == list(published)  # optimizer states go by order


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224_ctx_product_50_shared_k", "deit_small_patch16_224_ctx_cross_56_shared_k"]
)
def test_a_checkpoint_with_the_published_keys_loads_strictly(name):
    """Each key goes to its own place: every tensor has a different value."""
    entries = list(published_entries(name))
    values = {key: float(number) for number, (key, *_) in enumerate(entries)}
    state = {key: torch.full(shape, values[key], dtype=getattr(torch, kind)) for key, shape, kind in entries}
    model = create_model(name)
    assert not any(model.load_state_dict(state, strict=True))
    tables = [key for key, *_ in entries if "lookup_table" in key]
    assert len(tables) == (24 if "cross" in name else 12)
    for key in ("cls_token", "blocks.3.attn.qkv.weight", "head.bias", *tables):
        *path, attribute = key.split(".")
        owner = model
        for part in path:
            owner = getattr(owner, part) if not part.isdigit() else owner[int(part)]
        assert getattr(owner, attribute).unique().tolist() == [values[key]], key


def test_the_names_are_timm_models():
    assert all(timm.is_model(name) for name in RPE_MODELS)
    model = timm.create_model("deit_tiny_patch16_224_ctx_product_50_shared_qkv", num_classes=7, depth=1)
    assert model.blocks[0].attn.rpe_v is not None and model.head.out_features == 7


def test_the_published_argument_rpe_config_is_rpe():
    config = get_rpe_config(rpe_on="qk", skip=1)
    for build in (create_model, timm.create_model):
        model = build("deit_tiny_patch16_224_ctx_product_50_shared_k", rpe_config=config, depth=1)
        assert model.blocks[0].attn.rpe_q is not None and model.blocks[0].attn.rpe_v is None
    with pytest.raises(ValueError, match="are the same argument; give one"):
        create_model("deit_tiny_patch16_224", rpe="none", rpe_config=config)


def test_the_groups_of_tiny_k_have_102_and_62_tensors():
    groups = parameter_groups(on_meta("deit_tiny_patch16_224_ctx_product_50_shared_k"), 0.05)
    assert [len(group["params"]) for group in groups] == [102, 62]


def tiny(name="deit_tiny_patch16_224", rpe=None, **kwargs):
    torch.manual_seed(0)
    return create_model(name, rpe, **(TINY | kwargs)).eval()


def test_rpe_overrides_the_name_and_none_removes_it():
    name = "deit_tiny_patch16_224_ctx_product_50_shared_k"
    assert tiny(name, "rpe-20-euc-ctx-0-v").blocks[0].attn.rpe_v.lookup_table_weight.shape == (2, 82, 16)
    assert not any("lookup" in key for key in tiny(name, "none").state_dict())
    assert tiny("deit_small_distilled_patch16_224", "rpe-1.9-product-ctx-1-k").blocks[0].attn.rpe_k.skip == 2


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_small_distilled_patch16_224"])
def test_non_square_images_and_zero_tables(name):
    """At zero tables the encoding changes nothing, on a 4 x 6 grid too."""
    images = torch.randn(2, 3, 16, 24)
    plain, equipped = (tiny(name, rpe, img_size=(16, 24)) for rpe in (None, "rpe-1.9-product-ctx-1-qkv"))
    equipped.load_state_dict(plain.state_dict(), strict=False)
    assert torch.allclose(equipped(images), plain(images), atol=1e-6)


def test_without_absolute_positions_only_the_encoding_tells_patches_apart():
    images = torch.randn(1, 3, 16, 16)
    moved = images.roll(4, dims=3)  # the same patches, elsewhere
    plain = tiny(pos_embed="none")
    equipped = tiny(rpe="rpe-1.9-product-ctx-1-k", pos_embed="none")
    for parameter in [*plain.parameters(), *equipped.parameters()]:
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    assert plain.pos_embed is None and torch.allclose(plain(images), plain(moved), atol=1e-4)
    assert (equipped(images) - equipped(moved)).abs().max() > 0.01


def test_the_class_token_starts_as_published_and_a_demo_with_strong_positions():
    assert 0.01 < tiny(embed_dim=256).cls_token.std() < 0.03
    assert 0.4 < create_model("deit_demo_patch4_32", depth=1).pos_embed.std() < 0.6


@pytest.mark.skipif(not timm.is_model("deepseek_vit_412m_enc"), reason="of newer timm")
def test_a_model_without_a_class_head_is_refused():
    with torch.device("meta"), pytest.raises(ValueError, match="'deepseek_vit_412m_enc': it has no class head"):
        create_model("deepseek_vit_412m_enc", num_classes=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("xx", None), "model 'xx': unknown; expected a timm model, .* or one of deit_tiny_patch16_224_ctx"),
        (("deit_small_patch16_224_ctx_euc_20_shared", None), r"mean deit_small_patch16_224_ctx_euc_20_shared_k\?"),
        (("vit_tiny_patch16_24", None), r"did you mean vit_tiny_patch16_224\?"),
        (("resnet10t", "rpe-1.9-product-ctx-1-k"), "'resnet10t' is a ResNet; iRPE needs a Vision Transformer"),
        (("deit_tiny_patch16_224", "rpe-1.9-prodct-ctx-1-k"), "unknown method 'prodct'"),
    ],
)
def test_a_wrong_model_or_spec_is_explained(arguments, words):
    with pytest.raises(ValueError, match=words):
        create_model(*arguments)


def test_images_smaller_than_a_patch_are_refused():
    for size in (8, (32, 15)):
        with pytest.raises(ValueError, match="pixels are smaller than its patches"):
            create_model("vit_tiny_patch16_224", depth=1, img_size=size)


def test_a_distilled_model_needs_its_position_embedding():
    with pytest.raises(ValueError, match="--no-abs-pos"):
        tiny("deit_small_distilled_patch16_224", pos_embed="none")


def test_pretrained_without_a_network_says_which_file_to_put_where(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    name = "deit_tiny_patch16_224_ctx_product_50_shared_k"
    with pytest.raises(ConnectionError, match=rf"put it here: {tmp_path}.*{name}\.pth"):
        create_model(name, pretrained=True)


def test_pretrained_reads_the_published_file_from_the_hub_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = "deit_tiny_patch16_224_ctx_product_50_shared_k"
    weights = {key: torch.full(shape, 0.25) for key, shape, _ in published_entries(name)}
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save({"model": weights}, tmp_path / "hub" / "checkpoints" / f"{name}.pth")
    model = create_model(name, pretrained=True, num_classes=10)
    assert model.pos_embed.unique().tolist() == [0.25] and model.head.out_features == 10


def test_position_embedding_is_resampled_bicubically_and_leading_tokens_stay():
    grid = torch.randn(1, 1 + 3 * 4, 8)
    grown = resize_pos_embed(grid, (3, 4), (6, 5))
    assert grown.shape == (1, 31, 8) and torch.equal(grown[:, 0], grid[:, 0])
    flat = torch.cat([grid[:, :1], torch.full((1, 12, 8), 0.5)], dim=1)
    assert torch.allclose(resize_pos_embed(flat, (3, 4), (7, 2))[:, 1:], torch.tensor(0.5))
    assert resize_pos_embed(grid, (3, 4), (3, 4)) is grid


def keys_cubic(distance):
    """Keys' cubic with a = -0.75, the weight of a pixel at this distance (PyTorch's bicubic)."""
    d, a = abs(distance), -0.75
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def test_the_resampled_positions_are_those_of_the_formula():
    """Rows stay rows, and each value is the cubic mean of 4 x 4 neighbours (edges repeated), not the linear one."""
    (h, w), (new_h, new_w) = (3, 5), (6, 4)
    old = torch.randn(1, 1 + h * w, 2, dtype=torch.float64)
    new = resize_pos_embed(old.float(), (h, w), (new_h, new_w))[0, 1:].view(new_h, new_w, 2)
    grid = old[0, 1:].view(h, w, 2)
    for row in range(new_h):
        for col in range(new_w):
            y, x = (row + 0.5) * h / new_h - 0.5, (col + 0.5) * w / new_w - 0.5
            total = torch.zeros(2, dtype=torch.float64)
            for i in range(math.floor(y) - 1, math.floor(y) + 3):
                for j in range(math.floor(x) - 1, math.floor(x) + 3):
                    weight = keys_cubic(y - i) * keys_cubic(x - j)
                    total += weight * grid[min(max(i, 0), h - 1), min(max(j, 0), w - 1)]
            torch.testing.assert_close(new[row, col].double(), total, atol=1e-5, rtol=0)


def test_the_grid_that_a_checkpoint_was_trained_on_has_its_rows_first(tmp_path):
    """48 x 32 pixels are 6 x 4 patches, not 4 x 6: the positions stay in their rows."""
    old = tiny(img_size=(24, 16))
    args = argparse.Namespace(input_size="24x16")
    torch.save({"model": old.state_dict(), "args": args}, tmp_path / "old.pth")
    new = tiny(img_size=(32, 32))
    notes = start_from(new, str(tmp_path / "old.pth"), list("abcd"))
    assert notes == {"pos_embed": "resampled from 6x4 to 8x8 patches"}
    assert torch.equal(new.pos_embed, resize_pos_embed(old.pos_embed, (6, 4), (8, 8)))


def test_a_size_below_zero_in_a_checkpoint_is_no_grid(tmp_path):
    """Five rows of minus five patches would be 25 as well."""
    torch.save(
        {"model": tiny(img_size=20).state_dict(), "args": argparse.Namespace(input_size=-20)}, tmp_path / "x.pth"
    )
    notes = start_from(tiny(img_size=32), str(tmp_path / "x.pth"), list("abcd"))
    assert notes == {"pos_embed": "resampled from 5x5 to 8x8 patches"}


def test_fine_tuning_leaves_fixed_positions_as_they_are():
    new = tiny(pos_embed="sincos", img_size=32)
    before = new.pos_embed.clone()
    notes = load_pretrained_weights(new, tiny(img_size=24).state_dict(), source="a.pth")
    assert torch.equal(new.pos_embed, before) and notes == {"pos_embed": "is not used: the positions here are fixed"}


def test_fine_tuning_carries_over_what_fits_and_says_what_does_not():
    spec = "rpe-1.9-product-ctx-1-k"
    old = tiny(rpe=spec, img_size=(16, 24))
    torch.nn.init.normal_(old.blocks[0].attn.rpe_k.lookup_table_weight)
    new = tiny(rpe=spec, img_size=(24, 32), num_classes=9)
    notes = load_pretrained_weights(new, old.state_dict(), (4, 6), source="a.pth")
    assert torch.equal(new.blocks[0].attn.rpe_k.lookup_table_weight, old.blocks[0].attn.rpe_k.lookup_table_weight)
    assert torch.equal(new.pos_embed, resize_pos_embed(old.pos_embed, (4, 6), (6, 8)))
    assert notes == {
        "pos_embed": "resampled from 4x6 to 6x8 patches",
        "head.weight": "starts fresh: (4, 32) there, (9, 32) here",
        "head.bias": "starts fresh: (4,) there, (9,) here",
    }


def test_tables_of_another_size_and_new_tables_start_at_zero():
    old, new = tiny(rpe="rpe-1.9-product-ctx-1-k"), tiny(rpe="rpe-2.0-product-ctx-1-qk")
    torch.nn.init.normal_(old.blocks[0].attn.rpe_k.lookup_table_weight)
    notes = load_pretrained_weights(new, old.state_dict(), source="a.pth")
    assert not new.blocks[0].attn.rpe_k.lookup_table_weight.any()
    assert notes == {
        f"blocks.{i}.attn.rpe_{name}.lookup_table_weight": what
        for name, what in (
            ("k", "starts fresh: (1, 16, 50) there, (1, 16, 82) here"),
            ("q", "starts fresh: not in the checkpoint"),
        )
        for i in (0, 1)
    }


def test_oblong_positions_of_the_same_grid_stay_as_they_are():
    """Also for a checkpoint that does not say its grid: 24 patches mean 4 x 6 here."""
    old, new = tiny(img_size=(16, 24)), tiny(img_size=(16, 24))
    torch.nn.init.normal_(old.pos_embed)
    assert load_pretrained_weights(new, old.state_dict(), source="a.pth") == {}
    assert torch.equal(new.pos_embed, old.pos_embed)


def test_positions_of_other_families_are_not_resampled():
    model = timm.models.Cait(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2, depth_token_only=1)
    assert load_pretrained_weights(model, model.state_dict(), source="a.pth") == {}


def test_weights_of_another_model_are_refused_with_their_keys():
    with pytest.raises(ValueError, match=r"a.pth does not fit .*unexpected: blocks.2.norm1.weight.* and 7 more"):
        load_pretrained_weights(tiny(), tiny(depth=3).state_dict(), source="a.pth")
    with pytest.raises(ValueError, match=r"a.pth: pos_embed is \(1, 12, .*: with 1 leading"):
        load_pretrained_weights(tiny(), tiny().state_dict() | {"pos_embed": torch.zeros(1, 12, 32)}, source="a.pth")


def test_rotary_positions_and_an_encoding_together():
    model = create_model(
        "vit_small_patch16_rope_224", "rpe-1.9-product-ctx-1-qk", img_size=(32, 48), depth=1, num_classes=3
    )
    assert model.rope is not None and model.blocks[0].attn.rpe_k.num_buckets == 50
    assert model(torch.randn(1, 3, 32, 48)).shape == (1, 3)


def test_a_plugin_registers_a_model(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "from timm.models import register_model\nfrom deit_irpe import create_model\n\n@register_model\n"
        "def deit_of_mine(**kwargs):\n    return create_model('deit_tiny_patch16_224', depth=1, **kwargs)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="'deit_of_mine': unknown"):
        create_model("deit_of_mine")
    monkeypatch.setenv("IRPE_PLUGINS", "my_models")
    assert len(create_model("deit_of_mine", num_classes=2).blocks) == 1
