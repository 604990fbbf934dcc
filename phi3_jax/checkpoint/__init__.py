"""Checkpoint formats: safetensors and GGUF, quantized weights, the Hub, conversion. Builds no model."""

from phi3_jax.checkpoint.convert import convert_checkpoint
from phi3_jax.checkpoint.opening import Checkpoint, open_checkpoint
from phi3_jax.checkpoint.quantize import quantize_checkpoint
from phi3_jax.checkpoint.source import CheckpointError, TensorSource
from phi3_jax.sources.hub import resolve

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "TensorSource",
    "convert_checkpoint",
    "open_checkpoint",
    "quantize_checkpoint",
    "resolve",
]
