"""A checksum of arrays, which Orbax's format does not have."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32


@jax.jit
def checksum(tree: Any) -> UInt32[Array, ""]:
    """Returns a number that depends on every bit, and on the order of the numbers."""
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        if leaf.dtype == jnp.int4:
            leaf = leaf.astype(jnp.int8)
        bits = jax.lax.bitcast_convert_type(leaf, np.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(
            jnp.uint32
        )
        weight = jnp.ones((), jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            shape = [size if each == axis else 1 for each in range(leaf.ndim)]
            weight = weight * (2 * jnp.arange(size, dtype=jnp.uint32) + 1).reshape(shape)
        total = total * jnp.uint32(31) + jnp.sum(bits * weight, dtype=jnp.uint32)
    return total
