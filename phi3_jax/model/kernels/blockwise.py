"""Blockwise attention of many queries over a cache, in plain JAX; it skips keys that no query sees."""

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
"""Sizes that fit into CPU caches, scores included, and make products large enough; found by experiment."""

LEAST_QUERIES = 32
"""Fewer queries are faster with all slots at once."""

_LEAST = float(jnp.finfo(jnp.float32).min)


def blockwise_attention(
    query: Float[Array, "B T K G H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: CausalMask,
    *,
    scale: float,
) -> Attended:
    """Softmax attention with running maximum and sum (arXiv:2112.05682), scores and sums in float32.

    The time grows with the visible keys, not with the slots of the cache, and only one block's scores are
    kept. Arguments are as in `xla_attention`; it has no gradient.
    """
    attend = partial(_attend, key=key, value=value, scale=scale)
    if query.shape[1] <= QUERY_BLOCK:
        return attend(None, query, mask)
    return by_query_blocks(attend, query, mask, QUERY_BLOCK)


def _attend(
    index: Any, query: Array, mask: CausalMask, *, key: Array, value: Array, scale: float
) -> Attended:
    batch, length, kv_heads, groups, width = query.shape
    slots = key.shape[2]
    size = min(KEY_BLOCK, slots)
    folded = query.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, groups * length, width)
    begin, end = _visible_blocks(mask, size)

    def add(block: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, maximum, total = sums
        at = jnp.minimum(block * size, slots - size)  # the last block overlaps the one before it

        def cut(x: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, at, size, axis)

        keys, values = (cut(x, 2).astype(query.dtype) for x in (key, value))
        segments = None if mask.key_segments is None else cut(mask.key_segments, 1)
        is_new = at + jnp.arange(size, dtype=jnp.int32)[None] >= block * size
        visible = replace(
            mask,
            key_slots=cut(mask.key_slots, 1),
            key_mask=cut(mask.key_mask, 1) & is_new,
            key_segments=segments,
        ).dense()
        scores = jnp.einsum("BKRH,BKSH->BKRS", folded, keys, preferred_element_type=jnp.float32)
        scores = scores.reshape(batch, kv_heads, groups, length, size) * scale
        scores = jnp.where(visible[:, :, None], scores, _LEAST).reshape(batch, kv_heads, -1, size)
        new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1, keepdims=True))
        weights, decay = jnp.exp(scores - new_maximum), jnp.exp(maximum - new_maximum)
        attended = jnp.einsum(
            "BKRS,BKSH->BKRH", weights.astype(query.dtype), values, preferred_element_type=jnp.float32
        )
        total = total * decay + jnp.sum(weights, axis=-1, keepdims=True)
        return out * decay + attended, new_maximum, total

    ones = jnp.ones((batch, kv_heads, groups * length, 1), jnp.float32)
    start = jnp.zeros((*ones.shape[:3], width), jnp.float32), ones * _LEAST, ones * 0
    out, maximum, total = jax.lax.fori_loop(begin, end, add, start)
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    out = (out / total).astype(query.dtype).reshape(batch, kv_heads, groups, length, width)
    return Attended(
        out.transpose(0, 3, 1, 2, 4),
        None,
        (maximum + jnp.log(total)).reshape(batch, kv_heads * groups, length),
    )


def _visible_blocks(mask: CausalMask, size: int) -> tuple[Array, Array]:
    """Returns the first block with a key that some query may see, and the one after the last such."""
    visible = mask.key_mask & (mask.key_slots <= jnp.max(mask.query_slots, axis=1, keepdims=True))
    if mask.window is not None:
        visible &= mask.key_slots > jnp.min(mask.query_slots, axis=1, keepdims=True) - mask.window
    slots = jnp.arange(visible.shape[1], dtype=jnp.int32)[None]
    first = jnp.min(jnp.where(visible, slots, visible.shape[1]))
    last = jnp.max(jnp.where(visible, slots, -1))
    return first // size, last // size + 1
