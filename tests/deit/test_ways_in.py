"""timm's arguments for weights and sizes, and the flags in a stranger's checkpoint: followed or refused."""

import argparse
import logging
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn.modules.module import register_module_parameter_registration_hook

import deit_irpe
from deit_irpe.args import get_args_parser
from deit_irpe.load_model import class_names, load_model
from deit_irpe.models import build_model, from_flags
from deit_irpe.models.finetune import fit_classes, head_prefixes, load_pretrained_weights, resize_pos_embed
from irpe_ops.modules import buckets_of
from irpe_train.checkpoint import Checkpoint
from irpe_train.errors import BadCheckpoint

NAME, DEMO = "deit_tiny_patch16_224_ctx_product_50_shared_k", "deit_demo_patch4_32"
SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in one.state_dict().items())


def trained(name=NAME, **options):
    model = deit_irpe.create_model(name, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))

    def refuse(*_, **__):
        raise AssertionError("a download was tried")

    monkeypatch.setattr("socket.getaddrinfo", refuse)


def test_the_file_that_a_run_starts_from(tmp_path, monkeypatch):
    monkeypatch.setattr(from_flags, "fetch", lambda name: tmp_path / f"{name}.pth")
    flags = dict(pretrained=True, finetune="")
    assert from_flags.starting_weights(argparse.Namespace(model=NAME, **flags)) == str(tmp_path / f"{NAME}.pth")
    assert from_flags.starting_weights(argparse.Namespace(model="vit_tiny_patch16_224", **flags)) == ""
    assert from_flags.starting_weights(argparse.Namespace(model=NAME, pretrained=False, finetune="x.pth")) == "x.pth"


@pytest.mark.parametrize("wrapped", [False, True], ids=["weights", "our checkpoint"])
def test_a_file_named_in_the_overlay(tmp_path, wrapped, caplog):
    logging.getLogger("irpe").propagate = True
    mine = trained(depth=1)
    flags = argparse.Namespace(model=NAME)
    torch.save({"model": mine.state_dict(), "args": flags} if wrapped else mine.state_dict(), tmp_path / "mine.pth")
    overlay = dict(file=str(tmp_path / "mine.pth"))
    assert same(timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, depth=1), mine)
    assert not caplog.messages
    again = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, depth=1, num_classes=7)
    assert again.head.out_features == 7 and torch.equal(again.norm.weight, mine.norm.weight)
    assert "mine.pth: head.weight starts fresh" in caplog.text


def test_weights_given_as_a_state_dict():
    mine = trained(depth=1)
    config = timm.models.get_pretrained_cfg(NAME).to_dict() | {"state_dict": mine.state_dict()}
    assert same(timm.create_model(NAME, pretrained=True, pretrained_cfg=config, depth=1), mine)


@pytest.mark.parametrize("name", [NAME, DEMO])
def test_a_folder_saved_for_the_hub_loads_again(tmp_path, name):
    mine = timm.create_model(name, depth=1, num_classes=5)
    for parameter in mine.parameters():
        torch.nn.init.normal_(parameter)
    timm.models.save_for_hf(mine, str(tmp_path / "saved"))
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    assert same(again, mine) and again.pretrained_cfg["source"] == "local-dir"
    assert same(deit_irpe.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True), mine)
    fresh = deit_irpe.create_model(f"local-dir:{tmp_path / 'saved'}")
    assert fresh.head.out_features == 5 and not same(fresh, mine)


@pytest.mark.parametrize("way", ["local-dir", "state_dict", "safetensors"])
def test_positions_fit_the_size_wherever_the_weights_are_from(tmp_path, way):
    mine = trained(DEMO, depth=1)
    save_file(mine.state_dict(), tmp_path / "mine.safetensors")
    timm.models.save_for_hf(mine, str(tmp_path / "saved"), model_config=dict(model_args=dict(depth=1)))
    overlay = {
        "state_dict": dict(state_dict=mine.state_dict()),
        "safetensors": dict(file=tmp_path / "mine.safetensors"),
    }
    name, given = f"local-dir:{tmp_path / 'saved'}", {}
    if way in overlay:
        name, given = DEMO, dict(pretrained_cfg_overlay=overlay[way], depth=1)
    larger = timm.create_model(name, pretrained=True, img_size=(32, 48), **given)
    assert torch.equal(larger.pos_embed, resize_pos_embed(mine.pos_embed, (8, 8), (8, 12)))
    assert torch.equal(larger.head.weight, mine.head.weight)


