"""equip on timm ViTs: nothing changes but what should, and every way of running the model still works."""

import copy
import io
import pickle
import re
import sys

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from irpe_ops import equip, get_rpe_config, parse_rpe_spec, rpe_attention
from irpe_ops.equip.timm_vit import RPEAttention
from tests import oracles

SPEC = "rpe-1.9-product-ctx-1-qkv"
SMALL = {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
MODELS = {
    "class token": ("vit_tiny_patch16_224", {}),
    "class and distillation token": ("deit_tiny_distilled_patch16_224", {}),
    "class and register tokens": ("vit_tiny_patch16_224", {"reg_tokens": 4}),
    "no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "no absolute positions, other grid": ("vit_tiny_patch16_224", {"pos_embed": "none", "img_size": (32, 80)}),
    "qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "scaled attention norm": ("vit_tiny_patch16_224", {"scale_attn_norm": True}),
    "no qkv bias, layer scale": ("vit_tiny_patch16_224", {"qkv_bias": False, "init_values": 0.1}),
    "deit3": ("deit3_small_patch16_224", {}),
}


def make(name="class token", seed=0, **kwargs):
    torch.manual_seed(seed)
    model_name, extra = MODELS[name]
    return timm.create_model(model_name, **{**SMALL, **extra, **kwargs}).eval()


def images(model, batch=2, size=None):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *(size or model.patch_embed.img_size), generator=generator)


def equipped(name="class token", spec=SPEC, **kwargs):
    model = equip(make(name, **kwargs), spec)
    oracles.fill_tables(model, std=5.0)
    return model


def close(ours, expected, tolerance=1e-5):
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_zero_tables_change_nothing(name):
    model = make(name)
    before, weights = model(images(model)), copy.deepcopy(model.state_dict())
    same = equip(model, SPEC)
    assert same is model
    close(model(images(model)), before, 1e-6)
    after = model.state_dict()
    assert [key for key in after if "rpe_" not in key] == list(weights)
    assert all(torch.equal(after[key], value) for key, value in weights.items())
    model.load_state_dict(weights | {k: v for k, v in after.items() if "rpe_" in k}, strict=True)


def test_tables_come_after_the_projection_in_order():
    keys = list(equip(make(), SPEC).blocks[0].attn.state_dict())
    tables = [f"rpe_{role}.lookup_table_weight" for role in "qkv"]
    assert keys == ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias", *tables]


@pytest.mark.parametrize("name", MODELS)
def test_every_block_computes_encoded_attention(name):
    model = equipped(name, img_size=(32, 48))
    height, width = model.patch_embed.grid_size
    skip = model.num_prefix_tokens
    seen = {}
    attn = model.blocks[1].attn
    attn.register_forward_hook(lambda m, inputs, out: seen.update(x=inputs[0], out=out))
    model(images(model, batch=1))
    x = seen["x"]
    q, k, v = attn.qkv(x).view(1, x.shape[1], 3, 2, 12).permute(2, 0, 3, 1, 4)
    out = oracles.attention(
        attn.q_norm(q), attn.k_norm(k), v, attn.rpe_q, attn.rpe_k, attn.rpe_v, height, width
    ).float()  # (B, H, L, D)
    close(seen["out"], attn.proj(attn.norm(out.transpose(1, 2).flatten(2))))
    assert {part.skip for rpe in (attn.rpe_q, attn.rpe_k, attn.rpe_v) for part in rpe.parts} == {skip}


@pytest.mark.parametrize(
    "spec", ["rpe-20-euc-ctx-1-k", "rpe-33-quant-bias-0-qk", "rpe-20-cross-ctx-0-v", get_rpe_config()]
)
def test_specs_and_configs(spec):
    model = equipped(spec=spec)
    config = parse_rpe_spec(spec) if isinstance(spec, str) else spec
    for block in model.blocks:
        assert "".join(r for r in "qkv" if getattr(block.attn, f"rpe_{r}") is not None) == config.rpe_on
    assert not torch.allclose(model(images(model)), make()(images(model)), atol=1e-5)


def test_dynamic_img_size_follows_the_image():
    model = equipped(dynamic_img_size=True)
    for size in [(64, 64), (32, 96), (96, 32), (64, 64)]:
        fixed = equipped(img_size=size, pos_embed="none")
        model.pos_embed.data.zero_()
        weights = {k: v for k, v in model.state_dict().items() if k != "pos_embed"}
        fixed.load_state_dict(weights)
        # pos_embed "none" leaves the class token without one too; ours is zero.
        close(model(images(model, size=size)), fixed(images(fixed, size=size)))


