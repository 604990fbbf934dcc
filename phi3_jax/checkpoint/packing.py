"""Small integers in 32-bit words, as quantized checkpoints store them."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int8, Int32

from phi3_jax.sizes import ceil_div

BLOCK = 1 << 18
"""The bytes of words that are converted at once, so that temporary arrays stay in the processor's cache."""


def blocks(rows: int, row_bytes: int, block: int) -> Iterator[slice]:
    """Yields slices of rows that have about `block` bytes; at least 16 rows, the width of a cache line."""
    step = max(16, block // max(1, row_bytes))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def unpack_columns(
    words: Int32[np.ndarray, "rows words"], bits: int, columns: int
) -> Int8[np.ndarray, "rows columns"]:
    """Returns the integers of 4 or 8 bits that are packed along the columns.

    The first integer of a word has its lowest bits. An integer q is stored as q + 2**(bits - 1), without a
    sign. `words` may be a transposed view.
    """
    values = np.empty((len(words), columns), np.int8)
    for rows in blocks(len(words), 4 * words.shape[1], BLOCK):
        packed = np.ascontiguousarray(words[rows]).view(np.uint8)
        if bits == 8:
            np.bitwise_xor(packed[:, :columns], 0x80, out=values[rows].view(np.uint8))
            continue
        pairs = packed.astype(np.uint16)
        pairs |= pairs << 4
        pairs &= 0x0F0F
        np.subtract(pairs.view(np.int8)[:, :columns], 8, out=values[rows])
    return values


def pack_columns(values: Int8[np.ndarray, "rows columns"], bits: int) -> Int32[np.ndarray, "rows words"]:
    """Returns the words that `unpack_columns` reads; the rest of a row's last word is zero."""
    rows, columns = values.shape
    words = np.zeros((rows, ceil_div(columns * bits, 32)), np.int32)
    for part in blocks(rows, 4 * words.shape[1], BLOCK):
        stored = words[part].view(np.uint8)
        if bits == 8:
            np.bitwise_xor(values[part].view(np.uint8), 0x80, out=stored[:, :columns])
            continue
        pairs = np.zeros(stored.shape, np.uint16)
        np.add(values[part], 8, out=pairs.view(np.int8)[:, :columns])
        stored[:] = pairs | pairs >> 4
    return words


def input_order(g_idx: Int32[np.ndarray, " in"], groups: int) -> Int32[np.ndarray, " in"] | None:
    """Returns the inputs sorted by their group; None if they are sorted already.

    Raises:
        ValueError: there is no group of a number, or groups have different sizes.
    """
    outside = (g_idx < 0) | (g_idx >= groups)
    if outside.any():
        at = int(outside.argmax())
        raise ValueError(f"places input {at} in group {g_idx[at]}; expected 0 to {groups - 1}")
    sizes = np.bincount(g_idx, minlength=groups)
    if (sizes != len(g_idx) // groups).any():
        at = int((sizes != len(g_idx) // groups).argmax())
        raise ValueError(f"gives group {at} {sizes[at]} inputs; expected {len(g_idx) // groups} in each")
    if (np.diff(g_idx) >= 0).all():
        return None
    return np.argsort(g_idx, kind="stable").astype(np.int32)


def sort_inputs(values: Int8[np.ndarray, "out in"], order: Int32[np.ndarray, " in"]) -> None:
    """Sorts the columns of an array in place."""
    for rows in blocks(len(values), values.shape[1], BLOCK):
        values[rows] = values[rows].take(order, axis=1)
