"""Tests that decoding with a cache equals the full forward, writes in place and is compiled once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answers import stored
from reference import (
    alone,
    distance,
    longrope,
    pair,
    positions,
    random_ids,
    run,
    run_theirs,
    small_vocabulary_config,
)

from phi3_jax import KVCache, Phi3ForCausalLM
from phi3_jax.cache.layer_cache import write_slots

TOLERANCE = 1e-5
LENGTH = 14
SLOTS = 24

CASES = {
    "gqa": {},
    "window": {"sliding_window": 5},
    "longrope": longrope(11),
}
CHUNKS = {"one by one": [1] * LENGTH, "unequal": [5, 1, 5, 3]}


def mask_of_three_rows(side):
    """Returns a mask of 14, 11 and 8 tokens; under an original window of 11, one row is long."""
    mask = np.ones((3, LENGTH), np.int64)
    for row, padding in ((1, 3), (2, 6)):
        first = {"none": None, "left": 0, "right": LENGTH - padding, "middle": 5}[side]
        if first is not None:
            mask[row, first : first + padding] = 0
    return mask


def decode(model, ids, mask, chunks, cache, **arguments):
    """Returns the logits of all chunks, each with the mask of its own tokens, and the cache."""
    logits, start = [], 0
    for size in chunks:
        chunk = slice(start, start + size)
        out = run(
            model,
            input_ids=ids[:, chunk],
            attention_mask=mask[:, chunk],
            past_key_values=cache,
            **arguments,
        )
        logits.append(np.asarray(out.logits))
        cache = out.past_key_values
        start += size
    return np.concatenate(logits, axis=1), cache


@pytest.mark.parametrize("side", ["none", "left", "right", "middle"])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("case", CASES)
def test_chunks_equal_the_full_forward(case, chunks, side, tmp_path):
    config = small_vocabulary_config(**CASES[case])
    ours, theirs = pair("causal", config, tmp_path)
    mask = mask_of_three_rows(side)
    ids = random_ids(config, mask)
    tokens = mask.sum(axis=1)
    logits, cache = decode(
        ours, ids, mask, CHUNKS[chunks], ours.init_cache(3, SLOTS), rope_length=tokens.astype(np.int32)
    )
    # A window counts slots: padding in the middle of a row takes up part of it, in the reference too.
    padded = case == "window" and side == "middle"
    ref = run_theirs(theirs, ids, mask).logits if padded else alone(theirs, ids, mask)
    assert distance(logits, ref, mask.astype(bool)[..., None]) <= TOLERANCE
    np.testing.assert_array_equal(cache.tokens, tokens)
    np.testing.assert_array_equal(cache.length, [LENGTH] * 3)
    np.testing.assert_array_equal(cache.mask[:, :LENGTH], mask)
    np.testing.assert_array_equal(cache.rope_length, tokens)
    assert cache.get_seq_length() == LENGTH


def test_rows_continue_at_their_own_slots(tmp_path):
    """Right padding is cut off again, so each row has another number of used slots."""
    config = small_vocabulary_config(sliding_window=5)
    ours, theirs = pair("causal", config, tmp_path)
    mask = mask_of_three_rows("right")[:, :9]
    mask[2, 4:] = 0
    history = mask.sum(axis=1)
    ids = random_ids(config, mask)
    new = random_ids(config, np.ones((3, 5), np.int64), seed=1)
    prefill = run(ours, input_ids=ids, attention_mask=mask, past_key_values=ours.init_cache(3, SLOTS))
    cache = dataclasses.replace(prefill.past_key_values, length=jnp.asarray(history, jnp.int32))
    for chunks in ([5], [1, 1, 2, 1]):
        logits, after = decode(ours, new, np.ones_like(new), chunks, cache)
        np.testing.assert_array_equal(after.length, history + 5)
        np.testing.assert_array_equal(after.tokens, history + 5)
        for row, count in enumerate(history):
            whole = np.concatenate([ids[row, :count], new[row]])[None]
            ref = alone(theirs, whole, np.ones_like(whole))[0, count:]
            assert distance(logits[row], ref) <= TOLERANCE


@pytest.mark.parametrize("side", ["left", "middle"])
def test_masks_may_cover_cached_tokens_or_all_slots(side, tmp_path):
    config = small_vocabulary_config()
    ours, theirs = pair("causal", config, tmp_path)
    mask = mask_of_three_rows(side)
    ids = random_ids(config, mask)
    ref = alone(theirs, ids, mask)
    token = mask.astype(bool)[:, 9:, None]
    first = run(
        ours, input_ids=ids[:, :9], attention_mask=mask[:, :9], past_key_values=ours.init_cache(3, SLOTS)
    )
    every_slot = np.pad(mask, ((0, 0), (0, SLOTS - LENGTH)))
    for given in (mask[:, 9:], mask, every_slot):
        inside = run(ours, input_ids=ids[:, 9:], attention_mask=given, past_key_values=first.past_key_values)
        assert distance(inside.logits, ref[:, 9:], token) <= TOLERANCE
        np.testing.assert_array_equal(inside.past_key_values.mask, every_slot)
    # Outside `jit` the cache's length is concrete, and the mask is checked against it.
    for given in (mask[:, 9:], mask, every_slot):
        out = jax.eval_shape(lambda m, g=given: m(ids[:, 9:], g, past_key_values=first.past_key_values), ours)
        assert out.logits.shape == (3, 5, 32)
    with pytest.raises(
        ValueError, match=r"attention_mask covers 13 tokens; expected the 5 new ones.*9 cached"
    ):
        ours(ids[:, 9:], mask[:, :13], past_key_values=first.past_key_values)


@stored
def dynamic_cache(theirs, ids, mask, sizes):
    """Returns the reference's logits of each chunk, and the cached keys and values after the last one."""
    import torch
    import transformers

    cache = transformers.DynamicCache(config=theirs.model.config)
    at, logits, start = positions(mask), [], 0
    for size in sizes:
        end = start + size
        with torch.no_grad():
            out = theirs.model(
                torch.tensor(ids[:, start:end]),
                attention_mask=torch.tensor(mask[:, :end]),
                position_ids=torch.tensor(at[:, start:end]),
                past_key_values=cache,
                use_cache=True,
            )
        logits.append(out.logits)
        start = end
    return {
        "logits": logits,
        "keys": [layer.keys for layer in cache.layers],
        "values": [layer.values for layer in cache.layers],
    }


