"""equip on models from other libraries, with random weights: zero tables change nothing, others follow the formula."""

import copy
import io
import threading

import numpy as np
import pytest
import torch
from torch import nn

from irpe_ops import build_rpe, equip, get_bucket_ids_2d, parse_rpe_spec
from irpe_ops.equip.timm_vit import RPEAttention
from tests import oracles
from tests.helpers.gallery import (
    GRIDS,
    MODELS,
    SPEC,
    answer,
    attentions,
    encoder,
    hugging_face,
    make,
    rotary,
    torchvision_vit,
)


@pytest.mark.parametrize("name", MODELS)
def test_zero_tables_change_nothing_and_filled_ones_do(name):
    model, x = make(name)
    with torch.no_grad():
        before, weights = answer(model, x), copy.deepcopy(model.state_dict())
        equip(model, SPEC, grid=GRIDS.get(name))
        assert not any(module.training for module in model.modules())  # it was in evaluation mode
        torch.testing.assert_close(answer(model, x), before, rtol=1e-4, atol=1e-5)
        after = model.state_dict()
        assert [key for key in after if "rpe_" not in key] == list(weights)
        assert len(attentions(model)) == MODELS[name][2]
        oracles.fill_tables(model, std=3.0)
        assert not torch.allclose(answer(model, x), before, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="has iRPE already; equip a fresh model"):
        equip(model, SPEC, grid=GRIDS.get(name))


@pytest.mark.parametrize("name", MODELS)
def test_training_reaches_every_table_and_a_checkpoint_keeps_it(name):
    model, x = make(name, equipped=True)
    oracles.fill_tables(model)
    answer(model.train(), x).sum().backward()
    tables = {key: value for key, value in model.named_parameters() if "lookup_table" in key}
    assert len(tables) == 3 * MODELS[name][2]
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in tables.values())
    file = io.BytesIO()
    torch.save(model.eval().state_dict(), file)
    file.seek(0)
    other, _ = make(name, equipped=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(answer(other, x), answer(model, x))
        torch.testing.assert_close(answer(copy.deepcopy(model), x), answer(model, x))


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("transformers")])
def test_from_pretrained_of_a_class_that_equips_itself(name, tmp_path, monkeypatch):
    """Its tables are read like other weights, and start at zero where the checkpoint has none."""
    plain, x = make(name)

    class Equipped(type(plain)):
        def __init__(self, config):
            super().__init__(config)
            equip(self, SPEC)

    plain.save_pretrained(tmp_path / "plain")
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: torch.full_like(*args, torch.nan, **kwargs))
    model = Equipped.from_pretrained(tmp_path / "plain").eval()
    with torch.no_grad():
        torch.testing.assert_close(answer(model, x), answer(plain, x), rtol=1e-4, atol=1e-5)
        oracles.fill_tables(model)
        model.save_pretrained(tmp_path / "equipped")
        again = Equipped.from_pretrained(tmp_path / "equipped").eval()
        assert torch.equal(answer(copy.deepcopy(again), x), answer(model, x))


@pytest.mark.parametrize("half", [False, True])
def test_encodings_are_added_after_the_rotation(half):
    """Rotary attention with the terms of iRPE added by hand, from timm's own projections and rotation."""
    from timm.layers import apply_rot_embed_cat

    name = "timm DINOv3" if half else "timm ViT with mixed RoPE"
    model, x = make(name, equipped=True, spec="rpe-1.9-product-ctx-1-qk")
    oracles.fill_tables(model)
    attn, seen = model.blocks[1].attn, {}
    assert isinstance(attn, RPEAttention) and attn.rotate_half == half
    attn.register_forward_hook(
        lambda module, args, kwargs, out: seen.update(x=args[0], rope=kwargs["rope"], out=out), with_kwargs=True
    )
    with torch.no_grad():
        model(x)
        q, k, v = attn.project(seen["x"])
        skip = model.num_prefix_tokens
        q, k = (
            torch.cat([t[:, :, :skip], apply_rot_embed_cat(t[:, :, skip:], seen["rope"], half=half)], 2) for t in (q, k)
        )
        scores = q * attn.scale @ k.transpose(2, 3) + attn.rpe_k(q * attn.scale)
        scores = scores + attn.rpe_q(k * attn.scale).transpose(2, 3)
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attn.proj(attn.norm(out)), seen["out"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["TransformerEncoder", "TransformerEncoder, norm first"])
@pytest.mark.parametrize("grad", [True, False])
def test_masks_of_an_encoder(name, grad):
    """As PyTorch's own layers with the same masks; also without gradients, where PyTorch has its own fast path."""
    model, x = make(name)
    padding = torch.tensor([[False] * 12, [False] * 9 + [True] * 3])
    mask = torch.randn(12, 12, generator=torch.Generator().manual_seed(2))
    excluded, added = mask > 1, torch.zeros(12, 12).masked_fill(mask > 1, -torch.inf)
    options = [{}, {"src_key_padding_mask": padding}, {"mask": mask}]
    before = [model(x, **each) for each in options]
    options.append({"mask": excluded, "src_key_padding_mask": padding})
    before.append(model(x, mask=added, src_key_padding_mask=padding))
    with torch.set_grad_enabled(grad):
        equip(model, SPEC)
        model.token_grid.remember(3, 4)
        for each, expected in zip(options, before, strict=True):
            out = model(x, **each)
            kept = slice(None) if "src_key_padding_mask" not in each else (~padding if x.shape[0] == 2 else ~padding.T)
            torch.testing.assert_close(out[kept], expected[kept], rtol=1e-4, atol=1e-5)
        oracles.fill_tables(model, std=3.0)
        assert not torch.allclose(model(x), before[0], atol=1e-3)


