"""What the loops carry (sequences, who has ended, cache), and what they are told once for all steps."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from phi3_jax.cache.cache import KVCache
from phi3_jax.generation.processors import LogitsProcessorList
from phi3_jax.generation.sequences import Sequences

NO_TOKEN = -1
"""In reports, where a row made no token."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """The loop's state, one lane for each row that runs through the model.

    A lane's cache holds its columns [0, cache.length); columns [cache.length, sequences.length) are fed next:
    the prompt's at first, then only the latest token. With guidance the second half of the lanes are the
    unconditional twins of the first.
    """

    sequences: Sequences
    finished: Bool[Array, " L"]
    cache: KVCache

    @property
    def pending(self) -> Int[Array, " L"]:
        """Columns that the cache lacks; 0 for lanes that have finished."""
        return jnp.where(self.finished, 0, self.sequences.length - self.cache.length)

    def take(self, lanes: Int[Array, " n"]) -> "State":
        """Those lanes, in that order."""
        sequences = jax.tree.map(lambda x: x[lanes], self.sequences)
        return State(sequences, self.finished[lanes], self.cache.take(lanes))

    def with_cache(self, cache: KVCache) -> "State":
        return replace(self, cache=cache)

    def widen(self, columns: int) -> "State":
        """The same with room for `columns` columns."""
        extra = ((0, 0), (0, columns - self.sequences.ids.shape[1]))
        sequences = replace(
            self.sequences, ids=jnp.pad(self.sequences.ids, extra), mask=jnp.pad(self.sequences.mask, extra)
        )
        cache = self.cache if self.cache.window is not None else self.cache.resize(columns)
        return State(sequences, self.finished, cache)

    def truncate(self, new: Int[Array, " L"], finished: Bool[Array, " L"]) -> "State":
        """Each lane with its first `new` tokens only, and those marked `finished` that are to stop."""
        excess = jnp.maximum(self.sequences.new - new, 0)
        length = self.sequences.length - excess
        columns = jnp.arange(self.sequences.ids.shape[1])
        sequences = replace(
            self.sequences,
            mask=self.sequences.mask & (columns < length[:, None]),
            length=length,
            new=self.sequences.new - excess,
        )
        cache = self.cache.rewind(jnp.minimum(self.cache.length, jnp.maximum(length - 1, 0)))
        return State(sequences, self.finished | finished, cache)


class RopeChoice(NamedTuple):
    """How the rope list of a lane follows from its tokens; or the frequencies themselves."""

    least: Int[Array, " L"]
    most: Int[Array, ""]
    inv_freq: Float[Array, "L P"] | Float[Array, "L S P"] | None = None
    """In place of the config's: of each lane, or of each of its positions (the last one's from there on)."""
    attention_scaling: Float[Array, " L"] | None = None

    def length(self, tokens: Int[Array, " L"]) -> Int[Array, " L"]:
        """The length for which the list is chosen when a lane has `tokens` tokens."""
        return jnp.minimum(jnp.maximum(tokens, self.least), self.most)

    def take(self, lanes: Int[Array | np.ndarray, " n"]) -> "RopeChoice":
        """Of those lanes, in that order."""
        given = (None if x is None else x[lanes] for x in (self.inv_freq, self.attention_scaling))
        return RopeChoice(self.least[lanes], self.most, *given)

    def given(self, positions: Int[Array, "L T"]) -> dict[str, Any]:
        """What the model is told of frequencies, for tokens at these positions."""
        inv_freq = self.inv_freq
        if inv_freq is not None and inv_freq.ndim == 3:
            inv_freq = jnp.take_along_axis(inv_freq, positions[:, :, None], axis=1, mode="clip")
        told = {"inv_freq": inv_freq, "attention_scaling": self.attention_scaling}
        return {name: value for name, value in told.items() if value is not None}


class StepSettings(NamedTuple):
    """What does not change from step to step; all of it data, so that new values compile nothing."""

    before_host: LogitsProcessorList
    """Logits processors ahead of those that run on the host (all of them where none does)."""
    after_host: LogitsProcessorList
    """Logits processors behind those that run on the host."""
    end_tokens: Int[Array, " E"]
    max_new_tokens: Int[Array, ""]
    rope: "RopeChoice"
    key: Key[Array, "..."] | None
    """For sampling, one for all rows or one for each; None takes the most likely token."""
    guidance_scale: Float[Array, ""] | None = None


def append(
    state: State,
    tokens: Int[Array, "R n"],
    count: Int[Array, " R"],
    settings: StepSettings,
) -> State:
    """Each row with the first `count` of its `tokens` behind it; rows end after an end token or at the limit.

    What follows an end token must not be counted by the caller. Finished rows stay as they are.
    """
    sequences, lanes = state.sequences, state.finished.shape[0]
    tokens = jnp.resize(tokens, (lanes, tokens.shape[1]))  # twins under guidance get the same tokens
    count = jnp.where(state.finished, 0, jnp.resize(count, (lanes,)))
    offset = jnp.arange(sequences.ids.shape[1]) - sequences.length[:, None]  # [L, S]
    fresh = (offset >= 0) & (offset < count[:, None])
    placed = jnp.take_along_axis(tokens, jnp.clip(offset, 0, tokens.shape[1] - 1), axis=1)
    new = sequences.new + count
    counted = jnp.arange(tokens.shape[1]) < count[:, None]
    ended = jnp.any(jnp.isin(tokens, settings.end_tokens) & counted, axis=1)
    return State(
        Sequences(
            ids=jnp.where(fresh, placed, sequences.ids),
            mask=sequences.mask | fresh,
            length=sequences.length + count,
            new=new,
        ),
        state.finished | ended | (new >= settings.max_new_tokens),
        state.cache,
    )
