"""Compares the C++ library's block-sparse attention with the pattern written out, and with XLA's."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import SCALE, assert_close, cache_mask, gradients_and_output, prefill_mask, random_arrays
from block_cases import PHI_3_SMALL, masked_softmax, visible_keys, with_blocks
from marks import slow
from phi3small import small_config

from phi3_jax import Phi3SmallForCausalLM
from phi3_jax.cache.quantized import QuantizedVectors
from phi3_jax.config.block_pattern import BlockPattern
from phi3_jax.model.attention import attention
from phi3_jax.model.kernels.dispatch import choose_kernels
from phi3_jax.model.kernels.native import native_attention
from phi3_jax.model.kernels.xla import xla_attention
from phi3_jax.model.masks import CausalMask
from phi3_jax.native.attention import VisibleBlocks
from phi3_jax.native.attention import attention as attend_natively
from phi3_jax.native.targets import ATTENTION
from phi3_jax.parallel.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("library")

run_natively = jax.jit(partial(native_attention, scale=SCALE))
run_xla = jax.jit(partial(xla_attention, scale=SCALE, output_lse=True))

SMALL = BlockPattern(size=16, local=2, stride=3, heads=4)
WIDE = BlockPattern(size=64, local=2, stride=8, heads=2)
ALIKE = BlockPattern(size=16, local=2, stride=3, heads=6, same_for_all_heads=True)
REAL = BlockPattern(size=64, local=16, stride=8, heads=8)


def operands(mask: CausalMask, pattern: BlockPattern, kv_heads: int, width: int, kind: Any) -> list[Any]:
    """Returns queries in float32, keys and values of a cache of this kind."""
    batch, length = mask.query_slots.shape
    heads = kv_heads, pattern.heads // kv_heads
    query, *cache = random_arrays(batch, length, mask.key_mask.shape[1], heads, width)
    convert = QuantizedVectors.quantize if kind == "int8" else lambda x: jnp.asarray(x, jnp.bfloat16)
    return [jnp.asarray(query), *map(convert, cache)]


def floats(vectors: Any) -> jax.Array:
    return vectors.dequantize() if isinstance(vectors, QuantizedVectors) else vectors.astype(jnp.float32)


def assert_equals_formula(mask: CausalMask, pattern: BlockPattern, arrays: list[Any]) -> None:
    """Checks the library's and XLA's output where a query sees a key, and their log-sum-exp."""
    rtol = 1e-5 if arrays[0].dtype == jnp.float32 else 2**-7
    query, key, value = map(floats, arrays)
    visible = visible_keys(mask, pattern)
    assert 0.05 < visible.mean() < 0.9 * np.asarray(mask.dense()).mean(), (
        "the pattern hides much, but not all"
    )
    sees = visible[:, 0].any(axis=2)  # [B, T]
    expected = masked_softmax(query, key, value, visible, SCALE)[sees]
    masked = with_blocks(mask, pattern, query.shape[3])
    dense, found = run_xla(query, key, value, masked), run_natively(*arrays, masked)
    assert_close(np.asarray(dense.out)[sees], expected)
    assert_close(np.asarray(found.out, np.float32)[sees], expected, rtol)
    lse, dense_lse = (np.asarray(x.lse).swapaxes(1, 2)[sees] for x in (found, dense))
    assert_close(lse, dense_lse)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    ("length", "kv_heads", "width", "padding", "pattern"),
    [
        (1, 2, 64, "left", SMALL),
        (1, 1, 96, "right", ALIKE),
        (5, 2, 32, "left", SMALL),
        (40, 1, 128, "none", WIDE),
        slow(70, 2, 64, "left", ALIKE),
        (270, 2, 64, "right", SMALL),
    ],
)
def test_caches_equal_the_formula(
    kind: str, length: int, kv_heads: int, width: int, padding: str, pattern: BlockPattern
) -> None:
    """Rows have other offsets, of the cache and of blocks; 270 queries are several parts."""
    mask = cache_mask(padding, 3, 700, 650, length, None, ragged=97)
    assert_equals_formula(mask, pattern, operands(mask, pattern, kv_heads, width, kind))


@pytest.mark.parametrize(("padding", "dtype"), [("left", "float32"), ("right", "bfloat16")])
def test_a_prefill_equals_the_formula(padding: str, dtype: str) -> None:
    mask = prefill_mask(padding, 2, 333, None)
    query, *cache = operands(mask, SMALL, 2, 64, "bfloat16")
    assert_equals_formula(mask, SMALL, [query.astype(dtype), *cache])


@pytest.mark.parametrize(("used", "ratio"), [(1024, 1), (1025, 1), (1200, 0.99), (3000, 0.7)])
def test_phi_3_small_decodes(used: int, ratio: float) -> None:
    """Up to 1,024 tokens, and one more for some heads, nothing is hidden."""
    mask = cache_mask("none", 1, 3100, used, 1, None)
    arrays = operands(mask, REAL, 2, 128, "bfloat16")
    visible = visible_keys(mask, REAL)
    assert (visible.sum(axis=(2, 3)).min() == used) == (used == 1024)
    assert visible.mean() * 3100 <= ratio * used
    expected = masked_softmax(arrays[0], *map(floats, arrays[1:]), visible, SCALE)
    assert_close(np.asarray(run_natively(*arrays, with_blocks(mask, REAL, 4)).out), expected)


@pytest.mark.parametrize(
    ("length", "pairs"),
    [(1025, (525_761, 525_825)), (4096, (4_089_856, 4_261_888)), slow(8192, (10_678_272, 11_079_680))],
)
def test_sees_as_many_keys_as_phi_3_small(length: int, pairs: tuple[int, int]) -> None:
    """Equal scores give the number of keys, as log-sum-exp. The heads are 0 and 7 of 32."""
    vectors = jnp.zeros((1, 2, length, 16), jnp.bfloat16)
    slots = jnp.arange(length, dtype=jnp.int32)[None]
    shifts = jnp.asarray(PHI_3_SMALL.shifts[[[0], [7]]])
    blocks = VisibleBlocks(slots, slots, shifts, PHI_3_SMALL.size, PHI_3_SMALL.local, PHI_3_SMALL.stride)
    query = jnp.zeros((1, length, 2, 1, 16), jnp.float32)
    attend = jax.jit(lambda *arrays: attend_natively(*arrays, slots, slots, scale=1.0, blocks=blocks)[1])
    counts = np.rint(np.exp(np.float64(attend(query, vectors, vectors))))
    assert tuple(counts[0, :, :, 0].sum(axis=0)) == pairs


@pytest.mark.parametrize("length", [1, 6, 40])
def test_reads_only_the_blocks_that_a_head_sees(length: int) -> None:
    """Values that a head does not see are NaN, of which any product is NaN, also with a probability of 0."""
    mask = cache_mask("left", 2, 700, 650, length, None, ragged=97)
    query, key, value = operands(mask, SMALL, 2, 64, "bfloat16")
    masked = with_blocks(mask, SMALL, 2)
    expected = run_natively(query, key, value, masked).out
    blocks = np.asarray(masked.blocks.key_positions) // SMALL.size  # [B, S]
    seen = visible_keys(mask, SMALL).any(axis=2).reshape(2, 2, 2, 700)
    numbers = np.arange(700 // SMALL.size + 1)
    seen = ((blocks[:, None, None, None] == numbers[:, None]) & seen[:, :, :, None]).any(axis=-1)
    unread = ~np.take_along_axis(seen, np.maximum(blocks, 0)[:, None, None], axis=-1)  # [B, K, G, S]
    for group in range(2):
        assert unread[:, :, group].mean() > 0.4
        poison = unread[:, :, group, :, None]
        out = run_natively(query, *(jnp.where(poison, jnp.nan, x) for x in (key, value)), masked).out
        np.testing.assert_array_equal(out[:, :, :, group], expected[:, :, :, group])
        assert np.isnan(out[:, :, :, 1 - group]).any()


def test_chunks_equal_the_whole() -> None:
    """Chunks end within blocks."""
    whole = prefill_mask("left", 2, 300, None)
    query, key, value = operands(whole, SMALL, 2, 64, "bfloat16")
    masked = with_blocks(whole, SMALL, 2)
    expected = np.asarray(run_natively(query, key, value, masked).out)
    for queries in (slice(0, 90), slice(90, 91), slice(91, 297), slice(297, 300)):
        arrays = [None if x is None else x[:, queries] for x in masked.query_arrays()]
        out = run_natively(query[:, queries], key, value, masked.with_queries(tuple(arrays))).out
        assert_close(np.asarray(out), expected[:, queries])


def test_gradients_equal_xla() -> None:
    mask = with_blocks(cache_mask("left", 2, 200, 190, 5, None), SMALL, 2)
    query, key, value = operands(mask, SMALL, 2, 64, "bfloat16")
    weight = np.random.default_rng(1).standard_normal(query.shape, np.float32)
    ours, expected = gradients(None, mask, weight), gradients("xla", mask, weight)
    assert ATTENTION in ours.lower(query, key, value).as_text()
    found = ours(query, key, value), expected(query, key, value)
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        assert_close(np.asarray(one, np.float32), np.asarray(other, np.float32))


def test_gradients_of_a_long_prefill_equal_those_of_float32() -> None:
    """They are those of stripes, which only the end rounds to the keys' bfloat16."""
    plain = prefill_mask("left", 2, 300, None)
    mask = with_blocks(plain, SMALL, 2)
    query, key, value = operands(mask, SMALL, 2, 64, "bfloat16")
    weight = np.random.default_rng(1).standard_normal(query.shape, np.float32)
    weight *= plain.key_mask[:, :, None, None, None]
    ours = gradients(None, mask, weight)
    assert ATTENTION in ours.lower(query, key, value).as_text()
    found, _ = ours(query, key, value)
    expected, _ = gradients("xla", mask, weight)(query, floats(key), floats(value))
    for one, other, rtol in zip(found, expected, (1e-5, 2**-8, 2**-8), strict=True):
        assert_close(np.asarray(one, np.float32), np.asarray(other), rtol)


