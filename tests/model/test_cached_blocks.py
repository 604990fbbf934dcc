"""Tests the Pallas kernel for caches over blocks: against XLA's attention, and compiled for absent TPUs."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    SCALE,
    assert_close,
    assert_close_where_visible,
    cache_mask,
    dense_attention,
    product,
    random_arrays,
)
from block_cases import PHI_3_SMALL, with_blocks
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from marks import slow

from phi3_jax.cache.quantized import QuantizedVectors
from phi3_jax.config.block_pattern import BlockPattern
from phi3_jax.model.attention import attention
from phi3_jax.model.kernels import cached, cached_blocks
from phi3_jax.model.kernels.xla import xla_attention
from phi3_jax.model.masks import CausalMask

PATTERNS = {
    # Two classes of three heads; a class sees two of four blocks, 128 keys.
    "classes": (BlockPattern(size=64, local=2, stride=4, heads=12), 2),
    # Heads of no class, and blocks that no step skips.
    "mha": (BlockPattern(size=16, local=3, stride=5, heads=3), 1),
    # All heads see the same blocks.
    "same": (BlockPattern(size=64, local=1, stride=4, heads=4, same_for_all_heads=True), 2),
    # The query heads of a key/value head see all blocks together.
    "all": (BlockPattern(size=32, local=2, stride=2, heads=6), 3),
}


def blocks_mask(name: str, *arguments: object, **options: int) -> CausalMask:
    return with_blocks(cache_mask(*arguments, **options), *PATTERNS[name])


def arrays_for(name: str, batch: int, length: int, size: int, width: int) -> list[np.ndarray]:
    pattern, groups = PATTERNS[name]
    return random_arrays(batch, length, size, (pattern.heads // groups, groups), width)


def run_kernel(*arrays: jax.Array | QuantizedVectors, mask: CausalMask) -> tuple[jax.Array, jax.Array]:
    return cached.cached_attention(*arrays, mask, scale=SCALE, interpret=True)


def check_kernel(arrays: list, mask: CausalMask) -> tuple[np.ndarray, np.ndarray]:
    """Checks the kernel's output against XLA's attention; returns it and the log-sum-exp."""

    @jax.jit
    def both(arrays: list, mask: CausalMask) -> tuple:
        return run_kernel(*arrays, mask=mask), dense_attention(mask, *arrays)

    (out, lse), expected = jax.tree.map(np.asarray, both(arrays, mask))
    assert_close_where_visible(out, expected, mask)
    return out, lse


@pytest.mark.parametrize(
    ("name", "length", "padding", "width"),
    [
        ("classes", 1, "left", 128),
        ("classes", 300, "right", 64),
        ("mha", 5, "left", 64),
        ("same", 1, "right", 128),
        ("all", 5, "left", 128),
        slow("classes", 5, "none", 64),
        slow("mha", 300, "none", 128),
        slow("mha", 1, "right", 64),
        slow("same", 300, "left", 64),
        slow("same", 5, "none", 128),
        slow("all", 1, "none", 64),
        slow("all", 300, "right", 128),
    ],
)
def test_patterns_and_padding_equal_xla(name: str, length: int, padding: str, width: int) -> None:
    """Lengths are of a decode step, drafts and a chunk; rows end, and begin, at different slots."""
    mask = blocks_mask(name, padding, 3, 1100, 1000, length, None, ragged=150)
    check_kernel(arrays_for(name, 3, length, 1100, width), mask)


@pytest.mark.parametrize("used", [slow(1024), slow(1025), 2300])
def test_the_published_pattern_equals_xla(used: int) -> None:
    mask = with_blocks(cache_mask("left", 2, 2304, used, 2, None), PHI_3_SMALL, 4)
    check_kernel(random_arrays(2, 2, 2304, (8, 4), 128), mask)


@pytest.mark.parametrize("width", [64, slow(128)])
def test_a_cache_that_ends_within_a_block_equals_xla(width: int) -> None:
    """What lies after its last key, which is not the first block of a step, does not count."""
    mask = blocks_mask("same", "none", 1, 900, 900, 2, None)
    check_kernel(arrays_for("same", 1, 2, 900, width), mask)


@pytest.mark.parametrize(("length", "width"), product([1, 40], [96, 128], always=[(1, 128), (40, 96)]))
def test_an_int8_cache_equals_xla(length: int, width: int) -> None:
    query, key, value = arrays_for("classes", 2, length, 640, width)
    key, value = (jax.jit(QuantizedVectors.quantize)(x) for x in (key, value))
    check_kernel([query, key, value], blocks_mask("classes", "left", 2, 640, 600, length, None))


def test_returns_the_log_sum_exp() -> None:
    query, key, value = arrays_for("classes", 2, 3, 640, 64)
    mask = blocks_mask("classes", "left", 2, 640, 600, 3, None)
    _, lse = check_kernel([query, key, value], mask)
    run = jax.jit(partial(xla_attention, mask=mask, scale=SCALE, output_lse=True))
    expected = run(query, key, value).lse
    assert_close(lse.reshape(2, 3, -1).swapaxes(1, 2), np.asarray(expected))


@pytest.mark.parametrize("axis", ["tensor", "context"])
def test_a_mesh_equals_xla(axis: str) -> None:
    """The devices of `tensor` have three of the six heads each, of classes in another order."""
    sizes = [2 if name == axis else 1 for name in ("data", "fsdp", "context", "tensor")]
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(sizes), ("data", "fsdp", "context", "tensor"))
    arrays = arrays_for("classes", 2, 2, 1024, 64)
    mask = blocks_mask("classes", "left", 2, 1024, 1000, 2, None, ragged=300)

    @jax.jit
    def both(arrays: list, mask: CausalMask) -> tuple:
        out, _ = attention(*arrays, mask, scale=SCALE, mesh=mesh, implementation="pallas")
        return out, dense_attention(mask, *arrays)

    assert_close_where_visible(*both(arrays, mask), mask)


def test_does_not_read_blocks_that_no_head_sees() -> None:
    """Each class skips the 128 of 256 keys of which its heads see no block; the other class reads them."""
    query, key, value = arrays_for("classes", 1, 2, 1024, 64)
    mask = blocks_mask("classes", "none", 1, 1024, 1000, 2, None)
    out, _ = jax.jit(run_kernel)(query, key, value, mask=mask)
    heads, groups = query.shape[2:4]
    visible = np.asarray(mask.dense())[0].reshape(heads, groups * 2, 8, 128).any(axis=(1, 3))
    assert 0 < visible.sum() < visible.size * 3 / 4
    unread = ~np.repeat(visible, 128, axis=1)[None, :, :, None]
    poisoned = (np.where(unread, np.nan, x) for x in (key, value))
    np.testing.assert_array_equal(jax.jit(run_kernel)(query, *poisoned, mask=mask)[0], out)


def cache_bytes(mask: CausalMask, heads: tuple[int, int], width: int, itemsize: int) -> int:
    """Returns the bytes of keys and values that a decode step of one layer reads."""
    batch, length = mask.query_slots.shape
    query = jnp.zeros((batch, length, *heads, width), jnp.bfloat16)
    reads = cached.plan_reads(query, itemsize, mask)
    steps = int(reads.counts.sum()) * heads[0] // reads.classes
    return steps * reads.blocks.keys * 2 * width * itemsize


@pytest.mark.parametrize(
    ("used", "start", "share"),
    [
        (8192, 0, 0.5625),
        slow(131072, 0, 0.5039),
        # Blocks that do not begin where those of the kernel do take a half more.
        (8192, 5, 0.7734),
        slow(131072, 5, 0.7515),
        slow(131072, 128, 0.5034),
    ],
)
@pytest.mark.parametrize("itemsize", [slow(1), 2])
def test_a_decode_step_reads_a_share_of_the_cache(used: int, start: int, share: float, itemsize: int) -> None:
    """The query heads of a key/value head see half of the far blocks together. Rows start with padding."""
    plain = cache_mask("none", 1, used, used, 1, None)
    plain.key_mask[:, :start] = False
    mask = with_blocks(plain, PHI_3_SMALL, 4)
    dense = cache_bytes(plain, (8, 4), 128, itemsize)
    assert dense == 2 * 8 * used * 128 * itemsize
    assert cache_bytes(mask, (8, 4), 128, itemsize) / dense == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize(
    ("pattern", "kv_heads", "classes"),
    [
        (PHI_3_SMALL, 8, 2),
        (PHI_3_SMALL, 1, 1),  # a device of eight
        (PHI_3_SMALL, 32, 8),
        (PATTERNS["mha"][0], 3, 3),
        (PATTERNS["same"][0], 2, 1),
    ],
)
def test_counts_classes_of_heads(pattern: BlockPattern, kv_heads: int, classes: int) -> None:
    groups = 4 if kv_heads == 1 else pattern.heads // kv_heads
    blocks = with_blocks(cache_mask("none", 1, 8, 8, 1, None), pattern, groups).blocks
    blocks = dataclasses.replace(blocks, shifts=blocks.shifts[:kv_heads])
    assert cached_blocks.count_classes(blocks) == classes


# For TPUs that are absent


@pytest.mark.parametrize(
    ("size", "length", "int8"),
    [(8192, 1, False), slow(131072, 1, False), slow(8192, 1, True), slow(8192, 512, False)],
)
def test_reads_the_cache_in_place_on_a_tpu(tpu_mesh: Mesh, size: int, length: int, int8: bool) -> None:
    sharding = NamedSharding(Mesh(tpu_mesh.devices[:1], ("context",)), PartitionSpec())
    shape = partial(jax.ShapeDtypeStruct, sharding=sharding)
    query, cache = shape((4, length, 8, 4, 128), jnp.bfloat16), shape((4, 8, size, 128), jnp.bfloat16)
    vectors = jax.tree.map(
        lambda x: shape(x.shape, x.dtype), jax.eval_shape(QuantizedVectors.quantize, cache) if int8 else cache
    )
    mask = with_blocks(cache_mask("left", 4, size, size - 8, length, None), PHI_3_SMALL, 4)
    masks = jax.tree.map(lambda x: shape(x.shape, x.dtype), mask)

    def decode(query: jax.Array, *cache_and_mask: jax.Array) -> jax.Array:
        return cached.cached_attention(query, *cache_and_mask, scale=SCALE)[0]

    program = jax.jit(decode).lower(query, vectors, vectors, masks).compile()
    assert 'custom_call_target="tpu_custom_call"' in program.as_text()
    activations = 4 * 4 * query.size + 4 * 4 * 4 * length * size // 512
    assert program.memory_analysis().temp_size_in_bytes < cache.size / 10 + activations
