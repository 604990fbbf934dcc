"""Weights as small integers times scales; what needs JAX is in `weight` and `product`."""

from phi3_jax.quantization.scheme import FLOATS, Quantization, WeightForm
from phi3_jax.quantization.stored import StoredWeight, round_weight

__all__ = ["FLOATS", "Quantization", "StoredWeight", "WeightForm", "round_weight"]