@pytest.mark.parametrize("average", [True, False])
def test_weights_and_a_mask_for_each_head_are_those_of_torch(average):
    torch.manual_seed(0)
    model, x = encoder(), torch.randn(2, 9, 16)
    mask = torch.randn(2 * 2, 9, 9)  # batch times heads
    options = {"attn_mask": mask, "average_attn_weights": average}
    expected = model.layers[0].self_attn(x, x, x, **options)
    found = equip(model, SPEC).layers[0].self_attn(x, x, x, **options)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_encoder_on_grids_of_one_length():
    model, x = make("TransformerEncoder", equipped=True)
    oracles.fill_tables(model, std=3.0)
    out = {}
    for size in ((3, 4), (4, 3), (3, 4)):
        model.token_grid.remember(*size)
        out.setdefault(size, []).append(model(x))
    assert torch.equal(*out[3, 4]) and not torch.allclose(out[3, 4][0], out[4, 3][0], atol=1e-3)
    square = equip(encoder().eval(), SPEC)
    assert square(torch.randn(1, 9, 16)).shape == (1, 9, 16)
    with pytest.raises(ValueError, match="L=12 minus skip=0 leading tokens is not a square grid"):
        square(torch.randn(1, 12, 16))
    layer = model.layers[0].self_attn
    out, weights = layer(x, x, x)
    assert weights.shape == (2, 12, 12) and torch.allclose(weights.sum(-1), torch.ones(()))
    with pytest.raises(ValueError, match="query, key and value must be the same tokens of one grid"):
        layer(x, x.clone(), x)
    with pytest.raises(ValueError, match="is_causal without a mask masks nothing; pass the causal mask too"):
        model(x, is_causal=True)


def test_padding_in_detr_is_invisible():
    model, _ = make("transformers DETR", equipped=True)
    oracles.fill_tables(model)
    encoder = model.model.encoder
    features, other = torch.randn(2, 2, 8, 16, generator=torch.Generator().manual_seed(3))
    kept = torch.tensor([[1] * 8, [1, 1, 0, 0] * 2])  # 2 x 4, and 2 x 2 of it
    other = torch.where(kept[..., None] == 1, features, other)
    encoder.layers[0].self_attn.grid.remember(2, 4)
    with torch.no_grad():
        out, same = (encoder(inputs_embeds=x, attention_mask=kept).last_hidden_state for x in (features, other))
    torch.testing.assert_close(out[kept == 1], same[kept == 1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_after_forward_passes_of_other_sizes(reentrant):
    """Blocks run again during backward, on the grid of their own forward pass."""
    torch.manual_seed(0)
    model = equip(hugging_face("Dinov2ForImageClassification", mlp_ratio=2), SPEC).train()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    oracles.fill_tables(model, std=3.0)
    images = [torch.randn(1, 3, *size, requires_grad=True) for size in ((32, 48), (48, 32))]
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        outs = [answer(model, image) for image in images]
        model.zero_grad()
        for out in outs:
            out.square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("transformers")])
def test_another_attention_implementation_is_refused_for_it_would_leave_the_encodings_out(name):
    model, x = make(name, equipped=True)
    right = answer(model, x)
    model.set_attn_implementation({"": "eager"})
    with pytest.raises(ValueError, match="implementation 'eager', which leaves encodings out"):
        answer(model, x)
    model.set_attn_implementation({"": "irpe"})
    assert torch.equal(answer(model, x), right)


def test_a_vit_within_another_model_that_was_used_before():
    transformers = pytest.importorskip("transformers")
    vit = hugging_face("ViTForImageClassification").base_model
    text = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9, add_cross_attention=True)
    model = transformers.VisionEncoderDecoderModel(encoder=vit, decoder=transformers.GPT2LMHeadModel(text)).eval()
    x = {"pixel_values": torch.randn(1, 3, 32, 32), "decoder_input_ids": torch.tensor([[1, 2]])}
    before = model(**x, output_hidden_states=True).logits  # transformers leaves hooks for it in the attentions
    equip(model, SPEC)
    torch.testing.assert_close(model(**x).logits, before)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    before = model(**x).logits
    oracles.fill_tables(model, std=3.0)
    assert not torch.allclose(model(**x).logits, before, rtol=1e-3, atol=1e-5)
    model.second = hugging_face("DeiTForImageClassification")
    for part in attentions(model):
        del part.rpe_k
    with pytest.raises(ValueError, match="holds several vision transformers; equip each by itself"):
        equip(model, SPEC)


