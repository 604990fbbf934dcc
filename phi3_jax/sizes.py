"""Arithmetic of sizes and counts."""

import math
from collections.abc import Sequence

import numpy as np

INT32_MAX = 2**31 - 1


def array_bytes(shape: Sequence[int], dtype: np.dtype) -> int:
    """Returns the bytes of an array on a device, where two int4 share a byte."""
    return math.prod(shape) * dtype.itemsize // (2 if dtype.name == "int4" else 1)


def ceil_div(total: int, size: int) -> int:
    """Returns how many pieces of `size` it takes to hold `total`."""
    return -(-total // size)


def round_up(value: int, multiple: int) -> int:
    """Returns the least multiple of `multiple` that is not below `value`."""
    return ceil_div(value, multiple) * multiple


def power_of_two(value: int) -> int:
    """Returns the least power of two that is not below `value`, which is at least 1."""
    return 1 << (value - 1).bit_length()