def test_a_saved_model_keeps_its_own_encoding_or_says_so(tmp_path):
    timm.models.save_for_hf(trained(depth=1), str(tmp_path), model_config=dict(model_args=dict(depth=1)))
    for rpe in ("none", "rpe-1.9-product-ctx-1-qkv"):
        with pytest.raises(ValueError, match=f"^--rpe {rpe}: model 'local-dir:.*' has an encoding of its own"):
            deit_irpe.create_model(f"local-dir:{tmp_path}", rpe)
    assert buckets_of(deit_irpe.create_model(f"local-dir:{tmp_path}")) == 50


def test_a_pretrained_head_follows_the_names_of_its_classes(tmp_path):
    """Models of the Hugging Face hub may name them."""
    mine = timm.create_model("vit_tiny_patch16_224", num_classes=3, **SMALL)
    config = dict(label_names=["c", "a", "b"], model_args=SMALL)
    timm.models.save_for_hf(mine, str(tmp_path / "saved"), model_config=config)
    flags = ["--model", f"local-dir:{tmp_path / 'saved'}", "--input-size", "32", "--pretrained", "--eval"]
    args = get_args_parser().parse_args(flags)
    model = from_flags.model_of_flags(args, ["a", "b", "c"], weights=True)
    assert torch.equal(model.head.weight, mine.head.weight[[1, 2, 0]])
    assert torch.equal(model.head.bias, mine.head.bias[[1, 2, 0]])
    with pytest.raises(ValueError, match="never trained: --pretrained has the classes c, ..., the data have a, ..."):
        from_flags.model_of_flags(args, ["a", "b", "d"], weights=True)


def test_a_checkpoint_path_is_loaded_after_the_encoding(tmp_path):
    mine = trained("deit_tiny_patch16_224", rpe="rpe-1.9-product-ctx-1-q", **SMALL)
    torch.save(mine.state_dict(), tmp_path / "mine.pth")
    options = dict(checkpoint_path=tmp_path / "mine.pth", **SMALL)
    assert same(deit_irpe.create_model("deit_tiny_patch16_224", "rpe-1.9-product-ctx-1-q", **options), mine)
    with pytest.raises(BadCheckpoint, match="mine.pth does not fit this .*unexpected: blocks.0.attn.rpe_q"):
        deit_irpe.create_model("deit_tiny_patch16_224", **options)


def test_weights_that_were_never_published_are_not_promised():
    with pytest.raises(ValueError, match=f"model '{DEMO}': pretrained=True, but no weights of it were published"):
        deit_irpe.create_model(DEMO, pretrained=True)


def test_weights_of_another_normalization_are_reported(monkeypatch):
    """Some timm models expect a mean of 0.5; images are normalised with ImageNet's, as published."""
    said = []
    monkeypatch.setattr(from_flags.logger, "warning", said.append)
    for name in ("vit_tiny_patch16_224", "deit_tiny_patch16_224"):
        monkeypatch.setattr(from_flags, "build_model", lambda *_, **__: timm.create_model(name, **SMALL))  # noqa: B023
        args = get_args_parser().parse_args(["--pretrained", "--model", name])
        from_flags.model_of_flags(args, ["x"] * 1000, weights=True)
    assert len(said) == 1 and "pixels with mean and std ((0.5, 0.5, 0.5), (0.5" in said[0]


@pytest.mark.parametrize("rpe", [None, "rpe-1.9-product-ctx-1-qkv"])
def test_no_class_token(rpe):
    model = deit_irpe.create_model("deit_tiny_patch16_224", rpe, class_token=False, global_pool="avg", **SMALL)
    assert model.cls_token is None and model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


@pytest.mark.parametrize(
    ("name", "side", "rpe"),
    [
        ("vit_tiny_r_s16_p8_224", 64, "rpe-1.9-product-ctx-1-k"),
        ("swin_tiny_patch4_window7_224", 112, None),
        ("cait_xxs24_224", 64, None),
        ("resnet18", 64, None),
    ],
)
def test_a_size_reaches_the_models_that_need_it(name, side, rpe):
    model = deit_irpe.create_model(name, rpe, img_size=side).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, side, side)).shape == (1, 1000)


