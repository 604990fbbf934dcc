"""The Phi-3 family in JAX and Flax: models, rope scalings, conversion, generation that match transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi3_jax.checkpoint import CheckpointError, convert_checkpoint
    from phi3_jax.config import Phi3Config
    from phi3_jax.generation_config import GenerationConfig
    from phi3_jax.model import (
        KVCache,
        Phi3ForCausalLM,
        Phi3ForSequenceClassification,
        Phi3ForTokenClassification,
        Phi3Model,
    )
    from phi3_jax.rope_scaling import RopeScaling, rope_type
    from phi3_jax.sharding import make_mesh
    from phi3_jax.tokenizer import Phi3Tokenizer

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "GenerationConfig",
    "KVCache",
    "Phi3Config",
    "Phi3ForCausalLM",
    "Phi3ForSequenceClassification",
    "Phi3ForTokenClassification",
    "Phi3Model",
    "Phi3Tokenizer",
    "RopeScaling",
    "convert_checkpoint",
    "make_mesh",
    "rope_type",
]

_MODULES = {
    "CheckpointError": "checkpoint",
    "GenerationConfig": "generation_config",
    "Phi3Config": "config",
    "Phi3Tokenizer": "tokenizer",
    "RopeScaling": "rope_scaling",
    "convert_checkpoint": "checkpoint",
    "make_mesh": "sharding",
    "rope_type": "rope_scaling",
}
"""Where a name comes from; the others are from `model`."""


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used, so that the tokenizer and `--help` need not wait for JAX."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'model')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
