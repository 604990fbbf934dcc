"""Tests rings, int8 and operations on rows: every kind of cache gives the results of the static one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow
from reference import alone, distance, longrope, pair, random_ids, run, small_config

from phi3_jax import Phi3ForCausalLM
from phi3_jax.cache.quantized import QuantizedVectors
from phi3_jax.model.attention import attention
from phi3_jax.model.kernels import xla as xla_module

WINDOW, CHUNK, RING = 65, 64, 128
"""The smallest ring: 64 slots of the window and 64 new ones."""

SLOTS = 320
KINDS = {
    "static": {},
    "ring": {"sliding": True, "chunk": CHUNK},
    "int8": {"dtype": "int8"},
    "int8 ring": {"dtype": jnp.int8, "sliding": True, "chunk": CHUNK},
}
MOST_KINDS_SLOW = [kind if kind == "int8 ring" else slow(kind) for kind in KINDS]


def tolerance(kind):
    """Returns a kind's tolerance: int8 rounds to 1/254 of the largest element, where small errors tip."""
    return 0.05 if "int8" in kind else 1e-5


def window_config(**changes):
    """Returns a config with a window and few tokens, as all logits of the reference are stored."""
    settings = {
        "vocab_size": 16,
        "sliding_window": WINDOW,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 512,
    }
    return small_config(**(settings | changes))


def models(tmp_path, **changes):
    return pair("causal", window_config(**changes), tmp_path)


def feed(model, ids, counts, cache, **arguments):
    """Feeds each row its next tokens, `counts` [rounds, B] of them, padded on the right.

    Returns each row's logits and the cache.
    """
    logits = [[] for _ in ids]
    done = np.zeros(len(ids), np.int32)
    start = np.asarray(cache.length)
    for count in np.asarray(counts, np.int32):
        width = 1 if count.max() <= 1 else 1 << int(count.max() - 1).bit_length()
        mask = np.arange(width) < count[:, None]
        positions = np.minimum(done[:, None] + np.arange(width), ids.shape[1] - 1)
        tokens = np.where(mask, np.take_along_axis(ids, positions, axis=1), model.config.pad_token_id)
        out = run(model, input_ids=tokens, attention_mask=mask, past_key_values=cache, **arguments)
        done = done + count
        cache = rewind(out.past_key_values, start + done)
        for row, number in enumerate(count):
            logits[row].append(np.asarray(out.logits)[row, :number])
        np.testing.assert_array_equal(cache.length, start + done)
        np.testing.assert_array_equal(cache.tokens, start + done)
    return [np.concatenate(parts) for parts in logits], cache


rewind = jax.jit(lambda cache, length: cache.rewind(length))
take = jax.jit(lambda cache, rows: cache.take(rows))
put = jax.jit(lambda cache, rows, other: cache.put(rows, other))


def random_tokens(model, rows, length, seed=0):
    return random_ids(model.config, np.ones((rows, length), np.int64), seed)


# Rows with different numbers of new tokens


COUNTS = [[3, 0, 5], [1, 1, 0], [0, 4, 1], [5, 2, 2], [4, 1, 0], [0, 0, 0], [1, 3, 3]]
"""New tokens of three rows in each round: 14, 11 and 11 in all."""


