"""The Phi-3 family in JAX and Flax: models, rope scalings, conversion, generation that match transformers."""

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
