"""Weights as small integers times scales."""

from phi3_jax.quantization.scheme import Quantization
from phi3_jax.quantization.stored import StoredWeight, WeightForm, round_weight
from phi3_jax.quantization.weight import QuantizedWeight

__all__ = ["Quantization", "QuantizedWeight", "StoredWeight", "WeightForm", "round_weight"]