@pytest.mark.parametrize(
    "changes",
    [
        slow({}),
        slow({"sliding_window": 5}),
        longrope(11),
    ],
    ids=["gqa", "window", "longrope"],
)
def test_rows_take_different_numbers_of_tokens(changes, tmp_path):
    ours, theirs = models(tmp_path, **changes)
    total = np.sum(COUNTS, axis=0)
    mask = (np.arange(14) < total[:, None]).astype(np.int64)
    ids = random_ids(ours.config, mask)
    ref = alone(theirs, ids, mask)
    logits, cache = feed(ours, ids, COUNTS, ours.init_cache(3, 24), rope_length=total.astype(np.int32))
    for row, length in enumerate(total):
        assert distance(logits[row], ref[row, :length]) <= 1e-5
    np.testing.assert_array_equal(cache.mask, np.arange(24) < total[:, None])
    np.testing.assert_array_equal(cache.rope_length, total)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rows_longer_than_the_window_match_transformers(kind, tmp_path):
    """Rows of 256, 219 and 112 tokens come in chunks: the ring's largest, small ones, single tokens."""
    ours, theirs = models(tmp_path)
    counts = [[64, 64, 0], [64, 0, 64], [64, 64, 1], [7, 64, 8], [3, 8, 0], [18, 0, 3], *[[1, 1, 1]] * 19]
    counts += [[1, 0, 1]] * 17
    total = np.sum(counts, axis=0)
    mask = (np.arange(total.max()) < total[:, None]).astype(np.int64)
    ids = random_ids(ours.config, mask)
    ref = alone(theirs, ids, mask)
    cache = ours.init_cache(3, SLOTS, **KINDS[kind])
    assert cache.max_length == (RING if "ring" in kind else SLOTS)
    logits, cache = feed(ours, ids, counts, cache)
    for row, length in enumerate(total):
        assert distance(logits[row], ref[row, :length]) <= tolerance(kind)
    assert cache.get_seq_length() == 256


@pytest.mark.parametrize(
    "chunks",
    [[64] * 4, slow([50, 64, 1, 63, 2, 64, *[1] * 12])],
    ids=["equal", "unequal"],
)
def test_a_ring_with_left_padding_matches_transformers(chunks, tmp_path):
    ours, theirs = models(tmp_path)
    length = sum(chunks)
    mask = (np.arange(length) >= np.array([[0], [37], [150]])).astype(np.int64)
    ids = random_ids(ours.config, mask)
    ref = alone(theirs, ids, mask)
    cache = ours.init_cache(3, SLOTS, **KINDS["ring"])
    start = 0
    for size in chunks:
        chunk = slice(start, start + size)
        out = run(ours, input_ids=ids[:, chunk], attention_mask=mask[:, chunk], past_key_values=cache)
        cache = out.past_key_values
        where = mask.astype(bool)[:, chunk, None]
        if where.any():
            assert distance(out.logits, ref[:, chunk], where) <= 1e-5
        start += size
    np.testing.assert_array_equal(cache.tokens, mask.sum(axis=1))
    np.testing.assert_array_equal(cache.length, [length] * 3)


# Rewinding


@pytest.mark.parametrize("kind", MOST_KINDS_SLOW)
def test_rejected_tokens_leave_no_trace(kind, tmp_path):
    ours, theirs = models(tmp_path)
    ids = random_tokens(ours, 2, 256)
    ref = alone(theirs, ids, np.ones_like(ids))
    cache = ours.init_cache(2, SLOTS, **KINDS[kind])
    start, rounds = np.zeros(2, np.int32), [[64, 64], [33, 0], [64, 20], [0, 1], [1, 0], [64, 64], [30, 64]]
    for number, accepted in enumerate(np.array(rounds)):
        positions = start[:, None] + np.arange(CHUNK)
        right = np.take_along_axis(ids, np.minimum(positions, 255), axis=1)
        given = np.where(
            np.arange(CHUNK) < accepted[:, None], right, random_tokens(ours, 2, CHUNK, number + 1)
        )
        out = run(ours, input_ids=given, past_key_values=cache)
        for row, count in enumerate(accepted):
            expected = ref[row, start[row] : start[row] + count]
            if count:
                assert distance(out.logits[row, :count], expected) <= tolerance(kind)
        start = start + accepted
        cache = rewind(out.past_key_values, start)
        np.testing.assert_array_equal(cache.tokens, start)


