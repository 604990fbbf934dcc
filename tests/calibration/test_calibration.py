"""Tests calibration on a tiny checkpoint against its floats and against plain rounding."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from reference import longrope, small_config
from small_checkpoint import write_checkpoint

from phi3_jax import Phi3ForCausalLM
from phi3_jax.calibration import CalibrationOptions, calibrate_checkpoint
from phi3_jax.calibration.layers import LayerRunner
from phi3_jax.checkpoint.opening import open_checkpoint
from phi3_jax.checkpoint.quantize import quantize_checkpoint
from phi3_jax.errors import UserError

INT4 = "int4:group_size=16"
OPTIONS = CalibrationOptions(windows=6, length=24, rows=2, dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, **longrope(), max_position_embeddings=64)
    return folder


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(5, 250, 200).astype(np.int32)


@pytest.fixture(scope="module")
def calibrated(folder, tokens, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibrated") / "model"
    calibrate_checkpoint(folder, out, tokens, INT4, OPTIONS)
    return out


def hidden_states(model, ids):
    return np.asarray(model.model(ids).last_hidden_state)


def test_sums_the_products_of_inputs():
    model = Phi3ForCausalLM(small_config())
    layer = model.model.layers[0]
    x = np.random.default_rng(0).normal(size=(2, 7, 48)).astype(np.float32)
    runner = LayerRunner(model.config, 2, 7)
    products = runner.products(layer, jnp.asarray(x))
    normed = np.asarray(layer.input_layernorm(x)).reshape(-1, 48)
    np.testing.assert_allclose(products["self_attn.qkv_proj"], normed.T @ normed, rtol=1e-4, atol=1e-4)
    assert {name: product.shape for name, product in products.items()} == {
        "self_attn.qkv_proj": (48, 48),
        "self_attn.o_proj": (48, 48),
        "mlp.gate_up_proj": (48, 48),
        "mlp.down_proj": (80, 80),
    }
    assert layer.mlp.down_proj.adapter is None


def test_runs_a_layer_as_the_model_does(folder):
    model = Phi3ForCausalLM.from_pretrained(folder)
    ids = np.random.default_rng(1).integers(5, 250, (2, 24))
    states = model.model(ids, output_hidden_states=True).hidden_states
    found = LayerRunner(model.config, 2, 24).outputs(model.model.layers[0], states[0])
    np.testing.assert_allclose(found, states[1], rtol=1e-5, atol=1e-5)


def test_answers_are_nearer_to_those_of_the_floats(folder, calibrated, tokens, tmp_path):
    quantize_checkpoint(folder, tmp_path / "plain", INT4)
    ids = tokens[: 6 * 24].reshape(6, 24)
    floats, plain, ours = (
        hidden_states(Phi3ForCausalLM.from_pretrained(path), ids)
        for path in (folder, tmp_path / "plain", calibrated)
    )
    assert np.linalg.norm(ours - floats) < 0.8 * np.linalg.norm(plain - floats)
    assert not calibrated.with_name("model.calibration").exists()
    forms = [{open_checkpoint(path).source.form(name) for name in open_checkpoint(path).source.names()}
             for path in (calibrated, tmp_path / "plain")]  # fmt: skip
    assert forms[0] == forms[1]


def test_keeps_the_choice_of_int8_activations(folder, tokens, tmp_path):
    calibrate_checkpoint(folder, tmp_path / "model", tokens, "int8:activations=int8", OPTIONS)
    source = open_checkpoint(tmp_path / "model").source
    forms = [form for name in source.names() if (form := source.form(name)) is not None]
    assert len(forms) == 8
    assert all(form.int8_activations for form in forms)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_resumes_after_a_kill(folder, calibrated, tokens, tmp_path, after):
    out = tmp_path / "model"

    def kill(done, total):
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_checkpoint(folder, out, tokens, INT4, OPTIONS, report=kill)
    assert not out.exists()
    finished = []
    calibrate_checkpoint(folder, out, tokens, INT4, OPTIONS, report=lambda done, _: finished.append(done))
    assert finished == list(range(after, 3))
    for path in calibrated.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_unfinished_work_is_not_resumed_with_another_text(folder, tokens, tmp_path):
    def kill(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_checkpoint(folder, tmp_path / "out", tokens, INT4, OPTIONS, report=kill)
    with pytest.raises(UserError, match=r"started with other options .* tokens: .*Remove .*out.calibration"):
        calibrate_checkpoint(folder, tmp_path / "out", tokens[::-1], INT4, OPTIONS)


def test_starts_over_beside_layers_of_work_that_was_being_removed(folder, calibrated, tokens, tmp_path):
    def kill(done, total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_checkpoint(folder, tmp_path / "model", tokens[::-1], INT4, OPTIONS, report=kill)
    (tmp_path / "model.calibration" / "calibration.json").unlink()
    calibrate_checkpoint(folder, tmp_path / "model", tokens, INT4, OPTIONS)
    for path in calibrated.glob("*.safetensors"):
        assert (tmp_path / "model" / path.name).read_bytes() == path.read_bytes()


def test_rejects_a_short_text(folder, tmp_path):
    with pytest.raises(UserError, match="the text has 5 tokens, too few for a window of 24"):
        calibrate_checkpoint(folder, tmp_path / "out", np.arange(5), INT4, OPTIONS)
    assert list(Path(tmp_path).iterdir()) == []
