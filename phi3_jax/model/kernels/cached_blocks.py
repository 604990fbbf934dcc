"""What the kernel for caches needs to know of blocks: which heads see the same ones, and who sees a key."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from phi3_jax.model.block_sparse import SparseBlocks


def count_classes(blocks: SparseBlocks) -> int:
    """Returns after how many key/value heads the patterns of their query heads repeat.

    Heads of one class, k and k + classes, read the same keys. All heads differ if the number does not divide
    theirs.
    """
    kv_heads, groups = blocks.shifts.shape
    first_shifts = blocks.pattern.shifts[::groups]
    repeated = np.flatnonzero(first_shifts == first_shifts[0])[1:]
    classes = int(repeated[0]) if len(repeated) else len(first_shifts)
    return classes if kv_heads % classes == 0 else kv_heads


def row_marks(
    blocks: SparseBlocks, classes: int, positions: Int[Array, "rows blocks queries"]
) -> Int[Array, "rows blocks query_rows 2"]:
    """Returns the block of each query row, and the remainder by the stride of the far blocks that it sees.

    Args:
        blocks: the pattern, and the shifts.
        classes: the number of `count_classes`.
        positions: the queries' positions, for each row of the batch and in it for each class.
    """
    groups = blocks.shifts.shape[1]
    numbers = jnp.repeat(positions // blocks.pattern.size, groups, axis=2)
    batch, queries = positions.shape[0] // classes, positions.shape[2]
    remainders = jnp.tile(_remainders(blocks, classes), (batch, queries))[:, None]
    return jnp.stack([numbers, jnp.broadcast_to(remainders, numbers.shape)], axis=-1)


def key_marks(blocks: SparseBlocks, positions: Int[Array, "rows S"]) -> Int[Array, "rows 2 S"]:
    """Returns the block of each key, and its remainder by the stride."""
    numbers = positions // blocks.pattern.size
    return jnp.stack([numbers, numbers % blocks.pattern.stride], axis=1)


def may_see(
    blocks: SparseBlocks,
    classes: int,
    query_positions: Int[Array, "rows blocks queries"],
    key_positions: Int[Array, "rows S"],
) -> Bool[Array, "rows blocks S"]:
    """Returns which of the keys before them some query of a block may see, by some head of the class."""
    first = jnp.min(query_positions, axis=2)[:, :, None] // blocks.pattern.size
    numbers = key_positions // blocks.pattern.size  # [rows, S]
    remainders = jnp.tile(_remainders(blocks, classes), (key_positions.shape[0] // classes, 1))
    far = (numbers % blocks.pattern.stride == remainders.T[:, :, None]).any(axis=0)
    return (first - numbers[:, None] < blocks.pattern.local) | far[:, None]


def _remainders(blocks: SparseBlocks, classes: int) -> Int[Array, "classes G"]:
    return (-1 - jnp.asarray(blocks.shifts)[:classes]) % blocks.pattern.stride