@pytest.mark.parametrize("kind", MOST_KINDS_SLOW)
def test_rewind_restores_lengths_and_masks(kind):
    model = Phi3ForCausalLM(window_config(num_hidden_layers=1))
    cache = model.init_cache(3, SLOTS, **KINDS[kind])
    mask = np.arange(60) >= np.array([[0], [5], [58]])
    cache = run(model, input_ids=random_tokens(model, 3, 60), attention_mask=mask, past_key_values=cache)
    cache = cache.past_key_values.rewind(np.array([70, 9, 59]))
    np.testing.assert_array_equal(cache.length, [60, 9, 59])
    np.testing.assert_array_equal(cache.tokens, [60, 4, 1])
    np.testing.assert_array_equal(cache.mask.sum(axis=1), [60, 4, 1])
    np.testing.assert_array_equal(cache.rope_length, [60, 55, 2])
    for size in (64, 64):
        cache = run(model, input_ids=random_tokens(model, 3, size), past_key_values=cache).past_key_values
    np.testing.assert_array_equal(cache.tokens, [188, 132, 129])
    if "ring" in kind:
        with pytest.raises(
            ValueError, match=r"cannot go back to \[123, 137, 187\].*ring of 128 has replaced"
        ):
            cache.rewind(np.array([123, 200, 200]))
    cache = cache.rewind(np.array([124, 0, 187]))
    np.testing.assert_array_equal(cache.tokens, [124, 0, 129])
    again = run(model, input_ids=random_tokens(model, 3, 20), past_key_values=cache)
    first = run(model, input_ids=random_tokens(model, 3, 20), past_key_values=model.init_cache(3, SLOTS))
    assert distance(again.logits[1], first.logits[1]) <= tolerance(kind)


# Rows that are taken and put


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rows_continue_after_take_and_put(kind, tmp_path):
    model, _ = models(tmp_path)
    ids, new = random_tokens(model, 3, 151), random_tokens(model, 3, 4, seed=1)
    counts = [[64, 64, 5], [64, 64, 60], [20, 0, 0], [1, 1, 1]]
    _, cache = feed(model, ids, counts, model.init_cache(3, SLOTS, **KINDS[kind]))
    expected = run(model, input_ids=new, past_key_values=cache).logits

    rows = np.array([2, 0, 2, 9])
    selected = take(cache, rows)
    np.testing.assert_array_equal(selected.length, np.asarray(cache.length)[[2, 0, 2, 2]])
    assert selected.window == cache.window
    out = run(model, input_ids=new[[2, 0, 2, 2]], past_key_values=selected)
    assert distance(out.logits, expected[np.array([2, 0, 2, 2])]) <= 1e-5

    others = model.init_cache(3, SLOTS, **KINDS[kind])
    mixed = put(others, np.array([1, 3, 0]), cache)
    np.testing.assert_array_equal(mixed.length, [cache.length[2], cache.length[0], 0])
    np.testing.assert_array_equal(mixed.rope_length, [cache.rope_length[2], cache.rope_length[0], 0])
    out = run(model, input_ids=new[[2, 0, 1]], past_key_values=mixed)
    assert distance(out.logits[:2], expected[np.array([2, 0])]) <= 1e-5


def test_rejects_rows_of_another_cache():
    model = Phi3ForCausalLM(window_config(num_hidden_layers=1))
    cache = model.init_cache(3, RING)
    for other in (
        model.init_cache(2, RING + 1),
        model.init_cache(2, RING, "bfloat16"),
        model.init_cache(2, RING, "int8"),
        model.init_cache(2, SLOTS, sliding=True, chunk=CHUNK),
        model.init_cache(1, RING),
    ):
        with pytest.raises(ValueError, match=r"2 rows of a cache with 128 slots.* cannot be replaced by"):
            cache.put(np.array([0, 1]), other)


# Rings


def test_size_of_a_ring_depends_on_window_and_chunk():
    model = Phi3ForCausalLM(window_config(num_hidden_layers=1))
    for max_length, chunk, slots in ((1000, 64, 128), (1000, 65, 256), (129, 1, 128), (4096, 512, 640)):
        cache = model.init_cache(1, max_length, sliding=True, chunk=chunk)
        assert (cache.max_length, cache.window) == (slots, WINDOW)
        assert cache.keys[0].shape == (1, 2, slots, 12)
    for max_length in (100, 128):  # no longer than a ring
        cache = model.init_cache(1, max_length, sliding=True, chunk=64)
        assert (cache.max_length, cache.window) == (max_length, None)
        assert cache.resize(150).max_length == 150


