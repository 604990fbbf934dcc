"""Tests the Pallas kernel for caches: interpreted against XLA's attention, and compiled for absent TPUs."""

import dataclasses
import re
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
    product,
    random_arrays,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from marks import slow

from phi3_jax.cache.quantized import QuantizedVectors
from phi3_jax.model.kernels import cached
from phi3_jax.model.masks import CausalMask


def run_kernel(*arrays: jax.Array | QuantizedVectors, mask: CausalMask) -> tuple[jax.Array, jax.Array]:
    return cached.cached_attention(*arrays, mask, scale=SCALE, interpret=True)


def check_kernel(arrays: list, mask: CausalMask, rtol: float = 1e-5) -> tuple[np.ndarray, np.ndarray]:
    """Checks the kernel's output against XLA's attention; returns it and the log-sum-exp."""

    @jax.jit
    def both(arrays: list, mask: CausalMask) -> tuple:
        return run_kernel(*arrays, mask=mask), dense_attention(mask, *arrays)

    (out, lse), expected = jax.tree.map(np.asarray, both(arrays, mask))
    assert_close_where_visible(out, expected, mask, rtol)
    return out, lse


@pytest.mark.parametrize(
    ("length", "padding", "window"),
    [
        (1, "left", 700),
        (5, "right", 40),
        (300, "left", None),
        slow(1, "none", None),
        slow(1, "right", 40),
        slow(5, "left", None),
        slow(5, "none", 700),
        slow(300, "right", 700),
        slow(300, "none", 40),
        slow(300, "left", 40),
    ],
)
def test_padding_and_windows_equal_xla(length: int, padding: str, window: int | None) -> None:
    """Lengths are of a decode step, drafts and a chunk; windows lie within a block of 512 or span two."""
    arrays = random_arrays(3, length, 1536, HEADS["gqa"], 64)
    check_kernel(arrays, cache_mask(padding, 3, 1536, 1200, length, window, ragged=150))


@pytest.mark.parametrize(
    ("heads", "width", "size"),
    product(
        list(HEADS),
        [64, 96, 128],
        [200, 2100],
        always=[("mha", 96, 200), ("gqa", 128, 2100), ("mqa", 64, 2100)],
    ),
)
def test_heads_widths_and_sizes_equal_xla(heads: str, width: int, size: int) -> None:
    """2,100 keys end within a block."""
    arrays = random_arrays(2, 3, size, HEADS[heads], width)
    check_kernel(arrays, cache_mask("left", 2, size, size, 3, None))


def test_heads_in_several_grid_steps_equal_xla() -> None:
    heads = (8, 1)
    assert cached.choose_blocks(2, *heads, 96, 640, 4).heads == 4
    check_kernel(random_arrays(1, 2, 640, heads, 96), cache_mask("left", 1, 640, 600, 2, None))


@pytest.mark.parametrize("used", [300, slow(640), 1500])
def test_a_ring_equals_xla(used: int) -> None:
    """The ring is partly filled, just full, or has wrapped twice."""
    size, length = 640, 4
    last = np.array([[used - 1], [used - 150]])
    key_slots = last - (last - np.arange(size)) % size
    mask = CausalMask(
        query_slots=last - length + 1 + np.arange(length),
        key_slots=key_slots,
        key_mask=(key_slots >= 0) & (key_slots != used - 20),
        window=600,
    )
    check_kernel(random_arrays(2, length, size, HEADS["gqa"], 96), mask)


@pytest.mark.parametrize("window", [slow(None), 200])
def test_combined_parts_of_a_cache_equal_the_whole(window: int | None) -> None:
    """Two devices have half of the slots each; a short row has no visible key on one of them."""
    size, length = 1024, 3
    arrays = random_arrays(3, length, size, HEADS["gqa"], 64)
    mask = cache_mask("left", 3, size, 1000, length, window, ragged=300)
    whole, whole_lse = check_kernel(arrays, mask)
    query, key, value = arrays
    parts = []
    run = jax.jit(run_kernel)
    for half in (np.s_[:512], np.s_[512:]):
        part = dataclasses.replace(mask, key_slots=mask.key_slots[:, half], key_mask=mask.key_mask[:, half])
        parts.append(run(query, key[:, :, half], value[:, :, half], mask=part))
    out, lse = (np.stack(x) for x in zip(*parts, strict=True))
    assert (lse == cached.UNSEEN).any()
    together = jnp.einsum("p...,p...H->...H", jax.nn.softmax(lse, axis=0), out)
    np.testing.assert_allclose(together, whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.nn.logsumexp(lse, axis=0), whole_lse, rtol=1e-5)


def test_returns_the_log_sum_exp() -> None:
    query, key, value = random_arrays(2, 3, 640, HEADS["gqa"], 64)
    mask = cache_mask("left", 2, 640, 600, 3, 100)
    _, lse = check_kernel([query, key, value], mask)
    scores = np.einsum("BTKGH,BKSH->BTKGS", query, key) * SCALE
    visible = np.asarray(mask.dense())[:, 0, :, None, None]
    assert_close(lse, np.log(np.exp(scores).sum(axis=-1, where=visible)))


def test_queries_without_a_visible_key_give_zeros() -> None:
    arrays = random_arrays(2, 2, 640, HEADS["gqa"], 64)
    mask = cache_mask("none", 2, 640, 600, 2, None)
    mask = dataclasses.replace(mask, key_mask=mask.key_mask & [[True], [False]])
    out, lse = check_kernel(arrays, mask)
    assert (out[1] == 0).all()
    assert (lse[1] == cached.UNSEEN).all()
    assert (lse[0] > cached.UNSEEN).all()


