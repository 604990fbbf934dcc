"""Tests that a model with quantized weights is saved, and loaded again as the same numbers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from reference import GROUPED, on_mesh, small_config

from phi3_jax import Phi3ForCausalLM, Phi3ForTokenClassification, make_mesh
from phi3_jax.checkpoint.opening import open_checkpoint
from phi3_jax.checkpoint.quantize import quantize_checkpoint
from phi3_jax.errors import UserError
from phi3_jax.lora import add_lora
from phi3_jax.model import quantize_model, quantizing
from phi3_jax.model.layers import QuantizedParam
from phi3_jax.model.quantizing import matrix_shape, quantizable, set_weight
from phi3_jax.quantization import Quantization, StoredWeight, round_weight

TEXTS = [
    "int8",
    "int8:symmetric=false",
    "int4:group_size=16",
    "int4:group_size=8,symmetric=false,skip=none",
    "int4:group_size=none",
    "int8:activations=int8",
    "int8:skip=none,activations=int8",
]


@pytest.fixture(scope="module")
def model() -> Phi3ForCausalLM:
    return Phi3ForCausalLM(small_config(**GROUPED, num_hidden_layers=1), dtype="bfloat16")


def assert_same(found: Any, expected: Any) -> None:
    """Compares what products do with activations, which no array says, and all numbers."""
    assert rounded_activations(found) == rounded_activations(expected)
    ours, theirs = (jax.tree_util.tree_leaves_with_path(each) for each in (found, expected))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, one), (_, other) in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype, path
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), err_msg=str(path))


def rounded_activations(model: Any) -> dict[str, bool]:
    return {
        name: module.weight.get_value().int8_activations
        for name, module in quantizable(model)
        if isinstance(module.weight, QuantizedParam)
    }


@pytest.mark.parametrize("text", TEXTS)
def test_loads_the_same_numbers(model: Phi3ForCausalLM, tmp_path: Path, text: str) -> None:
    quantized = quantize_model(model, text)
    quantized.save_pretrained(tmp_path)
    assert_same(Phi3ForCausalLM.from_pretrained(tmp_path, dtype="bfloat16"), quantized)


@pytest.mark.parametrize(
    "text",
    ["int8", "int4:group_size=8,symmetric=false,skip=none", *TEXTS[-2:]],
)
def test_writes_the_files_of_quantize(model: Phi3ForCausalLM, tmp_path: Path, text: str) -> None:
    """Which transformers and vLLM read."""
    model.save_pretrained(tmp_path / "floats")
    quantize_checkpoint(tmp_path / "floats", tmp_path / "expected", text)
    Phi3ForCausalLM.from_pretrained(tmp_path / "floats", quantization=text).save_pretrained(
        tmp_path / "found"
    )
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("found", "expected")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert configs[0]["dtype"] == configs[1]["dtype"] == "bfloat16"
    found, expected = (open_checkpoint(tmp_path / name).source for name in ("found", "expected"))
    assert set(found.names()) == set(expected.names())
    for name in expected.names():
        assert found.form(name) == expected.form(name)
        if found.form(name) is not None:
            ours, theirs = found.read_quantized(name), expected.read_quantized(name)
            np.testing.assert_array_equal(ours.values, theirs.values, err_msg=name)
            np.testing.assert_array_equal(ours.scale, theirs.scale, err_msg=name)
        np.testing.assert_array_equal(found.read(name), expected.read(name), err_msg=name)


def test_saves_from_a_mesh(model: Phi3ForCausalLM, tmp_path: Path) -> None:
    text = "int4:group_size=8,symmetric=false"
    divided = quantize_model(on_mesh(model, make_mesh("fsdp=2,context=2,tensor=2")), text)
    divided.save_pretrained(tmp_path)
    assert_same(Phi3ForCausalLM.from_pretrained(tmp_path, dtype="bfloat16"), quantize_model(model, text))


def test_saves_groups_that_come_first(
    model: Phi3ForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arrangement of TPUs and GPUs, in which 4 bits are int4."""
    text = "int4:group_size=8,symmetric=false"
    with monkeypatch.context() as patch:
        patch.setattr(quantizing, "platform", lambda mesh: "tpu")
        elsewhere = quantize_model(model, text)
    assert elsewhere.model.layers[0].mlp.down_proj.weight.get_value().grouped
    elsewhere.save_pretrained(tmp_path)
    assert_same(Phi3ForCausalLM.from_pretrained(tmp_path, dtype="bfloat16"), quantize_model(model, text))


@pytest.mark.parametrize("kind", ["order", "float8", "exact scales"])
def test_saves_weights_of_other_checkpoints(tmp_path: Path, kind: str) -> None:
    """Inputs in another order, FP8, and scales that bfloat16 does not hold."""
    model = Phi3ForTokenClassification(small_config(**GROUPED, num_hidden_layers=1, num_labels=3))
    for name, module in list(quantizable(model)):
        if not name.endswith("_proj"):
            continue
        _, inputs = shape = matrix_shape(module)
        weight = np.random.default_rng(inputs).normal(size=shape).astype(np.float32)
        stored = round_weight(weight, Quantization.parse("int4:group_size=8"), name)
        if kind == "order":
            groups = np.random.default_rng(0).permutation(np.repeat(np.arange(inputs // 8), 8))
            stored = replace(stored, order=np.argsort(groups, kind="stable"))
        elif kind == "float8":
            stored = StoredWeight(
                weight.astype(ml_dtypes.float8_e4m3fn), np.ones((shape[0], 1), np.float32), 8
            )
        else:
            stored = replace(stored, scale=stored.scale * np.float32(1.0001))
        set_weight(name, module, stored)
    model.save_pretrained(tmp_path)
    assert_same(Phi3ForTokenClassification.from_pretrained(tmp_path), model)


def test_adapters_are_refused(model: Phi3ForCausalLM, tmp_path: Path) -> None:
    adapted = add_lora(quantize_model(model, "int8"), 2)
    with pytest.raises(UserError, match="the model has adapters"):
        adapted.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
