"""Attention of sampled queries: its entropy, and how far back it reaches, by layer and head."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from phi3_jax.cache import KVCache
from phi3_jax.config.layer_frequencies import LayerFrequencies
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.evaluation.scorer import OnProgress, Scorer, rope_arguments
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.sizes import power_of_two

QUERIES = 64
"""Sampled queries of a text, unless another number is given."""

SINK_TOKENS = 4
"""First tokens of a text whose attention counts as that of the sink."""

BLOCK_BYTES = 64 << 20
"""Bytes in float32 of a layer's attention weights that are computed at a time, but at least one query's.

XLA reuses their memory for the next layer; a step takes some seven times as much.
"""

MOST_IN_BLOCK = 16
"""The most queries that are computed at a time."""


class AttentionProfile(NamedTuple):
    """Attention of each sampled query, or their mean, which lacks the axis Q.

    C bins of distances, N query heads. The probabilities are rounded to the model's dtype, and divided by
    their sum.
    """

    entropy: Float[np.ndarray, "*Q L N"]
    """-sum p log p, in nats."""
    sink: Float[np.ndarray, "*Q L N"]
    """The share of the text's first tokens, the sink."""
    distance: Float[np.ndarray, "*Q L N"]
    """The mean distance in tokens from a query to the keys after the sink, weighted by attention; 0 if there
    are none."""
    mass: Float[np.ndarray, "*Q L N C"]
    """The share of the keys after the sink in each bin of `distance_bins`; these and `sink` add up to 1."""

    def mean(self) -> "AttentionProfile":
        """Returns the mean of the queries, in float64."""
        return AttentionProfile(*(each.mean(axis=0, dtype=np.float64) for each in self))


def sample_positions(length: int, count: int) -> Int[np.ndarray, " Q"]:
    """Returns positions of queries in the second half of a text: the last ones of `count` equal parts.

    Early queries see few tokens, whatever the length.

    Raises:
        UserError: the half has fewer than `count` tokens, or there is no query.
    """
    half = length - length // 2
    if not 1 <= count <= half:
        raise UserError(f"queries={count} must be from 1 to {half}, half of the {length:,} tokens")
    return length // 2 + np.arange(1, count + 1) * half // count - 1


def distance_bins(length: int) -> Int[np.ndarray, " edges"]:
    """Returns the edges 0, 1, 2, 4, 8, ... of the bins of distances in a text.

    Bin c has the distances from edge c to below edge c + 1.
    """
    return np.array([0, *(2**n for n in range(power_of_two(length).bit_length()))], np.int32)


def check_inspection(config: Phi3Config) -> None:
    """Checks that the model's attention can be inspected.

    Raises:
        UserError: some layers are block-sparse.
    """
    if config.block_pattern is not None:
        raise UserError(
            "a model with block-sparse layers cannot be inspected; choose one whose layers are all dense"
        )


def check_memory(scorer: Scorer, length: int) -> None:
    """Checks that the cache for a text fits in memory, with the attention of its queries.

    Raises:
        UserError: it does not.
    """
    scorer.check_memory(length + 1 + _block(scorer.config, length))