def test_set_input_size_after_equip():
    model = equipped()
    model.set_input_size((32, 96))
    assert model(images(model, size=(32, 96))).shape == (2, 5)
    assert list(model.blocks[0].attn.grid.by_length.values())[-1] == (2, 6)


@pytest.mark.parametrize("kind", ["keep", "add", "causal"])
def test_masks_mean_what_they_mean_in_timm(kind):
    plain, model = make(), equip(make(), SPEC)
    mask = torch.rand(17, 17, generator=torch.Generator().manual_seed(2)) > 0.3
    mask |= torch.eye(17, dtype=torch.bool)
    masks = {
        "keep": {"attn_mask": mask},
        "add": {"attn_mask": torch.randn(2, 1, 17, 17)},
        "causal": {"is_causal": True},
    }[kind]
    x = images(model)
    close(model(x, **masks), plain(x, **masks), 1e-6)
    assert not torch.allclose(model(x, **masks), model(x), atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_fused_attn_is_kept_and_false_means_eager(fused, monkeypatch):
    model = make()
    for block in model.blocks:
        block.attn.fused_attn = fused
    equip(model, SPEC)
    used = []

    def spy(*args, backend, **options):
        used.append(backend)
        return rpe_attention(*args, backend=backend, **options)

    monkeypatch.setattr(sys.modules["irpe_ops.equip.timm_vit"], "rpe_attention", spy)
    model(images(model))
    assert used == ["auto" if fused else "eager"] * 2
    assert all(block.attn.fused_attn == fused for block in model.blocks)


def test_the_backend_is_an_argument_and_an_attribute():
    model = equip(make(), SPEC, backend="eager")
    assert {block.attn.attn_backend for block in model.blocks} == {"eager"}
    model.blocks[0].attn.attn_backend = "fast"
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        model(images(model))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("sizes", [[(64, 64)], [(32, 64), (64, 32)], [(32, 64), (96, 32), (64, 32)]])
def test_gradient_checkpointing_gives_the_same_gradients(sizes, reentrant, monkeypatch):
    # Several forward passes before one backward pass: blocks run again must find the grid of their own pass.
    monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: reentrant)
    grads = []
    for checkpointing in (False, True):
        model = equipped(dynamic_img_size=True).train()
        model.set_grad_checkpointing(checkpointing)
        sum(model(images(model, size=size)).square().sum() for size in sizes).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None for grad in grads[0].values())
    for name, grad in grads[1].items():
        close(grad, grads[0][name])


def test_dropout_only_while_training():
    model = equipped(attn_drop_rate=0.5, proj_drop_rate=0.1)
    x = images(model)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.allclose(model(x), model(x))
    attn = model.blocks[0].attn
    assert (attn.attn_drop.p, attn.proj_drop.p) == (0.5, 0.1)


def test_train_or_eval_mode_is_kept():
    assert equip(make().train(), SPEC).blocks[0].attn.rpe_k.training
    assert not equip(make(), SPEC).blocks[0].attn.rpe_k.training


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_independent(how):
    model = equipped(dynamic_img_size=True)
    x, wide = images(model), images(model, size=(32, 96))
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(x), model(x))
    model(wide)
    grid = twin.blocks[0].attn.grid
    assert grid is twin.blocks[1].attn.grid and grid is not model.blocks[0].attn.grid
    assert torch.equal(twin(x), model(x)) and torch.equal(twin(wide), model(wide))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tables_follow_dtype_and_device(dtype):
    model = equip(make().to(dtype), SPEC)
    assert model.blocks[0].attn.rpe_k.table.dtype == dtype
    assert model(images(model).to(dtype)).dtype == dtype


def test_autocast_with_qk_norm():
    model = equipped("qk_norm")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images(model))
    close(out.float(), model(images(model)), 0.05)


def test_compiles_whole():
    torch._dynamo.reset()
    model = equipped(spec="rpe-1.9-product-ctx-1-k", depth=1, pos_embed="none", dynamic_img_size=True)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for size in [(64, 64), (32, 96)]:
        close(compiled(images(model, size=size)), model(images(model, size=size)))


def test_intermediate_features():
    model = equipped()
    features = model.forward_intermediates(images(model), intermediates_only=True)
    assert [tuple(f.shape) for f in features] == [(2, 24, 4, 4)] * 2


