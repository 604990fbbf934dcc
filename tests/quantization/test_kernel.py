"""Tests the Pallas kernel, interpreted, against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.quantization import kernel


@pytest.mark.parametrize(
    ("rows", "out", "groups", "size", "dtype", "has_zero"),
    [
        (3, 128, 8, 128, jnp.int4, False),
        (40, 384, 16, 128, jnp.int4, True),
        (17, 128, 11, 128, jnp.int4, True),
        (530, 256, 8, 256, jnp.int8, True),
    ],
)
def test_equals_the_dequantized_product(rows, out, groups, size, dtype, has_zero):
    assert kernel.fits(out, size)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, groups * size)).astype(jnp.bfloat16)
    values = rng.integers(-8, 8, (groups, out, size)).astype(dtype)
    scale = rng.uniform(0.5, 1.5, (groups, out)).astype(np.float32)
    zero = rng.integers(-8, 8, (groups, out)).astype(np.float32) if has_zero else None
    y = kernel.grouped_product(jnp.asarray(x), jnp.asarray(values), scale, zero, interpret=True)
    shifted = values.astype(np.float64) - (0 if zero is None else zero[..., None])
    weight = (shifted * scale[..., None]).swapaxes(0, 1).reshape(out, -1)
    expected = x.astype(np.float64) @ weight.T
    sums = np.abs(x.astype(np.float64)) @ np.abs(weight).T
    assert (np.abs(y - expected) <= 1e-5 * sums).all()


@pytest.mark.parametrize(("out", "size"), [(128, 64), (96, 128)])
def test_takes_whole_tiles_only(out, size):
    assert not kernel.fits(out, size)