def attention_profile(
    scorer: Scorer,
    tokens: Int[np.ndarray, " T"],
    inv_freq: Float[np.ndarray, "..."] | LayerFrequencies,
    attention_scaling: float = 1.0,
    *,
    initial_tokens: int = 0,
    positions: Int[np.ndarray, " Q"] | None = None,
    sink_tokens: int = SINK_TOKENS,
    progress: OnProgress | None = None,
) -> AttentionProfile:
    """Measures the attention of some tokens of a text to all tokens up to them.

    The text goes through the cache in chunks. Then the sampled tokens run through the model once more, in
    blocks, and see the cached keys up to their own. Attention of size T x T is never computed.

    Args:
        inv_freq, attention_scaling, initial_tokens: as in `Scorer.score`, for one row.
        positions: of the queries; default: those of `sample_positions`, at most `QUERIES`.
        sink_tokens: how many first tokens count as the sink.
        progress: called with the number of tokens that the model has read.

    Raises:
        UserError: the model has block-sparse layers, a position is not in the text, or shapes do not fit.
    """
    tokens = np.asarray(tokens, np.int32)
    config, length = scorer.config, len(tokens)
    check_inspection(config)
    if positions is None:
        positions = sample_positions(length, min(QUERIES, length - length // 2))
    positions = np.asarray(positions, np.int32)
    if not len(positions) or positions.min() < 0 or positions.max() >= length:
        raise UserError(f"positions of queries must be from 0 to {length - 1:,}, and at least one")
    size = min(_block(config, length), len(positions))
    cache, rope = scorer.read(
        tokens, inv_freq, attention_scaling, initial_tokens=initial_tokens, spare=size, progress=progress
    )
    edges = distance_bins(length)
    rows, parts = len(rope[0]), []
    for start in range(0, len(positions), size):
        block = positions[start : start + size]
        padded = np.pad(block, (0, size - len(block)), mode="edge")
        at = np.broadcast_to(padded, (rows, size))
        measured, cache = scorer.compiled(
            _attend, cache, tokens[at], at, np.int32(sink_tokens), edges[:-1], edges[1:], *rope
        )
        parts.append([np.asarray(each)[: len(block)] for each in measured])
        if progress is not None:
            progress(len(block))
    return AttentionProfile(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _block(config: Phi3Config, length: int) -> int:
    """Returns the number of queries that are computed at a time."""
    return min(max(1, BLOCK_BYTES // (4 * config.num_attention_heads * length)), MOST_IN_BLOCK)


def _attend(
    model: Phi3ForCausalLM,
    cache: KVCache,
    ids: Int[Array, "B Q"],
    positions: Int[Array, "B Q"],
    sink_tokens: Int[Array, ""],
    lower: Int[Array, " C"],
    upper: Int[Array, " C"],
    *rope: Array,
) -> tuple[tuple[Array, ...], KVCache]:
    """Runs tokens of the cached text again.

    Returns:
        The fields of the `AttentionProfile` of the first row; the cache as it was.
    """
    slots = jnp.arange(cache.max_length, dtype=jnp.int32)
    distances = positions[:, :, None] - slots[None, None]  # [B, Q, S]
    visible = distances >= 0
    if model.config.sliding_window is not None:
        visible &= distances < model.config.sliding_window
    out = model.decoder(
        ids,
        attention_mask=visible[:, None],
        position_ids=positions,
        past_key_values=cache,
        output_attentions=True,
        **rope_arguments(model.config, positions, *rope),
    )
    assert out.attentions is not None
    assert out.past_key_values is not None
    layers = [_profile(each[0], distances[0], slots, sink_tokens, lower, upper) for each in out.attentions]
    stacked = (jnp.stack(each, axis=1) for each in zip(*layers, strict=True))
    return tuple(stacked), out.past_key_values.rewind(cache.length)


def _profile(
    weights: Float[Array, "N Q S"],
    distances: Int[Array, "Q S"],
    slots: Int[Array, " S"],
    sink_tokens: Int[Array, ""],
    lower: Int[Array, " C"],
    upper: Int[Array, " C"],
) -> tuple[Array, Array, Array, Array]:
    """Returns the fields of a layer's `AttentionProfile`."""
    shares = weights.astype(jnp.float32).swapaxes(0, 1)  # [Q, N, S]
    shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
    after_sink = jnp.where(slots < sink_tokens, 0.0, shares)
    apart = distances[:, None]

    def mass_of(bounds: tuple[Array, Array]) -> Array:
        inside = (apart >= bounds[0]) & (apart < bounds[1])
        return jnp.sum(jnp.where(inside, after_sink, 0.0), axis=-1)

    total = jnp.sum(after_sink, axis=-1)
    reach = jnp.sum(after_sink * apart.astype(jnp.float32), axis=-1)
    return (
        jnp.sum(jax.scipy.special.entr(shares), axis=-1),
        jnp.sum(shares - after_sink, axis=-1),
        jnp.where(total > 0, reach / jnp.maximum(total, jnp.finfo(jnp.float32).tiny), 0.0),
        jnp.moveaxis(jax.lax.map(mass_of, (lower, upper)), 0, -1),
    )
