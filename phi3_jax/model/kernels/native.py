"""The C++ library's attention, for a CPU."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from phi3_jax.cache.quantized import QuantizedVectors
from phi3_jax.model.kernels.xla import Attended
from phi3_jax.model.masks import CausalMask
from phi3_jax.native.attention import NO_KEY, VisibleBlocks, attention, can_attend


def fits(query: Float[Array, "B T K G H"], key: Any, mask: CausalMask) -> bool:
    """Whether the library takes these queries, keys and masks, and is faster than XLA."""
    is_narrow = isinstance(key, QuantizedVectors) or key.dtype == jnp.bfloat16
    is_float = query.dtype in (jnp.float32, jnp.bfloat16)
    return is_narrow and is_float and mask.key_segments is None and can_attend(query.shape[-1])


def native_attention(
    query: Float[Array, "B T K G H"],
    key: Float[Array, "B K S H"] | QuantizedVectors,
    value: Float[Array, "B K S H"] | QuantizedVectors,
    mask: CausalMask,
    *,
    scale: float,
) -> Attended:
    """Softmax attention that reads only blocks of keys that some query may see; it has no gradient.

    Arguments are as in `xla_attention`. A query without a visible key gets zeros.
    """
    options: dict[str, Any] = {"scale": scale, "window": mask.window}
    if isinstance(key, QuantizedVectors):
        options["key_scale"], key = key.scale, key.values
    if isinstance(value, QuantizedVectors):
        options["value_scale"], value = value.scale, value.values
    if (blocks := mask.blocks) is not None:
        pattern = blocks.pattern
        arrays = blocks.query_positions, blocks.key_positions, blocks.shifts
        options["blocks"] = VisibleBlocks(*arrays, pattern.size, pattern.local, pattern.stride)
    key_slots = jnp.broadcast_to(jnp.where(mask.key_mask, mask.key_slots, NO_KEY), mask.key_mask.shape)
    out, lse = attention(query, key, value, mask.query_slots, key_slots, **options)
    return Attended(out, None, lse.reshape(*lse.shape[:2], -1).swapaxes(1, 2))
