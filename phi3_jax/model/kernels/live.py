"""Attention of many queries over a cache, in plain JAX: in blocks, and only of keys that some query sees."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from phi3_jax.model.kernels.xla import Attended, by_query_blocks
from phi3_jax.model.masks import CausalMask

QUERY_BLOCK = 256
KEY_BLOCK = 512
"""What CPU caches hold, scores included, and what makes products large enough; found by trying."""

LEAST_QUERIES = 32
"""Fewer attend to all columns at once faster."""

_LEAST = float(jnp.finfo(jnp.float32).min)


def live_attention(
    query: Float[Array, "B T K G H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: CausalMask,
    *,
    scale: float,
) -> Attended:
    """Softmax attention with running maximum and sum (arXiv:2112.05682), scores and sums in float32.

    The time goes with the keys that are seen, not with the columns of the cache, and no more scores are kept
    than those of a block. Arguments as in `xla_attention`; it has no gradient.
    """
    attend = partial(_attend, key=key, value=value, scale=scale)
    if query.shape[1] <= QUERY_BLOCK:
        return attend(None, query, mask)
    return by_query_blocks(attend, query, mask, QUERY_BLOCK)


def _attend(
    index: Any, query: Array, mask: CausalMask, *, key: Array, value: Array, scale: float
) -> Attended:
    batch, length, kv_heads, groups, width = query.shape
    columns = key.shape[2]
    size = min(KEY_BLOCK, columns)
    folded = query.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, groups * length, width)
    begin, end = _live_blocks(mask, size)

    def add(block: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, most, total = sums
        at = jnp.minimum(block * size, columns - size)  # the last block lies over the one before it

        def cut(x: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, at, size, axis)

        keys, values = (cut(x, 2).astype(query.dtype) for x in (key, value))
        segments = None if mask.key_segments is None else cut(mask.key_segments, 1)
        counted = at + jnp.arange(size) >= block * size
        visible = replace(
            mask,
            key_slots=cut(mask.key_slots, 1),
            key_mask=cut(mask.key_mask, 1) & counted,
            key_segments=segments,
        ).dense()
        scores = jnp.einsum("BKRH,BKSH->BKRS", folded, keys, preferred_element_type=jnp.float32)
        scores = scores.reshape(batch, kv_heads, groups, length, size) * scale
        scores = jnp.where(visible[:, :, None], scores, _LEAST).reshape(batch, kv_heads, -1, size)
        higher = jnp.maximum(most, jnp.max(scores, axis=-1, keepdims=True))
        weights, fading = jnp.exp(scores - higher), jnp.exp(most - higher)
        attended = jnp.einsum(
            "BKRS,BKSH->BKRH", weights.astype(query.dtype), values, preferred_element_type=jnp.float32
        )
        return out * fading + attended, higher, total * fading + jnp.sum(weights, axis=-1, keepdims=True)

    ones = jnp.ones((batch, kv_heads, groups * length, 1), jnp.float32)
    nothing = jnp.zeros((*ones.shape[:3], width), jnp.float32), ones * _LEAST, ones * 0
    out, most, total = jax.lax.fori_loop(begin, end, add, nothing)
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    out = (out / total).astype(query.dtype).reshape(batch, kv_heads, groups, length, width)
    return Attended(
        out.transpose(0, 3, 1, 2, 4), None, (most + jnp.log(total)).reshape(batch, kv_heads * groups, length)
    )


def _live_blocks(mask: CausalMask, size: int) -> tuple[Array, Array]:
    """The first block of keys with one that any query may see, and the one behind the last."""
    seen = mask.key_mask & (mask.key_slots <= jnp.max(mask.query_slots, axis=1, keepdims=True))
    if mask.window is not None:
        seen &= mask.key_slots > jnp.min(mask.query_slots, axis=1, keepdims=True) - mask.window
    columns = jnp.arange(seen.shape[1], dtype=jnp.int32)
    first = jnp.min(jnp.where(seen, columns, seen.shape[1]))
    last = jnp.max(jnp.where(seen, columns, -1))
    return first // size, last // size + 1
