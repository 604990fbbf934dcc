"""Directories whose weights are in a GGUF file, as the default model's."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_files import VOCAB, byte_level, stored_layout, weights, write_gguf
from reference import run, small_config

from phi3_jax import Phi3ForCausalLM, Phi3Tokenizer
from phi3_jax.checkpoint import convert_checkpoint, default_model, open_checkpoint, quantize_checkpoint
from phi3_jax.checkpoint.fingerprint import fingerprint
from phi3_jax.checkpoint.gguf import GGUFSource
from phi3_jax.errors import CheckpointError
from phi3_jax.model import loading
from phi3_jax.model.quantizing import has_quantized_weights

IDS = np.arange(24).reshape(2, 12) * 3 % VOCAB


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory as that of the default model, with a rope and an end of answers of its own."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = stored_layout(weights(fused=False))
    path = write_gguf(folder / "a.gguf", "llama", tensors, Kind.Q4_1, tokenizer=byte_level("smollm"))
    default_model._describe(path, folder)
    for name, changes in (
        ("config.json", {"rope_theta": 123.0}),
        ("generation_config.json", {"eos_token_id": 5}),
    ):
        fields = json.loads((folder / name).read_text(encoding="utf-8")) | changes
        (folder / name).write_text(json.dumps(fields), encoding="utf-8")
    return folder


def test_has_the_file_s_weights_and_its_own_config(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "available", lambda: True)
    source, config = open_checkpoint(directory)
    file = GGUFSource(directory / "a.gguf")
    assert config.rope_theta == 123.0
    assert list(source.names()) == list(file.names())
    name = "model.layers.1.self_attn.qkv_proj.weight"
    assert source.form(name) == file.form(name) is not None
    np.testing.assert_array_equal(source.read_quantized(name).values, file.read_quantized(name).values)

    model = Phi3ForCausalLM.from_pretrained(directory, dtype="float32")
    assert model.generation_config.eos_token_id == 5
    assert model.model.layers[0].mlp.down_proj.weight.get_value().values.dtype == "uint8"
    same = Phi3ForCausalLM.from_pretrained(directory / "a.gguf", dtype="float32", config=config)
    np.testing.assert_array_equal(run(model, input_ids=IDS).logits, run(same, input_ids=IDS).logits)
    other = Phi3ForCausalLM.from_pretrained(directory / "a.gguf", dtype="float32")
    assert np.abs(run(other, input_ids=IDS).logits - run(model, input_ids=IDS).logits).max() > 1e-3


def test_becomes_floats_where_only_xla_multiplies(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "available", lambda: False)
    for path in (directory, directory / "a.gguf"):
        assert not has_quantized_weights(Phi3ForCausalLM.from_pretrained(path))
        model = Phi3ForCausalLM.from_pretrained(path, quantization="int8")
        assert model.model.layers[0].mlp.down_proj.weight.get_value().values.dtype == "int8"
    Phi3ForCausalLM(small_config()).save_pretrained(directory.parent / "floats")
    quantize_checkpoint(directory.parent / "floats", directory.parent / "small")
    assert has_quantized_weights(Phi3ForCausalLM.from_pretrained(directory.parent / "small"))


def test_has_its_own_tokenizer(directory: Path) -> None:
    source, _ = open_checkpoint(directory)
    text = "ab12 'sA"
    expected = Phi3Tokenizer.from_pretrained(directory / "a.gguf").encode(text)
    assert source.tokenizer().encode(text) == expected
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer in"):
        source.tokenizer()


def test_is_converted_with_its_other_files(directory: Path, tmp_path: Path) -> None:
    (directory / "LICENSE.txt").write_text("free", encoding="utf-8")
    convert_checkpoint(directory, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "LICENSE.txt",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    floats = Phi3ForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    packed = Phi3ForCausalLM.from_pretrained(directory, dtype="float32")
    np.testing.assert_allclose(
        run(floats, input_ids=IDS).logits, run(packed, input_ids=IDS).logits, rtol=1e-5, atol=1e-5
    )


def test_safetensors_come_first(directory: Path, tmp_path: Path) -> None:
    """A model that is saved into the directory is the one that is read from it."""
    model = Phi3ForCausalLM.from_pretrained(directory, dtype="float32", quantization="none")
    model.model.norm.weight.set_value(model.model.norm.weight[...] * 2)
    model.save_pretrained(directory)
    saved = Phi3ForCausalLM.from_pretrained(directory, dtype="float32")
    np.testing.assert_array_equal(saved.model.norm.weight[...], model.model.norm.weight[...])
    assert "a.gguf" not in fingerprint(directory)


def test_a_change_of_the_file_is_noticed(directory: Path) -> None:
    before = fingerprint(directory)
    content = bytearray((directory / "a.gguf").read_bytes())
    content[-1] ^= 1
    (directory / "a.gguf").write_bytes(content)
    after = fingerprint(directory)
    assert {name for name in before if before[name] != after[name]} == {"a.gguf"}


def test_rejects_several_files(directory: Path) -> None:
    shutil.copyfile(directory / "a.gguf", directory / "b.gguf")
    with pytest.raises(CheckpointError, match=r"several \.gguf files \(a\.gguf, b\.gguf\); name one of them"):
        open_checkpoint(directory)


def test_rejects_a_config_of_another_model(directory: Path) -> None:
    fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps(fields | {"intermediate_size": 96}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="shape"):
        Phi3ForCausalLM.from_pretrained(directory)
