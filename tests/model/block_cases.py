"""Masks with blocks for tests of attention kernels."""

import dataclasses

import numpy as np

from phi3_jax.config.block_pattern import BlockPattern
from phi3_jax.model.block_sparse import SparseBlocks
from phi3_jax.model.masks import CausalMask

PHI_3_SMALL = BlockPattern(size=64, local=16, stride=8, heads=32)
"""The pattern of the published models, with 8 key/value heads."""


def with_blocks(mask: CausalMask, pattern: BlockPattern, groups: int) -> CausalMask:
    """Returns the mask with blocks that count each row's tokens; queries are in slots of the keys."""
    positions = np.maximum(np.cumsum(mask.key_mask, axis=1, dtype=np.int32) - 1, 0)
    at_queries = np.take_along_axis(positions, np.asarray(mask.query_slots), axis=1)
    shifts = pattern.shifts.reshape(-1, groups)
    return dataclasses.replace(mask, blocks=SparseBlocks(at_queries, positions, shifts, pattern))
