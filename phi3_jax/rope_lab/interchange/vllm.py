"""Rope scalings as vLLM's `--hf-overrides`."""

import json
import math
import shlex
from collections.abc import Mapping
from typing import Any

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.rope_lab.interchange.factors import rope_factors
from phi3_jax.rope_lab.interchange.transformers import check_family, native_entry

_YARN_DEFAULTS = ("attention_factor", "mscale", "mscale_all_dim", "truncate")
"""Keys of YaRN that some versions of vLLM do not read; they are left out where they have no effect."""


def hf_overrides(config: Phi3Config, model_type: str = "phi3") -> dict[str, Any]:
    """Returns the value of `vllm serve --hf-overrides`, which replaces fields of a model's config.

    Longrope's attention factors are written as `short_mscale` and `long_mscale`, because vLLM does not read
    `attention_factor` there. A YaRN whose attention factor is not the paper's becomes longrope with the same
    frequencies, because versions of vLLM differ in the name of that factor. vLLM chooses the long list for
    all texts if its `--max-model-len` is above the original length.

    Raises:
        UserError: vLLM cannot express the rope, or the config is of another family.
    """
    check_family(config, model_type)
    scaling = config.rope_scaling
    lengths: dict[str, Any] = {"max_position_embeddings": config.max_position_embeddings}
    shared: dict[str, Any] = {"rope_theta": config.rope_theta}
    if model_type == "phi3":  # transformers' check of Phi-3's entry, which vLLM runs, asks for it
        shared["partial_rotary_factor"] = config.partial_rotary_factor
    if scaling.rope_type == "default" or (model_type == "llama" and _is_native(config)):
        entry = {key: value for key, value in native_entry(config).items() if key not in _YARN_DEFAULTS}
        return {"rope_parameters": entry | shared} | lengths
    if scaling.rope_type == "dynamic":
        raise UserError(
            "vLLM computes rope type 'dynamic' for its longest text, whatever a text's length; use yarn or "
            "longrope"
        )
    factors = rope_factors(config, "vLLM")
    original = {"original_max_position_embeddings": config.original_max_position_embeddings}
    entry = {
        "rope_type": "longrope",
        "short_factor": list(factors.short),
        "long_factor": list(factors.long),
        "short_mscale": factors.short_attention,
        "long_mscale": factors.long_attention,
    }
    if factors.short_attention == factors.long_attention:
        entry["attention_factor"] = factors.long_attention  # for vLLM's models that run in transformers
    return {"rope_parameters": entry | original | shared} | original | lengths


def serve_command(model: str, overrides: Mapping[str, Any], context: int) -> str:
    """Returns the command line that serves a model with the overrides, for a shell.

    Args:
        model: the model as vLLM names it.
        context: the longest text in tokens.
    """
    value = json.dumps(overrides, separators=(",", ":"))
    arguments = ["vllm", "serve", model, "--max-model-len", str(context), "--hf-overrides", value]
    return shlex.join(arguments)


def _is_native(config: Phi3Config) -> bool:
    """Whether all versions of vLLM compute the type as we do."""
    if config.rope_scaling.rope_type in ("linear", "llama3"):
        return True
    if config.rope_scaling.rope_type != "yarn":
        return False
    entry = native_entry(config)
    attention_factor = rope_factors(config, "vLLM").long_attention
    papers = 0.1 * math.log(entry["factor"]) + 1
    return entry.get("truncate", True) and math.isclose(attention_factor, papers, rel_tol=1e-9)
