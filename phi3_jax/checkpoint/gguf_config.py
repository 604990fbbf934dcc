"""Reads a GGUF file's hyperparameters as the contents of Hugging Face's config.json."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from phi3_jax.sources.gguf_file import GGUFFile, shortest_decimal

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that hold parameters of the config's rope entry."""

# Keys that change llama.cpp's forward pass in ways that Phi-3 lacks, and their values without effect.
_FOREIGN_KEYS: dict[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.causal": (True,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "use_parallel_residual": (False,),
}


def read_config(file: GGUFFile) -> dict[str, Any]:
    """Returns the contents of a config.json.

    Raises:
        CheckpointError: a key is missing, or a value does not fit Phi-3.
    """
    for key, neutral in _FOREIGN_KEYS.items():
        if (value := file.metadata(f"{{arch}}.{key}")) is not None and value not in neutral:
            raise file.error(f"{file.architecture}.{key} = {value} has no counterpart in Phi-3's block")
    hidden = file.require("{arch}.embedding_length")
    heads = _same_in_all_layers(file, "{arch}.attention.head_count")
    kv_heads = _same_in_all_layers(file, "{arch}.attention.head_count_kv", heads)
    head_dim = file.metadata("{arch}.attention.key_length", hidden // heads)
    if (value_length := file.metadata("{arch}.attention.value_length", head_dim)) != head_dim:
        raise file.error(
            f"keys of width {head_dim} and values of width {value_length}: Phi-3 has one head_dim"
        )
    rope = read_rope(file, head_dim)
    layers = file.require("{arch}.block_count")
    if layers > len(file.names()):
        raise file.error(
            f"{file.architecture}.block_count = {layers}, but the file has {len(file.names())} tensors"
        )
    config: dict[str, Any] = {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "vocab_size": (file.shape("token_embd.weight") or (0,))[0],
        "hidden_size": hidden,
        "intermediate_size": _same_in_all_layers(file, "{arch}.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": file.require("{arch}.attention.layer_norm_rms_epsilon"),
        **rope,
        "sliding_window": _sliding_window(file, layers, rope["max_position_embeddings"]),
        "tie_word_embeddings": "output.weight" not in file,
        "bos_token_id": file.metadata("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.metadata("tokenizer.ggml.padding_token_id"),
    }
    if head_dim * heads != hidden:
        config["head_dim"] = head_dim
    return config


def read_rope(file: GGUFFile, head_dim: int | None = None) -> dict[str, Any]:
    """Returns the fields of a config.json that are about rope.

    Args:
        file: a model, or a file that has nothing but a rope.
        head_dim: the width of the model's heads; without it, the file must have `rope.dimension_count`, and
            the part of a head that rotates is not checked and not returned.

    Raises:
        CheckpointError: a key is missing, or a value does not fit.
    """
    if head_dim is None:
        rotary = file.require("{arch}.rope.dimension_count")
    else:
        rotary = file.metadata("{arch}.rope.dimension_count", head_dim)
        if file.architecture == "llama" and rotary != head_dim:
            raise file.error(
                f"llama.rope.dimension_count = {rotary}, but heads are {head_dim} wide and all of it rotates"
            )
    context = file.require("{arch}.context_length")
    rope: dict[str, Any] = {
        "max_position_embeddings": context,
        "original_max_position_embeddings": file.metadata(
            "{arch}.rope.scaling.original_context_length", context
        ),
        "rope_theta": file.metadata("{arch}.rope.freq_base", 10000.0),
    }
    if head_dim is not None and rotary != head_dim:
        rope["partial_rotary_factor"] = rotary / head_dim
    return rope | {"rope_scaling": _rope_scaling(file, rope, rotary)}


def _same_in_all_layers(file: GGUFFile, key: str, default: int | None = None) -> int:
    value = file.metadata(key, default) if default is not None else file.require(key)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise file.error(f"{key.replace('{arch}', file.architecture)} differs between layers: {value}")
        return value[0]
    return value


def _sliding_window(file: GGUFFile, layers: int, context: int) -> int | None:
    window = file.metadata("{arch}.attention.sliding_window")
    if window is None and file.architecture == "phi3" and layers in (32, 40) and context == 4096:
        # The file is older than the key; llama.cpp too knows Phi-3-mini-4k and -medium-4k by these sizes.
        return 2047
    return window or None


def _rope_scaling(file: GGUFFile, config: Mapping[str, Any], rotary: int) -> dict[str, Any] | None:
    kind = file.metadata("{arch}.rope.scaling.type", "none")
    factor = file.metadata("{arch}.rope.scaling.factor", file.metadata("{arch}.rope.scale_linear", 0.0))
    attention_factor = file.metadata("{arch}.rope.scaling.attn_factor")
    lists = {}
    for name in ROPE_TENSORS:
        if name not in file:
            continue
        if (shape := file.shape(name)) != (rotary // 2,):
            raise file.error(
                f"tensor {name!r} has {math.prod(shape)} factors; {rotary} rotary dims need {rotary // 2}"
            )
        lists[name] = [shortest_decimal(x) for x in file.values(name).astype(np.float32)]
    if "rope_factors_long.weight" in lists or "rope_factors_short.weight" in lists:
        return _longrope(file, config, lists, attention_factor)
    if (factors := lists.get("rope_freqs.weight")) and set(factors) != {1.0}:
        # Llama 3 divides each frequency by a fixed factor: longrope with twice the same list.
        if kind != "none":
            raise file.error(f"'rope_freqs.weight' together with {kind} rope scaling cannot be expressed")
        return {
            "type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0 if attention_factor is None else attention_factor,
        }
    if kind == "none" and factor in (0.0, 1.0):
        return None
    if kind in ("none", "linear"):
        return {"type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(file, config, factor, attention_factor)
    raise file.error(
        f"rope scaling {kind!r} is not supported here; supported: linear, yarn, longrope with its lists"
    )


def _longrope(
    file: GGUFFile,
    config: Mapping[str, Any],
    lists: Mapping[str, list[float]],
    attention_factor: float | None,
) -> dict[str, Any]:
    for name in ROPE_TENSORS[1:]:
        file.shape(name)  # refuses a file with one of the two lists
    scaling: dict[str, Any] = {
        "type": "longrope",
        "short_factor": lists["rope_factors_short.weight"],
        "long_factor": lists["rope_factors_long.weight"],
    }
    # The length at which the second list takes over has no default.
    original = file.require("{arch}.rope.scaling.original_context_length")
    scale = config["max_position_embeddings"] / original
    implied = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    if attention_factor is not None and not math.isclose(attention_factor, implied, rel_tol=1e-6):
        scaling["attention_factor"] = attention_factor
    return scaling


def _yarn(
    file: GGUFFile, config: Mapping[str, Any], factor: float, attention_factor: float | None
) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "type": "yarn",
        "factor": factor or config["max_position_embeddings"] / config["original_max_position_embeddings"],
        "original_max_position_embeddings": config["original_max_position_embeddings"],
    }
    if attention_factor not in (None, 1.0):
        # llama.cpp multiplies its key with YaRN's own 0.1 ln f + 1.
        scaling["attention_factor"] = attention_factor * (0.1 * math.log(scaling["factor"]) + 1)
    for name in ("beta_fast", "beta_slow"):
        if (value := file.metadata(f"{{arch}}.rope.scaling.yarn_{name}")) is not None:
            scaling[name] = value
    return scaling
