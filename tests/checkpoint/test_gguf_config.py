"""GGUF files: the config and the rope scaling that their metadata describe."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import stored
from gguf_files import (
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    LONG,
    SHORT,
    VOCAB,
    stored_layout,
    weights,
    write_gguf,
)

from phi3_jax.checkpoint.gguf import GGUFSource
from phi3_jax.checkpoint.source import CheckpointError


def test_reads_the_config(tmp_path: Path, llama_file: Path) -> None:
    assert GGUFSource(llama_file).config_dict() == {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 256,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    tied = stored_layout(weights(fused=False))
    del tied["output.weight"]
    source = GGUFSource(write_gguf(tmp_path / "tied.gguf", "llama", tied))
    assert source.config_dict()["tie_word_embeddings"] is True
    assert "lm_head.weight" not in source.names()


def test_reads_head_dim_partial_rotation_and_window(tmp_path: Path) -> None:
    """Two heads of 32 in a model of 128, of which 24 dims rotate; a window of 0 means none."""
    tensors = stored_layout(weights(fused=True))
    for name, value in tensors.items():
        if "attn_qkv" in name:
            tensors[name] = value[: 4 * HEAD_DIM]
        elif "attn_output" in name:
            tensors[name] = np.ascontiguousarray(value[:, : 2 * HEAD_DIM])
    attention = {
        "head_count": 2,
        "head_count_kv": 1,
        "key_length": 32,
        "value_length": 32,
        "sliding_window": 31,
    }
    extra = {f"phi3.attention.{key}": value for key, value in attention.items()}
    extra["phi3.rope.dimension_count"] = 24
    source = GGUFSource(write_gguf(tmp_path / "a.gguf", "phi3", tensors, extra=extra))
    config = source.config_dict()
    assert (config["head_dim"], config["partial_rotary_factor"], config["sliding_window"]) == (32, 0.75, 31)
    assert source.shape("model.layers.0.self_attn.o_proj.weight") == (HIDDEN, 64)
    extra["phi3.attention.sliding_window"] = 0
    config = GGUFSource(write_gguf(tmp_path / "b.gguf", "phi3", tensors, extra=extra)).config_dict()
    assert config["sliding_window"] is None


def test_old_files_get_their_models_window(tmp_path: Path) -> None:
    """Phi-3-mini-4k's first files lack the key: 32 layers and 4096 tokens mean 2047."""
    tensors = stored_layout(weights(fused=True))
    layers = {
        name.replace("blk.0.", f"blk.{i}."): v
        for i in range(32)
        for name, v in tensors.items()
        if ".0." in name
    }
    extra = {"phi3.block_count": 32, "phi3.context_length": 4096}
    path = write_gguf(tmp_path / "a.gguf", "phi3", tensors | layers, extra=extra)
    assert GGUFSource(path).config_dict()["sliding_window"] == 2047


LONGROPE = {
    "rope_factors_long.weight": np.array(LONG, np.float32),
    "rope_factors_short.weight": np.array(SHORT, np.float32),
}


@pytest.mark.parametrize(
    ("attn_factor", "explicit"),
    [(1.1902380714, None), (1.3465735903, 1.3465735903), (None, None)],
    ids=["longrope's own", "early yarn", "absent"],
)
def test_reads_longrope(tmp_path: Path, attn_factor: float | None, explicit: float | None) -> None:
    extra = {
        "phi3.context_length": 131072,
        "phi3.rope.scaling.original_context_length": 4096,
        "phi3.rope.scaling.attn_factor": attn_factor,
    }
    tensors = stored_layout(weights(fused=True)) | LONGROPE
    config = GGUFSource(write_gguf(tmp_path / "a.gguf", "phi3", tensors, extra=extra)).config_dict()
    assert (config["max_position_embeddings"], config["original_max_position_embeddings"]) == (131072, 4096)
    scaling = config["rope_scaling"]
    assert scaling["type"] == "longrope"
    # Shortest decimals: 1.02, not 1.0199999809265137.
    assert scaling["short_factor"] == SHORT
    assert scaling["long_factor"] == pytest.approx(LONG, rel=1e-7)
    assert scaling.get("attention_factor") == (
        None if explicit is None else pytest.approx(explicit, rel=1e-7)
    )


def test_rejects_longrope_without_its_original_length(tmp_path: Path) -> None:
    tensors = stored_layout(weights(fused=True)) | LONGROPE
    with pytest.raises(CheckpointError, match=r"lacks 'phi3\.rope\.scaling\.original_context_length'"):
        GGUFSource(write_gguf(tmp_path / "a.gguf", "phi3", tensors))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 8.0, "original_context_length": 32, "yarn_beta_fast": 16.0},
            {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
        ),
        (
            {"type": "yarn", "original_context_length": 64, "attn_factor": 0.5},
            {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "attention_factor": 0.5693147,
            },
        ),
    ],
    ids=["none", "linear", "yarn", "yarn with attention factor"],
)
def test_reads_rope_scaling(tmp_path: Path, extra: dict[str, object], expected: Any) -> None:
    keys = {f"llama.rope.scaling.{key}": value for key, value in extra.items()}
    path = write_gguf(tmp_path / "a.gguf", "llama", stored_layout(weights(fused=False)), extra=keys)
    scaling = GGUFSource(path).config_dict()["rope_scaling"]
    if scaling is not None:
        assert scaling.pop("type") == expected.pop("type")
        expected = pytest.approx(expected, rel=1e-6)
    assert scaling == expected


@stored
def llama3_frequencies(settings: dict[str, Any]) -> Any:
    """Returns the inverse frequencies of transformers' llama3 rule."""
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**settings), torch.device("cpu"))
    return frequencies


def test_reads_llama3_frequencies_as_longrope_with_one_list(tmp_path: Path) -> None:
    """The frequencies of transformers' llama3 rule survive as factors on the plain ones."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64, "rope_theta": 50000.0}
    expected = llama3_frequencies(
        {
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "max_position_embeddings": 256,
            "rope_parameters": rope,
        }
    )
    plain = 50000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    factors = (plain / expected).astype(np.float32)
    assert factors.max() == pytest.approx(8.0)
    tensors = stored_layout(weights(fused=False)) | {"rope_freqs.weight": factors}
    read = GGUFSource(write_gguf(tmp_path / "a.gguf", "llama", tensors)).config_dict()
    scaling = read["rope_scaling"]
    assert scaling["short_factor"] == scaling["long_factor"]
    assert scaling["attention_factor"] == 1.0
    np.testing.assert_allclose(plain / np.array(scaling["long_factor"]), expected, rtol=1e-6)
