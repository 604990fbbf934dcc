"""The Phi-3 family in JAX and Flax: models, rope scalings, conversion, generation that match transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi3_jax.cache import KVCache
    from phi3_jax.checkpoint import CheckpointError, convert_checkpoint
    from phi3_jax.config import (
        GenerationConfig,
        LayerFrequencies,
        Phi3Config,
        Phi3SmallConfig,
        RopeScaling,
        rope_type,
    )
    from phi3_jax.model import (
        Phi3ForCausalLM,
        Phi3ForSequenceClassification,
        Phi3ForTokenClassification,
        Phi3Model,
        Phi3SmallForCausalLM,
        Phi3SmallForSequenceClassification,
        Phi3SmallForTokenClassification,
        Phi3SmallModel,
    )
    from phi3_jax.parallel.sharding import make_mesh
    from phi3_jax.quantization import Quantization
    from phi3_jax.tokenizer import Phi3Tokenizer

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "GenerationConfig",
    "KVCache",
    "LayerFrequencies",
    "Phi3Config",
    "Phi3ForCausalLM",
    "Phi3ForSequenceClassification",
    "Phi3ForTokenClassification",
    "Phi3Model",
    "Phi3SmallConfig",
    "Phi3SmallForCausalLM",
    "Phi3SmallForSequenceClassification",
    "Phi3SmallForTokenClassification",
    "Phi3SmallModel",
    "Phi3Tokenizer",
    "Quantization",
    "RopeScaling",
    "convert_checkpoint",
    "make_mesh",
    "rope_type",
]

_MODULES = {
    "CheckpointError": "errors",
    "GenerationConfig": "config",
    "KVCache": "cache",
    "LayerFrequencies": "config",
    "Phi3Config": "config",
    "Phi3SmallConfig": "config",
    "Phi3Tokenizer": "tokenizer",
    "Quantization": "quantization",
    "RopeScaling": "config",
    "convert_checkpoint": "checkpoint",
    "make_mesh": "parallel.sharding",
    "rope_type": "config",
}
"""The module of each name; the others are in `model`."""


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used, so that the tokenizer and `--help` need not wait for JAX."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'model')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
