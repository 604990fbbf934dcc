"""Tests calibration of a tiny Phi-3-small, with windows in which its sparse layers hide keys."""

import jax.numpy as jnp
import numpy as np
import pytest
from phi3small import small_config
from reference import distance, run, write_random_model

from phi3_jax import Phi3ForCausalLM
from phi3_jax.calibration import CalibrationOptions, calibrate_checkpoint
from phi3_jax.calibration.layers import LayerRunner
from phi3_jax.checkpoint.opening import open_checkpoint
from phi3_jax.checkpoint.quantize import quantize_checkpoint
from phi3_jax.parallel.sharding import make_mesh

INT4 = "int4:group_size=8"
OPTIONS = CalibrationOptions(windows=16, length=32, rows=4, dtype="float32")
TOKENS = np.random.default_rng(0).integers(4, 96, 16 * 32).astype(np.int32)
IDS = TOKENS.reshape(16, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_random_model("causal", small_config(num_hidden_layers=2), folder)
    return folder


def test_runs_layers_as_the_model_does(folder):
    """The first one is sparse, and the second one dense."""
    model = Phi3ForCausalLM.from_pretrained(folder)
    states = model.model(IDS[:4], output_hidden_states=True).hidden_states
    runner = LayerRunner(model.config, 4, 32)
    assert distance(runner.outputs(model.model.layers[0], states[0]), states[1]) <= 1e-6
    last = runner.outputs(model.model.layers[1], states[1])
    assert distance(model.model.final_layernorm(last), states[2]) <= 1e-6


def test_sums_the_products_of_inputs(folder):
    layer = Phi3ForCausalLM.from_pretrained(folder).model.layers[0]
    x = np.random.default_rng(0).normal(size=(2, 32, 48)).astype(np.float32)
    products = LayerRunner(small_config(), 2, 32).products(layer, jnp.asarray(x))
    assert {name: product.shape for name, product in products.items()} == {
        "self_attn.query_key_value": (48, 48),
        "self_attn.dense": (48, 48),
        "mlp.up_proj": (48, 48),
        "mlp.down_proj": (80, 80),
    }
    normed = np.asarray(layer.input_layernorm(x)).reshape(-1, 48)
    assert distance(products["self_attn.query_key_value"], normed.T @ normed) <= 1e-5
    assert layer.mlp.up_proj.adapter is None


@pytest.mark.slow
def test_answers_are_nearer_to_those_of_the_floats(folder, tmp_path):
    calibrate_checkpoint(folder, tmp_path / "calibrated", TOKENS, INT4, OPTIONS)
    quantize_checkpoint(folder, tmp_path / "plain", INT4)
    paths = folder, tmp_path / "plain", tmp_path / "calibrated"
    models = [Phi3ForCausalLM.from_pretrained(path) for path in paths]
    floats, plain, ours = (np.asarray(run(model.model, input_ids=IDS).last_hidden_state) for model in models)
    assert np.linalg.norm(ours - floats) < 0.7 * np.linalg.norm(plain - floats)
    first, rounded, calibrated = (open_checkpoint(path).source for path in paths)
    assert set(calibrated.names()) == set(rounded.names()) == set(first.names())
    for name in first.names():
        assert calibrated.form(name) == rounded.form(name)
        if calibrated.form(name) is None:
            np.testing.assert_array_equal(calibrated.read(name), first.read(name), err_msg=name)
    divided = Phi3ForCausalLM.from_pretrained(paths[2], mesh=make_mesh("data=2,fsdp=2,tensor=2"))
    assert distance(run(divided.model, input_ids=IDS).last_hidden_state, ours) <= 1e-5
