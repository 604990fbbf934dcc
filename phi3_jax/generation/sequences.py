"""The token sequences of a batch, as logits processors see them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Sequences:
    """The rows of a batch during generation; each may have its own length.

    A row uses slots [0, length), the prompt's padding first; later slots hold anything. `mask` is True
    exactly where a slot holds a token. The last `new` of the used slots were generated.
    """

    ids: Int[Array, "R S"]
    mask: Bool[Array, "R S"]
    length: Int[Array, " R"]
    new: Int[Array, " R"]

    @property
    def tokens(self) -> Int[Array, " R"]:
        """The number of tokens in each row, without padding."""
        return jnp.sum(self.mask, axis=1, dtype=jnp.int32)

    @property
    def generated(self) -> Bool[Array, "R S"]:
        """True where a slot holds a generated token."""
        slots = jnp.arange(self.ids.shape[1], dtype=jnp.int32)[None]
        return self.mask & (slots >= (self.length - self.new)[:, None])

    def first(self, rows: int) -> "Sequences":
        """Returns the first `rows` rows."""
        return jax.tree.map(lambda x: x[:rows], self)

    def last(self, n: int) -> tuple[Int[Array, "R {n}"], Bool[Array, "R {n}"]]:
        """Returns each row's `n` latest slots, the newest last, and whether they hold tokens.

        Slots before a row's first one hold none.
        """
        slot = self.length[:, None] - n + jnp.arange(n, dtype=jnp.int32)[None]
        inside = jnp.maximum(slot, 0)
        ids = jnp.take_along_axis(self.ids, inside, axis=1, mode="clip")
        return ids, (slot >= 0) & jnp.take_along_axis(self.mask, inside, axis=1, mode="clip")

    def counts(self, among: Bool[Array, "R S"], vocab_size: int) -> Int[Array, "R {vocab_size}"]:
        """Counts each token of the vocabulary in the slots `among`."""
        return token_counts(self.ids, among, vocab_size)


def token_counts(
    ids: Int[Array, "R S"], among: Bool[Array, "R S"], vocab_size: int
) -> Int[Array, "R {vocab_size}"]:
    """Counts each token of the vocabulary in each row where `among` is True."""
    rows = jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]
    index = jnp.where(among, ids, vocab_size)  # out of bounds: dropped
    return jnp.zeros((ids.shape[0], vocab_size), jnp.int32).at[rows, index].add(1, mode="drop")


def common_prefix_length(a: Sequence[Any] | np.ndarray, b: Sequence[Any] | np.ndarray) -> int:
    """Returns how many elements `a` and `b` share from the first one on."""
    length = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:length]) != np.asarray(b[:length]))
    return int(different[0]) if different.size else length
