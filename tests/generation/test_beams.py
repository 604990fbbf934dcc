"""Tests beam search, beam sampling and guidance against transformers' generate."""

import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from answers import stored
from marks import slow
from twins import PAD, Twins, ask, beside, named, prompts, softmax

LENGTHS = (20, 13, 5)
RECORDED = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@pytest.fixture(scope="module")
def ends(twins: Twins) -> list[int]:
    """Two tokens that beams of some rows reach soon."""
    answer = twins.theirs(*prompts(LENGTHS), max_new_tokens=16, num_beams=3)
    return [int(answer[0, 25]), int(answer[1, 29])]


@stored
def search(reference: Any, ids: np.ndarray, mask: np.ndarray, **options: Any) -> dict[str, Any]:
    """Returns the reference's beam search with the records of all steps stacked: [steps, rows, tokens]."""
    out = ask(reference, ids, mask, **options)
    return out | {name: np.stack(out[name]) for name in ("scores", "logits")}


def same(twins: Twins, **options: Any) -> SimpleNamespace:
    """Checks that our output equals the reference's, and returns it."""
    ids, mask = prompts(LENGTHS)
    ours = twins.ours(ids, mask, **RECORDED, **options)
    theirs = SimpleNamespace(**search(twins.reference, ids, mask, **RECORDED, **options))
    np.testing.assert_array_equal(ours.sequences, theirs.sequences)
    np.testing.assert_allclose(ours.sequences_scores, theirs.sequences_scores, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(ours.beam_indices, theirs.beam_indices)
    # A step's scores mean something only in rows whose answer is longer than the step.
    beams = options["num_beams"]
    lengths = (theirs.beam_indices >= 0).sum(axis=1).reshape(3, -1).max(axis=1)
    for name in ("scores", "logits"):
        own = np.stack(getattr(ours, name))
        steps = np.arange(len(own))[:, None, None]
        other, own, live = beside(getattr(theirs, name), own, np.repeat(lengths, beams)[:, None] > steps)
        other, own = other[live], own[live]
        finite = np.isfinite(other)
        np.testing.assert_array_equal(np.isfinite(own), finite)
        np.testing.assert_allclose(own[finite], other[finite], rtol=1e-3, atol=1e-4)
    return theirs


@pytest.mark.parametrize("beams", [slow(2), slow(3), 4])
def test_beams(twins: Twins, beams: int) -> None:
    out = same(twins, num_beams=beams, max_new_tokens=16, num_return_sequences=beams)
    assert (out.beam_indices % beams > 0).any()
    ids, mask = prompts(LENGTHS)
    greedy = twins.theirs(ids, mask, max_new_tokens=16)
    assert (out.sequences[::beams] != greedy).any(), "beams that find the greedy answer test nothing"


FAST = [("never", 0.0)]
"""The `early_stopping` and length penalty that are not left to the slow run."""


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty"),
    [
        case if case in FAST else slow(*case)
        for case in itertools.product((False, True, "never"), (1.0, 0.0, 2.5, -1.5))
    ],
)
def test_end_tokens(twins: Twins, ends: list[int], early_stopping: Any, length_penalty: float) -> None:
    options = {"early_stopping": early_stopping, "length_penalty": length_penalty, "eos_token_id": ends}
    out = same(twins, num_beams=3, max_new_tokens=40, num_return_sequences=2, **options)
    assert length_penalty > 1 or np.isin(out.sequences[:, 20:], ends).any()


@pytest.mark.slow
def test_returns_ids_only(twins: Twins, ends: list[int]) -> None:
    answer = twins.same(*prompts(LENGTHS), num_beams=3, max_new_tokens=40, eos_token_id=ends)
    assert answer.shape[0] == 3


@pytest.mark.slow
def test_beams_continue_where_the_best_ones_end(shallow: Twins, ends: list[int]) -> None:
    """End tokens are the most likely after every beam, so continuing candidates rank far below."""
    options: dict[str, Any] = {"eos_token_id": ends, "renormalize_logits": True, "early_stopping": "never"}
    options["sequence_bias"] = {(end,): 12.0 for end in ends}
    out = same(shallow, num_beams=3, max_new_tokens=20, num_return_sequences=3, **options)
    assert len(out.scores) > 3


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [LENGTHS, (20, 13)])
def test_early_stopping_stops(shallow: Twins, ends: list[int], lengths: tuple[int, ...]) -> None:
    """The search stops as soon as every row has its finished beams, for any batch size."""
    ids, mask = prompts(lengths)
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 40, "early_stopping": True} | RECORDED
    options |= {"eos_token_id": ends, "sequence_bias": {(end,): 2.0 for end in ends}, "length_penalty": 2.0}
    ours, theirs = shallow.ours(ids, mask, **options), shallow.theirs(ids, mask, **options)
    np.testing.assert_array_equal(ours.sequences, theirs.sequences)
    assert len(theirs.scores) < 40
    assert len(ours.scores) == len(theirs.scores)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(7,), (12, 9), (20, 13, 5, 8)])
