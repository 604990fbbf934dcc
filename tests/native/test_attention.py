"""Compares the C++ library's attention in programs with XLA's."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

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
    gradients_and_output,
    prefill_mask,
    random_arrays,
    visible_queries,
)
from marks import slow
from reference import random_ids, small_config

from phi3_jax import Phi3ForCausalLM
from phi3_jax.cache.quantized import QuantizedVectors
from phi3_jax.model.attention import attention
from phi3_jax.model.kernels.dispatch import choose_kernels
from phi3_jax.model.kernels.native import native_attention
from phi3_jax.model.kernels.xla import xla_attention
from phi3_jax.model.masks import CausalMask
from phi3_jax.native.attention import attention as attend_natively
from phi3_jax.native.targets import ATTENTION, WRITE

pytestmark = pytest.mark.usefixtures("library")

run_natively = jax.jit(partial(native_attention, scale=SCALE))


def operands(dtype: Any, kind: str, *sizes: Any) -> list[Any]:
    """Returns queries of this dtype, keys and values of a cache of this kind."""
    query, *cache = random_arrays(*sizes)
    convert = QuantizedVectors.quantize if kind == "int8" else lambda x: jnp.asarray(x, jnp.bfloat16)
    return [jnp.asarray(query, dtype), *map(convert, cache)]


def floats(vectors: Any) -> jax.Array:
    return vectors.dequantize() if isinstance(vectors, QuantizedVectors) else vectors.astype(jnp.float32)


def assert_equals_xla(arrays: list[Any], mask: CausalMask) -> None:
    """Checks output and log-sum-exp against XLA's in float32.

    bfloat16 queries give results and, if they are many, probabilities in bfloat16.
    """
    rtol = 1e-5 if arrays[0].dtype == jnp.float32 else 2**-7
    exact = jax.jit(partial(xla_attention, scale=SCALE, output_lse=True))
    expected = exact(arrays[0].astype(jnp.float32), *map(floats, arrays[1:]), mask.dense())
    attended = run_natively(*arrays, mask)
    assert attended.out.dtype == arrays[0].dtype
    assert_close_where_visible(attended.out.astype(jnp.float32), expected.out, mask, rtol)
    visible = visible_queries(mask)
    lse, expected_lse = (np.asarray(x.lse).swapaxes(1, 2)[visible] for x in (attended, expected))
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("length", "heads", "width", "padding", "window"),
    [
        (1, "gqa", 96, "left", None),
        (1, "mqa", 64, "none", 40),
        slow(3, "mha", 128, "right", None),
        (7, "gqa", 32, "left", 300),
        slow(40, "mqa", 80, "right", None),
        (300, "gqa", 64, "left", 40),
    ],
)
def test_caches_equal_xla(
    dtype: str, kind: str, length: int, heads: str, width: int, padding: str, window: int | None
) -> None:
    """The keys of 1,300 slots are divided; 300 queries are several blocks."""
    arrays = operands(dtype, kind, 3, length, 1300, HEADS[heads], width)
    assert_equals_xla(arrays, cache_mask(padding, 3, 1300, 1200, length, window, ragged=150))


@pytest.mark.parametrize("window", [None, 70])
def test_a_prefill_equals_xla(window: int | None) -> None:
    assert_equals_xla(
        operands("float32", "bfloat16", 2, 270, 270, HEADS["gqa"], 64), prefill_mask("right", 2, 270, window)
    )


def test_a_ring_equals_xla() -> None:
    size, used = 640, 1000
    key_slots = used - 1 - (used - 1 - np.arange(size)[None]) % size
    query_slots = used - 2 + np.arange(2)[None]
    mask = CausalMask(query_slots, key_slots, key_slots != used - 20, window=600)
    assert_equals_xla(operands("float32", "bfloat16", 1, 2, size, HEADS["mha"], 64), mask)


def test_does_not_read_blocks_without_visible_keys() -> None:
    query, key, value = operands("float32", "bfloat16", 1, 300, 2048, HEADS["gqa"], 64)
    mask = cache_mask("none", 1, 2048, 1500, 300, 100)
    unseen = (np.arange(2048) < 1024) | (np.arange(2048) >= 1536)
    out = run_natively(query, key, value, mask).out
    poisoned = run_natively(query, *(jnp.where(unseen[:, None], jnp.nan, x) for x in (key, value)), mask).out
    np.testing.assert_array_equal(poisoned, out)


@pytest.mark.parametrize("length", [1, 40])
def test_queries_without_a_visible_key_give_zeros(length: int) -> None:
    arrays = operands("bfloat16", "bfloat16", 2, length, 640, HEADS["gqa"], 64)
    mask = cache_mask("none", 2, 640, 600, length, None)
    assert_equals_xla(arrays, dataclasses.replace(mask, key_mask=mask.key_mask & [[True], [False]]))
    attended = run_natively(*arrays, dataclasses.replace(mask, key_mask=mask.key_mask & False))
    assert (attended.out == 0).all()
    assert (attended.lse == np.finfo(np.float32).min).all()


def test_gives_the_same_bytes_in_many_threads() -> None:
    arrays = operands("bfloat16", "bfloat16", 2, 20, 2100, HEADS["gqa"], 64)
    mask = cache_mask("left", 2, 2100, 2000, 20, None)
    expected = np.asarray(run_natively(*arrays, mask).out)
    with ThreadPoolExecutor(8) as pool:
        for other in pool.map(lambda _: np.asarray(run_natively(*arrays, mask).out), range(32)):
            np.testing.assert_array_equal(other, expected)


def test_gradients_equal_xla() -> None:
    query, key, value = operands("float32", "bfloat16", 2, 5, 200, HEADS["gqa"], 64)
    mask = cache_mask("left", 2, 200, 190, 5, None)
    weight = np.random.default_rng(1).standard_normal(query.shape, np.float32)

    def attend(*arrays: jax.Array) -> jax.Array:
        return attention(*arrays, mask, scale=SCALE)[0]

    ours = jax.jit(gradients_and_output(attend, weight))
    assert ATTENTION in ours.lower(query, key, value).as_text()
    expected = jax.jit(gradients_and_output(partial(dense_attention, mask), weight))(query, key, value)
    for one, other in zip(jax.tree.leaves(ours(query, key, value)), jax.tree.leaves(expected), strict=True):
        assert_close(np.asarray(one, np.float32), np.asarray(other, np.float32), 1e-5)


def test_models_write_and_read_bfloat16_caches() -> None:
    """A step's answers are those of a float32 cache, by XLA, up to the cache's rounding."""
    model = Phi3ForCausalLM(small_config(head_dim=32), dtype="bfloat16")
    assert model.cache_dtype == jnp.bfloat16
    ids = random_ids(model.config, np.ones((2, 9), np.int64))

    def logits(dtype: str) -> Any:
        cache = model(ids[:, :-1], past_key_values=model.init_cache(2, 128, dtype)).past_key_values
        step = jax.jit(lambda cache: model(ids[:, -1:], past_key_values=cache).logits)
        text = step.lower(cache).as_text()
        assert (ATTENTION in text, WRITE in text) == (dtype == "bfloat16", dtype == "bfloat16")
        return np.asarray(step(cache))

    found, expected = logits("bfloat16"), logits("float32")
    assert np.sqrt(np.mean(np.square(found - expected))) <= 0.02 * np.sqrt(np.mean(np.square(expected)))


CHOICES: dict[str, tuple[dict[str, Any], str]] = {
    "a step": ({}, "native"),
    "int8": ({"kind": "int8"}, "native"),
    "float32 keys": ({"kind": "float32"}, "xla"),
    "narrow heads": ({"width": 24}, "xla"),
    "segments": ({"segments": True}, "xla"),
    "asked for": ({"implementation": "xla"}, "xla"),
    "a chunk of a prompt": ({"length": 40}, "native"),
    "a short prefill": ({"length": 255, "size": 255, "prefill": True}, "xla"),
    "a prefill": ({"length": 256, "size": 256, "prefill": True}, "native"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_is_chosen_on_cpu(name: str) -> None:
    options, expected = CHOICES[name]
    sizes = {"length": 1, "size": 512, "width": 64} | options
    length, size, width = sizes["length"], sizes["size"], sizes["width"]
    query = jnp.zeros((1, length, 1, 1, width), jnp.bfloat16)
    kind, shape = options.get("kind", "bfloat16"), (1, 1, size, width)
    key: Any = QuantizedVectors.zeros(shape) if kind == "int8" else jnp.zeros(shape, kind)
    slots = np.arange(size)[None]
    numbers = np.ones_like(slots) if "segments" in options else None
    queries = slots[:, -length:]
    segments = None if numbers is None else numbers[:, -length:]
    mask = CausalMask(queries, slots, slots >= 0, None, "prefill" in options, segments, numbers)
    assert choose_kernels(query, key, mask, options.get("implementation"))["cpu"] == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"query": np.zeros((2, 3, 2, 2, 32), np.int32)},
        {"query": np.zeros((2, 3, 2, 2, 24), np.float32)},
        {"key": np.zeros((2, 2, 7, 32), np.float32)},
        {"value": np.zeros((2, 2, 6, 32), jnp.bfloat16)},
        {"key_slots": np.zeros((2, 6), np.int32)},
        {"query_slots": np.zeros((2, 3), np.float32)},
        {"key_scale": np.zeros((2, 2, 7), jnp.bfloat16), "value_scale": np.zeros((2, 2, 7), jnp.bfloat16)},
    ],
    ids=["dtype of queries", "width", "dtype of keys", "slots", "key slots", "query slots", "scales"],
)
def test_rejects_operands_that_do_not_fit(changes: dict[str, np.ndarray]) -> None:
    arrays = {
        "query": np.zeros((2, 3, 2, 2, 32), np.float32),
        "key": np.zeros((2, 2, 7, 32), jnp.bfloat16),
        "value": np.zeros((2, 2, 7, 32), jnp.bfloat16),
        "query_slots": np.zeros((2, 3), np.int32),
        "key_slots": np.zeros((2, 7), np.int32),
    } | changes
    with pytest.raises(ValueError, match=r"attention\(.*\): expected"):
        jax.eval_shape(partial(attend_natively, scale=1.0), **arrays)
