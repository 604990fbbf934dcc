"""The state of a decoding loop, and the settings that hold for all of its steps."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from phi3_jax.cache.cache import KVCache
from phi3_jax.config.layer_frequencies import LayerFrequencies
from phi3_jax.generation.processors import LogitsProcessorList
from phi3_jax.generation.sequences import Sequences

NO_TOKEN = -1
"""Stands in a report where a row generated no token."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """The state of a decoding loop for B rows: those that generate tokens, padding and unconditional rows.

    A row's cache has the keys and values of its slots [0, cache.length). Slots [cache.length,
    sequences.length) are fed next: at first the prompt's, then only the latest token. With guidance the
    second half are the unconditional rows of the first half.
    """

    sequences: Sequences
    finished: Bool[Array, " B"]
    cache: KVCache

    @property
    def pending(self) -> Int[Array, " B"]:
        """The number of slots of each row that the cache does not have yet; 0 for finished rows."""
        return jnp.where(self.finished, 0, self.sequences.length - self.cache.length)

    def take(self, rows: Int[Array, " n"]) -> "State":
        """Returns these rows in this order."""
        sequences = jax.tree.map(lambda x: x[rows], self.sequences)
        return State(sequences, self.finished[rows], self.cache.take(rows))

    def with_cache(self, cache: KVCache) -> "State":
        return replace(self, cache=cache)

    def resize(self, slots: int) -> "State":
        """Returns the same state with more slots a row."""
        extra = ((0, 0), (0, slots - self.sequences.ids.shape[1]))
        sequences = replace(
            self.sequences, ids=jnp.pad(self.sequences.ids, extra), mask=jnp.pad(self.sequences.mask, extra)
        )
        cache = self.cache if self.cache.window is not None else self.cache.resize(slots)
        return State(sequences, self.finished, cache)

    def truncate(self, new: Int[Array, " B"], finished: Bool[Array, " B"]) -> "State":
        """Keeps each row's first `new` generated tokens and ends the rows in `finished`."""
        excess = jnp.maximum(self.sequences.new - new, 0)
        length = self.sequences.length - excess
        slots = jnp.arange(self.sequences.ids.shape[1], dtype=jnp.int32)[None]
        sequences = replace(
            self.sequences,
            mask=self.sequences.mask & (slots < length[:, None]),
            length=length,
            new=self.sequences.new - excess,
        )
        cache = self.cache.rewind(jnp.minimum(self.cache.length, jnp.maximum(length - 1, 0)))
        return State(sequences, self.finished | finished, cache)


class RopeChoice(NamedTuple):
    """Chooses the rope frequencies of each row: by its length within limits, or given ones."""

    least: Int[Array, " B"]
    most: Int[Array, ""]
    inv_freq: Float[Array, "B P"] | Float[Array, "B S P"] | LayerFrequencies | None = None
    """Replaces the config's frequencies for each row, or each of its positions (the last holds beyond)."""
    attention_scaling: Float[Array, " B"] | None = None

    def length(self, tokens: Int[Array, " B"]) -> Int[Array, " B"]:
        """Returns the length that chooses the frequencies of a row of `tokens` tokens."""
        return jnp.minimum(jnp.maximum(tokens, self.least), self.most)

    def take(self, rows: Int[Array | np.ndarray, " n"]) -> "RopeChoice":
        """Returns the choice for these rows in this order."""
        replacements = jax.tree.map(lambda x: x[rows], (self.inv_freq, self.attention_scaling))
        return RopeChoice(self.least[rows], self.most, *replacements)

    def model_arguments(self, positions: Int[Array, "B T"]) -> dict[str, Any]:
        """Returns the model's arguments that replace its config's rope for tokens at `positions`."""
        inv_freq = self.inv_freq
        if isinstance(inv_freq, Array) and inv_freq.ndim == 3:
            inv_freq = jnp.take_along_axis(inv_freq, positions[:, :, None], axis=1, mode="clip")
        arguments = {"inv_freq": inv_freq, "attention_scaling": self.attention_scaling}
        return {name: value for name, value in arguments.items() if value is not None}


class StepSettings(NamedTuple):
    """Settings that hold for all steps; they are data, so new values compile nothing."""

    before_host: LogitsProcessorList
    """Logits processors before those that run on the host; all of them if none does."""
    after_host: LogitsProcessorList
    end_tokens: Int[Array, " E"]
    max_new_tokens: Int[Array, ""]
    rope: RopeChoice
    key: Key[Array, "..."] | None
    """One for all rows or one for each; None takes the most likely token."""
    guidance_scale: Float[Array, ""] | None = None


def append(state: State, tokens: Int[Array, "R n"], count: Int[Array, " R"], settings: StepSettings) -> State:
    """Appends the first `count` of `tokens` to each row; a row ends after an end token or at its limit.

    The caller counts no token after an end token. Finished rows stay as they are.
    """
    sequences, rows = state.sequences, state.finished.shape[0]
    tokens = jnp.resize(tokens, (rows, tokens.shape[1]))  # unconditional rows get the same tokens
    count = jnp.where(state.finished, 0, jnp.resize(count, (rows,)))
    slots = jnp.arange(sequences.ids.shape[1], dtype=jnp.int32)[None]
    offset = slots - sequences.length[:, None]  # [B, S]
    is_new = (offset >= 0) & (offset < count[:, None])
    new_ids = jnp.take_along_axis(tokens, jnp.clip(offset, 0, tokens.shape[1] - 1), axis=1)
    new = sequences.new + count
    counts = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < count[:, None]
    ends = jnp.any(jnp.isin(tokens, settings.end_tokens) & counts, axis=1)
    return State(
        Sequences(
            ids=jnp.where(is_new, new_ids, sequences.ids),
            mask=sequences.mask | is_new,
            length=sequences.length + count,
            new=new,
        ),
        state.finished | ends | (new >= settings.max_new_tokens),
        state.cache,
    )