@pytest.mark.parametrize("name", ["hrnet_w18_small", "resnet18"])
def test_a_model_that_takes_any_size_is_tried_with_this_one(name):
    """HRNet refuses the argument with another message."""
    model = deit_irpe.create_model(name, img_size=(64, 32), in_chans=1)
    assert model.training and model.conv1.in_channels == 1
    with pytest.raises(ValueError, match="built with these arguments .img_size=64.: Calculated padded input"):
        deit_irpe.create_model("inception_v3", img_size=64)


def test_feature_maps_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=f"model '{DEMO}' cannot be built .*out_indices=.9,.*: feature index 9 is out"):
        deit_irpe.create_model(DEMO, features_only=True, out_indices=(9,))


@pytest.mark.parametrize(
    ("name", "size"), [("swin_tiny_patch4_window7_224", -3), ("efficientformer_l1", 96), ("convit_tiny", (64, 128))]
)
def test_a_size_that_a_model_cannot_take_is_refused(name, size):
    """Swin refuses it when it is built, EfficientFormer and ConViT only when they see an image of that size."""
    words = f"model '{name}' cannot be built with these arguments (img_size={size})"
    with pytest.raises(ValueError, match=re.escape(words)):
        deit_irpe.create_model(name, img_size=size)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (dict(model="densenet121"), "--drop-path: model 'densenet121' has no such dropout; give --drop-path 0"),
        (dict(model="resnet18", drop=0.1, drop_path=0), "--drop: model 'resnet18' has no such dropout; give --drop 0"),
        (dict(model_kwargs=["dept=3"]), "--model-kwargs: model .* unexpected keyword argument 'dept'"),
        (dict(model_kwargs=["num_heads=5"]), "cannot be built with these arguments"),
        (dict(model_kwargs=["num_heads=0"]), "cannot be built with these arguments"),
        (dict(model_kwargs=["depth=x"]), "--model-kwargs: model .*unsupported operand"),
        (dict(model_kwargs=["depth=0"]), "depth=0 leaves no block"),
        (dict(model_kwargs=["depth=True"]), r"--model-kwargs: model 'deit_tiny_patch16_224': linspace\(\).{,300}$"),
        (dict(model_kwargs=["weight_init=foo"]), "weight_init='foo'.*: AssertionError"),
        (dict(model_kwargs=["depth=1", "num_heads=1", "depth=2"]), "--model-kwargs: depth is given twice"),
        (dict(model_kwargs=["qkv_bias=maybe"]), "--model-kwargs qkv_bias=maybe: expected true or false"),
        (dict(model_kwargs=["class_token=0"]), "--model-kwargs class_token=0: expected true or false"),
        (dict(model_kwargs=["global_pool=''"]), "--model-kwargs global_pool='': without pooling"),
        (dict(model_kwargs=["name=x"]), "--model-kwargs name=...: give --model"),
        (dict(model_kwargs=["rpe=rpe-2.0-euc-ctx-1-k"]), "--model-kwargs rpe=...: give --rpe"),
        (dict(model_kwargs=["attn_backend=sdpa"]), "--model-kwargs attn_backend=...: give --attn-backend"),
        (dict(model_kwargs=["in_chans=1"]), "--model-kwargs in_chans=...: images have three channels"),
        (dict(model_kwargs=["num_classes=1"]), "--model-kwargs num_classes=...: the data say"),
        (dict(model_kwargs=["pretrained=True"]), "--model-kwargs pretrained=...: give --pretrained"),
        (dict(model_kwargs=["pretrained_cfg_overlay={'url': 'x'}"]), "_overlay=...: give --finetune FILE"),
        (dict(model_kwargs=["img_size=64"]), "--model-kwargs img_size=64: give --input-size, here 224"),
        (dict(model="local-dir:/nowhere"), "^model 'local-dir:/nowhere': .*/nowhere"),
    ],
)
def test_flags_that_a_model_cannot_take_are_named(flags, words):
    with pytest.raises((ValueError, OSError), match=words):
        build_model(argparse.Namespace(**{"model": "deit_tiny_patch16_224"} | flags), 10)


def test_dropout_is_where_deit_has_it():
    flags = dict(model="deit_tiny_patch16_224", model_kwargs=["depth=2"], drop=0.25, drop_path=0.5)
    model = build_model(argparse.Namespace(**flags), 3)
    last = model.blocks[-1]
    rates = [
        part.p for part in (model.pos_drop, last.attn.proj_drop, last.mlp.drop1, last.mlp.drop2, last.attn.attn_drop)
    ]
    assert rates == [0.25, 0.25, 0.25, 0.25, 0.0] and model.head_drop.p == 0
    assert last.drop_path1.drop_prob == 0.5 and isinstance(model.blocks[0].drop_path1, torch.nn.Identity)


