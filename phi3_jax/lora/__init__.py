"""Low-rank adapters on a model's projections, and their files in PEFT's format."""

from phi3_jax.lora.adapted import ModelPaths, find_model, load_merged, open_model
from phi3_jax.lora.adapters import LoRA, add_lora, merge_lora
from phi3_jax.lora.merging import save_merged
from phi3_jax.lora.peft_files import check_adapters, load_adapters, save_adapters

__all__ = [
    "LoRA",
    "ModelPaths",
    "add_lora",
    "check_adapters",
    "find_model",
    "load_adapters",
    "load_merged",
    "merge_lora",
    "open_model",
    "save_adapters",
    "save_merged",
]
