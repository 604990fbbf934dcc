"""JAX's settings under which an implicit promotion, or an integer without a dtype, is an error."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def strict_settings() -> Iterator[None]:
    """Turns 64-bit numbers on and all implicit promotion off, as some users do."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
