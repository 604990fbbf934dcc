"""Tests products of int8 activations and int8 weights (W8A8)."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax import export
from reference import GROUPED, distance, longrope, on_mesh, padding_mask, small_config

from phi3_jax import Phi3ForCausalLM, make_mesh
from phi3_jax.lora import add_lora
from phi3_jax.model import quantize_model
from phi3_jax.model.layer_stack import stack_layers
from phi3_jax.model.layers import Linear
from phi3_jax.model.quantizing import set_abstract, set_weight
from phi3_jax.parallel.sharding import sharding
from phi3_jax.quantization import Quantization, StoredWeight, round_weight
from phi3_jax.quantization import product as of_products
from phi3_jax.quantization.product import quantized_product, round_rows

TEXT = "int8:activations=int8"
FLOAT32 = jnp.dtype(jnp.float32)


def formula(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the integers and the scales of rows."""
    wide = x.astype(np.float32)
    scale = np.abs(wide).max(axis=-1, keepdims=True) * np.float32(1 / 127)
    return np.rint(wide * (np.float32(1) / scale)).astype(np.int64), scale


def make_linear(inputs: int, outputs: dict[str, int], mesh: object = None, axis: str = "mlp") -> Linear:
    return Linear({axis: inputs}, outputs, std=0.1, rngs=nnx.Rngs(0), dtype=FLOAT32, mesh=mesh)


def with_weight(linear: Linear, seed: int = 3) -> tuple[Linear, StoredWeight]:
    shape = int(np.prod([size for _, size in linear.outputs])), linear.inputs[0][1]
    weight = np.random.default_rng(seed).normal(size=shape)
    stored = round_weight(weight, Quantization.parse(TEXT), "w")
    set_weight("w", linear, stored)
    return linear, stored


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_rounds_rows_by_the_formula(dtype: np.dtype) -> None:
    x = (np.random.default_rng(0).normal(size=(5, 7, 48)) * 10.0 ** np.arange(-2, 3)[:, None, None]).astype(
        dtype
    )
    integers, scale = jax.jit(round_rows)(x)
    assert (integers.dtype, scale.dtype) == (np.int8, np.float32)
    expected, scales = formula(x)
    np.testing.assert_array_equal(integers, expected)
    np.testing.assert_array_equal(scale, scales)
    assert (np.abs(expected).max(axis=-1) == 127).all()


def test_rounds_halves_to_even_numbers() -> None:
    integers, _ = round_rows(np.array([[254, 1, 3, -5, -7, 0]], np.float32))
    np.testing.assert_array_equal(integers, [[127, 0, 2, -2, -4, 0]])


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("rows", [(), (1,), (1, 1), (3,), (2, 40)])
def test_products_and_gradients(rows: tuple[int, ...], dtype: np.dtype, alone: bool) -> None:
    """The gradient is that of the product without rounded activations."""
    rng = np.random.default_rng(3)
    linear, stored = with_weight(make_linear(48, {"kv_heads": 2, "qkv": 4, "head_dim": 6}))
    weight = linear.weight.get_value()
    assert weight.int8_activations
    x = rng.normal(size=(*rows, 48)).astype(dtype)
    pull = rng.normal(size=(*rows, 2, 4, 6)).astype(np.float32)
    y, back = jax.vjp(lambda x: quantized_product(x, weight, FLOAT32, alone=alone), jnp.asarray(x))
    integers, scale = formula(x)
    expected = integers @ stored.values.T.astype(np.int64) * scale.astype(np.float64) * stored.scale[:, 0]
    np.testing.assert_allclose(y, expected.reshape(pull.shape), rtol=1e-6)
    assert distance(y, (x.astype(np.float32) @ stored.dequantize().T).reshape(pull.shape)) > 1e-3
    of_x = pull.reshape(*rows, 48) @ stored.dequantize()
    assert distance(back(pull)[0], of_x) < (1e-6 if dtype == np.float32 else 0.01)


