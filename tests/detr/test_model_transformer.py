import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_irpe.models.transformer import MultiheadAttention, Transformer, TransformerDecoderLayer
from tests import oracles
from tests.helpers.tiny_detr import SPECS, tiny_transformer

HEIGHT, WIDTH = 2, 3


def random_map(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Features and positions as tokens, and a mask with padding on the right of the second image."""
    torch.manual_seed(1)
    src, pos = torch.randn(2, batch, HEIGHT * WIDTH, 16, dtype=torch.float64)
    mask = torch.zeros(batch, HEIGHT, WIDTH, dtype=torch.bool)
    mask[-1, :, -1] = True
    return src, pos, mask


def exact_attention(attention: nn.Module, query_key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Encoder attention with the loops of tests/oracles.py."""
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (attention.nhead, -1)).transpose(1, 2)
        for x, w, b in zip((query_key, query_key, value), weights, biases, strict=True)
    )
    excluded = mask.flatten(1)[:, None, None].expand(-1, attention.nhead, q.shape[2], -1)
    heads = oracles.attention(
        q, k, v, attention.rpe_q, attention.rpe_k, attention.rpe_v, HEIGHT, WIDTH, excluded=excluded
    )
    return attention.out_proj(heads.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("enc_rpe2d", SPECS)
def test_encoder_layer_is_the_formula(enc_rpe2d, pre_norm):
    layer = tiny_transformer(enc_rpe2d, pre_norm=pre_norm).encoder.layers[0]
    nn.init.normal_(layer.self_attn.in_proj_bias)
    src, pos, mask = random_map()

    def feed_forward(x: Tensor) -> Tensor:
        return layer.linear2(layer.linear1(x).relu())

    if pre_norm:
        x = layer.norm1(src)
        x = src + exact_attention(layer.self_attn, x + pos, x, mask)
        expected = x + feed_forward(layer.norm2(x))
    else:
        x = layer.norm1(src + exact_attention(layer.self_attn, src + pos, src, mask))
        expected = layer.norm2(x + feed_forward(x))
    torch.testing.assert_close(layer(src, pos, mask), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_without_encoding_the_encoder_is_torch_own(pre_norm):
    transformer = tiny_transformer(pre_norm=pre_norm)
    theirs = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=pre_norm, dtype=torch.float64),
        2,
        norm=nn.LayerNorm(16, dtype=torch.float64) if pre_norm else None,
        enable_nested_tensor=False,
    ).eval()
    theirs.load_state_dict(transformer.encoder.state_dict())
    src, _, mask = random_map()
    ours = transformer.encoder(src, torch.zeros_like(src), mask)
    padding = mask.flatten(1)
    visible = ~padding
    torch.testing.assert_close(ours[visible], theirs(src, src_key_padding_mask=padding)[visible], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_without_positions_the_decoder_layer_is_torch_own(pre_norm):
    torch.manual_seed(0)
    ours = TransformerDecoderLayer(16, 2, 24, 0.0, pre_norm).eval().double()
    theirs = nn.TransformerDecoderLayer(16, 2, 24, batch_first=True, norm_first=pre_norm, dtype=torch.float64).eval()
    theirs.load_state_dict(ours.state_dict())
    memory, _, mask = random_map()
    tgt = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(
        ours(tgt, torch.zeros_like(tgt), memory, memory, mask),
        theirs(tgt, memory, memory_key_padding_mask=mask.flatten(1)),
        rtol=1e-9,
        atol=1e-9,
    )


def test_attention_with_positions_is_torch_own():
    torch.manual_seed(0)
    ours = MultiheadAttention(16, 4, 0.0).eval().double()
    theirs = nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64).eval()
    theirs.load_state_dict(ours.state_dict())
    memory, pos, mask = random_map()
    query = torch.randn(2, 5, 16, dtype=torch.float64)
    expected, _ = theirs(query, memory + pos, memory, key_padding_mask=mask.flatten(1))
    torch.testing.assert_close(ours(query, memory + pos, memory, mask), expected, rtol=1e-9, atol=1e-9)