def test_a_ring_rejects_what_its_slots_cannot_hold():
    model = Phi3ForCausalLM(window_config(num_hidden_layers=1))
    cache = model.init_cache(2, SLOTS, **KINDS["ring"])
    ids = random_tokens(model, 2, 65)
    message = r"ring of 128 slots a row: 64 belong to the window of 65 and 65 new tokens.* at most 64 at once"
    for call in (model, jax.jit(lambda *a, **k: model(*a, **k).logits)):
        with pytest.raises(ValueError, match=message):
            call(ids, past_key_values=cache)
        for shape in ((2, 5), (2, 128), (2, 1, 4, 128)):
            with pytest.raises(ValueError, match=r"ring takes a mask of the new tokens only, \(2, 4\)"):
                call(ids[:, :4], np.ones(shape, np.int64), past_key_values=cache)
    with pytest.raises(ValueError, match="ring of 128 slots cannot be resized"):
        cache.resize(256)
    with pytest.raises(ValueError, match="chunk=0"):
        model.init_cache(2, SLOTS, sliding=True, chunk=0)
    for window in (None, 66):
        other = Phi3ForCausalLM(window_config(num_hidden_layers=1, sliding_window=window))
        with pytest.raises(ValueError, match=f"a window of 65 slots, the model's sliding_window is {window}"):
            other(ids[:, :4], past_key_values=cache)
    with pytest.raises(ValueError, match="sliding=True needs a sliding_window"):
        Phi3ForCausalLM(window_config(sliding_window=None)).init_cache(1, 8, sliding=True)


# int8


def test_quantized_vectors_are_off_by_half_a_scale_at_most():
    """The scale is rounded first, so its rounding adds no error."""
    x = np.random.default_rng(0).normal(size=(50, 3, 40, 24)) * np.logspace(-20, 20, 50)[:, None, None, None]
    x = x.astype(np.float32)
    x[0, 0, 0] = 0
    for quantize in (QuantizedVectors.quantize, jax.jit(QuantizedVectors.quantize)):
        quantized = quantize(x)
        assert (quantized.values.dtype, quantized.scale.dtype) == (jnp.int8, jnp.bfloat16)
        assert (quantized.shape, quantized.scale.shape) == (x.shape, x.shape[:-1])
        scale = np.asarray(quantized.scale, np.float64)[..., None]
        error = np.abs(np.asarray(quantized.values, np.float64) * scale - x)
        assert (error <= 0.5001 * scale).all()
        assert (error.max(axis=-1) <= np.abs(x).max(axis=-1) / 253).all()
        assert distance(quantized.dequantize(), x - (x - np.asarray(quantized.values) * scale)) <= 1e-6
        assert np.abs(quantized.values).max() == 127


