"""Rope scalings in the formats of transformers, llama.cpp and vLLM, in both directions."""

from phi3_jax.rope_lab.interchange.gguf import gguf_rope, write_gguf_rope
from phi3_jax.rope_lab.interchange.reading import read_rope
from phi3_jax.rope_lab.interchange.transformers import transformers_fields
from phi3_jax.rope_lab.interchange.vllm import hf_overrides

__all__ = ["gguf_rope", "hf_overrides", "read_rope", "transformers_fields", "write_gguf_rope"]
