"""Which query may see which key."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CausalMask:
    """A query sees a key that is a token, at its own slot or before, within the window.

    Kept as vectors, so that each kernel makes of it what it needs and nobody holds T x S of anything. Slots
    count padding, so left padding shifts queries and keys alike.
    """

    query_slots: Int[Array, "B T"]
    key_slots: Int[Array, "#B S"]
    """Below 0: nothing lies there."""
    key_mask: Bool[Array, "B S"]
    """Keys that are tokens, not padding."""
    window: int | None = field(metadata={"static": True})
    """Keys that a query sees at most, its own included."""
    fresh: bool = field(default=False, metadata={"static": True})
    """The keys are those of the queries and nothing else: both lie in the slots 0 to T - 1."""
    query_segments: Int[Array, "B T"] | None = None
    """Queries see only keys of their own segment; 0: padding."""
    key_segments: Int[Array, "B S"] | None = None

    def dense(self) -> Bool[Array, "B 1 T S"]:
        """True where a query sees a key."""
        query = self.query_slots[:, :, None]  # [B, T, 1]
        key = self.key_slots[:, None, :]  # [B, 1, S]
        visible = self.key_mask[:, None, :] & (key <= query)
        if self.window is not None:
            visible &= key > query - self.window
        if self.query_segments is not None and self.key_segments is not None:
            visible &= self.query_segments[:, :, None] == self.key_segments[:, None, :]
        return visible[:, None]

    def sighted(self) -> Bool[Array, "B T"]:
        """Queries of a fresh mask that see any key: all but some that are padding."""
        if self.query_segments is not None:
            return self.query_segments != 0  # tokens see themselves, padding sees none of its segment
        tokens = jnp.pad(jnp.cumsum(self.key_mask, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
        seen = jnp.take_along_axis(tokens, self.query_slots + 1, axis=1)
        if self.window is not None:
            before = jnp.maximum(self.query_slots + 1 - self.window, 0)
            seen -= jnp.take_along_axis(tokens, before, axis=1)
        return seen > 0

    def of_rows(self, rows: slice, slots: int) -> "CausalMask":
        """The mask of these rows and their first slots; of keys in a cache."""
        key_slots = self.key_slots if self.key_slots.shape[0] == 1 else self.key_slots[rows]
        return replace(
            self,
            query_slots=self.query_slots[rows],
            key_slots=key_slots[:, :slots],
            key_mask=self.key_mask[rows, :slots],
        )

    def last_queries(self, count: int) -> "CausalMask":
        """The mask of the last `count` queries; 0: of all."""
        query_slots = self.query_slots[:, -count:]
        segments = None if self.query_segments is None else self.query_segments[:, -count:]
        fresh = self.fresh and query_slots.shape == self.query_slots.shape
        return replace(self, query_slots=query_slots, query_segments=segments, fresh=fresh)
