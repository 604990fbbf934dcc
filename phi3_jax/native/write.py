"""Writes vectors into a cache in place with the C++ library."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Num

from phi3_jax.native.targets import WRITE, available

KINDS = (jnp.bfloat16, jnp.float16, jnp.int8)
"""The dtypes that are written."""


def can_write(whole: Array, vectors: Array) -> bool:
    """Whether `write` takes these arrays, and can run; XLA updates 32-bit numbers as fast.

    False for the open sizes of `jax.export`.
    """
    are_numbers = all(isinstance(size, int) for size in (*whole.shape, *vectors.shape))
    return are_numbers and whole.ndim >= 3 and whole.dtype in KINDS and available()


def write(
    whole: Num[Array, "B K S ..."],
    vectors: Num[Array, "N K T ..."],
    rows: Int32[Array, " N"],
    start: Int32[Array, " N"],
) -> Num[Array, "B K S ..."]:
    """Returns `whole` with `vectors[n]` in the slots [start[n], start[n] + T) of row `rows[n]`.

    In a program for one CPU or within `shard_map`, where `whole` is not used again, nothing else is copied.
    As in XLA's updates, numbers beyond the array mean its last rows or slots. It has no gradient.

    Raises:
        ValueError: dtypes or shapes do not fit each other.
    """
    count = vectors.shape[0]
    is_right = (
        vectors.dtype == whole.dtype
        and vectors.ndim == whole.ndim
        and (vectors.shape[1], *vectors.shape[3:]) == (whole.shape[1], *whole.shape[3:])
        and vectors.shape[2] <= whole.shape[2]
        and rows.shape == start.shape == (count,)
        and rows.dtype == start.dtype == jnp.int32
    )
    if not is_right:
        raise ValueError(
            f"vectors {vectors.dtype}{list(vectors.shape)}, rows {rows.dtype}{list(rows.shape)} and start "
            f"{start.dtype}{list(start.shape)} do not fit an array {whole.dtype}{list(whole.shape)}"
        )
    result = jax.ShapeDtypeStruct(whole.shape, whole.dtype)
    call = jax.ffi.ffi_call(WRITE, result, input_output_aliases={0: 0}, vmap_method="sequential")
    return call(whole, vectors, rows, start)
