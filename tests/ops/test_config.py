"""Configs and spec strings: what is accepted, what is refused and with which message."""

import dataclasses
import re

import numpy as np
import pytest

from irpe_ops import get_rpe_config, parse_rpe_spec


def test_defaults_are_the_promised_ones():
    assert dataclasses.asdict(get_rpe_config()) == {
        "ratio": 1.9, "method": "product", "mode": "ctx", "shared_head": True, "skip": 0, "rpe_on": "k"
    }  # fmt: skip


def test_spec_and_arguments_name_the_same_config():
    assert parse_rpe_spec("rpe-2.0-quant-bias-0-qk", skip=1) == get_rpe_config(2.0, "quant", "bias", False, 1, "qk")
    assert repr(get_rpe_config(2, "quant", "bias", 0, np.int64(1))) == repr(
        get_rpe_config(2.0, "quant", "bias", False, 1)
    )


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.uint8, np.int64])
def test_a_ratio_may_be_numpys(kind):
    config = get_rpe_config(kind(40), "euc")
    assert config == get_rpe_config(40.0, "euc") and type(config.ratio) is float
    with pytest.raises(ValueError, match=r"ratio .*200.* asks 'product' for more than 65,536 buckets"):
        get_rpe_config(kind(200), "product")


@pytest.mark.parametrize("rpe_on", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
@pytest.mark.parametrize("ratio", ["1.9", "20", "2.0", "1e1", "5e-1", "3.3333333333333335"])
def test_spec_round_trip(rpe_on, ratio):
    config = parse_rpe_spec(f"rpe-{ratio}-cross-ctx-1-{rpe_on}")
    assert parse_rpe_spec(config.spec) == config
    assert (config.ratio, config.rpe_on) == (float(ratio), rpe_on)


def test_any_case_and_the_long_name_of_ctx():
    assert parse_rpe_spec(" RPE-1.9-Product-CONTEXTUAL-1-QK\n") == get_rpe_config(rpe_on="qk")
    assert get_rpe_config(mode="BIAS").mode == "bias"
    assert get_rpe_config(mode="Contextual").mode == "ctx"
    assert get_rpe_config(method="EUC").method == "euc"
    assert get_rpe_config(rpe_on="VKq").rpe_on == "qkv" and parse_rpe_spec("rpe-1-euc-ctx-1-kq").rpe_on == "qk"


def test_the_parts_of_a_config_have_their_published_names():
    config = get_rpe_config(2.0, "cross", "ctx", False, 1, "qv")
    assert config.rpe_k is None and config.rpe_q == get_rpe_config(2.0, "cross", "ctx", False, 1, "q")
    assert get_rpe_config().rpe_k == get_rpe_config()
    assert config.rpe_v.rpe_on == "v" and config.rpe_v.rpe_v == config.rpe_v
    assert config.rpe_q.num_buckets == 2 * (9 + 1)
    assert [get_rpe_config(r, m).num_buckets for r, m in ((1.9, "product"), (2, "product"), (20, "euc"))] == [
        49,
        81,
        81,
    ]
    assert (config.rpe_q.alpha, config.rpe_q.beta, config.rpe_q.gamma) == (2.0, 4.0, 16.0)


def test_config_is_frozen_and_hashable():
    config = get_rpe_config()
    assert len({config, get_rpe_config()}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.skip = 1


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("rpe-2.0-prodct-ctx-1-k", "unknown method 'prodct'; expected one of euc, quant, cross, product"),
        (
            "rpe-2.0-product-context-1-k",
            "unknown mode 'context'; expected one of ctx, bias (or contextual), or your own: IRPE_PLUGINS",
        ),
        ("rpe-2.0-product-ctx-1-x", "unknown rpe_on 'x'; expected one of q, k, v, qk, qv, kv, qkv"),
        ("rpe-2.0-product-ctx-1-kk", "unknown rpe_on 'kk'"),
        ("rpe-2.0-product-ctx-1-", "unknown rpe_on ''"),
        ("rpe-2.0-product-ctx-2-k", "shared_head is 0 or 1, not '2'"),
        ("rpe-two-product-ctx-1-k", "ratio is a positive number, not 'two'"),
        ("rpe-0-product-ctx-1-k", "ratio is a positive number, not 0.0"),
        ("rpe--1.9-product-ctx-1-k", "ratio is a positive number, not -1.9"),
        ("rpe-nan-product-ctx-1-k", "ratio is a positive number, not nan"),
        ("rpe-1_9-product-ctx-1-k", "ratio is a positive number, not '1_9'"),  # 19 to Python
        ("rpe-１.9-product-ctx-1-k", "ratio is a positive number, not '１.9'"),
        ("rpe- 1.9-product-ctx-1-k", "ratio is a positive number, not ' 1.9'"),
        ("rpe-64-product-ctx-1-k", "ratio 64.0 asks 'product' for more than 65,536 buckets"),
        ("rpe-1e308-euc-ctx-1-k", "ratio 1e+308 asks 'euc' for more than 65,536 buckets"),
        ("rpe-0.4-product-ctx-1-k", "ratio 0.4 leaves a single bucket"),
        ("rpe-2.0-product-bias-1-qkv", "this mode adds to attention scores, and values have none; use mode 'ctx'"),
        ("rpe-2.0-product-ctx-1", "expected six parts joined by '-'"),
        ("2.0-product-ctx-1-k", "expected six parts joined by '-'"),
        ("", "expected six parts joined by '-'"),
    ],
)
def test_wrong_specs_say_what_is_wrong(spec, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        parse_rpe_spec(spec)
    assert repr(spec) in str(error.value)
    assert str(error.value).endswith("Format: rpe-{ratio}-{method}-{mode}-{shared_head}-{rpe_on}")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": None}, "unknown method None"),
        ({"mode": None}, "unknown mode None"),
        ({"rpe_on": None}, "unknown rpe_on None"),
        ({"rpe_on": "v", "mode": "bias"}, "values have none"),
        ({"method": ["product"]}, "unknown method ['product']"),
        ({"ratio": "1.9"}, "ratio is a positive number, not '1.9'"),
        ({"ratio": float("inf")}, "not inf"),
        ({"ratio": True}, "ratio is a positive number, not True"),
        ({"ratio": 1e9}, "ratio 1000000000.0 asks 'product' for more than 65,536 buckets; use a smaller one"),
        ({"ratio": 10**400}, "more than 65,536 buckets"),
        ({"shared_head": "yes"}, "shared_head is True or False"),
        ({"shared_head": 2}, "shared_head is True or False"),
        ({"skip": -1}, "skip, the number of leading tokens, must be an integer of at least 0, not -1"),
        ({"skip": 1.0}, "skip, the number of leading tokens, must be an integer of at least 0, not 1.0"),
    ],
)
def test_wrong_fields_say_what_is_wrong(fields, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        get_rpe_config(**fields)


def test_a_spec_is_a_string():
    with pytest.raises(ValueError, match="an rpe spec is a string, not NoneType"):
        parse_rpe_spec(None)
