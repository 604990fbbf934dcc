"""Generation: one compiled step, and loops around it."""

from phi3_jax.generation.step import CompiledModel, Sampling
from phi3_jax.generation.stream import stream_tokens

__all__ = ["CompiledModel", "Sampling", "stream_tokens"]