@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_two_threads_with_two_image_sizes(name):
    """Both have 24 tokens: each thread gets the result of its own grid."""
    if name == "timm":
        model = equip(rotary("vit_tiny_patch16_224", dynamic_img_size=True, img_size=64, num_heads=2).eval(), SPEC)
        sizes = ((64, 96), (96, 64))
    else:
        model = equip(hugging_face("Dinov2ForImageClassification", mlp_ratio=2).eval(), SPEC)
        sizes = ((32, 48), (48, 32))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    oracles.fill_tables(model, std=3.0)
    images = [torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1)) for size in sizes]
    turn = [threading.Semaphore(1), threading.Semaphore(0)]
    blocks = model.blocks if name == "timm" else [m for m in model.modules() if type(m).__name__ == "Dinov2Layer"]
    with torch.no_grad():
        wanted = [answer(model, image) for image in images]
        assert not torch.allclose(answer(model, images[0]), answer(model, images[1]), atol=1e-3)
    answers = [None, None]

    def serve(i):
        with torch.no_grad():
            answers[i] = answer(model, images[i])

    def hand_over(*_):  # the other thread runs whenever this one is about to enter a block
        i = int(threading.current_thread().name)
        turn[1 - i].release()
        turn[i].acquire(timeout=20)

    for block in blocks:
        block.register_forward_pre_hook(hand_over)
    both = [threading.Thread(target=serve, args=(i,), name=str(i)) for i in (0, 1)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(60)
        for semaphore in turn:
            semaphore.release()
    for ours, expected in zip(answers, wanted, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("build", [torchvision_vit, lambda: hugging_face("ViTForImageClassification")])
def test_a_model_that_was_compiled_before_is_equipped_inside(build):
    inside = build()
    model = torch.compile(inside, backend="eager")
    assert equip(model, SPEC) is model and any("rpe_k" in name for name, _ in inside.named_parameters())


def test_whole_numbers_of_numpy_are_taken():
    three, four, skip = np.int64(3), np.uint8(4), np.int32(1)
    assert equip(encoder(), SPEC, grid=(three, four))(torch.zeros(1, 12, 16)).shape == (1, 12, 16)
    rpe = build_rpe(parse_rpe_spec(SPEC, skip), np.int16(8), np.int8(2))[1]
    x = torch.randn(1, 2, 13, 8)
    assert rpe(x, three, four).equal(rpe(x, 3, 4))
    ours, wanted = (get_bucket_ids_2d("product", *sizes, 1.9, 3.8, 15.2) for sizes in ((three, four, skip), (3, 4, 1)))
    assert ours[0].equal(wanted[0]) and ours[1] == wanted[1]


def test_subclasses_of_models_and_layers_are_what_they_were():
    class Ours(type(torchvision_vit())):
        pass

    assert len(attentions(equip(Ours(32, 8, 2, 2, 16, 32), SPEC))) == 2
    model = hugging_face("ViTForImageClassification")
    layer = next(module for module in model.modules() if type(module).__name__ == "ViTLayer")
    layer.__class__ = type("OurLayer", (type(layer),), {})
    assert len(attentions(equip(model, SPEC))) == 2
    attention = next(module for module in model.modules() if type(module).__name__ == "ViTAttention")
    model = hugging_face("ViTForImageClassification")
    next(module for module in model.modules() if type(module).__name__ == "ViTAttention").__class__ = type(
        "OurAttention", (type(attention),), {}
    )
    with pytest.raises(ValueError, match="the attention of a ViTLayer: expected one ViTAttention, got 0"):
        equip(model, SPEC)


def test_leading_tokens_are_counted():
    for name, skip in (("transformers DeiT", 2), ("transformers DINOv2 with registers", 4), ("torchvision ViT", 1)):
        model, _ = make(name, equipped=True, spec=parse_rpe_spec(SPEC, skip=7))
        assert {part.skip for attention in attentions(model) for part in attention.rpe_k.parts} == {skip}


@pytest.mark.parametrize("name", ["transformers ViT", "TransformerEncoder", "timm EVA-02"])
def test_dropout_of_attention_weights_when_training(name):
    model, x = make(name, equipped=True)
    for attention in attentions(model):
        for dropout in ("attention_dropout", "dropout"):  # transformers, PyTorch
            if isinstance(getattr(attention, dropout, None), float):
                setattr(attention, dropout, 0.5)
        if hasattr(attention, "attn_drop"):
            attention.attn_drop.p = 0.5
    with torch.no_grad():
        assert torch.equal(answer(model, x), answer(model, x))
        for attention in attentions(model):
            attention.train()
        assert not torch.allclose(answer(model, x), answer(model, x), atol=1e-4)