@pytest.mark.parametrize(
    ("length", "limit"),
    [
        (1, 2 * 4 * 40 * 12),
        (7, 1),
        *(slow(*each) for each in ((1, 1 << 20), (7, 2 * 4 * 40 * 12), (150, 1 << 20))),
    ],
)
def test_int8_attention_equals_attention_over_dequantized_vectors(length, limit, monkeypatch):
    """Four, two or one heads are computed at a time, with one mask or one a head."""
    monkeypatch.setattr(xla_module, "HEADS_BLOCK_BYTES", limit)
    batch, kv_heads, groups, slots, width = 3, 4, 2, 40, 12
    random = np.random.default_rng(0)
    query = jnp.asarray(random.normal(size=(batch, length, kv_heads, groups, width)), jnp.float32)
    key, value = (
        QuantizedVectors.quantize(random.normal(size=(batch, kv_heads, slots, width))) for _ in range(2)
    )
    # A new function, so that nothing is reused that was traced under another limit.
    attend = jax.jit(lambda *a, **k: attention(*a, **k), static_argnames=("scale", "output_weights"))
    for heads, weights in ((1, False), (kv_heads * groups, True)):
        mask = jnp.asarray(random.random((batch, heads, length, slots)) < 0.6)
        mask = jnp.where(mask, 0.5, -3.0) if weights else mask
        ours = attend(query, key, value, mask, scale=0.4, output_weights=weights)
        ref = attend(query, key.dequantize(), value.dequantize(), mask, scale=0.4, output_weights=weights)
        assert distance(ours[0], ref[0]) <= 1e-5
        assert (ours[1] is None) == (not weights)
    assert distance(ours[1], ref[1]) <= 1e-5
    half, weights = attend(query.astype(jnp.bfloat16), key, value, mask, scale=0.4, output_weights=True)
    assert half.dtype == weights.dtype == jnp.bfloat16
    assert distance(half.astype(jnp.float32), ref[0]) <= 0.02


def test_dropout_over_int8_differs_between_heads(monkeypatch):
    monkeypatch.setattr(xla_module, "HEADS_BLOCK_BYTES", 1)
    query = jnp.zeros((1, 100, 2, 1, 8))
    vectors = QuantizedVectors.quantize(jnp.ones((1, 2, 50, 8)))
    mask = jnp.ones((1, 1, 100, 50), bool)
    out, _ = attention(
        query, vectors, vectors, mask, scale=1.0, dropout_rate=0.5, dropout_key=jax.random.key(0)
    )
    assert 0.9 < out.mean() < 1.1
    assert out[:, :, 0].std() > 0.05
    assert not np.array_equal(out[:, :, 0], out[:, :, 1])


@pytest.mark.parametrize(("head_dim", "most"), [(64, 0.53), (96, 0.52)])
def test_int8_takes_half_the_bytes(head_dim, most):
    model = Phi3ForCausalLM(window_config(num_hidden_layers=1, head_dim=head_dim))

    def size(dtype):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(model.init_cache(2, 512, dtype)))

    assert size("int8") <= most * size("bfloat16")


def test_rejects_unsupported_dtypes():
    model = Phi3ForCausalLM(window_config(num_hidden_layers=1))
    for dtype in ("int16", "uint8", "bool"):
        with pytest.raises(ValueError, match=f"dtype={dtype}: a cache holds floating-point numbers or int8"):
            model.init_cache(1, 8, dtype)


# In place


@pytest.mark.parametrize(("batch", "length"), [(1, 1), slow(2, 1), (2, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_writes_every_kind_in_place(kind, batch, length, monkeypatch):
    monkeypatch.setattr(xla_module, "HEADS_BLOCK_BYTES", 1)
    heads = {"head_dim": 64, "num_attention_heads": 16, "num_key_value_heads": 16}
    model = Phi3ForCausalLM(window_config(**heads, sliding_window=961))

    def step(model, ids, cache):
        out = model(ids, past_key_values=cache, logits_to_keep=1)
        return out.logits, out.past_key_values

    jitted = jax.jit(step, donate_argnames="cache")
    ids = jnp.full((batch, length), 5, jnp.int32)
    cache = model.init_cache(batch, 2048 if "ring" in kind else 1024, **KINDS[kind])
    assert cache.max_length == 1024
    large = np.prod(cache.keys[0].shape) * cache.keys[0].dtype.itemsize
    compiled = jitted.lower(model, ids, cache).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * len(cache.keys) * large
    assert memory.temp_size_in_bytes < 0.9 * large, "a step copies a layer's cache"
    buffers = [array.unsafe_buffer_pointer() for array in jax.tree.leaves((cache.keys, cache.values))]
    for _ in range(3):
        _, cache = compiled(model, ids, cache)
    assert buffers == [array.unsafe_buffer_pointer() for array in jax.tree.leaves((cache.keys, cache.values))]
    np.testing.assert_array_equal(cache.length, [3 * length] * batch)
