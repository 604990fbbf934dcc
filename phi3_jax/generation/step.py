"""One compiled step, prefill and decode alike: new tokens in, the next token and the updated cache out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from phi3_jax.generation.sampling import next_token
from phi3_jax.model import KVCache, Phi3ForCausalLM

PREFILL_CHUNK = 512
"""Prompt tokens computed at a time, so that a prompt's activations are bounded."""


class Sampling(NamedTuple):
    """How tokens are chosen; a temperature of 0 takes the most likely one. See `sampling.filter_logits`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> None:
        """Raises ValueError, naming the setting that cannot be."""
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is negative; 0 takes the most likely token")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} is negative; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not in (0, 1]; 1 keeps every token")


class CompiledModel:
    """A model ready to run: taken apart once, its forward compiled for a donated cache.

    A step compiles once for each number of new tokens and each cache size, not for each length.
    """

    def __init__(self, model: Phi3ForCausalLM):
        self.model = model
        self._leaves, structure = jax.tree.flatten(model)

        def step(leaves, ids, mask, cache, rope_length, key, sampling):
            model: Phi3ForCausalLM = jax.tree.unflatten(structure, leaves)
            out = model(
                ids,
                mask,
                past_key_values=cache,
                rope_length=jnp.maximum(rope_length, cache.rope_length),
                logits_to_keep=1,
            )
            return next_token(out.logits[:, -1], key, *sampling), out.past_key_values

        self._step = jax.jit(step, donate_argnames="cache")

    def step(
        self,
        ids: Int[Array | np.ndarray, "B T"],
        mask: Int[Array | np.ndarray, "B T"],
        cache: KVCache,
        rope_length: Int[Array | np.ndarray, " B"],
        key: Key[Array, ""] | None,
        sampling: Sampling,
    ) -> tuple[Int[Array, " B"], KVCache]:
        """Feeds `ids` and gives each row's next token; the cache that went in is gone afterwards.

        `rope_length` is the length that chooses each row's rope list, when it is more than the cache's.
        """
        settings = () if key is None else tuple(sampling)
        return self._step(self._leaves, ids, mask, cache, rope_length, key, settings)

    def prefill(
        self,
        ids: Int[np.ndarray, " T"],
        max_length: int,
        key: Key[Array, ""] | None,
        sampling: Sampling,
    ) -> tuple[Int[Array, " 1"], KVCache]:
        """Computes one prompt in chunks and gives its next token; the cache has room for `max_length` tokens.

        The prompt is padded on the left to whole chunks, or to a power of two below a chunk, and the cache to
        a few sizes, so that prompts of any length share a handful of compiled programs.
        """
        length = len(ids)
        padded = padded_length(length)
        chunk = min(padded, PREFILL_CHUNK)
        row = np.zeros((1, padded), np.int32)
        row[0, padded - length :] = ids
        mask = (np.arange(padded) >= padded - length)[None].astype(np.int32)
        cache = self.model.init_cache(1, cache_length(padded + max_length - length))
        rope_length = np.full((1,), length, np.int32)
        token = jnp.zeros((1,), jnp.int32)
        for start in range(0, padded, chunk):
            part = slice(start, start + chunk)
            token, cache = self.step(row[:, part], mask[:, part], cache, rope_length, key, sampling)
        return token, cache


def padded_length(length: int) -> int:
    """The smallest power of two from 16, or number of whole chunks, that holds `length` tokens."""
    if length > PREFILL_CHUNK:
        return -(-length // PREFILL_CHUNK) * PREFILL_CHUNK
    return max(16, 1 << (length - 1).bit_length())


def cache_length(slots: int) -> int:
    """The cache size for `slots`: in steps of 128 up to 1,024, above in eighths of the next power of two."""
    step = max(128, 1 << max((slots - 1).bit_length() - 3, 0))
    return -(-slots // step) * step
