"""Logits processors that shape the distribution a token is drawn from: temperature and truncations.

Under transformers' names, and as `processors` describes. None of them sorts the vocabulary. What to keep is
decided by a threshold, found by bisection over the float32 numbers themselves: 32 sums over the vocabulary,
exact, and on a CPU some 25 times faster than a sort. Tokens with equal scores stay or go together, where the
reference lets its sort decide.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.generation.processors import LogitsProcessor, Number
from phi3_jax.generation.sequences import Sequences

TOP_H_CANDIDATES = 100
"""Most tokens that top-h keeps, a constant of the reference."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TemperatureLogitsWarper(LogitsProcessor):
    """Divides scores by the temperature: below 1 the likely tokens become likelier."""

    temperature: Number

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        return scores / self.temperature


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TopHLogitsWarper(LogitsProcessor):
    """Keeps the likeliest tokens whose share of the entropy is at most `top_h`, among the 100 likeliest.

    Entropy is that of those 100 (https://arxiv.org/abs/2509.02510).
    """

    top_h: Number

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        ranked, _ = jax.lax.top_k(scores, min(TOP_H_CANDIDATES, scores.shape[-1]))
        p = jax.nn.softmax(ranked, axis=-1)
        entropies = jnp.where(p > 0, -p * jnp.log(p), 0.0)
        share = jnp.cumsum(entropies, axis=-1) <= self.top_h * jnp.sum(entropies, axis=-1, keepdims=True)
        last = jnp.maximum(jnp.sum(share & (p > 0), axis=-1, keepdims=True) - 1, 0)
        return _where_kept(scores >= jnp.take_along_axis(ranked, last, axis=-1), scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TopKLogitsWarper(LogitsProcessor):
    """Keeps the `top_k` likeliest tokens, and those as likely as the last of them."""

    top_k: Number
    min_tokens_to_keep: int = field(default=1, metadata={"static": True})

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        k = jnp.clip(self.top_k, min(self.min_tokens_to_keep, scores.shape[-1]), scores.shape[-1])
        highest = -threshold(-scores, jnp.ones_like(scores), lambda count: count >= k)
        return _where_kept(scores >= highest, scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TopPLogitsWarper(LogitsProcessor):
    """Keeps the fewest likeliest tokens whose probabilities sum to `top_p` (https://arxiv.org/abs/1904.09751).

    As in the reference, a token goes if it and all less likely ones have at most 1 - `top_p` together.
    """

    top_p: Number
    min_tokens_to_keep: int = field(default=1, metadata={"static": True})

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        tail = 1 - self.top_p
        least = threshold(scores, jax.nn.softmax(scores, axis=-1), lambda mass: mass > tail)
        return _where_kept(
            scores >= jnp.minimum(least, _nth_largest(scores, self.min_tokens_to_keep)), scores
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class MinPLogitsWarper(LogitsProcessor):
    """Keeps tokens with at least `min_p` times the likeliest one's probability (arXiv:2407.01082)."""

    min_p: Number
    min_tokens_to_keep: int = field(default=1, metadata={"static": True})

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        p = jax.nn.softmax(scores, axis=-1)
        likely = p >= self.min_p * jnp.max(p, axis=-1, keepdims=True)
        return _where_kept(likely | (scores >= _nth_largest(scores, self.min_tokens_to_keep)), scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TypicalLogitsWarper(LogitsProcessor):
    """Keeps the fewest tokens of probability `mass` whose information is closest to the entropy.

    Locally typical sampling (https://arxiv.org/abs/2202.00666).
    """

    mass: Number
    min_tokens_to_keep: int = field(default=1, metadata={"static": True})

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        log_p = jax.nn.log_softmax(scores, axis=-1)
        p = jnp.exp(log_p)
        distance = jnp.abs(_entropy(log_p) + log_p)
        distance = jnp.where(jnp.isnan(distance), jnp.inf, distance)
        furthest = threshold(distance, p, lambda mass: mass >= self.mass)
        at_least = -_nth_largest(-distance, self.min_tokens_to_keep)
        return _where_kept(distance <= jnp.maximum(furthest, at_least), scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class EpsilonLogitsWarper(LogitsProcessor):
    """Keeps tokens of at least probability `epsilon` (https://arxiv.org/abs/2210.15191, section 3)."""

    epsilon: Number
    min_tokens_to_keep: int = field(default=1, metadata={"static": True})

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        likely = jax.nn.softmax(scores, axis=-1) >= self.epsilon
        return _where_kept(likely | (scores >= _nth_largest(scores, self.min_tokens_to_keep)), scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class EtaLogitsWarper(LogitsProcessor):
    """Keeps tokens of at least probability min(epsilon, sqrt(epsilon) * exp(-entropy)) (arXiv:2210.15191)."""

    epsilon: Number
    min_tokens_to_keep: int = field(default=1, metadata={"static": True})

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        log_p = jax.nn.log_softmax(scores, axis=-1)
        eta = jnp.minimum(self.epsilon, jnp.sqrt(self.epsilon) * jnp.exp(-_entropy(log_p)))
        likely = jax.nn.softmax(scores, axis=-1) >= eta
        return _where_kept(likely | (scores >= _nth_largest(scores, self.min_tokens_to_keep)), scores)


def threshold(
    values: Float[Array, "R V"],
    weights: Float[Array, "R V"],
    enough: Callable[[Float[Array, "R 1"]], Bool[Array, "R 1"]],
) -> Float[Array, "R 1"]:
    """The least of each row's values such that the weights of all up to it sum to `enough`.

    Where no sum is, the largest value. `enough` is monotone, and no weight negative.
    """
    keys = _ordered(values)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down, without overflow
        reached = enough(jnp.sum(jnp.where(keys <= middle, weights, 0.0), axis=-1, keepdims=True))
        return jnp.where(reached, low, middle + 1), jnp.where(reached, middle, high)

    bounds = jnp.min(keys, axis=-1, keepdims=True), jnp.max(keys, axis=-1, keepdims=True)
    _, least = jax.lax.fori_loop(0, 32, halve, bounds)
    return jax.lax.bitcast_convert_type(_mirrored(least), jnp.float32)


def _ordered(values: Float[Array, "R V"]) -> Int[Array, "R V"]:
    """Integers in the order of the float32 numbers, the same for both zeros."""
    return _mirrored(jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32))


def _mirrored(bits: Int[Array, "..."]) -> Int[Array, "..."]:
    """Sign and magnitude to two's complement; its own inverse."""
    return jnp.where(bits < 0, jnp.iinfo(jnp.int32).min - bits, bits)


def _nth_largest(values: Float[Array, "R V"], n: int) -> Float[Array, "R 1"]:
    if n == 1:
        return jnp.max(values, axis=-1, keepdims=True)
    largest, _ = jax.lax.top_k(values, min(n, values.shape[-1]))
    return jnp.min(largest, axis=-1, keepdims=True)  # a slice would have XLA sort the whole row on a CPU


def _entropy(log_p: Float[Array, "R V"]) -> Float[Array, "R 1"]:
    terms = jnp.where(log_p > -jnp.inf, log_p * jnp.exp(log_p), 0.0)
    return -jnp.sum(terms, axis=-1, keepdims=True)


def _where_kept(keep: Bool[Array, "R V"], scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
    return jnp.where(keep, scores, -jnp.inf)
