"""Tests models with quantized weights against models of the dequantized floats."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dequantized import floats_of
from flax import nnx
from reference import GROUPED, distance, longrope, on_mesh, padding_mask, small_config

from phi3_jax import Phi3ForCausalLM, Phi3ForSequenceClassification, make_mesh
from phi3_jax.errors import UserError
from phi3_jax.lora.adapters import add_lora, merge_lora
from phi3_jax.model import quantize_model, quantizing
from phi3_jax.model.layers import Linear, QuantizedParam
from phi3_jax.model.quantizing import matrix_shape, quantizable, set_weight
from phi3_jax.quantization import Quantization, StoredWeight, round_weight
from phi3_jax.quantization.product import quantized_product

TEXTS = ["int8", "int4:group_size=16", "int4:group_size=8,symmetric=false,skip=none", "int8:symmetric=false"]


@pytest.fixture(scope="module")
def model():
    return Phi3ForCausalLM(small_config(num_hidden_layers=1, **longrope(), tie_word_embeddings=True))


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    mask = padding_mask(2, 24, "left")
    return np.where(mask, rng.integers(4, 96, (2, 24)), 3), mask


@jax.jit
def logits(model, ids, mask):
    return model(ids, mask).logits


@pytest.mark.parametrize("text", TEXTS)
def test_equals_the_dequantized_floats(model, rows, text):
    quantized = quantize_model(model, text)
    expected = logits(floats_of(quantized), *rows)
    assert distance(logits(quantized, *rows), expected) < 1e-5
    assert distance(logits(model, *rows), expected) > 1e-3  # rounding is seen


def test_generates_like_the_dequantized_floats(model, rows):
    quantized = quantize_model(model, "int4:group_size=16,skip=none")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": []}
    np.testing.assert_array_equal(
        quantized.generate(*rows, **options), floats_of(quantized).generate(*rows, **options)
    )


def test_counts_the_original_parameters(model):
    for text in TEXTS:
        assert quantize_model(model, text).num_parameters() == model.num_parameters()


def test_reordered_inputs(model, rows):
    quantized = jax.tree.map(lambda leaf: leaf, model)
    rng = np.random.default_rng(1)
    for name, module in quantizable(quantized):
        if name.endswith("proj"):
            stored = round_weight(
                np.asarray(module.weight[...]).reshape(matrix_shape(module)), Quantization(4, 16), name
            )
            order = rng.permutation(stored.values.shape[1]).astype(np.int32)
            set_weight(name, module, replace(stored, order=order))
    assert distance(logits(quantized, *rows), logits(floats_of(quantized), *rows)) < 1e-5


def test_float8_values():
    rng = np.random.default_rng(2)
    linear = Linear(
        {"embed": 48}, {"mlp": 20}, std=0.1, rngs=nnx.Rngs(0), dtype=jnp.dtype(jnp.float32), mesh=None
    )
    values = rng.normal(size=(20, 48)).astype(jnp.float8_e4m3fn)
    stored = StoredWeight(values=values, scale=rng.uniform(1, 2, (20, 1)).astype(np.float32), bits=8)
    set_weight("w", linear, stored)
    x = rng.normal(size=(3, 48)).astype(np.float32)
    np.testing.assert_allclose(linear(x), x @ stored.dequantize().T, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("rows", [(), (1,), (1, 1), (3,), (2, 40)])
def test_products_and_gradients(text, rows):
    rng = np.random.default_rng(3)
    linear = Linear(
        {"embed": 48}, {"kv_heads": 2, "qkv": 4, "head_dim": 6}, std=0.1, rngs=nnx.Rngs(0),
        dtype=jnp.dtype(jnp.float32), mesh=None,
    )  # fmt: skip
    stored = round_weight(rng.normal(size=(48, 48)), Quantization.parse(text), "w")
    set_weight("w", linear, stored)
    x = rng.normal(size=(*rows, 48)).astype(np.float32)
    pull = rng.normal(size=(*rows, 2, 4, 6)).astype(np.float32)
    weight = linear.weight.get_value()
    y, back = jax.vjp(lambda x: quantized_product(x, weight, jnp.dtype(jnp.float32), alone=True), x)
    dense = stored.dequantize().astype(np.float64)
    np.testing.assert_allclose(y, (x @ dense.T).reshape(pull.shape), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(back(pull)[0], pull.reshape(*rows, 48) @ dense, rtol=2e-5, atol=2e-5)
    low = quantized_product(x.astype(jnp.bfloat16), weight, jnp.dtype(jnp.float32), alone=True)
    assert distance(low, y) < 0.02


@pytest.mark.parametrize("text", ["int8:skip=none", "int4:group_size=8,symmetric=false"])
def test_equals_one_device_on_a_mesh(rows, text):
    config = small_config(**GROUPED, num_hidden_layers=1)
    ids, mask = (np.tile(array, (4, 1)) for array in rows)
    one = quantize_model(Phi3ForCausalLM(config), text)
    several = quantize_model(on_mesh(Phi3ForCausalLM(config), make_mesh("fsdp=2,context=2,tensor=2")), text)
    weight = several.model.layers[0].mlp.down_proj.weight.get_value()
    assert weight.values.addressable_shards[0].data.size * 4 == weight.values.size
    assert distance(logits(several, ids, mask), logits(one, ids, mask)) < 1e-5


@pytest.fixture
def like_a_tpu(monkeypatch):
    """Arranges weights as on a TPU."""
    monkeypatch.setattr(quantizing, "platform", lambda mesh: "tpu")


@pytest.mark.usefixtures("like_a_tpu")
@pytest.mark.parametrize("text", ["int4:group_size=16", "int8:group_size=8,symmetric=false,skip=none"])
def test_groups_first_equal_the_dequantized_floats(model, rows, text):
    quantized = quantize_model(model, text)
    assert quantized.model.layers[0].mlp.down_proj.weight.get_value().grouped
    few = tuple(array[:1] for array in rows)
    for given in (rows, few):
        assert distance(logits(quantized, *given), logits(floats_of(quantized), *given)) < 1e-5
    same = quantize_model(Phi3ForCausalLM(model.config), text)
    assert same.num_parameters() == model.num_parameters()


@pytest.mark.usefixtures("like_a_tpu")
def test_groups_first_on_a_mesh(rows):
    text, config = "int4:group_size=8,symmetric=false", small_config(**GROUPED, num_hidden_layers=1)
    ids, mask = (np.tile(array, (4, 1)) for array in rows)
    one = quantize_model(Phi3ForCausalLM(config), text)
    several = quantize_model(on_mesh(Phi3ForCausalLM(config), make_mesh("fsdp=2,context=2,tensor=2")), text)
    weight = several.model.layers[0].mlp.down_proj.weight.get_value()
    assert weight.values.dtype == jnp.int4
    assert weight.values.addressable_shards[0].data.size * 4 == weight.values.size
    assert distance(logits(several, ids, mask), logits(one, ids, mask)) < 1e-5


def test_rejects_groups_that_the_mesh_does_not_divide():
    config = small_config(**GROUPED, num_hidden_layers=1)
    model = on_mesh(Phi3ForCausalLM(config), make_mesh("data=2,tensor=4"))
    with pytest.raises(
        UserError, match=r"down_proj has 10 groups of 8 inputs, .* tensor=4; use tensor=1, 2, 5, 10"
    ):
        quantize_model(model, "int4:group_size=8")


def test_bytes_may_be_an_odd_number_for_each_device():
    config = small_config(**GROUPED, num_hidden_layers=1, intermediate_size=10)
    ids = np.random.default_rng(0).integers(4, 96, (4, 6))
    several = on_mesh(Phi3ForCausalLM(config), make_mesh("data=4,tensor=2"))
    expected = logits(quantize_model(Phi3ForCausalLM(config), "int8"), ids, None)
    assert distance(logits(quantize_model(several, "int8"), ids, None), expected) < 1e-5


def test_adapters_on_quantized_weights_get_gradients(model, rows):
    ids, mask = rows
    quantized = add_lora(quantize_model(model, "int4:group_size=16"), 2, rngs=5)
    floats = add_lora(floats_of(quantize_model(model, "int4:group_size=16")), 2, rngs=5)

    @jax.jit
    def gradients(model):
        graph, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)

        def loss(adapters):
            return nnx.merge(graph, adapters, rest)(ids, mask, labels=np.where(mask, ids, -100)).loss

        return jax.grad(loss)(adapters)

    found, expected = jax.tree.leaves(gradients(quantized)), jax.tree.leaves(gradients(floats))
    assert len(found) == 8
    for one, other in zip(found, expected, strict=True):
        assert distance(one, other) < 1e-5


def test_heads_of_classifiers_stay_floats():
    model = quantize_model(Phi3ForSequenceClassification(small_config(num_labels=3)), "int8:skip=none")
    assert isinstance(model.score.weight, nnx.Param)
    assert isinstance(model.model.embed_tokens.weight, QuantizedParam)


def test_refuses_what_needs_floats(model):
    quantized = quantize_model(model, "int8:skip=none")
    with pytest.raises(UserError, match="proj is quantized already"):
        quantize_model(quantize_model(model, "int8"), "int4:group_size=8")
    with pytest.raises(UserError, match="proj is quantized, so its adapter cannot be merged"):
        merge_lora(add_lora(quantized, 2))
    with pytest.raises(UserError, match="proj is quantized, and DoRA needs its floats"):
        add_lora(quantized, 2, dora=True)
    with pytest.raises(UserError, match="has an adapter; merge it first"):
        quantize_model(add_lora(model, 2), "int8")
    with pytest.raises(UserError, match="the token embeddings are quantized"):
        quantized.resize_token_embeddings(100)


def test_the_given_model_does_not_change(model):
    quantize_model(model, "int8")
    assert isinstance(model.model.layers[0].mlp.down_proj.weight, nnx.Param)


@pytest.mark.parametrize(
    "text", ["int8:skip=none", "int4:group_size=none,symmetric=false", "int4:group_size=8"]
)
def test_strict_promotion_on_a_mesh(rows, text):
    """Devices that divide the inputs add sums in bfloat16, which meet scales in float32."""
    ids, mask = (np.tile(array, (4, 1)) for array in rows)
    model = Phi3ForCausalLM(small_config(**GROUPED, num_hidden_layers=1), dtype=jnp.bfloat16)
    several = quantize_model(on_mesh(model, make_mesh("fsdp=2,context=2,tensor=2")), text)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        found = jax.jit(lambda model: model(ids, mask).logits)(several)
    assert distance(found, logits(quantize_model(model, text), ids, mask)) < 0.05
