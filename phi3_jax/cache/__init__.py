"""The cache of keys and values, an explicit pytree that goes into a forward and comes out."""

from phi3_jax.cache.cache import KVCache
from phi3_jax.cache.quantized import QuantizedVectors
from phi3_jax.cache.ragged import RaggedVectors

__all__ = ["KVCache", "QuantizedVectors", "RaggedVectors"]