def test_decoder_adds_query_positions_to_queries_and_keys_but_not_to_values():
    torch.manual_seed(0)
    layer = TransformerDecoderLayer(16, 2, 24, 0.0, pre_norm=False).eval().double()
    memory, pos, mask = random_map()
    tgt, query_pos = torch.randn(2, 2, 5, 16, dtype=torch.float64)
    x = layer.norm1(tgt + layer.self_attn(tgt + query_pos, (tgt + query_pos).clone(), tgt))
    x = layer.norm2(x + layer.multihead_attn(x + query_pos, memory + pos, memory, mask))
    x = layer.norm3(x + layer.linear2(layer.linear1(x).relu()))
    torch.testing.assert_close(layer(tgt, query_pos, memory + pos, memory, mask), x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("enc_rpe2d", SPECS)
def test_what_is_in_the_padding_is_invisible(enc_rpe2d):
    transformer = tiny_transformer(enc_rpe2d)
    src, pos = torch.randn(2, 2, 16, HEIGHT, WIDTH, dtype=torch.float64)
    mask = random_map()[2]
    queries = torch.randn(5, 16, dtype=torch.float64)
    hs, memory = transformer(src, mask, queries, pos)
    assert hs.shape == (2, 2, 5, 16) and memory.shape == src.shape
    padded = mask[:, None].expand_as(src)
    other_hs, other_memory = transformer(src.masked_fill(padded, 7.0), mask, queries, pos.masked_fill(padded, -3.0))
    torch.testing.assert_close(other_hs, hs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(other_memory[~padded], memory[~padded], rtol=1e-10, atol=1e-10)


def test_zero_tables_change_nothing():
    plain, encoded = tiny_transformer(), tiny_transformer("rpe-2.0-product-ctx-1-qkv")
    encoded.load_state_dict(plain.state_dict(), strict=False)
    for name, parameter in encoded.named_parameters():
        if "lookup_table" in name:
            nn.init.zeros_(parameter)
    src, pos, mask = random_map()
    torch.testing.assert_close(encoded.encoder(src, pos, mask), plain.encoder(src, pos, mask), rtol=1e-10, atol=1e-10)


def test_tables_start_by_xavier_as_published():
    """The bound of 33 * 81 fans is sqrt(6 / (33 * 81)) = 0.0474, and the largest entry is just under it."""
    torch.manual_seed(0)
    (layer,) = Transformer(
        enc_rpe2d="rpe-2.0-product-ctx-1-k", num_encoder_layers=1, num_decoder_layers=0, dim_feedforward=8
    ).encoder.layers
    table, linear = layer.self_attn.rpe_k.lookup_table_weight, layer.linear1.weight
    assert table.shape == (1, 32, 81) and linear.shape == (8, 256)
    for parameter, bound in ((table, math.sqrt(6 / (33 * 81))), (linear, math.sqrt(6 / (8 + 256)))):
        assert 0.98 * bound < parameter.abs().max() <= bound
    assert not layer.self_attn.in_proj_bias.any() and not layer.self_attn.out_proj.bias.any()


def test_compiles_whole_for_sizes_that_change():
    transformer = tiny_transformer("rpe-1.9-product-ctx-1-k", num_encoder_layers=1, num_decoder_layers=1)
    compiled = torch.compile(transformer, backend="eager", fullgraph=True, dynamic=True)
    for height, width in ((3, 4), (5, 2)):
        src, pos = torch.randn(2, 2, 16, height, width, dtype=torch.float64)
        mask, queries = torch.zeros(2, height, width, dtype=torch.bool), torch.randn(5, 16, dtype=torch.float64)
        for ours, expected in zip(compiled(src, mask, queries, pos), transformer(src, mask, queries, pos), strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("enc_rpe2d", ["", "rpe-2.0-product-ctx-1-k"])
def test_dropout_acts_in_training_only(enc_rpe2d):
    transformer = tiny_transformer(enc_rpe2d, dropout=0.5)
    src, pos, mask = random_map()
    attention = transformer.encoder.layers[0].self_attn
    for run in (lambda: transformer.encoder(src, pos, mask), lambda: attention(src + pos, src, mask)):
        for training in (False, True):
            transformer.train(training)
            assert torch.equal(run(), run()) != training


def test_a_backend_is_passed_on():
    transformer = tiny_transformer("rpe-2.0-product-ctx-1-k", attn_backend="nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        transformer.encoder(*random_map())