@pytest.mark.parametrize("case", ["gqa", "window"])
def test_matches_the_dynamic_cache_of_transformers(case, tmp_path):
    """The same steps give the same logits, keys and values."""
    config = small_vocabulary_config(**CASES[case])
    ours, theirs = pair("causal", config, tmp_path)
    mask = mask_of_three_rows("left")
    ids = random_ids(config, mask)
    sizes = (6, 1, 4, 1, 2)
    ref = dynamic_cache(theirs, ids, mask, sizes)
    cache = ours.init_cache(3, SLOTS)
    start = 0
    for size, logits in zip(sizes, ref["logits"], strict=True):
        end = start + size
        out = run(ours, input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        cache = out.past_key_values
        assert distance(out.logits, logits, mask.astype(bool)[:, start:end, None]) <= TOLERANCE
        start = end
    if case == "gqa":
        token = mask.astype(bool)[:, None, :, None]
        for name, layers in (("keys", cache.keys), ("values", cache.values)):
            for layer, expected in zip(layers, ref[name], strict=True):
                assert distance(layer[:, :, :LENGTH], expected, token) <= TOLERANCE


# In place, and compiled once


@pytest.mark.parametrize("batch", [1, 2])
def test_decoding_is_compiled_once_and_writes_in_place(batch):
    config = small_vocabulary_config(head_dim=64, num_key_value_heads=2)
    model = Phi3ForCausalLM(config, dtype=jnp.bfloat16)
    traces = 0

    def step(model, ids, cache):
        nonlocal traces
        traces += 1
        out = model(ids, past_key_values=cache)
        return jnp.argmax(out.logits[:, -1:], axis=-1), out.past_key_values

    jitted = jax.jit(step, donate_argnames="cache")
    ids = jnp.full((batch, 1), 5, jnp.int32)
    cache = model.init_cache(batch, 2048, model.cache_dtype)
    large = cache.keys[0].nbytes
    compiled = jitted.lower(model, ids, cache).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * config.num_hidden_layers * large
    assert memory.temp_size_in_bytes < large / 2, "a step copies a layer's cache"

    traces = 0
    buffers = [array.unsafe_buffer_pointer() for array in cache.keys + cache.values]
    donated = cache
    for _ in range(20):
        ids, cache = jitted(model, ids, cache)
    assert traces <= 1
    assert jitted._cache_size() == 1
    assert buffers == [array.unsafe_buffer_pointer() for array in cache.keys + cache.values]
    assert all(array.is_deleted() for array in donated.keys + donated.values)
    np.testing.assert_array_equal(cache.length, [20] * batch)


# The cache itself


def test_rejects_more_tokens_than_free_slots():
    model = Phi3ForCausalLM(small_vocabulary_config())
    cache = run(model, input_ids=np.full((2, 6), 5), past_key_values=model.init_cache(2, 8)).past_key_values
    with pytest.raises(
        ValueError, match=r"has 8 slots a row: 6 are used and 3 more tokens do not fit.*resize\(9\)"
    ):
        model(np.full((2, 3), 5), past_key_values=cache)
    with pytest.raises(ValueError, match=r"has 4 slots a row: 0 are used and 5 more"):
        run(model, input_ids=np.full((2, 5), 5), past_key_values=model.init_cache(2, 4))
    assert run(model, input_ids=np.full((2, 2), 5), past_key_values=cache).logits.shape[1] == 2


def test_resized_cache_keeps_its_tokens(tmp_path):
    config = small_vocabulary_config()
    ours, theirs = pair("causal", config, tmp_path)
    mask = mask_of_three_rows("left")
    ids = random_ids(config, mask)
    _, cache = decode(ours, ids[:, :9], mask[:, :9], [9], ours.init_cache(3, 10))
    with pytest.raises(ValueError, match="max_length=8 is below the 9 slots in use"):
        cache.resize(8)
    small = cache.resize(9)
    assert small.max_length == 9
    cache = small.resize(SLOTS)
    assert cache.max_length == SLOTS
    assert cache.keys[0].shape == (3, 2, SLOTS, 12)
    logits, _ = decode(ours, ids[:, 9:], mask[:, 9:], [1, 4], cache)
    ref = alone(theirs, ids, mask)[:, 9:]
    assert distance(logits, ref, mask.astype(bool)[:, 9:, None]) <= TOLERANCE
    assert jax.jit(lambda c: c.resize(12))(cache).max_length == 12


def test_returns_a_cache_if_given_or_asked_for():
    model = Phi3ForCausalLM(small_vocabulary_config(num_hidden_layers=1))
    ids = np.full((1, 3), 5)
    cache = model.init_cache(1, 8)
    assert run(model, input_ids=ids).past_key_values is None
    assert run(model, input_ids=ids, past_key_values=cache).past_key_values.max_length == 8
    assert run(model, input_ids=ids, past_key_values=cache, use_cache=False).past_key_values is None
    new = run(model, input_ids=ids, use_cache=True).past_key_values
    assert new.max_length >= 3 + 128
    np.testing.assert_array_equal(new.length, [3])
    assert run(model, input_ids=ids, use_cache=False).past_key_values is None


def test_dtype_is_given_or_that_of_the_model():
    config = small_vocabulary_config(num_hidden_layers=1)
    half = Phi3ForCausalLM(config, dtype=jnp.bfloat16)
    on_cpu = next(iter(half.model.norm.weight[...].devices())).platform == "cpu"
    assert half.cache_dtype == (jnp.float32 if on_cpu else jnp.bfloat16)
    for init in (half.init_cache, jax.jit(half.init_cache, static_argnums=(0, 1))):
        assert init(1, 8).keys[0].dtype == jnp.bfloat16
    assert half.init_cache(1, 8, jnp.bfloat16).keys[0].dtype == jnp.bfloat16
    out = run(half, input_ids=np.full((1, 3), 5), past_key_values=half.init_cache(1, 8, jnp.bfloat16))
    assert out.past_key_values.keys[0].dtype == jnp.bfloat16


def test_rejects_a_cache_of_another_model():
    config = small_vocabulary_config()
    model = Phi3ForCausalLM(config)
    ids = np.full((2, 3), 5)
    for changes, batch in (({"num_hidden_layers": 3}, 2), ({"num_key_value_heads": 4}, 2), ({}, 3)):
        cache = KVCache.create(small_vocabulary_config(**changes), batch, 8)
        with pytest.raises(
            ValueError, match=r"past_key_values has \d layers of shape .* this model and batch need 2"
        ):
            model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="max_length=0: a cache needs at least one slot"):
        model.init_cache(2, 0)


@pytest.mark.parametrize("batch", [1, 3])
def test_writes_each_row_at_its_own_first_free_slot(batch):
    slots = np.zeros((batch, 2, 9, 4), np.float32)
    new = np.random.default_rng(0).standard_normal((batch, 2, 3, 4), np.float32)
    start = np.array([2, 0, 6])[:batch]
    written = np.asarray(write_slots(jnp.asarray(slots), jnp.asarray(new), jnp.asarray(start)))
    for row, first in enumerate(start):
        slots[row, :, first : first + 3] = new[row]
    np.testing.assert_array_equal(written, slots)