def test_other_batches(twins: Twins, ends: list[int], lengths: tuple[int, ...]) -> None:
    twins.same(*prompts(lengths), num_beams=3, max_new_tokens=40, early_stopping=True, eos_token_id=ends)


@pytest.mark.parametrize(
    "options",
    [
        slow({"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 12}),
        {"repetition_penalty": 0.8, "renormalize_logits": True},
    ],
)
def test_processors(shallow: Twins, ends: list[int], options: dict[str, Any]) -> None:
    # The reference also counts n-grams of a prompt's padding, which matter after a padding token.
    options = options | {"suppress_tokens": [PAD], "eos_token_id": ends}
    same(shallow, num_beams=3, max_new_tokens=24, num_return_sequences=3, **options)


@pytest.mark.slow
def test_beams_with_allowed_tokens(shallow: Twins, ends: list[int]) -> None:
    def allowed(row: int, ids: Any) -> list[int]:
        return [token for token in range(4, 96) if (token + int(ids[-1]) + row) % 3] + ends

    options = {"num_beams": 3, "max_new_tokens": 12, "eos_token_id": ends, "num_return_sequences": 2}
    same(shallow, **options, prefix_allowed_tokens_fn=named(allowed, ends))


@pytest.mark.slow
def test_beams_with_a_stopping_criterion(shallow: Twins, ends: list[int]) -> None:
    seen: list[int] = []

    def rule(ids: np.ndarray, scores: Any, **_: Any) -> np.ndarray:
        seen.append(ids.shape[1])
        return (ids[:, -1] % 11 == 0) | (ids.shape[1] >= 29)

    options = {"num_beams": 3, "max_new_tokens": 30, "eos_token_id": ends, "num_return_sequences": 3}
    for lengths in (LENGTHS, (20, 13)):
        ids, mask = prompts(lengths)
        expected = shallow.theirs(ids, mask, **options, stopping_criteria=[rule])
        widths = seen.copy()
        seen.clear()
        np.testing.assert_array_equal(shallow.ours(ids, mask, **options, stopping_criteria=[rule]), expected)
        assert expected.shape[1] <= 29
        assert seen == widths, "as many steps as the reference"
        seen.clear()


@pytest.mark.slow
def test_continues_from_the_best_beams(twins: Twins, ends: list[int]) -> None:
    ids, mask = prompts(LENGTHS)
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 40, "eos_token_id": ends}
    out = twins.ours(ids, mask, **options, return_dict_in_generate=True)
    sequences = np.asarray(out.sequences)
    is_token = np.asarray(out.beam_indices) >= 0
    more = np.concatenate([sequences, np.full((3, 1), 60)], axis=1)
    mask = np.concatenate([mask, is_token, np.ones((3, 1))], axis=1).astype(np.int64)
    answer = twins.ours(more, mask, max_new_tokens=12, past_key_values=out.past_key_values)
    np.testing.assert_array_equal(
        answer[:, more.shape[1] :], twins.ours(more, mask, max_new_tokens=12)[:, more.shape[1] :]
    )


# --- beam sampling -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_beam_sampling_draws_without_replacement(shallow: Twins) -> None:
    """Two beams of one token are two different draws in the order of their scores."""
    ids, mask = prompts((11,))
    options: dict[str, Any] = {"do_sample": True, "num_beams": 2, "num_return_sequences": 2, "top_k": 6}
    options |= {"max_new_tokens": 1, "temperature": 1.5}
    drawn = np.concatenate(
        [
            shallow.ours(np.repeat(ids, 400, axis=0), np.repeat(mask, 400, axis=0), **options, seed=seed)
            for seed in range(10)
        ]
    )[:, 11].reshape(-1, 2)
    recorded = {"return_dict_in_generate": True, "output_scores": True}
    scores = shallow.theirs(ids, mask, **options, **recorded).scores[0][0]
    p = softmax(scores)
    tokens = np.argsort(-p)[:6]
    assert p[tokens].sum() == pytest.approx(1)
    counts = Counter(map(tuple, drawn.tolist()))
    statistic, pairs = 0.0, 0
    for better, first in enumerate(tokens):
        for second in tokens[better + 1 :]:
            chance = p[first] * p[second] * (1 / (1 - p[first]) + 1 / (1 - p[second]))
            expected = chance * len(drawn)
            statistic += (counts.pop((int(first), int(second)), 0) - expected) ** 2 / expected
            pairs += 1
    assert not counts
    assert pairs == 15
    assert statistic < 36.1  # the 99.9% quantile of chi-square with 14 degrees of freedom


@pytest.mark.slow
def test_beam_sampling(shallow: Twins, ends: list[int]) -> None:
    def answer(seed: int, **options: Any) -> np.ndarray:
        options = {"do_sample": True, "num_beams": 3, "max_new_tokens": 16, "eos_token_id": ends} | options
        return shallow.ours(*prompts(LENGTHS), seed=seed, **options)

    np.testing.assert_array_equal(answer(1), answer(1))
    assert answer(1).tolist() != answer(2).tolist()
    # At this temperature candidates come in the order of their scores, as in a search.
    scores = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 12}
    cold = {"temperature": 1e-4, "top_k": 0, "eos_token_id": []} | scores
    assert answer(1, **cold).tolist() == answer(2, **cold).tolist()


