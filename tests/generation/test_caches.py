"""Tests that cache kinds (rings for sliding windows, int8, growing caches) do not change the text."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from marks import slow
from reference import alone as logits_alone
from reference import distance, longrope, run, small_config
from rows import alone, answers, assert_varied, rows_of
from twins import Twins, prompts

from phi3_jax import Phi3ForCausalLM
from phi3_jax.generation import engine as engine_module

WINDOW = 7
RING = 640
"""Slots for a window of 7 and chunks of 512, in steps of 128."""

LENGTHS = (600, 3, 550)
BATCH = prompts(LENGTHS, seed=21)
COUNT = 200
"""New tokens that make the longest row wrap around the ring."""

INT8 = 0.05
"""The largest distance of logits over an int8 cache from exact ones, relative to the largest logit."""


def nbytes(cache: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))


# --- rings --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def windowed(twins_of: Callable[..., Twins]) -> Twins:
    changes = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
    return twins_of(sliding_window=WINDOW, **changes)


@pytest.fixture(scope="module")
def expected(windowed: Twins) -> np.ndarray:
    new = alone(windowed, *BATCH, COUNT)
    assert_varied(new)
    return new


@pytest.mark.slow
def test_a_ring_does_not_change_the_text(windowed: Twins, expected: np.ndarray) -> None:
    """The longest row has more slots than the ring, which wraps during generation."""
    options = {"max_new_tokens": COUNT, "return_dict_in_generate": True}
    ring, static = (
        windowed.ours(*BATCH, cache_implementation=kind, **options) for kind in ("sliding_window", "static")
    )
    np.testing.assert_array_equal(np.asarray(static.sequences)[:, LENGTHS[0] :], expected)
    np.testing.assert_array_equal(ring.sequences, static.sequences)
    assert ring.past_key_values.max_length == RING
    assert ring.past_key_values.window == WINDOW
    assert static.past_key_values.max_length > RING
    share = RING / static.past_key_values.max_length
    assert nbytes(ring.past_key_values) < 1.01 * share * nbytes(static.past_key_values)


@pytest.mark.parametrize("length", [slow(5), slow(630), slow(1100)])
def test_rings_around_prompts_of_any_length(windowed: Twins, length: int) -> None:
    ids, mask = prompts((length,), seed=22)
    new = answers(windowed, ids, mask, 700, cache_implementation="sliding_window")
    np.testing.assert_array_equal(new, alone(windowed, ids, mask, 700))


@pytest.mark.slow
def test_a_window_wider_than_a_chunk(twins_of: Callable[..., Twins]) -> None:
    changes = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
    twins = twins_of(sliding_window=600, **changes)
    ids, mask = prompts((1300, 40), seed=23)
    new = answers(twins, ids, mask, 300, cache_implementation="sliding_window")
    np.testing.assert_array_equal(new, alone(twins, ids, mask, 300))


@pytest.mark.slow
def test_a_ring_with_beams(windowed: Twins) -> None:
    ids, mask = BATCH
    beams = {
        "max_new_tokens": 60,
        "num_beams": 3,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    ours = windowed.ours(ids, mask, cache_implementation="sliding_window", **beams)
    for row, tokens in enumerate(rows_of(ids, mask)):
        theirs = windowed.theirs(tokens[None], np.ones((1, len(tokens)), np.int64), **beams)
        np.testing.assert_array_equal(ours.sequences[row, ids.shape[1] :], theirs.sequences[0, len(tokens) :])
        np.testing.assert_allclose(ours.sequences_scores[row], theirs.sequences_scores[0], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lookup", "itself", "other"])
def test_a_ring_with_drafts(windowed: Twins, expected: np.ndarray, name: str) -> None:
    """Rejected drafts replace only slots that have left the window."""
    other = Phi3ForCausalLM(windowed.config.replace(num_hidden_layers=1), rngs=5)
    options: dict[str, Any] = {
        "lookup": {"prompt_lookup_num_tokens": 10},
        "itself": {"assistant_model": windowed.model, "assistant_confidence_threshold": 0.0},
        "other": {"assistant_model": other, "num_assistant_tokens": 5},
    }[name]
    new = answers(windowed, *BATCH, COUNT, cache_implementation="sliding_window", **options)
    np.testing.assert_array_equal(new, expected)


@pytest.mark.slow
@pytest.mark.parametrize("added", [0, 30])
def test_continues_from_a_ring(windowed: Twins, expected: np.ndarray, added: int) -> None:
    """The second call's cache is of the same kind as the one passed to it."""
    out = windowed.ours(
        *BATCH, max_new_tokens=90, cache_implementation="sliding_window", return_dict_in_generate=True
    )
    ids = np.asarray(out.sequences)
    more = np.random.default_rng(0).integers(4, 96, (len(ids), added))
    ids = np.concatenate([ids, more], axis=1)
    mask = np.concatenate([BATCH[1], np.ones((len(ids), 90 + added), np.int64)], axis=1)
    second = windowed.ours(
        ids, mask, max_new_tokens=110, past_key_values=out.past_key_values, return_dict_in_generate=True
    )
    assert second.past_key_values.max_length == RING
    new = expected[:, 90:] if not added else alone(windowed, ids, mask, 110)
    np.testing.assert_array_equal(np.asarray(second.sequences)[:, ids.shape[1] :], new)