def gradients(implementation: str | None, mask: CausalMask, weight: np.ndarray) -> Any:
    def attend(*arrays: jax.Array) -> jax.Array:
        return attention(*arrays, mask, scale=SCALE, implementation=implementation)[0]

    return jax.jit(gradients_and_output(attend, weight))


def test_devices_of_a_mesh_have_the_patterns_of_their_own_heads() -> None:
    mask = cache_mask("left", 2, 700, 650, 3, None, ragged=97)
    arrays = operands(mask, SMALL, 2, 64, "bfloat16")
    masked, mesh = with_blocks(mask, SMALL, 2), make_mesh("fsdp=2,context=2,tensor=2")
    run = jax.jit(lambda *arrays: attention(*arrays, masked, scale=SCALE, mesh=mesh)[0])
    assert ATTENTION in run.lower(*arrays).as_text()
    assert_close(np.asarray(run(*arrays)), np.asarray(run_natively(*arrays, masked).out))


@pytest.mark.slow
def test_models_decode_from_bfloat16_caches() -> None:
    """Answers are those of a float32 cache, by XLA, up to the cache's rounding. 7 tokens are a chunk."""
    config = small_config(hidden_size=64)
    model = Phi3SmallForCausalLM(config, dtype="bfloat16")
    ids = np.random.default_rng(0).integers(5, 90, (2, 70))
    mask = np.arange(70) >= [[0], [9]]

    def logits(dtype: str) -> Any:
        cache = model.init_cache(2, 128, dtype)
        cache = model(ids[:, :-7], attention_mask=mask[:, :-7], past_key_values=cache).past_key_values
        step = jax.jit(lambda cache: model(ids[:, -7:], past_key_values=cache).logits)
        assert (ATTENTION in step.lower(cache).as_text()) == (dtype == "bfloat16")
        return np.asarray(step(cache), np.float32)[..., 5:90]

    found, expected = logits("bfloat16"), logits("float32")
    assert np.sqrt(np.mean(np.square(found - expected))) <= 0.02 * np.sqrt(np.mean(np.square(expected)))


