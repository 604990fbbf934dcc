"""Random arrays and masks for tests of attention kernels, and comparisons with XLA's attention."""

import itertools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi3_jax.cache.quantized import QuantizedVectors
from phi3_jax.model.kernels.xla import xla_attention
from phi3_jax.model.masks import CausalMask

SCALE = 0.31
HEADS = {"mha": (3, 1), "gqa": (2, 3), "mqa": (1, 4)}
"""Key/value heads, and query heads of each."""


def product(*values: list, always: list[tuple]) -> list:
    """Returns all combinations; those not in `always` are marked slow."""
    combinations = list(itertools.product(*values))
    assert set(always) <= set(combinations)
    marks = {case: () if case in always else pytest.mark.slow for case in combinations}
    return [pytest.param(*case, marks=mark) for case, mark in marks.items()]


def random_arrays(batch: int, length: int, size: int, heads: tuple[int, int], width: int) -> list[np.ndarray]:
    """Returns queries, keys and values. NumPy draws them, as JAX would compile programs for that."""
    random = np.random.default_rng(0)
    kv_heads, groups = heads
    shapes = (batch, length, kv_heads, groups, width), *[(batch, kv_heads, size, width)] * 2
    return [random.standard_normal(shape, np.float32) for shape in shapes]


def token_mask(padding: str, batch: int, size: int) -> np.ndarray:
    """Returns a mask [B, S], True for tokens; each row has another number of them."""
    lengths = size - np.arange(batch)[:, None] * (size // 3) - 5
    slots = np.arange(size)
    if padding == "left":
        return slots >= size - lengths
    if padding == "right":
        return slots < lengths
    return np.ones((batch, size), bool)


def prefill_mask(padding: str, batch: int, length: int, window: int | None) -> CausalMask:
    slots = np.arange(length, dtype=np.int32)[None]
    return CausalMask(
        query_slots=np.repeat(slots, batch, axis=0),
        key_slots=slots,
        key_mask=token_mask(padding, batch, length),
        window=window,
        prefill=True,
    )


def cache_mask(
    padding: str, batch: int, size: int, used: int, length: int, window: int | None, ragged: int = 0
) -> CausalMask:
    """Returns the mask of `length` queries in the last of `used` slots of a cache with `size` slots.

    Each row uses `ragged` slots fewer than the row before it.
    """
    slots = np.arange(size, dtype=np.int32)[None]
    lengths = used - ragged * np.arange(batch, dtype=np.int32)[:, None]
    query_slots = lengths - length + np.arange(length, dtype=np.int32)
    tokens = np.pad(token_mask(padding, batch, used), ((0, 0), (0, size - used)))
    tokens |= slots >= query_slots[:, :1]  # the queries' own keys
    return CausalMask(query_slots, slots, tokens & (slots < lengths), window)


def gradients_and_output(attend: Callable[..., jax.Array], weight: np.ndarray) -> Callable[..., tuple]:
    """Returns a function that gives the gradients of the weighted sum, and the output of `attend`."""

    def loss(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(*arrays)
        return jnp.sum(out * weight), out

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)


def dense_attention(mask: CausalMask, *arrays: jax.Array | QuantizedVectors) -> jax.Array:
    """Returns XLA's attention over all scores at once."""
    return xla_attention(*arrays, mask.dense(), scale=SCALE).out


def assert_close(actual: np.ndarray, expected: np.ndarray, rtol: float = 1e-5) -> None:
    """Checks equality to `rtol` of the largest number."""
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def visible_queries(mask: CausalMask) -> np.ndarray:
    """Returns a mask [B, T], True for queries with a visible key."""
    return np.asarray(mask.dense())[:, 0].any(axis=2)


def assert_close_where_visible(
    actual: np.ndarray, expected: np.ndarray, mask: CausalMask, rtol: float = 1e-5
) -> None:
    """Checks equality for queries with a visible key, and finite numbers everywhere."""
    assert np.isfinite(actual).all()
    visible = visible_queries(mask)
    assert_close(np.asarray(actual)[visible], np.asarray(expected)[visible], rtol)


def dense_gradients_and_output(mask: CausalMask, weight: np.ndarray) -> Callable[..., tuple]:
    return gradients_and_output(partial(dense_attention, mask), weight)