def test_a_ring_needs_a_window(twins: Twins) -> None:
    with pytest.raises(ValueError, match="sliding_window"):
        twins.ours(*prompts((5,)), max_new_tokens=4, cache_implementation="sliding_window")


# --- int8 ---------------------------------------------------------------------------------------------------

SHORT = prompts((20, 7, 13), seed=24)


@pytest.fixture(scope="module")
def plain(twins_of: Callable[..., Twins]) -> Twins:
    return twins_of()


def test_logits_over_an_int8_cache(plain: Twins) -> None:
    """Compares teacher-forced logits, token by token, with a float cache and the reference."""
    ids, mask = prompts((64, 64), seed=25)
    exact = logits_alone(plain.reference, ids, mask)
    for dtype, tolerance in (("int8", INT8), (None, 1e-5)):
        cache, logits = plain.model.init_cache(2, 128, dtype=dtype), []
        for position in range(ids.shape[1]):
            out = run(plain.model, input_ids=ids[:, position : position + 1], past_key_values=cache)
            cache = out.past_key_values
            logits.append(np.asarray(out.logits))
        assert distance(np.concatenate(logits, axis=1), exact) <= tolerance


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "seed": 0, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 4},
    "itself": {"assistant_confidence_threshold": 0.0},
    "guidance": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("mode", [slow(mode) if mode != "greedy" else mode for mode in MODES])