@pytest.mark.parametrize(("dtype", "kernel"), [("bfloat16", "native"), ("float32", "xla")])
def test_is_chosen_on_cpu(dtype: str, kernel: str) -> None:
    mask = with_blocks(cache_mask("none", 1, 128, 100, 1, None), SMALL, 2)
    query, key = jnp.zeros((1, 1, 2, 2, 64)), jnp.zeros((1, 2, 128, 64), dtype)
    assert choose_kernels(query, key, mask, None)["cpu"] == kernel
    assert choose_kernels(query, key, mask, "xla")["cpu"] == "xla"


@pytest.mark.parametrize(
    "change", [{"shifts": np.zeros((2, 1), np.int32)}, {"key_positions": np.zeros((1, 7), np.float32)}]
)
def test_rejects_blocks_that_do_not_fit(change: dict[str, np.ndarray]) -> None:
    slots = np.zeros((1, 7), np.int32)
    blocks = VisibleBlocks(slots, slots, np.zeros((2, 2), np.int32), 4, 1, 2)._replace(**change)
    query, vectors = np.zeros((1, 7, 2, 2, 16), np.float32), np.zeros((1, 2, 7, 16), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"blocks\(.*\): expected int32"):
        attend_natively(query, vectors, vectors, slots, slots, scale=1.0, blocks=blocks)
