"""Tests the choice of a quantization, and rounding to it."""

import ml_dtypes
import numpy as np
import pytest

from phi3_jax import Quantization
from phi3_jax.errors import UserError
from phi3_jax.quantization import round_weight, stored

TEXTS = ["int8", "int4", "int8:group_size=32", "int4:group_size=none", "int4:symmetric=false,skip=none"]
TEXTS += ["int8:activations=int8", "int8:skip=none,activations=int8"]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_name_quantizations(text):
    assert str(Quantization.parse(text)) == text


def test_reads_every_field():
    chosen = Quantization.parse("int4:group_size=128,symmetric=false,skip=lm_head+o_proj")
    assert chosen == Quantization(4, 128, False, ("lm_head", "o_proj"))
    assert Quantization.parse(chosen) is chosen
    assert chosen.includes("model.embed_tokens")
    assert not chosen.includes("model.layers.0.self_attn.o_proj")
    assert not chosen.includes("score")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fp4", "'fp4' is not known; use int8 or int4"),
        ("", "use int8 or int4"),
        ("int4:groups=4", "'groups' is not known; use group_size, symmetric, skip, activations"),
        ("int4:group_size=many", "group_size='many' cannot be read; write group_size=128 or none"),
        ("int4:group_size", "group_size='' cannot be read"),
        ("int4:group_size=12", "group_size=12 of a quantization must be a multiple of 8"),
        ("int4:group_size=-8", "must be a multiple of 8"),
        ("int4:symmetric=maybe", "write symmetric=true or false"),
        ("int8:activations=fp8", "activations='fp8' cannot be read; write activations=int8 or none"),
        (
            "int4:activations=int8",
            "activations=int8 of a quantization needs bits=8, group_size=none and symmetric=true, not "
            "bits=4, group_size=64, symmetric=true; use int8:activations=int8",
        ),
        ("int8:activations=int8,group_size=32", "not bits=8, group_size=32, symmetric=true"),
        ("int8:symmetric=false,activations=int8", "not bits=8, group_size=none, symmetric=false"),
    ],
)
def test_rejects_texts(text, message):
    with pytest.raises(UserError, match=message):
        Quantization.parse(text)


def test_rejects_bits():
    with pytest.raises(UserError, match="bits=3 of a quantization must be 8 or 4"):
        Quantization(bits=3)
    with pytest.raises(UserError, match="activations='int4' of a quantization must be 'int8' or None"):
        Quantization(activations="int4")


@pytest.fixture(scope="module")
def weight():
    weight = np.random.default_rng(0).normal(size=(24, 48)).astype(np.float32)
    weight[1] = 0
    weight[2] = np.abs(weight[2]) + 1
    weight[3, :16] = -weight[2, :16]
    return weight


@pytest.mark.parametrize("text", ["int8", "int8:group_size=16", "int8:symmetric=false", "int4:group_size=16"])
def test_errors_are_half_a_scale(weight, text):
    rounded = round_weight(weight, Quantization.parse(text), "w")
    errors = np.abs(rounded.dequantize() - weight).reshape(*rounded.scale.shape, -1)
    # A scale that is rounded down leaves the largest element a little beyond the last value. A symmetric
    # group of 4 bits has no 8, so an element opposite to the largest one can lose a whole scale.
    most = {"int8": 0.76, "int8:group_size=16": 0.76, "int8:symmetric=false": 1.01}.get(text, 1.04)
    assert (errors <= most * np.abs(rounded.scale)[..., None]).all()
    assert np.median(errors / np.maximum(np.abs(rounded.scale), 1e-9)[..., None]) < 0.3


def test_four_bits_with_zeros(weight):
    rounded = round_weight(weight, Quantization(4, 16, symmetric=False), "w")
    assert rounded.zero is not None
    assert set(np.unique(rounded.values)) <= set(range(-8, 8))
    assert set(np.unique(rounded.zero)) <= set(range(-8, 8))
    assert rounded.zero[2].tolist() == [-8, -8, -8]  # all positive: zero is the lowest value
    assert rounded.zero[3, 0] == 7
    errors = np.abs(rounded.dequantize() - weight).reshape(*rounded.scale.shape, -1)
    assert (errors <= 1.05 * rounded.scale[..., None]).all()


def test_scales_are_bfloat16(weight):
    for text in ("int8", "int4:group_size=16", "int4:group_size=none,symmetric=false"):
        scale = round_weight(weight, Quantization.parse(text), "w").scale
        np.testing.assert_array_equal(scale, scale.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_zeros_stay_zeros(weight):
    for text in ("int8", "int4:group_size=16", "int4:group_size=16,symmetric=false"):
        np.testing.assert_array_equal(round_weight(weight, Quantization.parse(text), "w").dequantize()[1], 0)


def test_rounded_weights_do_not_change(weight):
    for text in ("int8", "int4:group_size=16"):
        once = round_weight(weight, Quantization.parse(text), "w").dequantize()
        np.testing.assert_array_equal(round_weight(once, Quantization.parse(text), "w").dequantize(), once)


def test_rounds_block_by_block(weight, monkeypatch):
    whole = round_weight(weight, Quantization(4, 16, symmetric=False), "w")
    monkeypatch.setattr(stored, "BLOCK", 5 * 48)
    parts = round_weight(weight, Quantization(4, 16, symmetric=False), "w")
    for name in ("values", "scale", "zero"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))


def test_takes_rows(weight):
    rounded = round_weight(weight, Quantization(4, 16, symmetric=False), "w")
    taken = rounded.take_rows([slice(20, 24), slice(0, 2)])
    np.testing.assert_array_equal(taken.dequantize(), rounded.dequantize()[[20, 21, 22, 23, 0, 1]])
    assert rounded.take_rows([slice(0, 24)]) is rounded


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_rejects_numbers_that_are_not_finite(weight, number):
    broken = weight.copy()
    broken[7, 3] = number
    with pytest.raises(UserError, match=r"layers.0.o_proj has numbers that are not finite"):
        round_weight(broken, Quantization(), "layers.0.o_proj")


def test_rejects_groups_that_do_not_divide(weight):
    with pytest.raises(UserError, match=r"o_proj has 48 inputs, .* use group_size=8 or 16 or 24 or 48"):
        round_weight(weight, Quantization(4, 32), "o_proj")
