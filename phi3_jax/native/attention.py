"""Attends over a cache with the C++ library."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Float32, Int32, Num

from phi3_jax.native.targets import ATTENTION, available, variant
from phi3_jax.sizes import INT32_MAX

NO_KEY = INT32_MAX
"""The slot of a key that no query sees."""

WIDTHS = 16
"""The width of a head is a multiple of this."""


class VisibleBlocks(NamedTuple):
    """The blocks of keys that each query head sees, as in `SparseBlocks`.

    The position of a key is that of the slot before it, or one more.
    """

    query_positions: Int32[Array, "B T"]
    key_positions: Int32[Array, "B S"]
    shifts: Int32[Array, "K G"]
    size: int
    local: int
    stride: int


def can_attend(width: int) -> bool:
    """Whether `attention` takes heads of this width, and is faster than XLA here.

    This was measured on x86. On Arm it is assumed, because XLA copies the cache there, too.
    """
    return width % WIDTHS == 0 and available() and variant() != "portable"


def attention(
    query: Float[Array, "B T K G H"],
    key: Num[Array, "B K S H"],
    value: Num[Array, "B K S H"],
    query_slots: Int32[Array, "B T"],
    key_slots: Int32[Array, "B S"],
    *,
    scale: float,
    window: int | None = None,
    key_scale: BFloat16[Array, "B K S"] | None = None,
    value_scale: BFloat16[Array, "B K S"] | None = None,
    blocks: VisibleBlocks | None = None,
) -> tuple[Float[Array, "B T K G H"], Float32[Array, "B T K G"]]:
    """Returns softmax attention in the dtype of the queries, and the log-sum-exp of each query's scores.

    It works if the library is `available()`, in programs for one CPU or within `shard_map`. Scores, softmax
    and sums are float32; probabilities are rounded to bfloat16 for many bfloat16 queries. The time grows with
    the visible keys, and no copy of the cache is made. It has no gradient. A query that sees no key gets
    zeros, and the least float32 as its log-sum-exp.

    Args:
        query: float32 or bfloat16, grouped by the key/value head that they read.
        key, value: bfloat16; or int8 with scales.
        query_slots: a query sees the keys in its own slot and before.
        key_slots: the slot of each key, or `NO_KEY`.
        scale: factor on the scores.
        window: the most slots that a query sees, its own included; None: all.
        key_scale, value_scale: of each vector of int8.
        blocks: hides blocks of keys, which are not read; None: hides none.

    Raises:
        ValueError: dtypes or shapes do not fit each other.
    """
    scales = () if key_scale is None or value_scale is None else (key_scale, value_scale)
    _check(query, key, value, query_slots, key_slots, *scales)
    pattern: tuple[Array, ...] = ()
    sizes = 0, 0, 0
    if blocks is not None:
        pattern, sizes = blocks[:3], blocks[3:]
        _check_blocks(query, key, *pattern)
    results = (
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        jax.ShapeDtypeStruct(query.shape[:-1], jnp.float32),
    )
    call = jax.ffi.ffi_call(ATTENTION, results, vmap_method="sequential")
    out, log_sum = call(
        *(query, key, value, *scales, query_slots, key_slots, *pattern),
        scale=np.float32(scale),
        window=np.int64(window or 0),
        **{name: np.int64(size) for name, size in zip(("block", "local", "stride"), sizes, strict=True)},
    )
    return out, log_sum


def _check(
    query: Array, key: Array, value: Array, query_slots: Array, key_slots: Array, *scales: Array
) -> None:
    batch, length, kv_heads, _, width = query.shape
    slots = key.shape[2]
    vectors = (batch, kv_heads, slots)
    is_right = (
        query.dtype in (jnp.float32, jnp.bfloat16)
        and key.dtype == value.dtype == (jnp.int8 if scales else jnp.bfloat16)
        and key.shape == value.shape == (*vectors, width)
        and all(scale.dtype == jnp.bfloat16 and scale.shape == vectors for scale in scales)
        and query_slots.dtype == key_slots.dtype == jnp.int32
        and (query_slots.shape, key_slots.shape) == ((batch, length), (batch, slots))
        and width % WIDTHS == 0
    )
    if not is_right:
        operands = (query, key, value, *scales, query_slots, key_slots)
        shapes = ", ".join(f"{operand.dtype}{list(operand.shape)}" for operand in operands)
        raise ValueError(
            f"attention({shapes}): expected queries [B, T, K, G, H], where {WIDTHS} divides H, keys and "
            "values [B, K, S, H] of bfloat16, or of int8 with scales bfloat16 [B, K, S], and slots int32 "
            "[B, T] and [B, S]"
        )


def _check_blocks(query: Array, key: Array, *operands: Array) -> None:
    batch, length, kv_heads, groups, _ = query.shape
    expected = (batch, length), (batch, key.shape[2]), (kv_heads, groups)
    if tuple(x.shape for x in operands) != expected or any(x.dtype != jnp.int32 for x in operands):
        shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in operands)
        raise ValueError(
            f"blocks({shapes}): expected int32 positions [B, T] and [B, S], and shifts [K, G] = "
            f"{', '.join(str(list(shape)) for shape in expected)}"
        )
