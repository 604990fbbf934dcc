"""Low-rank adapters on a model's projections, and their files in PEFT's format."""

from phi3_jax.lora.adapters import LoRA, add_lora, merge_lora
from phi3_jax.lora.peft_files import load_adapters, save_adapters

__all__ = ["LoRA", "add_lora", "load_adapters", "merge_lora", "save_adapters"]
