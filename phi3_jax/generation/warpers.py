"""Logits processors that shape the distribution that a token is drawn from: temperature and truncations.

They have transformers' names and follow the rules in `processors`. None of them sorts the vocabulary. A
threshold decides which tokens stay; bisection over the float32 numbers finds it with 32 sums over the
vocabulary, exactly, and on a CPU about 25 times faster than a sort. Tokens with equal scores stay or go
together; in the reference its sort decides.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.generation.processors import LogitsProcessor, Number
from phi3_jax.generation.sequences import Sequences

TOP_H_CANDIDATES = 100
"""The most tokens that top-h keeps, a constant of the reference."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TemperatureLogitsWarper(LogitsProcessor):
    """Divides scores by the temperature; below 1 likely tokens become more likely."""

    temperature: Number

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        return scores / self.temperature


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TopHLogitsWarper(LogitsProcessor):
    """Keeps the most likely tokens whose share of the entropy is at most `top_h` (arXiv:2509.02510).

    The entropy is that of the 100 most likely tokens, the only candidates.
    """

    top_h: Number

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        ranked, _ = jax.lax.top_k(scores, min(TOP_H_CANDIDATES, scores.shape[-1]))
        p = jax.nn.softmax(ranked, axis=-1)
        entropies = jnp.where(p > 0, -p * jnp.log(p), 0.0)
        share = jnp.cumsum(entropies, axis=-1) <= self.top_h * jnp.sum(entropies, axis=-1, keepdims=True)
        last = jnp.maximum(jnp.sum(share & (p > 0), axis=-1, keepdims=True) - 1, 0)
        return _keep_where(scores >= jnp.take_along_axis(ranked, last, axis=-1), scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TopKLogitsWarper(LogitsProcessor):
    """Keeps the `top_k` most likely tokens, and those as likely as the last of them."""

    top_k: Number
    min_tokens_to_keep: int = field(default=1, metadata={"static": True})

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        k = jnp.clip(self.top_k, min(self.min_tokens_to_keep, scores.shape[-1]), scores.shape[-1])
        k = jnp.asarray(k, jnp.float32)  # counts are sums of weights
        highest = -threshold(-scores, jnp.ones_like(scores), lambda count: count >= k)
        return _keep_where(scores >= highest, scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TopPLogitsWarper(LogitsProcessor):
    """Keeps the fewest most likely tokens whose probabilities sum to `top_p` (arXiv:1904.09751).

    As in the reference, a token goes if it and all less likely ones together have at most 1 - `top_p`.
    """

    top_p: Number
    min_tokens_to_keep: int = field(default=1, metadata={"static": True})

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        tail = 1 - jnp.asarray(self.top_p, jnp.float32)
        least = threshold(scores, jax.nn.softmax(scores, axis=-1), lambda mass: mass > tail)
        return _keep_where(
            scores >= jnp.minimum(least, _nth_largest(scores, self.min_tokens_to_keep)), scores
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class MinPLogitsWarper(LogitsProcessor):
    """Keeps tokens of at least `min_p` times the highest probability (arXiv:2407.01082)."""

    min_p: Number
    min_tokens_to_keep: int = field(default=1, metadata={"static": True})

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        p = jax.nn.softmax(scores, axis=-1)
        likely = p >= self.min_p * jnp.max(p, axis=-1, keepdims=True)
        return _keep_where(likely | (scores >= _nth_largest(scores, self.min_tokens_to_keep)), scores)


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
        return _keep_where(distance <= jnp.maximum(furthest, at_least), scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class EpsilonLogitsWarper(LogitsProcessor):
    """Keeps tokens of at least probability `epsilon` (https://arxiv.org/abs/2210.15191, section 3)."""

    epsilon: Number
    min_tokens_to_keep: int = field(default=1, metadata={"static": True})

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        likely = jax.nn.softmax(scores, axis=-1) >= self.epsilon
        return _keep_where(likely | (scores >= _nth_largest(scores, self.min_tokens_to_keep)), scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class EtaLogitsWarper(LogitsProcessor):
    """Keeps tokens of at least probability min(epsilon, sqrt(epsilon) * exp(-entropy)) (arXiv:2210.15191)."""

    epsilon: Number
    min_tokens_to_keep: int = field(default=1, metadata={"static": True})

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        log_p = jax.nn.log_softmax(scores, axis=-1)
        epsilon = jnp.asarray(self.epsilon, jnp.float32)
        eta = jnp.minimum(epsilon, jnp.sqrt(epsilon) * jnp.exp(-_entropy(log_p)))
        likely = jax.nn.softmax(scores, axis=-1) >= eta
        return _keep_where(likely | (scores >= _nth_largest(scores, self.min_tokens_to_keep)), scores)


def threshold(
    values: Float[Array, "R V"],
    weights: Float[Array, "R V"],
    enough: Callable[[Float[Array, "R 1"]], Bool[Array, "R 1"]],
) -> Float[Array, "R 1"]:
    """Returns each row's least value for which `enough(sum of the weights of all values up to it)` is True.

    If there is none, returns the largest value. `enough` must be monotone and the weights not negative.
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
    """Returns integers in the order of the float32 numbers, equal for both zeros."""
    return _mirrored(jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32))


def _mirrored(bits: Int[Array, "..."]) -> Int[Array, "..."]:
    """Converts sign and magnitude to two's complement; it is its own inverse."""
    return jnp.where(bits < 0, jnp.iinfo(jnp.int32).min - bits, bits)


def _nth_largest(values: Float[Array, "R V"], n: int) -> Float[Array, "R 1"]:
    if n == 1:
        return jnp.max(values, axis=-1, keepdims=True)
    largest, _ = jax.lax.top_k(values, min(n, values.shape[-1]))
    return jnp.min(largest, axis=-1, keepdims=True)  # for a slice XLA would sort the whole row on a CPU


def _entropy(log_p: Float[Array, "R V"]) -> Float[Array, "R 1"]:
    terms = jnp.where(log_p > -jnp.inf, log_p * jnp.exp(log_p), 0.0)
    return -jnp.sum(terms, axis=-1, keepdims=True)


def _keep_where(keep: Bool[Array, "R V"], scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
    return jnp.where(keep, scores, -jnp.inf)
