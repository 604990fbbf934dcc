"""Ropes in GGUF files: their effect in llama.cpp, copies of models, and files that are read again."""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_files import byte_level, stored_layout, weights, write_gguf
from rope_cases import (
    CONTEXT,
    HEAD_DIM,
    LENGTHS,
    ORIGINAL,
    ROPES,
    TWO_ATTENTION_FACTORS,
    assert_same_rope,
    frequencies,
    rope_config,
)

from phi3_jax import Phi3Config, Phi3ForCausalLM
from phi3_jax.checkpoint import convert_checkpoint
from phi3_jax.checkpoint.gguf import GGUFSource
from phi3_jax.config.rope_argument import parse_rope
from phi3_jax.errors import CheckpointError, UserError
from phi3_jax.rope_lab.interchange import gguf_rope, read_rope, write_gguf_rope
from phi3_jax.rope_lab.interchange.json_text import json_text

ARCHITECTURES = ["phi3", "llama"]
EXPRESSIBLE = sorted({*ROPES} - {"dynamic", *TWO_ATTENTION_FACTORS})


def llama_cpp_rope(path: Path, context: int) -> tuple[np.ndarray, float]:
    """Returns the frequencies and the factor on cosines and sines that llama.cpp computes from a file.

    As in its llama-context.cpp and rope_yarn of ggml-cpu/ops.cpp; YaRN's betas are options there, and are not
    read from the files of these architectures.
    """
    reader = gguf.GGUFReader(path)
    architecture = reader.get_field("general.architecture").contents()
    tensors = {tensor.name: np.array(tensor.data, np.float64) for tensor in reader.tensors}

    def value(key: str, default: Any = None) -> Any:
        field = reader.get_field(f"{architecture}.{key}")
        return default if field is None else field.contents()

    dims, kind = value("rope.dimension_count"), value("rope.scaling.type", "linear")
    original = value("rope.scaling.original_context_length", value("context_length"))
    scale = 1.0 if kind == "none" else 1 / (value("rope.scaling.factor", 0.0) or 1.0)
    base = value("rope.freq_base", 10000.0)
    if kind == "longrope" or architecture == "phi3":
        factors = tensors.get(f"rope_factors_{'long' if context > original else 'short'}.weight")
    else:
        factors = tensors.get("rope_freqs.weight")
    angles = base ** (-np.arange(0, dims, 2) / dims)
    if factors is not None:
        angles = angles / factors
    mscale = value("rope.scaling.attn_factor", 1.0)
    if kind != "yarn":
        return angles * scale, mscale
    turns = [dims * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(base)) for beta in (32, 1)]
    low, high = max(0, math.floor(turns[0])), min(dims - 1, math.ceil(turns[1]))
    ramp = 1 - np.clip((np.arange(dims // 2) - low) / max(0.001, high - low), 0, 1)
    return angles * scale * (1 - ramp) + angles * ramp, mscale * (1 + 0.1 * math.log(1 / scale))


def write_alone(config: Phi3Config, architecture: str, folder: Path) -> Path:
    path = folder / "rope.gguf"
    write_gguf_rope(path, gguf_rope(config, architecture))
    return path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_llama_cpp_has_the_same_frequencies(name: str, architecture: str, tmp_path: Path) -> None:
    config = rope_config(name)
    path = write_alone(config, architecture, tmp_path)
    expected = frequencies(config)
    assert_same_rope([llama_cpp_rope(path, length) for length in LENGTHS], expected)
    factors = tmp_path / "factors.json"
    factors.write_text(json_text(read_rope(path)))
    assert_same_rope(frequencies(parse_rope(f"@{factors}").apply(rope_config("default"))), expected)


def test_tensors_are_those_that_llama_cpp_loads_for_the_architecture() -> None:
    names = {
        (architecture, name): [*gguf_rope(rope_config(name), architecture).tensors]
        for architecture in ARCHITECTURES
        for name in ("linear", "yarn", "llama3", "longrope")
    }
    both = ["rope_factors_long.weight", "rope_factors_short.weight"]
    assert {key: each for key, each in names.items() if each} == {
        ("phi3", "llama3"): both,
        ("phi3", "longrope"): both,
        ("llama", "llama3"): ["rope_freqs.weight"],
        ("llama", "longrope"): both,
    }
    assert gguf_rope(rope_config("longrope")).has_two_lists
    assert not gguf_rope(rope_config("llama3")).has_two_lists


def test_factors_of_one_keep_their_attention_factor(tmp_path: Path) -> None:
    """A reader takes a single list of ones for plain rope, so that there are two lists."""
    ones = [1.0] * (HEAD_DIM // 2)
    entry = {"rope_type": "longrope", "short_factor": ones, "long_factor": ones, "attention_factor": 1.2}
    config = rope_config("longrope", rope_scaling=entry)
    path = write_alone(config, "llama", tmp_path)
    assert read_rope(path)["attention_factor"] == 1.2
    assert llama_cpp_rope(path, 1)[1] == pytest.approx(1.2)


@pytest.mark.parametrize("name", ["dynamic", *TWO_ATTENTION_FACTORS])
def test_what_llama_cpp_cannot_express_is_an_error(name: str) -> None:
    message = "'dynamic' changes" if name == "dynamic" else "the attention factor is .* llama.cpp has one"
    with pytest.raises(UserError, match=message):
        gguf_rope(rope_config(name), "llama")


def model_file(folder: Path, architecture: str, **changes: Any) -> Path:
    """Writes a model with weights of several kinds, a tokenizer, and a rope of its own."""
    tensors = stored_layout(weights(fused=architecture == "phi3"))
    tensors["rope_freqs.weight"] = np.linspace(1, 2, HEAD_DIM // 2, dtype=np.float32)
    kinds = {"token_embd.weight": Kind.F16, "blk.0.ffn_down.weight": Kind.Q4_1, "output.weight": Kind.BF16}
    extra = {f"{architecture}.rope.scaling.attn_factor": 1.5, f"{architecture}.rope.scale_linear": 1.0}
    return write_gguf(
        folder / "model.gguf",
        architecture,
        tensors,
        Kind.Q8_0,
        extra=extra | {"general.alignment": 64} | changes,
        tokenizer=byte_level("smollm"),
        kinds=kinds,
    )


@pytest.mark.parametrize(
    ("architecture", "name"), [("phi3", "longrope"), ("llama", "yarn"), ("llama", "llama3")]
)
def test_copies_a_model_with_another_rope(architecture: str, name: str, tmp_path: Path) -> None:
    model, copy = model_file(tmp_path, architecture), tmp_path / "copy.gguf"
    config = Phi3Config.from_dict(GGUFSource(model).config_dict())
    lengths = {"max_position_embeddings": CONTEXT, "original_max_position_embeddings": ORIGINAL}
    changed = config.replace(rope_scaling=ROPES[name], **lengths)
    rope = gguf_rope(changed, architecture)
    write_gguf_rope(copy, rope, model)

    read = GGUFSource(copy)
    assert_same_rope(frequencies(Phi3Config.from_dict(read.config_dict())), frequencies(changed))
    assert read.tokenizer().get_vocab() == GGUFSource(model).tokenizer().get_vocab()
    before, after = gguf.GGUFReader(model), gguf.GGUFReader(copy)
    kept = {tensor.name: tensor for tensor in before.tensors if not tensor.name.startswith("rope_")}
    for tensor in after.tensors:
        assert tensor.data_offset % 64 == 0
        if tensor.name in rope.tensors:
            np.testing.assert_array_equal(tensor.data, rope.tensors[tensor.name])
        else:
            assert tensor.tensor_type == kept[tensor.name].tensor_type
            np.testing.assert_array_equal(tensor.data, kept.pop(tensor.name).data)
    assert not kept
    ours = {f"{architecture}.rope.scaling.attn_factor", f"{architecture}.rope.scale_linear", *rope.metadata}
    values = [
        {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        for reader in (before, after)
    ]
    unchanged = [{key: each for key, each in one.items() if key not in ours} for one in values]
    assert unchanged[0] == unchanged[1]
    assert f"{architecture}.rope.scale_linear" not in values[1]


@pytest.mark.slow  # compilation
def test_a_copy_gives_the_logits_of_the_config(tmp_path: Path) -> None:
    model, copy = model_file(tmp_path, "phi3"), tmp_path / "copy.gguf"
    config = Phi3Config.from_dict(GGUFSource(model).config_dict()).replace(
        rope_scaling=ROPES["longrope"], max_position_embeddings=64, original_max_position_embeddings=8
    )
    write_gguf_rope(copy, gguf_rope(config), model)
    ids = np.arange(12)[None] % 7
    options = {"dtype": "float32", "quantization": "none"}
    exported = Phi3ForCausalLM.from_pretrained(copy, **options)(ids).logits
    expected = Phi3ForCausalLM.from_pretrained(model, **options, config=config)(ids).logits
    np.testing.assert_allclose(exported, expected, rtol=1e-5, atol=1e-6)
    plain = Phi3ForCausalLM.from_pretrained(model, **options)(ids).logits
    assert not np.allclose(exported, plain, rtol=1e-2)
    convert_checkpoint(copy, tmp_path / "converted")
    converted = Phi3ForCausalLM.from_pretrained(tmp_path / "converted", **options)(ids).logits
    np.testing.assert_allclose(converted, expected, rtol=1e-5, atol=1e-6)


def test_a_longer_context_does_not_remove_the_window_of_an_old_file(tmp_path: Path) -> None:
    """A file without the key has a window by its layers and its context of 4,096 tokens."""
    tensors = stored_layout(weights(fused=True))
    layers = {
        name.replace("blk.0.", f"blk.{i}."): each
        for i in range(32)
        for name, each in tensors.items()
        if ".0." in name
    }
    extra = {"phi3.block_count": 32, "phi3.context_length": 4096}
    model = write_gguf(tmp_path / "old.gguf", "phi3", tensors | layers, extra=extra)
    config = Phi3Config.from_dict(GGUFSource(model).config_dict())
    assert config.sliding_window == 2047
    longer = config.replace(rope_scaling=ROPES["yarn"], max_position_embeddings=4 * 4096)
    write_gguf_rope(tmp_path / "new.gguf", gguf_rope(longer), model)
    assert GGUFSource(tmp_path / "new.gguf").config_dict()["sliding_window"] == 2047


def test_rejects_a_model_that_the_rope_does_not_fit(tmp_path: Path) -> None:
    model = model_file(tmp_path, "llama")
    with pytest.raises(UserError, match="architecture 'llama', the rope is for 'phi3'"):
        write_gguf_rope(tmp_path / "copy.gguf", gguf_rope(rope_config("yarn")), model)
    wide = rope_config("yarn", head_dim=64)
    with pytest.raises(UserError, match="rotates 32 dims of each head, and the rope has 64"):
        write_gguf_rope(tmp_path / "copy.gguf", gguf_rope(wide, "llama"), model)
    (tmp_path / "broken.gguf").write_bytes(model.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        write_gguf_rope(
            tmp_path / "copy.gguf", gguf_rope(rope_config("yarn"), "llama"), tmp_path / "broken.gguf"
        )
    assert not (tmp_path / "copy.gguf").exists()


def test_a_file_without_dims_is_no_rope(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "empty.gguf", "phi3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"lacks 'phi3\.rope\.dimension_count'"):
        read_rope(tmp_path / "empty.gguf")
