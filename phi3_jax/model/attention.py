"""Scaled dot-product attention over grouped heads; masks and cache come from outside."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from phi3_jax.model.layers import dropout, pad_single_row

QUERY_BLOCK = 128
"""Queries attended at a time, so that scores take QUERY_BLOCK x S a head: what CPU caches can hold."""


def attention(
    query: Float[Array, "B T K G H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S H"],
    mask: Bool[Array, "B #heads T S"] | Float[Array, "B #heads T S"],
    *,
    scale: float,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    output_weights: bool = False,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B N T S"] | None]:
    """Softmax attention, scores and softmax in float32.

    Args:
        query: grouped by the key/value head that each query head reads.
        key: keys, head-major: a decode step then reads each head's keys in one run.
        value: values, likewise.
        mask: True where a query sees a key, or numbers added to the scores; one for all heads or one a head.
        scale: factor on the scores.
        dropout_rate: dropout on the probabilities, applied when `dropout_key` is given.
        dropout_key: randomness for dropout.
        output_weights: also return the probabilities.

    Returns:
        The attended values and, if asked for, the probabilities of all N = K * G heads.
    """
    length = query.shape[1]
    if output_weights or length <= QUERY_BLOCK:
        out, weights = _attend(query, key, value, mask, scale, dropout_rate, dropout_key)
        return out, weights if output_weights else None

    blocks = -(-length // QUERY_BLOCK)
    padding = blocks * QUERY_BLOCK - length

    def split(x: Array, axis: int) -> Array:
        """Cuts `axis` into blocks and puts the blocks in front."""
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, padding)
        x = jnp.pad(x, widths)
        x = x.reshape(*x.shape[:axis], blocks, QUERY_BLOCK, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    @jax.checkpoint
    def attend_block(block: tuple[Array, Array, Array]) -> Array:
        index, queries, visible = block
        block_key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        return _attend(queries, key, value, visible, scale, dropout_rate, block_key)[0]

    out = jax.lax.map(attend_block, (jnp.arange(blocks), split(query, 1), split(mask, 2)))
    out = jnp.moveaxis(out, 0, 1)  # [B, blocks, QUERY_BLOCK, K, G, H]
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length], None


def _attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    scale: float,
    dropout_rate: float,
    dropout_key: Array | None,
) -> tuple[Array, Array]:
    batch, length, kv_heads, groups, width = query.shape
    rows = groups * length
    # A decode step reads a float32 cache as it is; with more queries, casting it first pays.
    dtype = jnp.promote_types(query.dtype, key.dtype) if length == 1 else query.dtype
    key, value = key.astype(dtype), value.astype(dtype)
    folded = query.astype(dtype).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, rows, width)
    scores = jnp.einsum("BKRH,BKSH->BKRS", pad_single_row(folded), key, preferred_element_type=jnp.float32)
    scores = scores[:, :, :rows].reshape(batch, kv_heads * groups, length, -1) * scale  # [B, N, T, S]
    if mask.dtype == jnp.bool:
        # Finite and added, as in the reference: a query that sees nothing attends everywhere alike instead of
        # giving NaN, and has the reference's gradient.
        mask = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)
    scores = scores + mask.astype(jnp.float32)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    folded = dropout(weights, dropout_rate, dropout_key).reshape(batch, kv_heads, rows, -1).astype(dtype)
    out = jnp.einsum("BKRS,BKSH->BKRH", pad_single_row(folded), value, preferred_element_type=jnp.float32)
    out = out[:, :, :rows].reshape(batch, kv_heads, groups, length, width).astype(query.dtype)
    return out.transpose(0, 3, 1, 2, 4), weights
