"""Tests that in every mode longrope rows that pass the switch of lists equal those rows alone."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import stored
from marks import slow
from reference import LONG, SHORT, distance, longrope, small_config
from rows import alone, answers, assert_varied, logits_along, rows_of
from twins import Twins, prompts

from phi3_jax import Phi3ForCausalLM
from phi3_jax.generation import prompts as prompts_module

ORIGINAL = 16
LENGTHS = (5, 15, 16, 17, 30, 9)
"""Lengths below, one below, at, one above and far above `ORIGINAL`."""

COUNT = 75
"""New tokens that bring the shortest row 64 past `ORIGINAL`."""

BATCH = prompts(LENGTHS, seed=1)
ASSISTANT = {"rope_scaling": longrope()["rope_scaling"], "num_hidden_layers": 1}
"""The config of assistants, which have another `original_max_position_embeddings`."""


@pytest.fixture(scope="module")
def crossing(twins_of: Callable[..., Twins]) -> Twins:
    """A pair whose rows switch to the long list at `ORIGINAL`."""
    return twins_of(**longrope())


@pytest.fixture(scope="module")
def expected(crossing: Twins) -> np.ndarray:
    """The reference's continuation of each row of `BATCH` alone."""
    new = alone(crossing, *BATCH, COUNT)
    assert_varied(new)
    return new


@pytest.fixture(scope="module")
def assistant_of() -> Callable[[int], Phi3ForCausalLM]:
    """Returns `assistant_of(original)`, which makes a one-layer longrope model that switches elsewhere."""

    def make(original: int) -> Phi3ForCausalLM:
        lengths = {"max_position_embeddings": 512, "original_max_position_embeddings": original}
        return Phi3ForCausalLM(small_config(**ASSISTANT | lengths), rngs=5)

    return make


@pytest.mark.optimized
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_switches_independently(crossing: Twins, expected: np.ndarray, side: str) -> None:
    ids, mask = prompts(LENGTHS, side)
    if side == "left":
        ids, mask = BATCH
    else:
        for row, tokens in enumerate(rows_of(*BATCH)):
            ids[row, : len(tokens)] = tokens
    np.testing.assert_array_equal(answers(crossing, ids, mask, COUNT), expected)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_another_original_length(twins_of: Callable[..., Twins], side: str) -> None:
    twins = twins_of(**longrope() | {"original_max_position_embeddings": 64})
    ids, mask = prompts((20, 63, 64, 65, 90, 41), side, seed=1)
    new = alone(twins, ids, mask, 108)
    assert_varied(new)
    np.testing.assert_array_equal(answers(twins, ids, mask, 108), new)


def test_the_lists_matter(crossing: Twins, expected: np.ndarray) -> None:
    """Using one list for all rows at all times changes tokens, so the tests above can fail."""
    starts_short = np.array(LENGTHS) <= ORIGINAL
    long, short = (answers(crossing, *BATCH, COUNT, rope_list=name) for name in ("long", "short"))
    np.testing.assert_array_equal((long != expected).any(axis=1), starts_short)
    assert (short != expected).any(axis=1).all()


@pytest.mark.parametrize("chunk", [8, slow(4)])
def test_any_chunking(
    crossing: Twins, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(prompts_module, "PREFILL_CHUNK", chunk)
    np.testing.assert_array_equal(answers(crossing, *BATCH, COUNT), expected)


@pytest.mark.slow
def test_logits_after_every_token(crossing: Twins, expected: np.ndarray) -> None:
    out = crossing.ours(
        *BATCH, max_new_tokens=COUNT, return_dict_in_generate=True, output_logits=True, output_scores=True
    )
    logits = np.stack(out.logits, axis=1)
    np.testing.assert_array_equal(logits, np.stack(out.scores, axis=1))
    for row, (tokens, new) in enumerate(zip(rows_of(*BATCH), expected, strict=True)):
        theirs = logits_along(crossing.reference, np.append(tokens, new), len(tokens))
        assert distance(logits[row], theirs) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(10, 15, 18), (12,)])
