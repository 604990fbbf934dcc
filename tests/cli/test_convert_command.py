"""Tests the command `phi3-jax convert`."""

import json
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from reference import small_config, write_random_model
from safetensors.numpy import load_file
from small_checkpoint import NEVER, PROMPT, SPECIALS, TEMPLATE
from tokenizers import pre_tokenizers

from phi3_jax import Phi3Tokenizer

DTYPES = pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])


def convert(run: Any, source: Path, out: Path, dtype: str | None) -> None:
    result = run("convert", source, out, *(["--dtype", dtype] if dtype else []))
    assert result.code == 0
    assert result.out == f"{out}: 0.00 GB\n"


@DTYPES
def test_converts_safetensors(run: Any, model_folder: Path, tmp_path: Path, dtype: str | None) -> None:
    out = tmp_path / "out"
    convert(run, model_folder, out, dtype)
    original, written = (load_file(folder / "model.safetensors") for folder in (model_folder, out))
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        assert written[name].dtype == jnp.dtype(dtype or "float32")
        assert np.array_equal(written[name], tensor.astype(written[name].dtype)), name
    assert json.loads((out / "config.json").read_text())["dtype"] == (dtype or "float32")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (model_folder / name).read_bytes()


@pytest.mark.live
@DTYPES
def test_transformers_loads_a_converted_checkpoint(
    run: Any, model_folder: Path, tmp_path: Path, dtype: str | None
) -> None:
    import torch
    import transformers

    convert(run, model_folder, tmp_path / "out", dtype)
    kind = getattr(torch, dtype or "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    assert model.dtype == kind
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(kind)), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(PROMPT)["input_ids"] == Phi3Tokenizer.from_pretrained(model_folder).encode(PROMPT)
    assert model.generation_config.eos_token_id == NEVER


def convert_to_shards(run: Any, folder: Path) -> dict[str, np.ndarray]:
    """Converts a model to several files in `out` and returns its tensors."""
    config = small_config(vocab_size=4000, hidden_size=64, head_dim=16)
    write_random_model("causal", config, folder / "in")
    assert run("convert", folder / "in", folder / "out", "--max-shard-size", "1MB").code == 0
    shards = sorted((folder / "out").glob("model-*-of-*.safetensors"))
    assert len(shards) >= 3
    assert all(path.stat().st_size < 1_100_000 or len(load_file(path)) == 1 for path in shards)
    return load_file(folder / "in" / "model.safetensors")


def test_converts_to_shards(run: Any, tmp_path: Path) -> None:
    original = convert_to_shards(run, tmp_path)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == original.keys()
    for name, file in index["weight_map"].items():
        assert np.array_equal(load_file(tmp_path / "out" / file)[name], original[name]), name


@pytest.mark.live
def test_transformers_loads_converted_shards(run: Any, tmp_path: Path) -> None:
    import transformers

    original = convert_to_shards(run, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert np.array_equal(tensor.numpy(), original[name]), name


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """Writes a Llama-like file with one layer and a small vocabulary, and returns its tensors."""
    rng = np.random.default_rng(0)
    words = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    kinds = [gguf.TokenType.CONTROL] * len(SPECIALS) + [gguf.TokenType.NORMAL] * (len(words) - len(SPECIALS))
    writer.add_token_types(kinds)
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(4)
    writer.add_chat_template(TEMPLATE)
    rows = {"attn_q": 64, "attn_k": 32, "attn_v": 32, "attn_output": 64, "ffn_gate": 96, "ffn_up": 96}
    shapes: dict[str, tuple[int, ...]] = {f"blk.0.{name}": (n, 64) for name, n in rows.items()}
    shapes |= {"token_embd": (len(words), 64), "output_norm": (64,), "blk.0.ffn_down": (64, 96)}
    shapes |= {"blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,)}
    tensors = {f"{name}.weight": rng.normal(0, 0.2, s).astype(np.float32) for name, s in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.slow
def test_converts_gguf_to_a_checkpoint_with_the_same_answers(run: Any, tmp_path: Path) -> None:
    tensors = write_gguf(tmp_path / "tiny.gguf")
    assert run("convert", tmp_path / "tiny.gguf", tmp_path / "out").code == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert np.array_equal(written["model.embed_tokens.weight"], tensors["token_embd.weight"])
    gate_up = np.concatenate([tensors["blk.0.ffn_gate.weight"], tensors["blk.0.ffn_up.weight"]])
    assert np.array_equal(written["model.layers.0.mlp.gate_up_proj.weight"], gate_up)
    tokenizer = Phi3Tokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("Hi there")) == "Hi there"
    results = [
        run("generate", "Hi", "--model", tmp_path / name, "--max-new-tokens", 9, "--dtype", "float32")
        for name in ("tiny.gguf", "out")
    ]
    assert results[0].code == results[1].code == 0
    assert results[0].out == results[1].out


@pytest.mark.live
def test_transformers_loads_a_converted_gguf(run: Any, tmp_path: Path) -> None:
    import transformers

    write_gguf(tmp_path / "tiny.gguf")
    assert run("convert", tmp_path / "tiny.gguf", tmp_path / "out").code == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.state_dict().keys() - written.keys() <= {"lm_head.weight"}
    for name, tensor in written.items():
        assert np.array_equal(model.state_dict()[name].numpy(), tensor), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("Hi there")["input_ids"]) == "Hi there"