@pytest.fixture(params=[True, False], ids=["library", "XLA"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the C++ library multiplies, if it is available."""
    if not request.param:
        monkeypatch.setattr(of_products, "is_faster", lambda *_, **__: False)
    return request.param


def test_sums_are_exact(library: bool) -> None:
    """Sums above 2**24, which float32 does not count one by one."""
    rng = np.random.default_rng(5)
    x = rng.integers(100, 127, (4, 4000)).astype(np.float32)
    x[:, 0] = 127
    values = rng.integers(100, 127, (64, 4000)).astype(np.int8)
    linear = make_linear(4000, {"embed": 64})
    set_weight("w", linear, StoredWeight(values, np.ones((64, 1), np.float32), 8, int8_activations=True))
    sums = x.astype(np.int64) @ values.T.astype(np.int64)
    expected = sums.astype(np.float32) * formula(x)[1]
    assert sums.min() > 2**25
    for rows in (x, x[:1]):
        np.testing.assert_allclose(linear(rows), expected[: len(rows)], rtol=1e-6 if library else 0)


@pytest.mark.usefixtures("library")
def test_zeros_stay_zeros_and_broken_numbers_are_seen() -> None:
    linear, _ = with_weight(make_linear(48, {"embed": 20}))
    x = np.random.default_rng(1).normal(size=(8, 48)).astype(np.float32)
    expected = np.array(linear(x))
    x[1] = 0
    x[2, 5], x[3, 5], x[4, 5] = np.nan, np.inf, -np.inf
    x[5] *= 1e-41 / np.abs(x[5]).max()
    x[6] *= 3e38 / np.abs(x[6]).max()
    scales = np.array(round_rows(x)[1])[:, 0]
    assert (scales[[0, 1, 5, 6, 7]] > 0).all()
    assert not np.isfinite(scales[2:5]).any()
    for dtype in (np.float32, ml_dtypes.bfloat16):
        y = np.array(linear(x.astype(dtype)))
        np.testing.assert_array_equal(y[1], 0)
        assert np.isnan(y[2]).all()
        assert not np.isfinite(y[3:5]).any()
        np.testing.assert_array_equal(y[5], 0)
        assert not np.isnan(y[6]).any()
        assert np.isfinite(y[[0, 7]]).all()
    np.testing.assert_array_equal(linear(x)[jnp.array([0, 7])], expected[[0, 7]])


@pytest.mark.parametrize("axes", ["data=4,tensor=2", "data=4,fsdp=2", "fsdp=2,context=2,tensor=2"])
@pytest.mark.parametrize(("axis", "outputs"), [("mlp", {"embed": 20}), ("embed", {"gate_up": 2, "mlp": 40})])
def test_a_mesh_has_the_scale_of_whole_rows(axes: str, axis: str, outputs: dict[str, int]) -> None:
    """The numbers are those of one device, also where devices have parts of the inputs."""
    mesh = make_mesh(axes)
    x = np.random.default_rng(2).normal(size=(8, 6, 48)).astype(np.float32)
    x[:, :, 3] *= 50  # the largest number is in the first part
    one, _ = with_weight(make_linear(48, outputs, axis=axis))
    several, _ = with_weight(make_linear(48, outputs, mesh, axis=axis))
    divided = jax.device_put(x, sharding(mesh, ("batch", None, axis if axis == "mlp" else None)))
    np.testing.assert_array_equal(jax.jit(lambda m, x: m(x))(several, divided), one(x))


@pytest.fixture(scope="module")
def model() -> Phi3ForCausalLM:
    return Phi3ForCausalLM(small_config(num_hidden_layers=1, **longrope(), tie_word_embeddings=True))


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    mask = padding_mask(2, 24, "left")
    return np.where(mask, np.random.default_rng(0).integers(4, 96, (2, 24)), 3), mask


@jax.jit
def logits(model: Phi3ForCausalLM, ids: np.ndarray, mask: np.ndarray | None) -> jax.Array:
    return model(ids, mask).logits


def test_a_tied_head_gets_floats(model: Phi3ForCausalLM) -> None:
    quantized = quantize_model(model, f"{TEXT},skip=none")
    assert not quantized.model.embed_tokens.weight.get_value().int8_activations
    assert quantized.model.layers[0].mlp.down_proj.weight.get_value().int8_activations


def test_a_mesh_has_the_logits_of_one_device(rows: tuple[np.ndarray, np.ndarray]) -> None:
    """A number near a half may be rounded up on one of the two."""
    plain = Phi3ForCausalLM(small_config(**GROUPED, num_hidden_layers=1))
    ids, mask = (np.tile(array, (4, 1)) for array in rows)
    one = quantize_model(plain, f"{TEXT},skip=none")
    several = quantize_model(on_mesh(plain, make_mesh("fsdp=2,context=2,tensor=2")), f"{TEXT},skip=none")
    found, expected = logits(several, ids, mask), logits(one, ids, mask)
    assert np.median(np.abs(found - expected)) < 1e-5
    assert distance(found, expected) < 0.3 * distance(logits(plain, ids, mask), expected)


def test_generates_what_the_forward_finds(
    model: Phi3ForCausalLM, rows: tuple[np.ndarray, np.ndarray]
) -> None:
    """A row of a decode step is rounded as the same row of a prefill."""
    quantized = quantize_model(model, TEXT)
    ids, mask = rows
    out = quantized.generate(ids, mask, max_new_tokens=6, do_sample=False, eos_token_id=[])
    whole = logits(quantized, out[:, :-1], np.pad(mask, ((0, 0), (0, 5)), constant_values=1))
    np.testing.assert_array_equal(out[:, -6:], np.argmax(whole[:, -6:], axis=-1))


def test_exports_any_number_of_rows(model: Phi3ForCausalLM, rows: tuple[np.ndarray, np.ndarray]) -> None:
    quantized = quantize_model(model, TEXT)
    batch, length = export.symbolic_shape("batch, length", constraints=["length <= 64"])
    shape = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    program = export.export(jax.jit(lambda ids: logits(quantized, ids, None)))(shape)
    ids = rows[0].astype(np.int32)
    for given in (ids, ids[:1, :1]):
        found, expected = program.call(given), logits(quantized, given, None)
        assert np.median(np.abs(found - expected)) < 1e-5


def test_stacked_layers_train_adapters(model: Phi3ForCausalLM, rows: tuple[np.ndarray, np.ndarray]) -> None:
    ids, mask = rows

    @jax.jit
    def gradients(model: Phi3ForCausalLM) -> nnx.State:
        graph, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)

        def loss(adapters: nnx.State) -> jax.Array:
            return nnx.merge(graph, adapters, rest)(ids, mask, labels=np.where(mask, ids, -100)).loss

        return jax.grad(loss)(adapters)

    plain = Phi3ForCausalLM(small_config())
    found, expected = (
        jax.tree.leaves(gradients(stack_layers(add_lora(quantize_model(plain, text), 2, rngs=5))))
        for text in (TEXT, "int8")
    )
    assert len(found) == 8
    for one, other in zip(found, expected, strict=True):
        assert distance(one, other) < 0.05
    assert max(distance(one, other) for one, other in zip(found, expected, strict=True)) > 1e-3


def test_multiplies_integers_on_all_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_products, "is_faster", lambda *_, **__: False)
    linear = make_linear(48, {"embed": 20})
    set_abstract("w", linear, Quantization.parse(TEXT).form("w", 48))
    x = jax.ShapeDtypeStruct((8, 48), jnp.bfloat16)
    traced = jax.jit(lambda linear, x: linear(x)).trace(linear, x)
    for platform in ("cpu", "tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "(tensor<8x48xi8>, tensor<20x48xi8>) -> tensor<8x20xi32>" in text