def test_a_flag_that_is_off_stops_no_model():
    assert build_model(argparse.Namespace(model="densenet121", drop_path=0.0), 3).num_classes == 3


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        (NAME, ("head",)),
        ("deit_tiny_distilled_patch16_224", ("head", "head_dist")),
        ("resnet18", ("fc",)),
        ("efficientnet_lite0", ("classifier",)),
        ("convnext_atto", ("head.fc",)),
    ],
)
def test_the_heads_that_may_start_fresh(name, heads):
    model = timm.create_model(name, num_classes=3)
    assert set(head_prefixes(model)) == {*(f"{name}." for name in heads), "head_dist."}
    old = timm.create_model(name, num_classes=4)
    notes = load_pretrained_weights(model, old.state_dict(), source="x.pth")
    assert sorted(notes) == sorted(f"{head}.{part}" for head in heads for part in ("weight", "bias"))
    kept = [key for key in model.state_dict() if key not in notes]
    assert all(torch.equal(model.state_dict()[key], old.state_dict()[key]) for key in kept)


@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "vit_medium_patch16_reg4_gap_256"])
def test_positions_without_a_place_for_the_class_token_are_resampled(name):
    sizes = dict(depth=1, embed_dim=16, num_heads=2, patch_size=8, num_classes=2)
    old, new = (timm.create_model(name, img_size=side, **sizes) for side in (32, 48))
    notes = load_pretrained_weights(new, old.state_dict(), source="x.pth")
    assert notes == {"pos_embed": "resampled from 4x4 to 6x6 patches"} and new.pos_embed.shape == (1, 36, 16)


@pytest.mark.parametrize("shape", [(), (17, 16), (1, 4, 4, 16), (2, 17, 16), (1, 0, 16), (1, 1, 16), (1, 15, 16)])
def test_positions_of_no_grid_are_refused_by_name(shape):
    model = deit_irpe.create_model(DEMO, depth=1, embed_dim=16, num_heads=2, num_classes=2)
    weights = model.state_dict() | {"pos_embed": torch.zeros(shape)}
    with pytest.raises(BadCheckpoint, match=r"checkpoint x\.pth: pos_embed is \(.*that is not a square grid"):
        load_pretrained_weights(model, weights, source="x.pth")


@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_a_head_of_another_shape_is_not_a_head_of_these_classes(shape):
    model = deit_irpe.create_model(DEMO, depth=1, embed_dim=16, num_heads=2, num_classes=2)
    stored = model.state_dict() | {"head.bias": torch.zeros(shape)}
    weights, notes = fit_classes(model, stored, ["x", "y"], ["y", "x"])
    started = load_pretrained_weights(model, weights, source="x.pth") | notes
    assert started["head.weight"] == "is reordered to match the classes of the data"
    assert started["head.bias"].startswith("starts fresh")
    if shape:
        with pytest.raises(BadCheckpoint, match=r"checkpoint x\.pth: its head has \d outputs without class names"):
            from_flags.load_classifier(model, Checkpoint("x.pth", {"model": stored}), 2, flag="--resume")


# --- flags in a stranger's checkpoint are data


def checkpoint(path, **flags):
    torch.manual_seed(0)
    model = deit_irpe.create_model(DEMO, depth=1, embed_dim=16, num_heads=2, num_classes=2)
    kwargs = ["depth=1", "embed_dim=16", "num_heads=2"]
    stored = argparse.Namespace(**{"model": DEMO, "model_kwargs": kwargs, "input_size": 32} | flags)
    torch.save({"model": model.state_dict(), "args": stored, "classes": ["x", "y"]}, path)
    return str(path)


def test_the_flags_that_matter_are_read(tmp_path):
    model, flags, classes = load_model(checkpoint(tmp_path / "x.pth", lr="none of its business", drop_path=0.9))
    assert classes == ["x", "y"] and flags.input_size == 32 and flags.drop_path == 0 and not model.training


def test_the_moving_average_is_another_model(tmp_path):
    source = checkpoint(tmp_path / "x.pth")
    contents = torch.load(source, weights_only=False)
    average = {key: value + 1 for key, value in contents["model"].items()}
    torch.save(contents | {"model_ema": average}, source)
    for ema, wanted in ((False, contents["model"]), (True, average)):
        assert torch.equal(load_model(source, ema=ema)[0].head.weight, wanted["head.weight"])


