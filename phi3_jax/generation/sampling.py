"""Choosing the next token from logits: pure functions, one row of logits a row of the batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def filter_logits(
    logits: Float[Array, "B V"],
    temperature: Float[Array, ""] | float,
    top_k: Int[Array, ""] | int,
    top_p: Float[Array, ""] | float,
) -> Float[Array, "B V"]:
    """Logits scaled by 1 / temperature, with all but the likely tokens at minus infinity.

    First the `top_k` most likely remain (0: all), then the fewest of those whose probabilities sum to at
    least `top_p` (1: all), at least one: the order and the rules of transformers' warpers.
    """
    logits = logits.astype(jnp.float32) / temperature
    ranked = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(logits.shape[-1])
    kept = jnp.where(top_k <= 0, logits.shape[-1], jnp.minimum(top_k, logits.shape[-1]))
    last = jnp.take_along_axis(ranked, jnp.broadcast_to(kept - 1, (*ranked.shape[:-1], 1)), axis=-1)
    ranked = jnp.where(ranked >= last, ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    keep = (rank == 0) | ((before < top_p) & (ranked > -jnp.inf)) | ((top_p >= 1.0) & (ranked > -jnp.inf))
    least = jnp.min(jnp.where(keep, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def next_token(
    logits: Float[Array, "B V"],
    key: Key[Array, ""] | None,
    temperature: Float[Array, ""] | float = 1.0,
    top_k: Int[Array, ""] | int = 0,
    top_p: Float[Array, ""] | float = 1.0,
) -> Int[Array, " B"]:
    """The most likely token of each row, or, with a key, one drawn from the filtered distribution."""
    if key is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, filter_logits(logits, temperature, top_k, top_p)).astype(jnp.int32)