@pytest.mark.parametrize(("length", "width"), product([1, 40], [96, 128], always=[(1, 96), (40, 128)]))
def test_an_int8_cache_equals_xla(length: int, width: int) -> None:
    query, key, value = random_arrays(2, length, 640, (6, 2), width)
    key, value = (jax.jit(QuantizedVectors.quantize)(x) for x in (key, value))
    check_kernel([query, key, value], cache_mask("left", 2, 640, 600, length, 300))


def test_bfloat16_queries_over_a_float32_cache_equal_xla() -> None:
    query, key, value = random_arrays(2, 1, 640, HEADS["gqa"], 96)
    mask = cache_mask("left", 2, 640, 600, 1, None)
    check_kernel([query.astype(jnp.bfloat16), key, value], mask, 1e-2)


def test_does_not_read_blocks_without_visible_keys() -> None:
    heads = (8, 1)
    assert cached.choose_blocks(2, *heads, 64, 2048, 4).keys == 512
    query, key, value = random_arrays(1, 2, 2048, heads, 64)
    mask = cache_mask("none", 1, 2048, 1500, 2, 300)
    unseen = (np.arange(2048) < 1024) | (np.arange(2048) >= 1536)
    run = jax.jit(run_kernel)
    out, _ = run(query, key, value, mask=mask)
    poisoned, _ = run(query, *(np.where(unseen[:, None], jnp.nan, x) for x in (key, value)), mask=mask)
    np.testing.assert_array_equal(poisoned, out)


def test_lists_visible_blocks_in_order() -> None:
    key_slots = np.where(cache_mask("left", 2, 1024, 700, 1, None).key_mask, np.arange(1024), cached.FAR)
    query_slots = np.array([[[10, 11], [698, 699]]] * 2)
    order, counts = cached.visible_blocks(query_slots, key_slots, None, 128)
    assert order[0].tolist() == [[0] * 8, [0, 1, 2, 3, 4, 5, 5, 5]]
    assert order[1, 1].tolist() == [1, 2, 3, 4, 5, 5, 5, 5]
    assert counts.tolist() == [[1, 6], [0, 5]]
    order, counts = cached.visible_blocks(query_slots, key_slots, 200, 128)
    assert order[:, 1].tolist() == [[3, 4, 5, 5, 5, 5, 5, 5]] * 2
    assert counts[:, 1].tolist() == [3, 3]


# For TPUs that are absent


def decode(
    query: jax.Array,
    new: tuple[jax.Array, jax.Array],
    cache: tuple[jax.Array, jax.Array],
    at: jax.Array,
    key_mask: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Writes new keys and values to the cache, in place, and returns attention over it, and the cache."""
    cache = jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, at, axis=2), cache, new)
    batch, length = query.shape[:2]
    key_slots = jnp.arange(key_mask.shape[1])[None]
    query_slots = jnp.broadcast_to(at + jnp.arange(length), (batch, length))
    mask = CausalMask(query_slots, key_slots, key_mask, window=None)
    out, _ = cached.cached_attention(query, *cache, mask, scale=SCALE)
    return out, cache


def decode_shapes(
    batch: int,
    length: int,
    heads: tuple[int, int],
    width: int,
    size: int,
    sharding: NamedSharding | None = None,
) -> tuple:
    """Returns the shapes of the arguments of `decode`."""
    shape = partial(jax.ShapeDtypeStruct, sharding=sharding)
    kv_heads, groups = heads
    query = shape((batch, length, kv_heads, groups, width), jnp.bfloat16)
    new = shape((batch, kv_heads, length, width), jnp.bfloat16)
    cache = shape((batch, kv_heads, size, width), jnp.bfloat16)
    return query, (new, new), (cache, cache), shape((), jnp.int32), shape((batch, size), bool)


@pytest.mark.parametrize("length", [1, 40])
def test_lowers_for_a_tpu(length: int) -> None:
    run = jax.jit(decode).trace(*decode_shapes(2, length, (2, 2), 96, 256))
    assert "tpu_custom_call" in run.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(
    ("batch", "length", "heads", "width"),
    [(1, 1, (32, 1), 96), (4, 1, (10, 4), 128), (4, 1, (8, 3), 128), (1, 512, (32, 1), 96)],
)
def test_reads_the_cache_in_place_on_a_tpu(
    tpu_mesh: Mesh, batch: int, length: int, heads: tuple[int, int], width: int
) -> None:
    size = 4096
    sharding = NamedSharding(Mesh(tpu_mesh.devices[:1], ("context",)), PartitionSpec())
    shapes = decode_shapes(batch, length, heads, width, size, sharding)
    program = jax.jit(decode, donate_argnums=2).lower(*shapes).compile()
    text = program.as_text()
    assert 'custom_call_target="tpu_custom_call"' in text
    cache_shape = rf"\[{batch},{heads[0]},({size},{width}|{width},{size})\]"
    copies = [
        line for line in text.splitlines() if re.search(rf"= \(?\w+{cache_shape}.* (copy|transpose)\(", line)
    ]
    assert copies == []
    cache_bytes = 2 * 2 * batch * heads[0] * size * width
    activations = 4 * 4 * batch * length * heads[0] * heads[1] * 128
    assert program.memory_analysis().temp_size_in_bytes < cache_bytes / 50 + activations
