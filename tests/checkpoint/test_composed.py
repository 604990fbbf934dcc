"""Llama's and Mistral's checkpoints, and those of wrapped models, are read as Phi-3's."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import stored
from reference import run
from safetensors.numpy import load_file, save_file

from phi3_jax import Phi3Config, Phi3ForCausalLM, convert_checkpoint, make_mesh
from phi3_jax.checkpoint import CheckpointError, open_checkpoint
from phi3_jax.checkpoint.reconfigure import reconfigure_checkpoint
from phi3_jax.config.rope_argument import as_longrope
from phi3_jax.errors import UserError
from phi3_jax.model.loading import load_abstract
from phi3_jax.model.saving import ModelSource

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-3,
    "hidden_act": "silu",
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
MODELS: dict[str, dict[str, Any]] = {
    # Llama ignores the window.
    "llama": {"model_type": "llama", "attention_bias": False, "pretraining_tp": 1, "sliding_window": 3},
    "llama 3": {"model_type": "llama", "rope_scaling": LLAMA3, "tie_word_embeddings": True},
    "llama with wide heads": {"model_type": "llama", "head_dim": 16},
    "llama with yarn": {"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
}
IDS = np.random.default_rng(3).integers(0, 96, (2, 20))


def tensors(settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns random tensors under Llama's names."""
    rng = np.random.default_rng(5)
    hidden, ffn = settings["hidden_size"], settings["intermediate_size"]
    width = settings.get("head_dim", hidden // settings["num_attention_heads"])
    q, kv = (settings[f"num_{kind}_heads"] * width for kind in ("attention", "key_value"))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (96, hidden)}
    for layer in range(settings["num_hidden_layers"]):
        of = f"model.layers.{layer}"
        shapes |= {f"{of}.self_attn.{name}_proj.weight": (q if name == "q" else kv, hidden) for name in "kqv"}
        shapes |= {f"{of}.mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        shapes |= {f"{of}.self_attn.o_proj.weight": (hidden, q), f"{of}.mlp.down_proj.weight": (hidden, ffn)}
        shapes |= {f"{of}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    if not settings.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (96, hidden)
    return {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


class Folder:
    """A checkpoint whose answers are stored under its settings."""

    def __init__(self, path: Path, settings: dict[str, Any], files: dict[str, np.ndarray] | None = None):
        self.path, self.answer_key = path, settings
        path.mkdir()
        (path / "config.json").write_text(json.dumps(settings))
        save_file(files or tensors(settings), path / "model.safetensors")


@stored(whole=True)
def their_logits(folder: Folder, ids: np.ndarray) -> Any:
    """Returns the logits of transformers' Llama or Mistral."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder.path).eval()
    with torch.no_grad():
        return model(torch.tensor(ids)).logits


@pytest.mark.parametrize("name", MODELS)
def test_matches_transformers_llama_and_mistral(tmp_path: Path, name: str) -> None:
    folder = Folder(tmp_path / "model", SIZES | MODELS[name])
    model = Phi3ForCausalLM.from_pretrained(folder.path)
    logits = run(model, input_ids=IDS).logits
    np.testing.assert_allclose(logits, their_logits(folder, IDS), rtol=1e-5, atol=1e-5)
    convert_checkpoint(folder.path, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "phi3"
    assert "attention_bias" not in config
    again = open_checkpoint(tmp_path / "out").source
    assert {key: again.shape(key) for key in again.names()} == {
        key: array.shape for key, array in ((each, ModelSource(model).read(each)) for each in again.names())
    }
    for key in again.names():
        np.testing.assert_array_equal(again.read(key), ModelSource(model).read(key))
    written = Phi3Config.from_pretrained(tmp_path / "out")
    assert written.rope_scaling == as_longrope(model.config).rope_scaling


@pytest.mark.live
@pytest.mark.parametrize("name", ["llama 3", "llama with yarn", "mistral"])
def test_transformers_phi3_reads_what_is_converted(tmp_path: Path, name: str) -> None:
    import torch
    import transformers

    folder = Folder(tmp_path / "model", SIZES | MODELS[name])
    convert_checkpoint(folder.path, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(model).__name__ == "Phi3ForCausalLM"
    with torch.no_grad():
        logits = model(torch.tensor(IDS)).logits
    np.testing.assert_allclose(logits, their_logits(folder, IDS), rtol=1e-5, atol=1e-5)


def test_reads_parts_for_a_mesh(tmp_path: Path) -> None:
    """Every part of every parameter comes from the rows of the right projection."""
    folder = Folder(tmp_path / "model", SIZES | MODELS["llama"]).path
    alone = Phi3ForCausalLM.from_pretrained(folder)
    divided = Phi3ForCausalLM.from_pretrained(folder, mesh=make_mesh({"fsdp": 4, "tensor": 2}))
    for name in ModelSource(alone).names():
        np.testing.assert_array_equal(ModelSource(divided).read(name), ModelSource(alone).read(name))
    source = open_checkpoint(folder).source
    whole = source.read("model.layers.0.self_attn.qkv_proj.weight")
    rows = [slice(40, 80), slice(0, 3), slice(95, 96)]
    part = source.read_part("model.layers.0.self_attn.qkv_proj.weight", rows, slice(5, 9))
    np.testing.assert_array_equal(part, np.concatenate([whole[run, 5:9] for run in rows]))


def test_mixed_dtypes_of_one_projection_are_widened(tmp_path: Path) -> None:
    found = tensors(SIZES)
    name = "model.layers.0.self_attn.k_proj.weight"
    found[name] = found[name].astype(np.float16)
    source = open_checkpoint(Folder(tmp_path / "model", SIZES | MODELS["llama"], found).path).source
    assert source.dtype("model.layers.0.self_attn.qkv_proj.weight") == np.float32
    read = source.read("model.layers.0.self_attn.qkv_proj.weight")
    part = source.read_part("model.layers.0.self_attn.qkv_proj.weight", [slice(0, 96)], slice(0, 48))
    np.testing.assert_array_equal(read, part)
    np.testing.assert_array_equal(read[48:72], found[name].astype(np.float32))


def test_reconfigures_a_llama_checkpoint(tmp_path: Path) -> None:
    """Its weights are converted, not linked."""
    folder = Folder(tmp_path / "model", SIZES | MODELS["llama"]).path
    config = Phi3Config.from_pretrained(folder).replace(rope_scaling={"rope_type": "linear", "factor": 2.0})
    reconfigure_checkpoint(folder, tmp_path / "out", config)
    assert any("qkv_proj" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention_bias": True}, "attention_bias=True of model_type='llama' has no counterpart"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rotary_factor=0.5",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "one kind of attention in all layers"),
        (
            {"model_type": "qwen2"},
            "'qwen2' is not supported; supported: 'phi3', 'llama', 'mistral'",
        ),
        ({"rope_scaling": {"rope_type": "llama4"}}, "llama4"),
    ],
)
def test_rejects_what_phi3_lacks(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Phi3Config.from_dict(SIZES | MODELS["llama"] | changes)


def test_missing_keys_mean_what_transformers_assumes() -> None:
    mistral = Phi3Config.from_dict({"model_type": "mistral"})
    assert (mistral.sliding_window, mistral.num_key_value_heads, mistral.rms_norm_eps) == (4096, 8, 1e-6)
    assert (mistral.pad_token_id, mistral.eos_token_id, mistral.context_length) == (None, 2, 131072)
    llama = Phi3Config.from_dict({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    assert (llama.hidden_size, llama.intermediate_size, llama.num_key_value_heads) == (4096, 11008, 32)
    assert llama.extra["architectures"] == ["Phi3ForCausalLM"]


ATTENTION = "model.layers.1.self_attn"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({f"{ATTENTION}.k_proj.weight": None}, rf"has {ATTENTION}.q_proj.weight, but lacks .*k_proj.weight"),
        ({f"{ATTENTION}.q_proj.bias": (48,)}, r"q_proj.bias: Phi-3 has no biases"),
        (
            {f"{ATTENTION}.q_proj.weight": (24, 48), f"{ATTENTION}.k_proj.weight": (48, 48)},
            "q_proj.weight has",
        ),
        (
            {"model.layers.1.mlp.up_proj.weight": (81, 48)},
            r"has shape \[81, 48\], expected \[80",
        ),
    ],
)
def test_rejects_projections_that_do_not_fit(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    found = tensors(SIZES)
    for name, shape in change.items():
        found.pop(name, None)
        if shape is not None:
            found[name] = np.ones(shape, np.float32)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(Folder(tmp_path / "model", SIZES | MODELS["llama"], found).path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "base_model.model."])
@pytest.mark.parametrize("fused", [True, False])
def test_wrappers_prefixes_are_removed(
    tmp_path: Path, prefix: str, fused: bool, caplog: pytest.LogCaptureFixture
) -> None:
    plain = Folder(tmp_path / "plain", SIZES | MODELS["llama"])
    found = tensors(SIZES)
    if fused:
        convert_checkpoint(plain.path, tmp_path / "fused")
        found = load_file(tmp_path / "fused" / "model.safetensors")
    wrapped = Folder(tmp_path / "wrapped", SIZES | MODELS["llama"], {prefix + k: v for k, v in found.items()})
    source, expected = open_checkpoint(wrapped.path).source, open_checkpoint(plain.path).source
    assert sorted(source.names()) == sorted(expected.names())
    for name in expected.names():
        np.testing.assert_array_equal(source.read(name), expected.read(name))
    with caplog.at_level(logging.INFO):
        Phi3ForCausalLM.from_pretrained(wrapped.path)


def test_a_file_without_tensors_is_an_error_in_time(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "model", SIZES | MODELS["llama"]).path
    save_file({}, folder / "model.safetensors")
    for use in (open_checkpoint, lambda path: convert_checkpoint(path, tmp_path / "out")):
        with pytest.raises(CheckpointError, match="has no tensors"):
            use(folder)
    save_file({"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: model\.embed_tokens\.weight, among a, b"):
        load_abstract(Phi3ForCausalLM, folder)


@pytest.mark.parametrize(
    ("prefix", "extra", "says"),
    [
        ("language_model.", (), "begin with 'language_model.', which no known wrapper adds"),
        ("module.transformer.x.", (), "begin with 'module.transformer.x.', which"),
        (
            "base_model.model.",
            ("layers.0.o_proj.lora_A.weight",),
            "begin with 'base_model.model.'",
        ),
    ],
)
def test_rejects_other_prefixes(tmp_path: Path, prefix: str, extra: tuple[str, ...], says: str) -> None:
    found = tensors(SIZES) | {name: np.ones((2, 2), np.float32) for name in extra}
    folder = Folder(tmp_path / "model", SIZES | MODELS["llama"], {prefix + k: v for k, v in found.items()})
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(folder.path)
