"""Attention in plain JAX, for every platform, mask and dtype; the other kernels are compared with it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from phi3_jax.cache.quantized import QuantizedVectors
from phi3_jax.model.layers import dropout, pad_single_row, wider_dtype
from phi3_jax.model.masks import CausalMask
from phi3_jax.model.symbolic import is_certain
from phi3_jax.sizes import ceil_div

QUERY_BLOCK = 128
"""Queries attended at a time: their scores, QUERY_BLOCK x S a head, fit into CPU caches."""

HEADS_BLOCK_BYTES = 4 << 20
"""Bytes in float32 of the int8 keys that a CPU widens at a time: these fit into its caches too."""


class Attended(NamedTuple):
    """The result of attention."""

    out: Float[Array, "B T K G H"]
    weights: Float[Array, "B N T S"] | None
    """The probabilities of all N = K * G heads."""
    lse: Float[Array, "B N T"] | None
    """The log-sum-exp of the scores, which combines results over parts of the keys; about the least float32
    where no key is visible."""


def xla_attention(
    query: Float[Array, "B T K G H"],
    key: Float[Array, "B K S H"] | QuantizedVectors,
    value: Float[Array, "B K S H"] | QuantizedVectors,
    mask: CausalMask | Bool[Array, "B #heads T S"] | Float[Array, "B #heads T S"],
    *,
    scale: float,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    output_weights: bool = False,
    output_lse: bool = False,
) -> Attended:
    """Softmax attention, scores and softmax in float32.

    Args:
        query: grouped by the key/value head that each query head reads.
        key: keys, head-major: a decode step then reads each head's keys in one run.
        value: values, likewise.
        mask: which query sees which key; an array is True where it does, or numbers added to the scores.
        scale: factor on the scores.
        dropout_rate: dropout on the probabilities, applied when `dropout_key` is given.
        dropout_key: randomness for dropout.
        output_weights: also return the probabilities.
        output_lse: also return the scores' log-sum-exp.
    """
    options: Any = {
        "scale": scale,
        "dropout_rate": dropout_rate,
        "output_weights": output_weights,
        "output_lse": output_lse,
    }
    attend = partial(_attend if isinstance(key, Array) else _attend_quantized, **options)
    if output_weights or is_certain(lambda: query.shape[1] <= QUERY_BLOCK):
        return attend(query, key, value, _dense(mask), dropout_key=dropout_key)

    @jax.checkpoint
    def attend_block(index: Array, queries: Array, visible: CausalMask | Array) -> Attended:
        block_key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        return attend(queries, key, value, _dense(visible), dropout_key=block_key)

    return by_query_blocks(attend_block, query, mask, QUERY_BLOCK)


def _dense(mask: CausalMask | Array) -> Array:
    return mask.dense() if isinstance(mask, CausalMask) else mask


def by_query_blocks(
    attend: Callable[[Array, Array, Any], Attended], query: Array, mask: CausalMask | Array, size: int
) -> Attended:
    """Attention of `size` queries at a time, by `attend(block index, queries, mask)`; without weights."""
    length = query.shape[1]
    blocks = ceil_div(length, size)
    padding = blocks * size - length

    def split(x: Array, axis: int) -> Array:
        """Splits `axis` into blocks, which move to the front; the last is padded with its last query."""
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, padding)
        x = jnp.pad(x, widths, mode="edge")
        x = x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    rows: Any
    if isinstance(mask, CausalMask):
        rows = jax.tree.map(lambda x: split(x, 1), mask.query_arrays())
    else:
        rows = split(mask, 2)

    def attend_block(block: tuple[Array, Array, Any]) -> tuple[Array, Array | None]:
        index, queries, visible = block
        if isinstance(mask, CausalMask):
            visible = mask.with_queries(visible)
        attended = attend(index, queries, visible)
        return attended.out, attended.lse

    out, lse = jax.lax.map(attend_block, (jnp.arange(blocks, dtype=jnp.int32), split(query, 1), rows))
    out = jnp.moveaxis(out, 0, 1)  # [B, blocks, size, K, G, H]
    out = out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length]
    if lse is not None:
        lse = jnp.moveaxis(lse, 0, 2)  # [B, N, blocks, size]
        lse = lse.reshape(*lse.shape[:2], -1)[:, :, :length]
    return Attended(out, None, lse)


def _attend_quantized(
    query: Array, key: QuantizedVectors, value: QuantizedVectors, mask: Array, **options: Any
) -> Attended:
    """Attends over int8 keys and values.

    XLA widens int8 inside the matrix product on TPU and GPU. On CPU it does so in memory, for some heads at a
    time then.
    """
    by_heads, whole = partial(_attend_by_heads, **options), partial(_attend, **options)
    return jax.lax.platform_dependent(query, key, value, mask, cpu=by_heads, default=whole)


def _attend_by_heads(
    query: Array,
    key: QuantizedVectors,
    value: QuantizedVectors,
    mask: Array,
    *,
    dropout_key: Array | None,
    **options: Any,
) -> Attended:
    """Attends some heads at a time, which limits how much of the int8 keys and values is widened."""
    batch, length, kv_heads, groups, width = query.shape
    fitting = max(HEADS_BLOCK_BYTES // (4 * key.shape[2] * width), 1)
    heads = max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n <= fitting)
    blocks = batch * kv_heads // heads
    dtype = jnp.float32 if length == 1 else query.dtype  # the faster product for a single query
    queries = query.astype(dtype).swapaxes(1, 2).reshape(blocks, heads, length, groups, width)
    masks = mask if mask.shape[1] == 1 else mask.reshape(blocks, heads * groups, *mask.shape[2:])
    # Blocks are sliced inside the loop: XLA copies the whole cache to split it beside an axis of length 1.
    key, value = jax.tree.map(lambda x: x.reshape(batch * kv_heads, *x.shape[2:]), (key, value))

    def attend_block(block: tuple[Array, Array]) -> Attended:
        index, queries = block
        keys, values = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, index * heads, heads)[None], (key, value)
        )
        visible = masks[index * len(masks) // blocks][None]
        block_key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        queries = queries.swapaxes(0, 1)[None]
        return _attend(queries, keys, values, visible, dropout_key=block_key, **options)

    out, weights, lse = jax.lax.map(attend_block, (jnp.arange(blocks, dtype=jnp.int32), queries))
    out = out.reshape(batch, -1, length, heads, groups, width).swapaxes(1, 2).reshape(query.shape)
    if weights is not None:
        weights = weights.reshape(batch, kv_heads * groups, length, -1).astype(query.dtype)
    if lse is not None:
        lse = lse.reshape(batch, kv_heads * groups, length)
    return Attended(out.astype(query.dtype), weights, lse)


def _attend(
    query: Array,
    key: Array | QuantizedVectors,
    value: Array | QuantizedVectors,
    mask: Array,
    *,
    scale: float,
    dropout_rate: float,
    dropout_key: Array | None,
    output_weights: bool,
    output_lse: bool,
) -> Attended:
    batch, length, kv_heads, groups, width = query.shape
    rows = groups * length
    key, key_scale = _split(key)
    value, value_scale = _split(value)
    # A decode step reads a float32 cache unchanged; for more queries, casting it first is faster.
    dtype = wider_dtype(query.dtype, key.dtype) if length == 1 else query.dtype
    key, value = key.astype(dtype), value.astype(dtype)
    folded = query.astype(dtype).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, rows, width)
    products = jax.lax.platform_dependent(
        pad_single_row(folded), key, cpu=_scores_keys_first if length == 1 else _scores, default=_scores
    )
    scores = products[:, :, :rows]
    if key_scale is not None:
        scores = scores * key_scale
    scores = scores.reshape(batch, kv_heads * groups, length, -1) * scale  # [B, N, T, S]
    if mask.dtype == jnp.bool:
        # Finite and added, as in the reference: a query without a visible key attends to all keys equally
        # instead of giving NaN, and has the reference's gradient.
        mask = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)
    scores = scores + mask.astype(jnp.float32)
    probabilities = jax.nn.softmax(scores, axis=-1)
    weights = probabilities.astype(query.dtype)
    # Where a scale follows, rounding waits for the product.
    folded = dropout(weights if value_scale is None else probabilities, dropout_rate, dropout_key)
    folded = folded.reshape(batch, kv_heads, rows, -1)
    if value_scale is not None:
        folded = folded * value_scale
    folded = pad_single_row(folded.astype(dtype))
    out = jnp.einsum("BKRS,BKSH->BKRH", folded, value, preferred_element_type=jnp.float32)
    out = out[:, :, :rows].reshape(batch, kv_heads, groups, length, width).astype(query.dtype)
    return Attended(
        out.transpose(0, 3, 1, 2, 4),
        weights if output_weights else None,
        jax.nn.logsumexp(scores, axis=-1) if output_lse else None,
    )


def _scores(query: Float[Array, "B K R H"], key: Float[Array, "B K S H"]) -> Float[Array, "B K R S"]:
    return jnp.einsum("BKRH,BKSH->BKRS", query, key, preferred_element_type=jnp.float32)


def _scores_keys_first(
    query: Float[Array, "B K R H"], key: Float[Array, "B K S H"]
) -> Float[Array, "B K R S"]:
    """Returns the same scores, faster for few queries on CPU.

    As the second operand, the keys would be packed again, which takes half of a step's time. Without the
    barrier XLA turns the product around.
    """
    products = jnp.einsum("BKSH,BKRH->BKSR", key, query, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(products).swapaxes(2, 3)


def _split(vectors: Array | QuantizedVectors) -> tuple[Array, Array | None]:
    """Returns the numbers to multiply, and the factor [B, K, 1, S] on the products, if any."""
    if isinstance(vectors, Array):
        return vectors, None
    return vectors.values, vectors.scale[:, :, None].astype(jnp.float32)
