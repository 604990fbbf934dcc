"""Rope scalings as the fields of a `config.json` that transformers 4 and 5 read."""

import math
from typing import Any

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.rope_types import ROPE_TYPES, attention_by_growth
from phi3_jax.errors import UserError
from phi3_jax.rope_lab.interchange.factors import rope_factors

MODEL_TYPES = ("phi3", "llama")
"""Values of `model_type` whose spelling of ropes is known."""

NATIVE = ("linear", "dynamic", "yarn", "llama3")
"""Types besides longrope that transformers reads for Llama and its relatives, with our parameters."""


def transformers_fields(config: Phi3Config, model_type: str = "phi3") -> dict[str, Any]:
    """Returns the fields of a `config.json` that are about rope.

    They are `rope_scaling`, which both transformers 4 and 5 read, `rope_theta` and the lengths. For Phi-3 the
    rope is longrope, the only scaling that transformers has there. An attention factor that does not follow
    from the growth of the context is `attention_factor`, which transformers 4 refuses for Phi-3. For Llama
    and its relatives other types keep their names, if transformers knows them.

    Raises:
        UserError: transformers cannot express the rope, or the config is of another family.
    """
    check_family(config, model_type)
    scaling = config.rope_scaling
    fields: dict[str, Any] = {
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
    }
    if config.partial_rotary_factor != 1:
        fields["partial_rotary_factor"] = config.partial_rotary_factor
    if scaling.rope_type == "default":
        return {"rope_scaling": None} | fields
    if model_type == "llama" and scaling.rope_type in NATIVE:
        return {"rope_scaling": native_entry(config)} | fields
    factors = rope_factors(config, f"transformers for {model_type}")
    original = config.original_max_position_embeddings
    entry: dict[str, Any] = {
        # transformers 4 asks for `type` in Phi-3, and prefers `rope_type` elsewhere.
        "type" if model_type == "phi3" else "rope_type": "longrope",
        "short_factor": list(factors.short),
        "long_factor": list(factors.long),
    }
    own = attention_by_growth(config.rope_base.extension, original)
    if not math.isclose(factors.attention, own, rel_tol=1e-7):
        entry["attention_factor"] = factors.attention
    if model_type != "phi3":
        entry["original_max_position_embeddings"] = original
    return {"rope_scaling": entry, "original_max_position_embeddings": original} | fields


def native_entry(config: Phi3Config) -> dict[str, Any]:
    """Returns a rope entry under its own type, with the parameters that other programs require."""
    scaling, base = config.rope_scaling, config.rope_base
    entry: dict[str, Any] = {"rope_type": scaling.rope_type}
    keys = ROPE_TYPES[scaling.rope_type].keys
    entry |= {key: value for key, value in scaling.parameters if key in keys}
    if scaling.original_in_entry:
        original = entry.setdefault("original_max_position_embeddings", base.original_max_position_embeddings)
        entry.setdefault("factor", base.max_position_embeddings / original)
    return entry


def check_family(config: Phi3Config, model_type: str) -> None:
    """Checks that a config is of Phi-3's block, and fits the model type that it is written for.

    Raises:
        UserError: it does not.
    """
    if config.model_type != Phi3Config.model_type:
        raise UserError(
            f"model_type={config.model_type!r}: its rope has no other format than its own config.json; only "
            "models with Phi-3's block can be exported"
        )
    if model_type not in MODEL_TYPES:
        raise UserError(f"model_type={model_type!r} must be one of {', '.join(MODEL_TYPES)}")
    if model_type == "llama" and config.partial_rotary_factor != 1:
        raise UserError(
            f"partial_rotary_factor={config.partial_rotary_factor}: all dims of a Llama rotate; use model "
            "type phi3"
        )