def test_beams(crossing: Twins, lengths: tuple[int, ...]) -> None:
    ids, mask = prompts(lengths, seed=2)
    options = {
        "max_new_tokens": 20,
        "num_beams": 3,
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    ours = crossing.ours(ids, mask, **options)
    new = np.asarray(ours.sequences)[:, ids.shape[1] :].reshape(len(ids), 2, -1)
    scores = np.asarray(ours.sequences_scores).reshape(len(ids), 2)
    for row, tokens in enumerate(rows_of(ids, mask)):
        theirs = crossing.theirs(tokens[None], np.ones((1, len(tokens)), np.int64), **options)
        np.testing.assert_array_equal(new[row], theirs.sequences[:, len(tokens) :])
        np.testing.assert_allclose(scores[row], theirs.sequences_scores, atol=1e-4)


@pytest.mark.parametrize("drafted", [10, slow(3)])
def test_prompt_lookup(crossing: Twins, expected: np.ndarray, drafted: int) -> None:
    """Ten drafted tokens reach past the switch in most rows."""
    np.testing.assert_array_equal(
        answers(crossing, *BATCH, COUNT, prompt_lookup_num_tokens=drafted), expected
    )


@pytest.mark.slow
@pytest.mark.parametrize(("original", "drafted"), [(24, 20), (8, 20), (24, 3)])
def test_assistants_with_another_original_length(
    crossing: Twins,
    expected: np.ndarray,
    assistant_of: Callable[[int], Phi3ForCausalLM],
    original: int,
    drafted: int,
) -> None:
    options = {"assistant_model": assistant_of(original), "num_assistant_tokens": drafted}
    for confidence in (0.0, 0.4):
        new = answers(crossing, *BATCH, COUNT, assistant_confidence_threshold=confidence, **options)
        np.testing.assert_array_equal(new, expected)


@pytest.mark.slow
def test_a_model_that_assists_itself(crossing: Twins, expected: np.ndarray) -> None:
    """Every draft is right, so rows reach the switch with drafts of full length."""
    new = answers(
        crossing,
        *BATCH,
        COUNT,
        assistant_model=crossing.model,
        num_assistant_tokens=20,
        assistant_confidence_threshold=0.0,
    )
    np.testing.assert_array_equal(new, expected)


@pytest.fixture(scope="module")
def first_call(crossing: Twins) -> Callable[..., tuple[np.ndarray, np.ndarray, Any]]:
    """Returns `first_call(lengths, count)`, which returns ids and mask after a call, and its cache."""

    def call(lengths: tuple[int, ...], count: int, **options: Any) -> tuple[np.ndarray, np.ndarray, Any]:
        ids, mask = prompts(lengths, seed=3)
        out = crossing.ours(ids, mask, max_new_tokens=count, return_dict_in_generate=True, **options)
        mask = np.concatenate([mask, np.ones((len(ids), count), np.int64)], axis=1)
        return np.asarray(out.sequences), mask, out.past_key_values

    return call


def extend(ids: np.ndarray, mask: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the batch with `count` random tokens after each row."""
    more = np.random.default_rng(count).integers(4, 96, (len(ids), count))
    return np.concatenate([ids, more], axis=1), np.concatenate([mask, np.ones_like(more)], axis=1)


@pytest.mark.parametrize(
    ("lengths", "new", "added"),
    [
        ((4, 6, 2), 4, 0),  # rows switch during generation
        ((4, 6, 2), 4, 9),  # some rows switch within the added tokens
        slow((4, 6, 2), 4, 30),
        ((12, 13, 10), 5, 0),  # caches of 16, 17 and 14 tokens
        ((12, 13, 10), 5, 1),
    ],
)
def test_continues_from_a_cache(
    crossing: Twins, first_call: Callable[..., Any], lengths: tuple[int, ...], new: int, added: int
) -> None:
    ids, mask, cache = first_call(lengths, new)
    assert np.asarray(cache.tokens).tolist() == [length + new - 1 for length in lengths]
    ids, mask = extend(ids, mask, added)
    continued = answers(crossing, ids, mask, 24, past_key_values=cache)
    np.testing.assert_array_equal(continued, alone(crossing, ids, mask, 24))


@pytest.mark.parametrize("rope_list", ["long", "short", "planned"])
def test_continues_from_a_cache_of_another_list(
    crossing: Twins, first_call: Callable[..., Any], rope_list: str
) -> None:
    """Rows below, near and above `ORIGINAL` are recomputed where the cache has the wrong list."""
    ids, mask, cache = first_call((4, 10, 25), 8, rope_list=rope_list)
    new = answers(crossing, ids, mask, 24, past_key_values=cache)
    np.testing.assert_array_equal(new, alone(crossing, ids, mask, 24))


@stored
def guided_alone(
    reference: Any, row: np.ndarray, negative: np.ndarray, scale: float, count: int
) -> list[int]:
    """Returns greedy tokens under guidance from forwards without a cache."""
    import torch

    new: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            given, without = (
                torch.log_softmax(
                    reference.model(torch.tensor([[*tokens, *new]]), use_cache=False).logits[0, -1], -1
                )
                for tokens in (row, negative)
            )
        new.append(int((without + scale * (given - without)).argmax()))
    return new


@pytest.mark.parametrize("negative", ["own last token", (2, 15, 6)])
def test_guidance(crossing: Twins, negative: Any) -> None:
    """Prompt and negative prompt switch at their own lengths."""
    ids, mask = prompts((6, 10, 18), seed=4)
    options, against = {}, [row[-1:] for row in rows_of(ids, mask)]
    if negative != "own last token":
        unwanted, unwanted_mask = prompts(negative, seed=5)
        options = {"negative_prompt_ids": unwanted, "negative_prompt_attention_mask": unwanted_mask}
        against = rows_of(unwanted, unwanted_mask)
    new = answers(crossing, ids, mask, 24, guidance_scale=1.7, **options)
    for row, tokens in enumerate(rows_of(ids, mask)):
        assert new[row].tolist() == guided_alone(crossing.reference, tokens, against[row], 1.7, 24)


def test_draws_do_not_depend_on_other_rows(crossing: Twins) -> None:
    ids, mask = BATCH
    others, others_mask = prompts((30, 1, 20, 2, 29, 16), seed=6)
    options = {"do_sample": True, "seed": 3, "top_k": 20}
    full = answers(crossing, ids, mask, COUNT, **options)
    assert len(set(map(tuple, full.tolist()))) == 6
    for row in (0, 3, 5):
        mixed, mixed_mask = others.copy(), others_mask.copy()
        mixed[row], mixed_mask[row] = ids[row], mask[row]
        new = answers(crossing, mixed, mixed_mask, COUNT, **options)
        np.testing.assert_array_equal(new[row], full[row])
        assert (new != full).any(axis=1).sum() == 5
    assert (answers(crossing, ids, mask, COUNT, **options | {"seed": 4}) != full).any(axis=1).all()


@pytest.mark.slow
def test_int8_cache(twins_of: Callable[..., Twins]) -> None:
    """The logits stay near the exact ones of the same text, before and after the switch."""
    crossing = twins_of(seed=0, **longrope())
    out = crossing.ours(
        *BATCH,
        max_new_tokens=COUNT,
        cache_implementation="quantized",
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits, new = np.stack(out.logits, axis=1), np.asarray(out.sequences)[:, BATCH[0].shape[1] :]
    for row, tokens in enumerate(rows_of(*BATCH)):
        exact = logits_along(crossing.reference, np.append(tokens, new[row]), len(tokens))
        assert distance(logits[row], exact) <= 0.05


@pytest.fixture(scope="module")
def early_yarn(crossing: Twins) -> Phi3ForCausalLM:
    """The model as an early Phi-3: "yarn" with the same two lists, and longrope's attention factor."""
    rope = {"type": "yarn", "short_factor": SHORT, "long_factor": LONG}
    attention_factor = float(
        crossing.config.rope_scaling.frequencies(crossing.config.rope_base, np.ones(1))[1]
    )
    model = Phi3ForCausalLM(
        crossing.config.replace(rope_scaling=rope | {"attention_factor": attention_factor}), rngs=0
    )
    assert model.config.rope_scaling.rope_type == "phi3-yarn"
    model.model.embed_tokens, model.model.norm = crossing.model.model.embed_tokens, crossing.model.model.norm
    model.model.layers, model.lm_head = crossing.model.model.layers, crossing.model.lm_head
    return model


@pytest.fixture(scope="module")
def one_list(crossing: Twins, twins_of: Callable[..., Twins]) -> Callable[[str], Twins]:
    """Returns `one_list("long")`, which makes the pair with a reference that has only this list."""

    def make(rope_list: str) -> Twins:
        factors = {"long": LONG, "short": SHORT}[rope_list]
        twins = copy.copy(twins_of(**longrope(short_factor=factors, long_factor=factors)))
        twins.model = crossing.model
        return twins

    return make


@pytest.fixture(scope="module", params=["longrope", "early yarn"])
def two_lists(request: pytest.FixtureRequest, crossing: Twins, early_yarn: Phi3ForCausalLM) -> Twins:
    """The pair, with our model under either rope type."""
    twins = copy.copy(crossing)
    twins.model = crossing.model if request.param == "longrope" else early_yarn
    return twins


@pytest.mark.parametrize("rope_list", ["long", "short"])
def test_uses_one_list_from_the_start(
    two_lists: Twins, one_list: Callable[[str], Twins], rope_list: str
) -> None:
    new = answers(two_lists, *BATCH, COUNT, rope_list=rope_list)
    np.testing.assert_array_equal(new, alone(one_list(rope_list), *BATCH, COUNT))


def test_uses_the_list_of_the_planned_length(two_lists: Twins, one_list: Callable[[str], Twins]) -> None:
    """Each row's planned length chooses its list: rows of up to six tokens end at `ORIGINAL` or before."""
    ids, mask = prompts((5, 6, 7, 16), seed=7)
    new = answers(two_lists, ids, mask, 10, rope_list="planned")
    short, long = (alone(one_list(name), ids, mask, 10) for name in ("short", "long"))
    assert (short != long).any(axis=1).all()
    np.testing.assert_array_equal(new, np.concatenate([short[:2], long[2:]]))


@pytest.mark.parametrize("rope_list", ["long", "short", "planned"])
@pytest.mark.slow
def test_lists_in_other_modes(crossing: Twins, one_list: Callable[[str], Twins], rope_list: str) -> None:
    reference = one_list("short" if rope_list == "short" else "long")
    expected = alone(reference, *BATCH, COUNT)
    modes: list[dict[str, Any]] = [
        {"prompt_lookup_num_tokens": 10},
        {"assistant_model": crossing.model, "assistant_confidence_threshold": 0.0},
    ]
    for options in modes:
        new = answers(crossing, *BATCH, COUNT, rope_list=rope_list, **options)
        np.testing.assert_array_equal(new, expected)
    ids, mask = prompts((12,), seed=2)
    beams = {"max_new_tokens": 20, "num_beams": 3}
    ours = crossing.ours(ids, mask, rope_list=rope_list, **beams)
    np.testing.assert_array_equal(ours, reference.theirs(ids, mask, **beams))


@pytest.mark.slow
def test_real_factors_at_4096(tmp_path: Path, shared_data: Callable[..., Path]) -> None:
    """Uses the lists of Phi-3.5 mini in a small model with its head dim and lengths."""
    file = shared_data("phi3-longrope", "longrope_factors.json")
    factors = json.loads(file.read_text(encoding="utf-8"))["Phi-3.5-mini-instruct"]
    config = small_config(
        num_hidden_layers=2,
        hidden_size=192,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.08,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_scaling={
            "type": "longrope",
            "short_factor": factors["short_factor"],
            "long_factor": factors["long_factor"],
        },
    )
    assert config.head_dim == factors["head_dim"]
    twins = Twins(config, tmp_path, seed=1)
    ids, mask = prompts((4080, 4095, 4060), seed=8)
    expected = alone(twins, ids, mask, 50)
    assert_varied(expected)
    np.testing.assert_array_equal(answers(twins, ids, mask, 50), expected)
