"""`GenerationConfig`: how tokens are chosen and when to stop."""

from phi3_jax.generation_config.config import GENERATION_CONFIG_NAME, GenerationConfig, ResolvedGeneration

__all__ = ["GENERATION_CONFIG_NAME", "GenerationConfig", "ResolvedGeneration"]
