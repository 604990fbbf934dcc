"""Tests every logits processor as a setting of generate, alone and combined, against transformers."""

from typing import Any

import numpy as np
import pytest
from marks import slow
from twins import PAD, Twins, prompts

LENGTHS = (20, 13, 5)
RECORDED = {"return_dict_in_generate": True, "output_scores": True}


@pytest.fixture(scope="module")
def free(shallow: Twins) -> np.ndarray:
    """30 new tokens of each row without any rule."""
    return shallow.theirs(*prompts(LENGTHS), max_new_tokens=30)[:, 20:]


def ends_of(free: np.ndarray) -> list[int]:
    """Returns two end tokens: one that the last row generates, and one that never occurs."""
    return [int(free[2, 7]), next(token for token in range(4, 96) if token not in free)]


def rules(free: np.ndarray) -> dict[str, dict[str, Any]]:
    """Returns settings that each change these answers.

    The reference counts n-grams of a prompt's padding too, so no padding token may be generated.
    """
    row, other, third = free.tolist()
    bias = {(row[2],): -3.0, (row[5], row[6]): -9.0, (other[1], other[2], other[3]): -20.0, (50,): 2.5}
    return {
        "repetition_penalty": {"repetition_penalty": 1.4},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 2, "suppress_tokens": [PAD]},
        "bad_words_ids": {"bad_words_ids": [[row[1]], [other[2], other[3]], [third[3], third[4], third[5]]]},
        "sequence_bias": {"sequence_bias": bias},
        "suppress_tokens": {"suppress_tokens": [row[3], other[0], PAD]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [row[0], third[0]]},
        "forced_eos_token_id": {"forced_eos_token_id": [17]},
        "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (5, 1.4)},
        "min_new_tokens": {"min_new_tokens": 9},
    }


NAMES = list(rules(np.arange(90).reshape(3, 30)))


def check_scores(ours: Any, theirs: Any, rows: Any = slice(None)) -> None:
    """Checks that the forbidden tokens and the other tokens' scores are the same."""
    ours, theirs = np.asarray(ours)[rows], theirs[rows]
    np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_processor(shallow: Twins, free: np.ndarray, name: str) -> None:
    options: dict[str, Any] = {"max_new_tokens": 30, "eos_token_id": ends_of(free)}
    changed = shallow.same(*prompts(LENGTHS), **options, **rules(free)[name])
    before = shallow.theirs(*prompts(LENGTHS), **options)
    assert changed.shape != before.shape or (changed != before).any()


def test_biases_as_a_list(shallow: Twins, free: np.ndarray) -> None:
    bias = [[list(tokens), value] for tokens, value in rules(free)["sequence_bias"]["sequence_bias"].items()]
    ends = ends_of(free)
    shallow.same(*prompts(LENGTHS), max_new_tokens=30, eos_token_id=ends, sequence_bias=bias)


def test_forced_first_token(shallow: Twins) -> None:
    """Transformers forces a sequence's second token, so only the one after a prompt of one token."""
    ids, mask = prompts((1, 1, 1))
    options = {"max_new_tokens": 6, "forced_bos_token_id": 44}
    answer = shallow.same(ids, mask, **options, begin_suppress_tokens=[int(ids[0, 0]), 44])
    assert (answer[:, 1] == 44).all()
    assert (shallow.same(*prompts(LENGTHS), **options)[:, 20] != 44).any()


@pytest.mark.parametrize("seed", [slow(0), 1, 2, slow(3)])
def test_processors_together(shallow: Twins, free: np.ndarray, seed: int) -> None:
    """Processors apply in transformers' order, and its recorded scores are equal."""
    rng = np.random.default_rng(seed)
    options: dict[str, Any] = {"max_new_tokens": 30, "eos_token_id": ends_of(free)}
    for name in rng.choice(NAMES, 5, replace=False):
        options |= rules(free)[name]
    # Forbidden tokens with finite scores overflow in the reference if a later rule multiplies or sums.
    finite = seed % 2 and "exponential_decay_length_penalty" not in options
    options |= {"remove_invalid_values" if finite else "renormalize_logits": True} | RECORDED
    ours, theirs = shallow.ours(*prompts(LENGTHS), **options), shallow.theirs(*prompts(LENGTHS), **options)
    np.testing.assert_array_equal(ours.sequences, theirs.sequences)
    assert len(ours.scores) == len(theirs.scores)
    live = np.ones(3, bool)
    for step, (own, other) in enumerate(zip(ours.scores, theirs.scores, strict=True)):
        check_scores(own, other, live)
        live &= ~np.isin(theirs.sequences[:, 20 + step], options["eos_token_id"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6, "top_k": 0},
        {"top_k": 7},
        {"top_k": 0, "top_p": 0.7},
        {"top_k": 0, "min_p": 0.1},
        {"top_k": 0, "typical_p": 0.6},
        {"top_k": 0, "epsilon_cutoff": 0.02},
        {"top_k": 0, "eta_cutoff": 0.05},
        {"temperature": 1.7, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.9},
        {"temperature": 0.8, "top_p": 0.95, "eta_cutoff": 0.01, "epsilon_cutoff": 0.01},
        {"temperature": 1.2, "top_k": 9, "repetition_penalty": 1.3, "renormalize_logits": True},
    ],
)
def test_distributions_match_transformers(shallow: Twins, options: dict[str, Any]) -> None:
    options = options | RECORDED | {"do_sample": True, "max_new_tokens": 1}
    ids, mask = prompts(LENGTHS)
    (ours,), (theirs,) = (
        shallow.ours(ids, mask, **options).scores,
        shallow.theirs(ids, mask, **options).scores,
    )
    check_scores(ours, theirs)
    if set(options) & {"top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}:
        count = np.isfinite(theirs).sum(axis=1)
        assert (count < 80).all()
        assert (count > 1).any()


def test_other_values_take_effect(shallow: Twins) -> None:
    """Settings are data, so other values take effect in the same programs."""
    for temperature, k, p in ((0.5, 3, 0.6), (2.0, 40, 0.99)):
        options = {"do_sample": True, "max_new_tokens": 1, "temperature": temperature, "top_k": k, "top_p": p}
        ids, mask = prompts(LENGTHS)
        (ours,) = shallow.ours(ids, mask, **options, **RECORDED).scores
        (theirs,) = shallow.theirs(ids, mask, **options, **RECORDED).scores
        check_scores(ours, theirs)
