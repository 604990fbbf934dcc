"""Vectors of rows that have different numbers of slots."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import jax
import jax.numpy as jnp
from jaxtyping import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RaggedVectors:
    """A layer's keys or values in parts, one below the other: the rows of each have as many slots.

    One step then reads the weights once for all rows, and of each row no more slots than it has.
    """

    parts: list[Array]
    """Each [B, K, S, H], with B and S of its own."""

    @property
    def shape(self) -> tuple[int, ...]:
        """All rows, and the slots of the longest."""
        rows = sum(part.shape[0] for part in self.parts)
        _, heads, _, width = self.parts[0].shape
        return rows, heads, max(part.shape[2] for part in self.parts), width

    @property
    def dtype(self) -> jnp.dtype:
        return self.parts[0].dtype

    def rows(self) -> Iterator[slice]:
        """Which rows are in each part."""
        counts = [part.shape[0] for part in self.parts]
        ends = list(accumulate(counts))
        return (slice(end - count, end) for count, end in zip(counts, ends, strict=True))
