"""Checkpoints: Hugging Face safetensors to and from a model, GGUF to a model, names to files."""

from phi3_jax.checkpoint.adapters import load_adapters, save_adapters
from phi3_jax.checkpoint.convert import convert_checkpoint
from phi3_jax.checkpoint.default_model import default_model
from phi3_jax.checkpoint.hub import resolve
from phi3_jax.checkpoint.load import load_abstract, load_model, open_checkpoint
from phi3_jax.checkpoint.save import save_model
from phi3_jax.checkpoint.source import CheckpointError, TensorSource

__all__ = [
    "CheckpointError",
    "TensorSource",
    "convert_checkpoint",
    "default_model",
    "load_abstract",
    "load_adapters",
    "load_model",
    "open_checkpoint",
    "resolve",
    "save_adapters",
    "save_model",
]
