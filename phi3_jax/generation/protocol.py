"""The interface that generation needs of a model; `Phi3ForCausalLM` has it."""

from typing import Any, Protocol

import jax.numpy as jnp

from phi3_jax.cache.cache import KVCache
from phi3_jax.config.generation_config import GenerationConfig
from phi3_jax.config.model_config import Phi3Config


class CausalLM(Protocol):
    """A causal language model: a pytree that maps token ids and a cache to logits and a cache."""

    @property
    def config(self) -> Phi3Config: ...

    @property
    def generation_config(self) -> GenerationConfig: ...

    @property
    def decoder(self) -> Any: ...

    @property
    def on_cpu(self) -> bool: ...

    @property
    def cache_dtype(self) -> jnp.dtype: ...

    def __call__(self, *arguments: Any, **options: Any) -> Any: ...

    def init_cache(
        self, batch_size: int, max_length: int, dtype: Any = None, sliding: bool = False, chunk: int = 512
    ) -> KVCache: ...
