"""Tests blockwise attention over a cache, in blocks of 256 queries and 512 keys, against XLA's attention."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    HEADS,
    SCALE,
    assert_close,
    assert_close_where_visible,
    cache_mask,
    dense_attention,
    dense_gradients_and_output,
    gradients_and_output,
    random_arrays,
    visible_queries,
)
from marks import slow

from phi3_jax.model.attention import attention
from phi3_jax.model.kernels.blockwise import blockwise_attention
from phi3_jax.model.kernels.xla import xla_attention
from phi3_jax.model.masks import CausalMask

run_blockwise = jax.jit(partial(blockwise_attention, scale=SCALE))


def assert_equals_xla(arrays: list, mask: CausalMask, rtol: float = 1e-5) -> None:
    """Checks output and log-sum-exp."""
    expected = jax.jit(partial(xla_attention, scale=SCALE, output_lse=True))(*arrays, mask.dense())
    attended = run_blockwise(*arrays, mask)
    outs = (x.out.astype(jnp.float32) for x in (attended, expected))
    assert_close_where_visible(*outs, mask, rtol)
    visible = visible_queries(mask)
    lse, expected_lse = (np.asarray(x.lse).swapaxes(1, 2)[visible] for x in (attended, expected))
    np.testing.assert_allclose(lse, expected_lse, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    ("length", "padding", "window"),
    [
        (40, "right", None),
        (300, "left", 40),
        slow(40, "left", 700),
        slow(40, "none", 40),
        slow(300, "none", None),
        slow(300, "right", 700),
        slow(300, "left", None),
    ],
)
def test_padding_and_windows_equal_xla(length: int, padding: str, window: int | None) -> None:
    """The last block of 1,300 keys overlaps the one before it."""
    arrays = random_arrays(3, length, 1300, HEADS["gqa"], 64)
    assert_equals_xla(arrays, cache_mask(padding, 3, 1300, 1200, length, window, ragged=150))


def test_a_cache_smaller_than_a_block_equals_xla() -> None:
    assert_equals_xla(random_arrays(2, 33, 70, HEADS["mqa"], 96), cache_mask("left", 2, 70, 70, 33, None))


def test_a_ring_equals_xla() -> None:
    size, length, used = 1640, 40, 3000
    key_slots = used - 1 - (used - 1 - np.arange(size)[None]) % size
    query_slots = used - length + np.arange(length)[None]
    mask = CausalMask(query_slots, key_slots, key_slots != used - 20, window=600)
    assert_equals_xla(random_arrays(1, length, size, HEADS["mha"], 64), mask)


def test_bfloat16_queries_over_a_float32_cache_equal_xla() -> None:
    query, key, value = random_arrays(2, 40, 640, HEADS["gqa"], 96)
    mask = cache_mask("left", 2, 640, 600, 40, None)
    assert_equals_xla([query.astype(jnp.bfloat16), key, value], mask, 1e-2)


def test_does_not_read_blocks_without_visible_keys() -> None:
    query, key, value = random_arrays(1, 300, 2048, HEADS["gqa"], 64)
    mask = cache_mask("none", 1, 2048, 1500, 300, 100)
    unseen = (np.arange(2048) < 1024) | (np.arange(2048) >= 1536)
    out = run_blockwise(query, key, value, mask).out
    poisoned = run_blockwise(query, *(np.where(unseen[:, None], jnp.nan, x) for x in (key, value)), mask).out
    np.testing.assert_array_equal(poisoned, out)


def test_queries_without_a_visible_key_give_zeros() -> None:
    arrays = random_arrays(2, 40, 640, HEADS["gqa"], 64)
    mask = cache_mask("none", 2, 640, 600, 40, None)
    assert_equals_xla(arrays, dataclasses.replace(mask, key_mask=mask.key_mask & [[True], [False]]))
    attended = run_blockwise(*arrays, dataclasses.replace(mask, key_mask=mask.key_mask & False))
    assert (attended.out == 0).all()
    assert (attended.lse == np.finfo(np.float32).min).all()


def test_gradients_equal_xla() -> None:
    arrays = random_arrays(2, 40, 640, HEADS["gqa"], 64)
    mask = cache_mask("left", 2, 640, 600, 40, None)
    weight = np.random.default_rng(1).standard_normal(arrays[0].shape, np.float32)

    def attend(*arrays: jax.Array) -> jax.Array:
        return attention(*arrays, mask, scale=SCALE)[0]

    scores = "40x640"  # the shape of all queries and keys at once
    dense, blocks = (jax.jit(f).lower(*arrays).as_text() for f in (partial(dense_attention, mask), attend))
    assert scores in dense
    assert scores not in blocks
    ours = jax.jit(gradients_and_output(attend, weight))(*arrays)
    expected = jax.jit(dense_gradients_and_output(mask, weight))(*arrays)
    jax.tree.map(assert_close, ours, expected)
