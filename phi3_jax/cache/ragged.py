"""Keys or values of rows that have different numbers of slots."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import jax
import jax.numpy as jnp
from jaxtyping import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RaggedVectors:
    """A layer's keys or values in parts whose rows are concatenated; all rows of a part have as many slots.

    A step then reads the weights once for all rows, and no more slots of a row than it has.
    """

    parts: list[Array]
    """Arrays [B, K, S, H], each with its own B and S."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[all rows, K, slots of the longest row, H]."""
        rows = sum(part.shape[0] for part in self.parts)
        _, heads, _, width = self.parts[0].shape
        return rows, heads, max(part.shape[2] for part in self.parts), width

    @property
    def dtype(self) -> jnp.dtype:
        return self.parts[0].dtype

    def rows(self) -> Iterator[slice]:
        """Yields the rows of each part."""
        counts = [part.shape[0] for part in self.parts]
        ends = list(accumulate(counts))
        return (slice(end - count, end) for count, end in zip(counts, ends, strict=True))
