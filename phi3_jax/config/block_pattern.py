"""`BlockPattern`: the blocks of keys that each query head of a block-sparse layer sees."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class BlockPattern:
    """A query sees the keys of the nearest blocks, and of one in `stride` of the blocks before them.

    A query of block a sees the earlier keys of block b if a - b < local, or if (b + shift + 1) % stride is 0;
    the shift is its head's. Blocks are counted from a row's first token.
    """

    size: int
    """Tokens of a block."""
    local: int
    """The nearest blocks, which every head sees: the query's own and those before it."""
    stride: int
    heads: int
    """Query heads."""
    same_for_all_heads: bool = False

    @property
    def dense_length(self) -> int:
        """The most tokens of rows in which every query sees all keys before it."""
        return self.local * self.size

    @property
    def shifts(self) -> Int[np.ndarray, " N"]:
        """The shift of each query head."""
        step = 0 if self.same_for_all_heads else max(1, self.stride // self.heads)
        return np.arange(self.heads, dtype=np.int32) * np.int32(step) % np.int32(self.stride)
