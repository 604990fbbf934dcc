"""Masks with blocks for tests of attention kernels, and their attention written out in NumPy."""

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


def visible_keys(mask: CausalMask, pattern: BlockPattern) -> np.ndarray:
    """Returns which keys each query of each head sees [B, N, T, S], by the definition of Phi-3-small."""
    tokens, slots = np.asarray(mask.key_mask), np.arange(mask.key_mask.shape[1])
    step = 0 if pattern.same_for_all_heads else max(1, int(pattern.stride / pattern.heads))
    visible = np.zeros((len(tokens), pattern.heads, mask.query_slots.shape[1], len(slots)), bool)
    for row, is_token in enumerate(tokens):
        key = (is_token.cumsum() - 1) // pattern.size
        query = key[np.asarray(mask.query_slots)[row, :, None]]
        for head in range(pattern.heads):
            is_remote = (key + head * step + 1) % pattern.stride == 0
            visible[row, head] = ((query - key < pattern.local) | is_remote) & is_token
        visible[row] &= slots <= np.asarray(mask.query_slots)[row, :, None]
    return visible


def masked_softmax(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, visible: np.ndarray, scale: float
) -> np.ndarray:
    """Returns attention [B, T, K, G, H] in float64, with zeros where a query sees no key."""
    batch, length, kv_heads, groups, _ = query.shape
    scores = np.einsum("BTKGH,BKSH->BKGTS", np.float64(query), np.float64(key)) * scale
    scores = np.where(visible.reshape(batch, kv_heads, groups, length, -1), scores, -np.inf)
    weights = np.exp(scores - np.maximum(scores.max(axis=-1, keepdims=True), -1e30))
    weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    return np.einsum("BKGTS,BKSH->BTKGH", weights, np.float64(value))
