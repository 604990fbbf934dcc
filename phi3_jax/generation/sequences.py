"""What a logits processor sees of the sequences so far."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Sequences:
    """The rows of a batch in the middle of generation; each may have its own length.

    A row's tokens stand in columns [0, length), prompt padding first; columns beyond hold anything. `mask` is
    True exactly where a column holds a token. The last `new` of the used columns were generated.
    """

    ids: Int[Array, "R S"]
    mask: Bool[Array, "R S"]
    length: Int[Array, " R"]
    new: Int[Array, " R"]

    @property
    def tokens(self) -> Int[Array, " R"]:
        """Tokens in each row, prompt padding not counted."""
        return jnp.sum(self.mask, axis=1, dtype=jnp.int32)

    @property
    def generated(self) -> Bool[Array, "R S"]:
        """True where a column holds a token that is not of the prompt."""
        return self.mask & (jnp.arange(self.ids.shape[1]) >= (self.length - self.new)[:, None])

    def last(self, n: int) -> tuple[Int[Array, "R {n}"], Bool[Array, "R {n}"]]:
        """Each row's `n` latest columns, the newest last, and whether they hold tokens.

        Columns before a row's first are given as not holding one.
        """
        column = self.length[:, None] - n + jnp.arange(n)
        inside = jnp.maximum(column, 0)
        ids = jnp.take_along_axis(self.ids, inside, axis=1, mode="clip")
        return ids, (column >= 0) & jnp.take_along_axis(self.mask, inside, axis=1, mode="clip")

    def counts(self, among: Bool[Array, "R S"], vocab_size: int) -> Int[Array, "R {vocab_size}"]:
        """How often each token of the vocabulary stands in the columns `among`."""
        return token_counts(self.ids, among, vocab_size)


def token_counts(
    ids: Int[Array, "R S"], among: Bool[Array, "R S"], vocab_size: int
) -> Int[Array, "R {vocab_size}"]:
    """How often each token occurs in each row where `among` is True."""
    rows = jnp.arange(ids.shape[0])[:, None]
    column = jnp.where(among, ids, vocab_size)  # out of bounds: dropped
    return jnp.zeros((ids.shape[0], vocab_size), jnp.int32).at[rows, column].add(1, mode="drop")


def common_prefix_length(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """Returns how many tokens `a` and `b` have in common from the first one on."""
    length = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:length]) != np.asarray(b[:length]))
    return int(different[0]) if different.size else length
