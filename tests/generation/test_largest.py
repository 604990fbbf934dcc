"""The place of the largest number, sought in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.generation.largest import _by_chunks, argmax


@pytest.mark.parametrize("size", [1, 16, 521, 384, 32064, 49152])
@pytest.mark.parametrize("lead", [(), (3,), (2, 5)])
def test_equals_numpy_with_ties(size: int, lead: tuple[int, ...]) -> None:
    """521 is a prime, so that there are no chunks; the first of equal numbers counts."""
    draws = np.random.default_rng(size)
    for values in (draws.normal(size=(*lead, size)), draws.integers(0, 3, (*lead, size)), np.zeros(size)):
        x = values.astype(np.float32)
        found = jax.jit(argmax)(x)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, x.argmax(-1))


@pytest.mark.parametrize("chunk", [1, 4, 12])
def test_odd_numbers_are_found_as_by_jax(chunk: int) -> None:
    rows = np.full((6, 12), -np.inf, np.float32)
    rows[1, 7], rows[2, [3, 9]], rows[3, [2, 11]], rows[4, 5:] = -1, np.nan, np.inf, np.nan
    rows[5, [4, 10]] = np.inf, np.nan
    np.testing.assert_array_equal(_by_chunks(jnp.asarray(rows), chunk), jnp.argmax(rows, axis=-1))
