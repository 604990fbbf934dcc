"""Block-sparse attention in plain JAX, over the keys near a query and the stripe of blocks of its head."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from phi3_jax.config.block_pattern import BlockPattern
from phi3_jax.model.kernels.block_splash import with_tokens_first
from phi3_jax.model.kernels.xla import Attended, by_query_blocks
from phi3_jax.model.masks import CausalMask
from phi3_jax.sizes import ceil_div

QUERY_BLOCK = 128
"""Queries attended at a time, in whole blocks of the pattern, of which there is at least one."""

_LEAST = float(jnp.finfo(jnp.float32).min)


def fits(mask: CausalMask) -> bool:
    """Whether the mask is a block-sparse prefill's, so long that this is faster than `xla_attention`."""
    blocks, length, slots = mask.blocks, mask.query_slots.shape[1], mask.key_mask.shape[1]
    if blocks is None or not mask.prefill or mask.key_segments is not None or mask.window is not None:
        return False
    # A device that has some of the queries of a mesh has more keys.
    return length == slots and length >= 2 * blocks.pattern.dense_length


def striped_attention(
    query: Float[Array, "B T K G H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    mask: CausalMask,
    *,
    scale: float,
) -> Float[Array, "B T K G H"]:
    """Softmax attention of a block-sparse prefill, scores and softmax in float32.

    The far blocks that a head sees are one of each `stride`. Each query head has a copy of its own, which
    takes 1 / `stride` of the memory of the queries. Arguments are as in `xla_attention`, with a mask that
    `fits`. Padding queries get zeros.
    """
    blocks = mask.blocks
    assert blocks is not None
    attend = partial(_attend, mask=mask, shifts=blocks.shifts, pattern=blocks.pattern, scale=scale)
    return with_tokens_first(attend, query, key.astype(query.dtype), value.astype(query.dtype), mask.key_mask)


def _attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: CausalMask,
    shifts: Int[Array, "K G"],
    pattern: BlockPattern,
    scale: float,
) -> Array:
    """Attends in rows whose padding comes last: slots are positions, and causality hides the padding."""
    length = query.shape[1]
    size = pattern.size * max(QUERY_BLOCK // pattern.size, 1)
    before = (pattern.local - 1) * pattern.size  # the keys near to the first query of a block of queries
    widths = ((0, 0), (0, 0), (before, -length % size), (0, 0))
    near_keys, near_values = jnp.pad(key, widths), jnp.pad(value, widths)
    phases = (-1 - shifts) % pattern.stride  # [K, G], the first block of each stripe
    count = ceil_div(ceil_div(length, pattern.size) - pattern.local, pattern.stride)
    far_keys, far_values = (_stripes(x, phases, count, pattern) for x in (key, value))
    far_blocks = phases[..., None] + pattern.stride * jnp.arange(count, dtype=jnp.int32)
    far_blocks = jnp.repeat(far_blocks, pattern.size, axis=-1)[:, :, None]  # [K, G, 1, far]

    @jax.checkpoint
    def attend_block(index: Array, queries: Array, _: Any) -> Attended:
        first = index * size
        slots = first + jnp.arange(size, dtype=jnp.int32)[:, None]
        key_slots = first - before + jnp.arange(before + size, dtype=jnp.int32)
        query_blocks = slots // pattern.size
        is_near = (key_slots <= slots) & (key_slots >= 0)
        is_near &= query_blocks - key_slots // pattern.size < pattern.local  # [size, near]
        is_far = query_blocks - far_blocks >= pattern.local  # [K, G, size, far]
        keys, values = (
            jax.lax.dynamic_slice_in_dim(x, first, before + size, axis=2) for x in (near_keys, near_values)
        )
        dots: Any = {"preferred_element_type": jnp.float32}
        folded = queries.transpose(0, 2, 3, 1, 4)  # XLA on a CPU is slower without this step
        near = jnp.einsum("BKGTH,BKSH->BKGTS", folded, keys, **dots)
        far = jnp.einsum("BKGTH,BKGSH->BKGTS", folded, far_keys, **dots)
        scores = [jnp.where(is_near, near * scale, _LEAST), jnp.where(is_far, far * scale, _LEAST)]
        weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(queries.dtype)
        near, far = jnp.split(weights, [before + size], axis=-1)
        out = jnp.einsum("BKGTS,BKSH->BKGTH", near, values, **dots)
        out += jnp.einsum("BKGTS,BKGSH->BKGTH", far, far_values, **dots)
        return Attended(out.astype(queries.dtype).transpose(0, 3, 1, 2, 4), None, None)

    return by_query_blocks(attend_block, query, mask, size).out


def _stripes(
    vectors: Float[Array, "B K S H"], phases: Int[Array, "K G"], count: int, pattern: BlockPattern
) -> Float[Array, "B K G far H"]:
    """Returns the blocks `phase`, `phase` + stride, ... of each head, so many of them."""
    batch, kv_heads, length, width = vectors.shape
    slots = count * pattern.stride * pattern.size
    padded = jnp.pad(vectors[:, :, :slots], ((0, 0), (0, 0), (0, max(slots - length, 0)), (0, 0)))
    blocks = padded.reshape(batch, kv_heads, 1, count, pattern.stride, pattern.size, width)
    # A sum in which one term is not 0: its gradient needs no scatter.
    is_own = phases[:, :, None] == jnp.arange(pattern.stride, dtype=jnp.int32)  # [K, G, stride]
    stripes = jnp.where(is_own[:, :, None, :, None, None], blocks, 0).sum(axis=4)
    return stripes.reshape(batch, kv_heads, phases.shape[1], count * pattern.size, width)