def test_tables_learn():
    model = equip(make(), SPEC)
    model(images(model)).square().sum().backward()
    attn = model.blocks[0].attn
    assert all(rpe.table.grad.abs().sum() > 0 for rpe in (attn.rpe_q, attn.rpe_k, attn.rpe_v))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: nn.Linear(2, 2), "Linear has no blocks over one grid (model.blocks), as timm's VisionTransformer"),
        (lambda: timm.create_model("resnet18"), "ResNet has no blocks"),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "SwinTransformer has no blocks"),
        (lambda: timm.create_model("beit_base_patch16_224", depth=1), "its Attention has unknown parts"),
        (lambda: timm.create_model("mixer_s32_224"), "does not report its token grid"),
        (lambda: timm.create_model("cait_xxs24_224", depth=1), "its attention is a TalkingHeadAttn"),
        (lambda: make(patch_drop_rate=0.5), "patch_drop_rate > 0 drops tokens"),
    ],
)
def test_other_models_are_refused_with_a_pointer(build, words):
    with pytest.raises(ValueError, match="equip: .*" + re.escape(words)) as error:
        equip(build(), SPEC)
    assert "docs/equip.md" in str(error.value) or "set it to 0" in str(error.value)


def test_blocks_with_other_attention_are_refused():
    model = make()
    model.blocks[1].attn = nn.MultiheadAttention(24, 2)
    with pytest.raises(ValueError, match="block 1 of VisionTransformer: its attention is a MultiheadAttention"):
        equip(model, SPEC)
    assert not isinstance(model.blocks[0].attn, RPEAttention)  # refused before anything was changed
    del model.blocks[1].attn
    with pytest.raises(ValueError, match="block 1 of VisionTransformer: it has no attn"):
        equip(model, SPEC)


def test_wrong_arguments_say_what_is_wrong():
    with pytest.raises(ValueError, match="this model has iRPE already; equip a fresh model"):
        equip(equip(make(), SPEC), SPEC)
    with pytest.raises(ValueError, match="unknown method 'prodct'"):
        equip(make(), "rpe-1.9-prodct-ctx-1-k")
    with pytest.raises(TypeError, match="expected a spec string or a config, not a NoneType"):
        equip(make(), None)
    with pytest.raises(TypeError, match=r"expected a model \(torch.nn.Module\), not a str"):
        equip("vit_tiny_patch16_224", SPEC)
    with pytest.raises(ValueError, match="equip: unknown backend 'fast'"):
        equip(make(), SPEC, backend="fast")


def test_tokens_that_fit_no_grid():
    with pytest.raises(ValueError, match=re.escape("11 tokens, 1 of them leading, fit no grid seen so far (4 x 4)")):
        equip(make(), SPEC).blocks[0].attn(torch.zeros(1, 11, 24))
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 16, batch_first=True), 1)
    tokens = torch.zeros(1, 17, 16)
    with pytest.raises(
        ValueError, match=re.escape("equip it with parse_rpe_spec(spec, skip=1) if a class token leads")
    ):
        equip(copy.deepcopy(encoder), SPEC, grid=(4, 4))(tokens)
    assert equip(encoder, parse_rpe_spec(SPEC, skip=1), grid=(4, 4))(tokens).shape == tokens.shape


def test_a_traced_model_says_how_to_trace_it():
    model = equipped()
    with pytest.raises(ValueError, match="use torch.export, or make it a leaf module of torch.fx"):
        torch.fx.symbolic_trace(model)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, RPEAttention) or super().is_leaf_module(module, name)

    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    close(traced(images(model)), model(images(model)))


class Copies(TorchDispatchMode):
    """Names the copies of the gradients of queries, keys and values together, ``(B, L, 3, H, D)``."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.stack.default, torch.ops.aten.clone.default) and out.dim() == 5:
            self.names.append(func.overloadpacket.__name__)
        return out


@pytest.mark.parametrize(
    ("name", "backend", "copies"),
    [("class token", "compiled", []), ("qk_norm", "compiled", ["stack"]), ("class token", "eager", ["stack"])],
)
def test_gradients_of_q_k_v_are_copied_once_at_most(name, backend, copies):
    """timm's backward copies them into one tensor, and then into the order of the linear layer before them."""
    model = equip(make(name), SPEC, backend=backend)
    oracles.fill_tables(model, std=5.0)
    reference = equip(make(name), SPEC, backend="eager").double()
    reference.load_state_dict(model.state_dict())
    loss = model(images(model)).square().sum()
    with Copies() as counted:
        loss.backward()
    assert counted.names == copies * len(model.blocks)
    reference(images(model).double()).square().sum().backward()
    for (weight, ours), exact in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-4, msg=weight)