# --- guidance ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.6, 0.5])
def test_guidance(twins: Twins, scale: float) -> None:
    answer = twins.same(*prompts(LENGTHS), max_new_tokens=24, guidance_scale=scale)
    assert (answer != twins.theirs(*prompts(LENGTHS), max_new_tokens=24)).any()


def test_negative_prompts(twins: Twins) -> None:
    negative, negative_mask = prompts((9, 4, 7), seed=1)
    ids, mask = prompts(LENGTHS)
    options: dict[str, Any] = {"max_new_tokens": 24, "guidance_scale": 1.6}
    expected = twins.theirs(
        ids,
        mask,
        **options,
        negative_prompt_ids=negative,
        negative_prompt_attention_mask=negative_mask,
    )
    ours = {"negative_prompt_ids": negative, "negative_prompt_attention_mask": negative_mask}
    np.testing.assert_array_equal(twins.ours(ids, mask, **options, **ours), expected)
    np.testing.assert_array_equal(twins.ours(ids, mask, **options, negative_prompt_ids=negative), expected)
    assert (expected != twins.theirs(ids, mask, **options)).any()


def test_negative_prompts_without_padding(twins: Twins) -> None:
    """One negative prompt serves all rows and is longer than the prompts."""
    negative, _ = prompts((30,), seed=1)
    ids, mask = prompts(LENGTHS)
    options: dict[str, Any] = {"max_new_tokens": 12, "guidance_scale": 1.6}
    expected = twins.theirs(ids, mask, **options, negative_prompt_ids=np.repeat(negative, 3, axis=0))
    np.testing.assert_array_equal(twins.ours(ids, mask, **options, negative_prompt_ids=negative), expected)


@pytest.mark.slow
def test_guided_rows_end_independently(twins: Twins) -> None:
    free = twins.theirs(*prompts(LENGTHS), max_new_tokens=24, guidance_scale=1.6)[:, 20:]
    ends = [int(free[0, 4]), int(free[1, 9])]
    answer = twins.same(*prompts(LENGTHS), max_new_tokens=24, guidance_scale=1.6, eos_token_id=ends)
    assert (answer[0, 25:] == PAD).all()


@pytest.mark.slow
def test_several_guided_answers(twins: Twins) -> None:
    ids, mask = prompts(LENGTHS)
    options: dict[str, Any] = {"max_new_tokens": 12, "guidance_scale": 1.6}
    sampled = options | {"do_sample": True, "num_return_sequences": 2, "seed": 1}
    greedy = twins.theirs(ids, mask, **options)
    np.testing.assert_array_equal(twins.ours(ids, mask, **sampled, top_k=1), np.repeat(greedy, 2, axis=0))
    drawn = twins.ours(ids, mask, **sampled, top_k=90)
    assert len({tuple(row) for row in drawn.tolist()}) == 6
