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

    def visible_pairs(self, queries: int, keys: int) -> int:
        """Returns the visible pairs of a row's last queries and its keys, of all heads together."""
        positions = np.arange(keys - queries, keys, dtype=np.int64)
        block = positions // self.size
        remote = np.maximum(block - self.local + 1, 0)  # blocks before the nearest ones
        near = positions - remote * self.size + 1
        # Of the blocks 0 to n - 1, a head with shift s sees those that are -1 - s modulo the stride.
        shifts, counts = np.unique(self.shifts, return_counts=True)
        pairs = 0
        for shift, heads in zip(shifts, counts, strict=True):
            seen = (remote + shift) // self.stride - shift // self.stride
            pairs += int(heads) * int((near + seen * self.size).sum())
        return pairs

    def read_share(self, keys: int, kv_heads: int) -> float:
        """Returns the share of a row's keys that its last query reads, a key/value head at a time."""
        blocks = np.arange((keys - 1) // self.size + 1)
        near = len(blocks) - blocks <= self.local
        shifts = self.shifts.reshape(kv_heads, -1)  # [K, G]
        remote = (blocks[:, None, None] + shifts + 1) % self.stride == 0
        return float((near[:, None] | remote.any(axis=2)).mean())