def test_int8_in_every_mode(plain: Twins, mode: str) -> None:
    """The recorded logits are near the exact ones of the same text, so the cache holds that text."""
    ids, mask = SHORT
    options = MODES[mode] | ({"assistant_model": plain.model} if mode == "itself" else {})
    out = plain.ours(
        ids,
        mask,
        max_new_tokens=30,
        cache_implementation="quantized",
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    times = options.get("num_return_sequences", 1)
    text, used = np.asarray(out.sequences), np.repeat(mask, times, axis=0)
    used = np.concatenate([used, np.ones((len(text), 30), np.int64)], axis=1)
    assert text.shape == (3 * times, 50)
    cache = out.past_key_values
    assert cache.batch_size == len(text)
    np.testing.assert_array_equal(cache.tokens, used.sum(axis=1) - 1)
    floats = plain.model.init_cache(len(text), cache.max_length, dtype="bfloat16")
    assert nbytes(cache) < 0.62 * nbytes(floats)  # 12 dims and a scale are 14 bytes, not 24
    if mode in ("beams", "guidance"):  # the logits are those of running beams, or guided
        return
    exact = logits_alone(plain.reference, text, used)[:, ids.shape[1] - 1 : -1]
    assert distance(np.stack(out.logits, axis=1), exact) <= INT8


def test_int8_is_half_of_bfloat16() -> None:
    """Compares sizes at the family's head dim."""
    config = small_config(num_hidden_layers=1, hidden_size=192, num_attention_heads=2, num_key_value_heads=2)
    model = Phi3ForCausalLM(config)
    sizes = [nbytes(model.init_cache(4, 256, dtype=dtype)) for dtype in ("int8", "bfloat16")]
    assert sizes[0] < 0.52 * sizes[1]


@pytest.mark.slow
def test_continues_from_an_int8_cache(plain: Twins) -> None:
    """Two calls of 15 tokens equal one of 30, and the cache stays int8."""
    options = {"cache_implementation": "quantized", "return_dict_in_generate": True}
    whole = plain.ours(*SHORT, max_new_tokens=30, **options)
    half = plain.ours(*SHORT, max_new_tokens=15, **options)
    mask = np.concatenate([SHORT[1], np.ones((3, 15), np.int64)], axis=1)
    second = plain.ours(
        np.asarray(half.sequences),
        mask,
        max_new_tokens=15,
        past_key_values=half.past_key_values,
        return_dict_in_generate=True,
    )
    assert second.past_key_values.keys[0].dtype == np.int8
    np.testing.assert_array_equal(second.sequences, whole.sequences)


@pytest.mark.slow
def test_int8_ring(windowed: Twins, expected: np.ndarray) -> None:
    """An int8 ring is possible as a cache that the caller makes."""
    ids, mask = prompts((400, 90), seed=26)
    cache = windowed.model.init_cache(2, 2000, dtype="int8", sliding=True)
    out = windowed.ours(
        ids,
        mask,
        max_new_tokens=500,
        past_key_values=cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert out.past_key_values.max_length == RING
    text = np.asarray(out.sequences)
    used = np.concatenate([mask, np.ones((2, 500), np.int64)], axis=1)
    exact = logits_alone(windowed.reference, text, used)[:, ids.shape[1] - 1 : -1]
    assert distance(np.stack(out.logits, axis=1), exact) <= INT8


# --- growth -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["greedy", "lookup", "itself", "sampling"])
def test_caches_grow(plain: Twins, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """The cache grows from 128 slots to 256 and more within one answer."""
    options = MODES[mode] | ({"assistant_model": plain.model} if mode == "itself" else {})
    options = options | {"num_return_sequences": 1}
    if mode == "sampling":
        expected = answers(plain, *SHORT, 300, **options)
    else:
        expected = alone(plain, *SHORT, 300)
        assert_varied(expected)
    monkeypatch.setattr(engine_module, "INITIAL_ROOM", 20)
    out = plain.ours(*SHORT, max_new_tokens=300, return_dict_in_generate=True, **options)
    assert out.past_key_values.max_length >= 320
    np.testing.assert_array_equal(np.asarray(out.sequences)[:, SHORT[0].shape[1] :], expected)
    few = plain.ours(*SHORT, max_new_tokens=30, return_dict_in_generate=True, **options)
    assert few.past_key_values.max_length == 128


def test_growth_stops_with_the_answer(plain: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "INITIAL_ROOM", 20)
    end = int(alone(plain, *prompts((20,), seed=24), 5)[0, 4])
    out = plain.ours(
        *prompts((20,), seed=24), max_new_tokens=400, eos_token_id=[end], return_dict_in_generate=True
    )
    assert out.past_key_values.max_length == 128


@pytest.mark.slow
def test_a_long_answer(twins_of: Callable[..., Twins]) -> None:
    changes = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
    twins = twins_of(initializer_range=0.2, **changes)
    ids, mask = prompts((20,), seed=27)
    expected = alone(twins, ids, mask, 1500)
    np.testing.assert_array_equal(answers(twins, ids, mask, 1500), expected)


@pytest.mark.slow
def test_growth_across_the_rope_lists(
    twins_of: Callable[..., Twins], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows change to the long list at about the time when the cache grows."""
    monkeypatch.setattr(engine_module, "INITIAL_ROOM", 20)
    changes = longrope() | {"original_max_position_embeddings": 126}
    twins = twins_of(**changes)
    ids, mask = prompts((60, 40, 62), seed=28)
    expected = alone(twins, ids, mask, 150)
    for options in ({}, MODES["lookup"], {"assistant_model": twins.model}):
        np.testing.assert_array_equal(answers(twins, ids, mask, 150, **options), expected)
