"""Logits processors: rules on the next token that hold with and without sampling.

Each is a pytree under transformers' name (generation/logits_process.py). Its numbers and token lists are
leaves, so a compiled loop takes other values without compiling again; what decides shapes is static.
`chain.logits_processors` checks the values; the classes cannot, because JAX fills them with tracers. Scores
are float32. Positions are counted in generated tokens, and each row is independent: padding never matches.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from phi3_jax.generation.sequences import Sequences, token_counts

Number = float | int | Array
"""A setting: a Python number from the user, an array or tracer under `jit`."""
TokenIds = Int[Array | np.ndarray, " N"]


class LogitsProcessor:
    """A pure function that changes the scores of the next token.

    A subclass runs in the compiled loop if it is a pytree, for instance a dataclass under
    `jax.tree_util.register_dataclass`.
    """

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        raise NotImplementedError(f"{type(self).__name__} needs a method __call__(sequences, scores)")


@jax.tree_util.register_pytree_with_keys_class
class LogitsProcessorList(tuple[LogitsProcessor, ...]):
    """Applies processors one after the other; every compiled function takes them in this list.

    jaxlib (0.10) treats two pytrees as equal where only the class of a registered dataclass differs. A cache
    of `jit`, which compares some bits of a hash and then structures, may then return one penalty's program
    for another one. In this list the classes are part of the structure.
    """

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        for processor in self:
            scores = processor(sequences, scores)
        return scores

    def tree_flatten_with_keys(self) -> tuple[Any, tuple[type, ...]]:
        children = [(jax.tree_util.SequenceKey(index), each) for index, each in enumerate(self)]
        return children, tuple(type(each) for each in self)

    @classmethod
    def tree_unflatten(cls, classes: tuple[type, ...], children: Iterable[Any]) -> "LogitsProcessorList":
        return cls(children)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class SequenceBiasLogitsProcessor(LogitsProcessor):
    """Adds `bias` to the score of `last` in rows whose latest tokens are `prefixes`.

    `prefixes` are aligned on the right; -1 on the left matches any token, or none.
    """

    prefixes: Int[Array | np.ndarray, "N P"]
    last: TokenIds
    bias: Float[Array | np.ndarray, " N"]

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        ids, is_token = sequences.last(self.prefixes.shape[1])
        prefixes = self.prefixes[None]
        same = (ids[:, None] == prefixes) & is_token[:, None]  # [R, N, P]
        matches = jnp.all(same | (prefixes < 0), axis=-1)
        added = jnp.where(matches, self.bias[None], 0.0)
        bias = jnp.zeros_like(scores).at[:, self.last].add(added, mode="drop")
        return scores + bias


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class NoBadWordsLogitsProcessor(SequenceBiasLogitsProcessor):
    """Forbids the token that would complete a bad word: a sequence bias of minus infinity."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class RepetitionPenaltyLogitsProcessor(LogitsProcessor):
    """Makes tokens that occurred less likely (penalty > 1) or more (< 1), however often they occurred.

    Divides positive scores and multiplies negative ones (https://arxiv.org/abs/1909.05858, section 4.1).
    """

    penalty: Number

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        seen = sequences.counts(sequences.mask, scores.shape[1]) > 0
        penalised = jnp.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return jnp.where(seen, penalised, scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class FrequencyPenaltyLogitsProcessor(LogitsProcessor):
    """Subtracts `penalty` from a token's score for each time it was generated, as OpenAI and vLLM do."""

    penalty: Number

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        counts = sequences.counts(sequences.generated, scores.shape[1])
        return scores - self.penalty * counts.astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class PresencePenaltyLogitsProcessor(LogitsProcessor):
    """Subtracts `penalty` from a token's score if it was generated, as OpenAI and vLLM do."""

    penalty: Number

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        present = sequences.counts(sequences.generated, scores.shape[1]) > 0
        return jnp.where(present, scores - self.penalty, scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class NoRepeatNGramLogitsProcessor(LogitsProcessor):
    """Forbids each token that would repeat `ngram_size` tokens of the row."""

    ngram_size: int = field(metadata={"static": True})

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        ids, before = sequences.ids, self.ngram_size - 1
        windows = ids.shape[1] - before
        if windows <= 0:
            return scores
        latest, _ = sequences.last(before)
        match = sequences.mask[:, before:]
        for offset in range(before):
            part = slice(offset, offset + windows)
            match &= sequences.mask[:, part] & (ids[:, part] == latest[:, offset, None])
        banned = token_counts(ids[:, before:], match, scores.shape[1]) > 0
        return jnp.where(banned, -jnp.inf, scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class MinNewTokensLengthLogitsProcessor(LogitsProcessor):
    """Forbids the end tokens until `min_new_tokens` tokens are generated."""

    min_new_tokens: Number
    eos_token_ids: TokenIds

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        early = sequences.new < self.min_new_tokens
        return jnp.where(early[:, None], _without(scores, self.eos_token_ids), scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class AllowedTokensLogitsProcessor(LogitsProcessor):
    """Forbids tokens outside `mask_fn(sequences)`: `prefix_allowed_tokens_fn` in a form that compiles.

    Where no allowed token has a score above minus infinity they all get 0, as in the reference's
    PrefixConstrainedLogitsProcessor. Every row must allow at least one token.
    """

    mask_fn: Callable[[Sequences], Bool[Array, "R V"]] = field(metadata={"static": True})

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        allowed = self.mask_fn(sequences)
        scores = jnp.where(allowed, scores, -jnp.inf)
        stuck = jnp.max(scores, axis=-1, keepdims=True) == -jnp.inf
        return jnp.where(stuck & allowed, 0.0, scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class ForcedBOSTokenLogitsProcessor(LogitsProcessor):
    """Leaves only `bos_token_id` for the token that follows `at` generated ones.

    The reference forces a sequence's second token: `at` is 1 minus the prompt's length.
    """

    bos_token_id: Number
    at: Number

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        return jnp.where((sequences.new == self.at)[:, None], _only(scores, self.bos_token_id), scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class ForcedEOSTokenLogitsProcessor(LogitsProcessor):
    """Leaves only `eos_token_ids` for the last of `max_new_tokens` tokens."""

    max_new_tokens: Number
    eos_token_ids: TokenIds

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        final = sequences.new == self.max_new_tokens - 1
        return jnp.where(final[:, None], _only(scores, self.eos_token_ids), scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class InfNanRemoveLogitsProcessor(LogitsProcessor):
    """Replaces NaN with 0 and the infinities with float32's largest and smallest numbers."""

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        return jnp.nan_to_num(scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class ExponentialDecayLengthPenalty(LogitsProcessor):
    """Raises the end tokens' scores by |score| * (factor ** (new - start) - 1) once `new` is past `start`.

    Holds the factor's logarithm, which is more exact in float32 for a factor close to 1.
    """

    start: Number
    log_factor: Number
    eos_token_ids: TokenIds

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        past = jnp.maximum(sequences.new - self.start, 0)[:, None]
        growth = jnp.where(past > 0, jnp.expm1(past.astype(jnp.float32) * self.log_factor), 0.0)
        ends = scores[:, self.eos_token_ids]
        raised = jnp.where(jnp.isfinite(ends), ends + jnp.abs(ends) * growth, ends)
        return scores.at[:, self.eos_token_ids].set(raised)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class SuppressTokensLogitsProcessor(LogitsProcessor):
    """Forbids tokens."""

    suppress_tokens: TokenIds

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        return _without(scores, self.suppress_tokens)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class SuppressTokensAtBeginLogitsProcessor(LogitsProcessor):
    """Forbids tokens directly after `at` generated ones, usually none."""

    begin_suppress_tokens: TokenIds
    at: Number

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        begins = sequences.new == self.at
        return jnp.where(begins[:, None], _without(scores, self.begin_suppress_tokens), scores)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class LogitNormalization(LogitsProcessor):
    """Turns scores into log-probabilities, whose exponentials sum to one."""

    def __call__(self, sequences: Sequences, scores: Float[Array, "R V"]) -> Float[Array, "R V"]:
        return jax.nn.log_softmax(scores, axis=-1)


def _without(scores: Float[Array, "R V"], tokens: TokenIds) -> Float[Array, "R V"]:
    return scores.at[:, tokens].set(-jnp.inf, mode="drop")


def _only(scores: Float[Array, "R V"], tokens: TokenIds | Number) -> Float[Array, "R V"]:
    return jnp.full_like(scores, -jnp.inf).at[:, tokens].set(0.0, mode="drop")
