"""Quantized weights of Phi-3-small, whose projections have biases: of other libraries, and our own."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from dequantized import floats_of
from marks import slow
from phi3small import small_config
from quantized_files import FORMS, gptq, random_weight, write_quantized
from reference import distance, on_mesh, run, write_random_model
from safetensors.numpy import load_file, save_file

from phi3_jax import CheckpointError, Phi3ForCausalLM, Phi3SmallForCausalLM
from phi3_jax.checkpoint.convert import convert_checkpoint
from phi3_jax.checkpoint.opening import open_checkpoint
from phi3_jax.checkpoint.quantize import quantize_checkpoint
from phi3_jax.model.quantizing import quantize_model
from phi3_jax.parallel.sharding import make_mesh

CONFIG = small_config(num_hidden_layers=1)
IDS = np.random.default_rng(1).integers(4, 96, (4, 29))
MODULES = [f"model.layers.0.{path}" for path in CONFIG.projections.values()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_random_model("causal", CONFIG, folder)
    return folder


def logits(model: Any) -> Any:
    return run(model, input_ids=IDS).logits


def assert_same(found: Any, expected: Any) -> None:
    ours, theirs = (jax.tree_util.tree_leaves_with_path(each) for each in (found, expected))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, one), (_, other) in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype, path
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), err_msg=str(path))


@pytest.mark.parametrize(
    "name", ["awq", "gptq", "gptq, sorted by importance", "pack-quantized with zero points", "fp8"]
)
def test_reads_weights_of_other_libraries_with_biases(name: str, tmp_path: Path) -> None:
    """The logits are those of the model with the same floats."""
    floats = write_quantized(tmp_path / "quantized", FORMS[name], CONFIG)
    source, config = open_checkpoint(tmp_path / "quantized")
    assert sorted(source.names()) == sorted(floats)
    for module in MODULES:
        assert source.form(f"{module}.weight") is not None
        np.testing.assert_array_equal(source.read(f"{module}.bias"), floats[f"{module}.bias"])
    model = Phi3ForCausalLM.from_pretrained(tmp_path / "quantized", dtype="float32")
    (tmp_path / "floats").mkdir()
    config.save_pretrained(tmp_path / "floats")
    save_file(
        {name: each.astype(np.float32) for name, each in floats.items()},
        tmp_path / "floats" / "model.safetensors",
    )
    expected = Phi3ForCausalLM.from_pretrained(tmp_path / "floats")
    assert distance(logits(model), logits(expected)) <= 1e-5


def test_converts_to_floats_with_biases(tmp_path: Path) -> None:
    floats = write_quantized(tmp_path / "quantized", FORMS["gptq"], CONFIG)
    convert_checkpoint(tmp_path / "quantized", tmp_path / "out", dtype="float32")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == floats.keys()
    for name, expected in floats.items():
        kind = np.float16 if name.removesuffix(".weight") in MODULES else expected.dtype
        np.testing.assert_array_equal(written[name], expected.astype(kind).astype(np.float32), err_msg=name)


def test_a_head_has_no_bias(tmp_path: Path) -> None:
    """Zeros that a packer writes are ignored there, and other numbers refused."""
    config = CONFIG.replace(tie_word_embeddings=False)
    write_quantized(tmp_path, FORMS["gptq"], config)
    path = tmp_path / "model.safetensors"
    head = random_weight(np.random.default_rng(0), (96, 48), FORMS["gptq"])
    stored = load_file(path) | {f"lm_head.{kind}": each for kind, each in gptq(head).items()}
    del stored["lm_head.weight"]
    save_file(stored | {"lm_head.bias": np.zeros(96, np.float16)}, path)
    model = Phi3ForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert distance(model.lm_head.floats(), head.floats()) <= 1e-6
    save_file(stored | {"lm_head.bias": np.ones(96, np.float16)}, path)
    with pytest.raises(
        CheckpointError, match=r"lm_head\.bias has numbers other than 0; the model has no such"
    ):
        Phi3ForCausalLM.from_pretrained(tmp_path)


def test_rejects_missing_and_unquantized_tensors(tmp_path: Path) -> None:
    floats = write_quantized(tmp_path, FORMS["awq"], CONFIG)
    path, (qkv, dense, *_) = tmp_path / "model.safetensors", MODULES
    stored = load_file(path)
    bias = stored.pop(f"{qkv}.bias")
    save_file(stored, path)
    with pytest.raises(CheckpointError, match=f"missing: {qkv}.bias"):
        Phi3ForCausalLM.from_pretrained(tmp_path)
    stored[f"{qkv}.bias"] = bias
    for kind in ("qweight", "qzeros", "scales"):
        del stored[f"{dense}.{kind}"]
    save_file(stored | {f"{dense}.weight": floats[f"{dense}.weight"]}, path)
    with pytest.raises(CheckpointError, match=f"{dense}.weight has dtype float32, but the settings"):
        Phi3ForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "text", ["int8", "int4:group_size=8,symmetric=false", "int8:activations=int8", "int8:skip=none"]
)
def test_rounds_a_checkpoint(folder: Path, tmp_path: Path, text: str) -> None:
    """It loads as the rounded model, computes as the floats do, and is written by the model as well."""
    quantize_checkpoint(folder, tmp_path / "out", text)
    model = Phi3ForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    assert isinstance(model, Phi3SmallForCausalLM)
    original = Phi3ForCausalLM.from_pretrained(folder)
    assert_same(model, quantize_model(original, text))
    assert distance(logits(model), logits(original)) > 1e-3
    if "activations" not in text:
        assert distance(logits(model), logits(floats_of(model))) <= 1e-5
    source, first = open_checkpoint(tmp_path / "out").source, open_checkpoint(folder).source
    for module in MODULES:
        assert source.form(f"{module}.weight") is not None
        assert source.dtype(f"{module}.bias") == np.float32
        np.testing.assert_array_equal(source.read(f"{module}.bias"), first.read(f"{module}.bias"))
    model.save_pretrained(tmp_path / "again")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert configs[0]["model_type"] == configs[1]["model_type"] == "phi3small"
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "again")]
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        np.testing.assert_array_equal(files[1][name], tensor, err_msg=name)


@pytest.mark.parametrize("text", ["int8", slow("int4:group_size=8,symmetric=false")])
def test_quantized_on_a_mesh(folder: Path, tmp_path: Path, text: str) -> None:
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    original = Phi3ForCausalLM.from_pretrained(folder)
    expected = quantize_model(original, text)
    divided = quantize_model(on_mesh(original, mesh), text)
    weight = divided.model.layers[0].mlp.up_proj.weight.get_value()
    assert {shard.data.shape[:2] for shard in weight.values.addressable_shards} == {(2, 40)}
    divided.save_pretrained(tmp_path)
    assert_same(Phi3ForCausalLM.from_pretrained(tmp_path), expected)
    loaded = Phi3ForCausalLM.from_pretrained(tmp_path, mesh=mesh)
    assert_same(loaded, divided)
    assert distance(logits(loaded), logits(expected)) <= 1e-5
