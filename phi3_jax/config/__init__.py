"""Configurations of models, of rope and of generation, and those of published models."""

from phi3_jax.config.generation_config import GenerationConfig
from phi3_jax.config.layer_frequencies import LayerFrequencies
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.phi3small_config import Phi3SmallConfig
from phi3_jax.config.rope_scaling import RopeScaling
from phi3_jax.config.rope_types import rope_type

__all__ = [
    "GenerationConfig",
    "LayerFrequencies",
    "Phi3Config",
    "Phi3SmallConfig",
    "RopeScaling",
    "rope_type",
]
