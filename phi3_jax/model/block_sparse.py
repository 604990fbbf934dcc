"""`SparseBlocks`: the part of a mask that hides blocks of keys, a pattern a head."""

from dataclasses import dataclass, field, replace

import jax
from jaxtyping import Array, Bool, Int

from phi3_jax.config.block_pattern import BlockPattern


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseBlocks:
    """Which blocks of keys the queries see, for all heads or, on a mesh, for one device's.

    Positions count tokens without padding from 0, and restart in each segment. Those of padding mean nothing.
    """

    query_positions: Int[Array, "B T"]
    key_positions: Int[Array, "B S"]
    shifts: Int[Array, "K G"]
    """Each query head's shift of `pattern`."""
    pattern: BlockPattern = field(metadata={"static": True})

    def dense(self) -> Bool[Array, "B N T S"]:
        """Returns which keys the pattern shows, also keys after the query."""
        size, local, stride = self.pattern.size, self.pattern.local, self.pattern.stride
        query = (self.query_positions // size)[:, None, :, None]  # [B, 1, T, 1]
        key = (self.key_positions // size)[:, None, None, :]  # [B, 1, 1, S]
        shifts = self.shifts.reshape(1, -1, 1, 1)
        return (query - key < local) | ((key + shifts + 1) % stride == 0)

    def take_rows(self, rows: slice, slots: int) -> "SparseBlocks":
        """Returns the part of these rows and their first slots."""
        query, key = self.query_positions[rows], self.key_positions[rows, :slots]
        return replace(self, query_positions=query, key_positions=key)
