"""Masks: which query sees which key."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from phi3_jax.model.block_sparse import SparseBlocks
from phi3_jax.model.symbolic import is_certain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CausalMask:
    """A query sees every key that is a token, at its own slot or before it, within the window.

    The mask is kept as vectors: each kernel derives what it needs from them, and nothing of size T x S is
    stored. Slots count padding too, so left padding shifts queries and keys alike.
    """

    query_slots: Int[Array, "B T"]
    key_slots: Int[Array, "#B S"]
    """The slot of each key; below 0, there is no key."""
    key_mask: Bool[Array, "B S"]
    """True for keys that are tokens, not padding."""
    window: int | None = field(metadata={"static": True})
    """The most keys that a query sees, its own included."""
    prefill: bool = field(default=False, metadata={"static": True})
    """Whether the keys are exactly the queries' own, both in slots 0 to T - 1; nothing is cached."""
    query_segments: Int[Array, "B T"] | None = None
    """Queries see only keys of their own segment; 0 is padding."""
    key_segments: Int[Array, "B S"] | None = None
    blocks: SparseBlocks | None = None
    """In a block-sparse layer, the blocks of keys that each head sees of these."""

    def dense(self) -> Bool[Array, "B #N T S"]:
        """Returns the mask as an array, True where a query sees a key."""
        query = self.query_slots[:, :, None]  # [B, T, 1]
        key = self.key_slots[:, None, :]  # [B, 1, S]
        visible = self.key_mask[:, None, :] & (key <= query)
        if self.window is not None:
            visible &= key > query - self.window
        if self.query_segments is not None and self.key_segments is not None:
            visible &= self.query_segments[:, :, None] == self.key_segments[:, None, :]
        return visible[:, None] if self.blocks is None else visible[:, None] & self.blocks.dense()

    def has_visible_key(self) -> Bool[Array, "B T"]:
        """Returns which queries of a prefill see any key: all but some that are padding."""
        if self.query_segments is not None:
            return self.query_segments != 0  # a token sees itself, padding sees no key of its segment
        tokens = jnp.pad(jnp.cumsum(self.key_mask, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
        visible = jnp.take_along_axis(tokens, self.query_slots + 1, axis=1)
        if self.window is not None:
            first = jnp.maximum(self.query_slots + 1 - self.window, 0)
            visible -= jnp.take_along_axis(tokens, first, axis=1)
        return visible > 0

    def take_rows(self, rows: slice, slots: int) -> "CausalMask":
        """Returns the mask of these rows and their first slots, for keys in a cache."""
        key_slots = self.key_slots if self.key_slots.shape[0] == 1 else self.key_slots[rows]
        return replace(
            self,
            query_slots=self.query_slots[rows],
            key_slots=key_slots[:, :slots],
            key_mask=self.key_mask[rows, :slots],
            blocks=None if self.blocks is None else self.blocks.take_rows(rows, slots),
        )

    def without_blocks(self) -> "CausalMask":
        """Returns the mask of a layer that is not block-sparse."""
        return self if self.blocks is None else replace(self, blocks=None)

    def without_idle_blocks(self) -> "CausalMask":
        """Returns the mask without `blocks` if the keys are so few that these hide none."""
        blocks = self.blocks
        if blocks is None or not is_certain(lambda: self.key_mask.shape[1] <= blocks.pattern.dense_length):
            return self
        return replace(self, blocks=None)

    def query_arrays(self) -> tuple[Any, ...]:
        """Returns the arrays [B, T] that describe queries, for `with_queries`; some are None."""
        positions = None if self.blocks is None else self.blocks.query_positions
        return self.query_slots, self.query_segments, positions

    def with_queries(self, arrays: tuple[Any, ...]) -> "CausalMask":
        """Returns the mask of other queries over the same keys."""
        slots, segments, positions = arrays
        blocks = None if self.blocks is None else replace(self.blocks, query_positions=positions)
        return replace(self, query_slots=slots, query_segments=segments, blocks=blocks)

    def last_queries(self, count: int) -> "CausalMask":
        """Returns the mask of the last `count` queries."""
        last = self.with_queries(jax.tree.map(lambda x: x[:, -count:], self.query_arrays()))
        prefill = self.prefill and last.query_slots.shape == self.query_slots.shape
        return replace(last, prefill=prefill)
