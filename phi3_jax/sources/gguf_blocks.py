"""The integers and scales of GGUF's simple quantizations, whose blocks are 32 inputs with one scale."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int8

SIZE = 32
"""Inputs of a block."""

BITS = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4}
"""The bits of a value, for each quantization that can be kept."""


class Blocks(NamedTuple):
    """A weight as `(values - zero) * scale`, with one scale for each block."""

    values: Int8[np.ndarray, "rows in"]
    """Of 4 bits: -8 to 7."""
    scale: Float[np.ndarray, "rows blocks"]
    """float32."""
    zero: Float[np.ndarray, "rows blocks"] | None
    """float32; None: 0."""


def read_blocks(kind: str, data: np.ndarray) -> Blocks:
    """Reads a tensor that is stored as `kind`, one of `BITS`, from its bytes [rows, bytes of a row]."""
    rows = len(data)
    header = 4 if kind == "Q4_1" else 2  # a float16 scale, and in Q4_1 a float16 least value
    parts = data.reshape(rows, -1, header + SIZE * BITS[kind] // 8)
    numbers = np.ascontiguousarray(parts[..., :header]).view(np.float16).astype(np.float32)
    scale, packed = numbers[..., 0], parts[..., header:]
    if kind == "Q8_0":
        return Blocks(packed.view(np.int8).reshape(rows, -1), scale, None)
    nibbles = np.concatenate([packed & 15, packed >> 4], axis=-1).reshape(rows, -1)
    values = nibbles.astype(np.int8) - np.int8(8)
    if kind == "Q4_0":
        return Blocks(values, scale, None)
    # (value + 8) * scale + least; where the scale is 0, every value is the least one.
    least = numbers[..., 1]
    is_constant = scale == 0
    values.reshape(rows, -1, SIZE)[is_constant] = 0
    scale = np.where(is_constant, least, scale)
    zero = np.where(is_constant, np.float32(-1), -8 - least / np.where(scale == 0, np.float32(1), scale))
    return Blocks(values, scale, zero.astype(np.float32))