@pytest.mark.parametrize("wanted", ["48x24", 32])  # another number of patches, and the same in another grid
def test_another_size_resamples_positions_from_the_grid_in_the_flags_whatever_holds_them(tmp_path, wanted):
    torch.manual_seed(0)
    sizes = dict(depth=1, embed_dim=16, num_heads=2, num_classes=2)
    old = deit_irpe.create_model(DEMO, img_size=(16, 64), **sizes)
    flags = dict(model=DEMO, model_kwargs=["depth=1", "embed_dim=16", "num_heads=2"], input_size="16x64")
    grid = (12, 6) if wanted == "48x24" else (8, 8)
    expected = resize_pos_embed(old.pos_embed.detach(), (4, 16), grid)
    for stored in (argparse.Namespace(**flags), flags):
        torch.save({"model": old.state_dict(), "args": stored}, tmp_path / "x.pth")
        assert torch.equal(load_model(str(tmp_path / "x.pth"), input_size=wanted)[0].pos_embed, expected)


def test_the_number_of_classes_is_that_of_the_head(tmp_path):
    model, _, _ = load_model(checkpoint(tmp_path / "x.pth", nb_classes=10**12))
    assert model.head.out_features == 2


@pytest.mark.parametrize(
    "flags",
    [
        dict(model_kwargs=["pretrained=True"]),
        dict(model_kwargs=["pretrained_cfg_overlay={'url': 'http://127.0.0.1:9/x.pth'}"]),
        dict(model_kwargs=["checkpoint_path=/etc/passwd"]),
        dict(model_kwargs=["depth=1000000000", "embed_dim=16", "num_heads=2"]),
        dict(model_kwargs=["depth=1", "embed_dim=1600000000", "num_heads=2"]),
        dict(model_kwargs=["depth=" + "(" * 10_000]),
        dict(model_kwargs=[3]),
        dict(model_kwargs="depth=1"),
        dict(model_kwargs=None),
        dict(model_kwargs=["depth"]),
        dict(model_kwargs=["depth=1", "embed_dim=16", "num_heads=2", "depth=1"]),
        dict(model_kwargs=("depth=1",)),
        dict(model_kwargs=["depth=0", "embed_dim=16", "num_heads=2"]),
        dict(no_abs_pos=2),
        dict(rpe=["none"]),
        dict(input_size=True),
        dict(model="hf-hub:someone/model"),
        dict(model="local-dir:/tmp"),
        dict(model="nowhere_tiny"),
        dict(model=3),
        dict(rpe=7),
        dict(rpe="rpe-1e9-product-ctx-1-k"),
        dict(input_size="x"),
        dict(input_size=-32),
        dict(input_size=10**9),
        dict(input_size=None),
        dict(input_size=[32]),
        dict(no_abs_pos="yes"),
    ],
    ids=str,
)
def test_flags_that_describe_no_model_of_these_weights(tmp_path, flags):
    made = 0

    def count(module, name, parameter):
        nonlocal made
        made += parameter is not None and parameter.device.type != "meta"

    source = checkpoint(tmp_path / "x.pth", **flags)
    hook = register_module_parameter_registration_hook(count)
    try:
        with pytest.raises(BadCheckpoint, match=r"x\.pth"):
            load_model(source)
    finally:
        hook.remove()
    assert made == 0  # nothing is allocated for a model that does not fit the weights


@pytest.mark.parametrize("args", [[1, 2], "model", 3])
def test_damaged_flags_of_a_checkpoint(tmp_path, args):
    checkpoint(tmp_path / "x.pth")
    contents = torch.load(tmp_path / "x.pth", weights_only=False) | {"args": args}
    torch.save(contents, tmp_path / "x.pth")
    with pytest.raises(BadCheckpoint, match="x.pth: its 'args' are a .*, not flags"):
        load_model(str(tmp_path / "x.pth"))


def test_as_many_names_as_outputs(tmp_path):
    source = checkpoint(tmp_path / "x.pth")
    torch.save(torch.load(source, weights_only=False) | {"classes": ["x"]}, source)
    with pytest.raises(BadCheckpoint, match="it names 1 classes, its class head has 2"):
        load_model(source)


def test_classes_without_names_are_those_of_imagenet_or_numbers():
    assert class_names(2) == ["class 0", "class 1"]
    names = class_names(1000)
    assert len(names) == 1000 and names[0].startswith("tench") and names[999].startswith("toilet tissue")
