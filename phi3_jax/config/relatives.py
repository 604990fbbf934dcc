"""Reads the configs of Llama and Mistral as Phi-3's: the same block, with its projections stored apart."""

from collections.abc import Mapping
from typing import Any

from phi3_jax.errors import UserError

# What a config.json without these keys means, for each type of model, where that is not what Phi-3 assumes.
_SAME = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "rms_norm_eps": 1e-6,
    "hidden_size": 4096,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        **_SAME,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        **_SAME,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}

RELATIVES = tuple(_DEFAULTS)
"""Values of `model_type` that are read as Phi-3."""

# Keys that change the model in ways that Phi-3 lacks, and their values without effect.
_FOREIGN: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "pretraining_tp": (1, 2, 4, 8),
    "rope_interleaved": (False,),
}

_CLASS_NAMES = ("Llama", "Mistral")
_ORIGINAL = "original_max_position_embeddings"


def as_phi3(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the contents of a config.json of Llama or Mistral as those of a Phi-3.

    Raises:
        UserError: a value changes the model in a way that Phi-3 lacks.
    """
    kind = mapping["model_type"]
    values = _DEFAULTS[kind] | dict(mapping)
    entries = [
        entry
        for name in ("rope_scaling", "rope_parameters")
        if isinstance(entry := values.get(name), Mapping)
    ]
    for name, neutral in _FOREIGN.items():
        for place in (values, *entries):
            if place.get(name) is not None and place[name] not in neutral:
                raise UserError(
                    f"{name}={place[name]!r:.80} of model_type={kind!r} has no counterpart in Phi-3"
                )
        values.pop(name, None)
    types = values.pop("layer_types", None)
    if isinstance(types, list) and len(set(map(str, types))) > 1:
        raise UserError(f"layer_types={types!r:.80}: Phi-3 has one kind of attention in all layers")
    if kind == "llama":
        values.pop("sliding_window", None)  # Llama has none, whatever its file says
    if all(place.get(_ORIGINAL) is None for place in (values, *entries)):
        values[_ORIGINAL] = values["max_position_embeddings"]
    if isinstance(names := values.get("architectures"), list):
        values["architectures"] = [_class_name(name) for name in names]
    values.pop("auto_map", None)
    return values | {"model_type": "phi3"}


def _class_name(name: Any) -> Any:
    """Returns Phi3ForCausalLM for LlamaForCausalLM."""
    for prefix in _CLASS_NAMES:
        if isinstance(name, str) and name.startswith(prefix):
            return "Phi3" + name.removeprefix(prefix)
    return name
