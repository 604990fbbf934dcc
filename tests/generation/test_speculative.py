"""Tests that drafts, from an assistant or earlier text, change neither greedy text nor the distribution."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from answers import stored
from marks import slow
from reference import distance, small_config
from rows import alone, answers, assert_varied
from twins import CONTEXT, Twins, prompts, softmax

from phi3_jax import Phi3ForCausalLM

COUNT = 61
BATCH = prompts((5, 20, 11), seed=11)
PROCESSORS: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 3,
    "bad_words_ids": [[50], [7, 9], [21, 22]],
    "min_new_tokens": 25,
}


@pytest.fixture(scope="module")
def pair_of(twins_of: Callable[..., Twins]) -> Twins:
    return twins_of()


@pytest.fixture(scope="module")
def windowed(twins_of: Callable[..., Twins]) -> Twins:
    return twins_of(sliding_window=7)


@pytest.fixture(scope="module")
def expected(pair_of: Twins) -> np.ndarray:
    new = alone(pair_of, *BATCH, COUNT)
    assert_varied(new)
    return new


@pytest.fixture(scope="module")
def assistant() -> Phi3ForCausalLM:
    """A model of one layer with other weights."""
    return Phi3ForCausalLM(small_config(num_hidden_layers=1, **CONTEXT), rngs=5)


def drafts(twins: Twins, assistant: Phi3ForCausalLM, name: str) -> dict[str, Any]:
    """Returns options that draft with another model, with the model itself, or from earlier text."""
    return {
        "assistant": {"assistant_model": assistant, "num_assistant_tokens": 5},
        "itself": {
            "assistant_model": twins.model,
            "num_assistant_tokens": 5,
            "assistant_confidence_threshold": 0.0,
        },
        "lookup": {"prompt_lookup_num_tokens": 3},
    }[name]


@pytest.mark.parametrize(
    ("tokens", "ngram"),
    [
        (1, 1),
        (10, 3),
        *(slow(tokens, ngram) for tokens in (1, 3, 10) for ngram in (1, 2, 3) if tokens == 3 or ngram == 2),
    ],
)
def test_prompt_lookup(pair_of: Twins, expected: np.ndarray, tokens: int, ngram: int) -> None:
    new = answers(pair_of, *BATCH, COUNT, prompt_lookup_num_tokens=tokens, max_matching_ngram_size=ngram)
    np.testing.assert_array_equal(new, expected)


@pytest.mark.parametrize("tokens", [slow(1), 5, slow(20)])
def test_an_assistant(pair_of: Twins, assistant: Phi3ForCausalLM, expected: np.ndarray, tokens: int) -> None:
    for confidence in (0.0, 0.4, 1.0):
        new = answers(
            pair_of,
            *BATCH,
            COUNT,
            assistant_model=assistant,
            num_assistant_tokens=tokens,
            assistant_confidence_threshold=confidence,
        )
        np.testing.assert_array_equal(new, expected)


@pytest.mark.parametrize("tokens", [slow(1), slow(5), 20])
def test_a_model_that_assists_itself(pair_of: Twins, expected: np.ndarray, tokens: int) -> None:
    for confidence in (0.0, 0.4):
        new = answers(
            pair_of,
            *BATCH,
            COUNT,
            assistant_model=pair_of.model,
            num_assistant_tokens=tokens,
            assistant_confidence_threshold=confidence,
        )
        np.testing.assert_array_equal(new, expected)


@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_any_number_of_tokens(
    pair_of: Twins, assistant: Phi3ForCausalLM, expected: np.ndarray, count: int
) -> None:
    """The limit of tokens cuts drafts short."""
    options = drafts(pair_of, assistant, "assistant") | {"assistant_confidence_threshold": 0.0}
    np.testing.assert_array_equal(answers(pair_of, *BATCH, count, **options), expected[:, :count])


def ends_of(new: np.ndarray) -> list[int]:
    """Returns two tokens that end the rows at different positions."""
    return [int(new[0, 8]), int(new[1, 23])]


@pytest.mark.parametrize("name", ["lookup", slow("itself"), slow("assistant")])
def test_end_tokens(pair_of: Twins, assistant: Phi3ForCausalLM, expected: np.ndarray, name: str) -> None:
    ends = ends_of(expected)
    plain = pair_of.theirs(*BATCH, max_new_tokens=COUNT, eos_token_id=ends)
    lengths = [1 + int(np.argmax(np.isin(row, ends))) for row in expected if np.isin(row, ends).any()]
    assert len(set(lengths)) > 1, "rows should end at different times"
    options = drafts(pair_of, assistant, name)
    ours = pair_of.ours(*BATCH, max_new_tokens=COUNT, eos_token_id=ends, **options)
    np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize("name", ["assistant", slow("lookup"), slow("itself")])
@pytest.mark.parametrize("only", [None, *(slow(processor) for processor in PROCESSORS)])
def test_logits_processors(
    pair_of: Twins, assistant: Phi3ForCausalLM, expected: np.ndarray, name: str, only: str | None
) -> None:
    """Processors see the text up to each drafted token."""
    chosen = PROCESSORS if only is None else {only: PROCESSORS[only]}
    options = chosen | {"max_new_tokens": COUNT, "eos_token_id": ends_of(expected)}
    theirs = pair_of.theirs(*BATCH, **options)
    assert only is not None or not np.array_equal(theirs[:, BATCH[0].shape[1] :], expected)
    np.testing.assert_array_equal(pair_of.ours(*BATCH, **options | drafts(pair_of, assistant, name)), theirs)


@pytest.mark.parametrize("name", ["lookup", slow("itself"), slow("assistant")])
def test_sliding_windows(windowed: Twins, assistant: Phi3ForCausalLM, name: str) -> None:
    expected = alone(windowed, *BATCH, COUNT)
    assert_varied(expected)
    options = drafts(windowed, assistant, name)
    np.testing.assert_array_equal(answers(windowed, *BATCH, COUNT, **options), expected)


@pytest.mark.parametrize("name", ["lookup", slow("assistant"), slow("itself")])
def test_recorded_scores(pair_of: Twins, assistant: Phi3ForCausalLM, name: str) -> None:
    """Outputs have an entry for each token, as without drafts."""
    options = {
        "max_new_tokens": COUNT,
        "repetition_penalty": 1.3,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    plain = pair_of.ours(*BATCH, **options)
    drafted = pair_of.ours(*BATCH, **options | drafts(pair_of, assistant, name))
    np.testing.assert_array_equal(drafted.sequences, plain.sequences)
    for kind in ("scores", "logits"):
        ours, one_by_one = getattr(drafted, kind), getattr(plain, kind)
        assert len(ours) == len(one_by_one) == COUNT
        assert distance(np.stack(ours), np.stack(one_by_one)) <= 1e-5
    assert distance(np.stack(plain.scores), np.stack(plain.logits)) > 1e-2


@pytest.mark.slow
def test_rows_that_ended_keep_their_own_logits(
    pair_of: Twins, assistant: Phi3ForCausalLM, expected: np.ndarray
) -> None:
    """Up to each row's end its logits are those without drafts, however long the others' drafts are."""
    options = {
        "max_new_tokens": COUNT,
        "eos_token_id": ends_of(expected),
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    plain = pair_of.ours(*BATCH, **options)
    drafted = pair_of.ours(*BATCH, **options | drafts(pair_of, assistant, "lookup"))
    assert len(plain.logits) == len(drafted.logits)
    ours, one_by_one = np.stack(drafted.logits, axis=1), np.stack(plain.logits, axis=1)
    for row, new in enumerate(expected):
        ends = np.flatnonzero(np.isin(new, options["eos_token_id"]))
        length = ends[0] + 1 if ends.size else len(new)
        assert distance(ours[row, :length], one_by_one[row, :length]) <= 1e-5


# --- draws --------------------------------------------------------------------------------------------------

VOCABULARY = 12
DRAWS = 20_000
PROMPT = np.array([[5, 9, 4, 11, 5, 9]])


@pytest.fixture(scope="module")
def few_tokens(twins_of: Callable[..., Twins]) -> Twins:
    """A pair whose vocabulary is so small that every text of a few tokens is drawn often."""
    return twins_of(num_hidden_layers=1, vocab_size=VOCABULARY, initializer_range=0.1)


@pytest.fixture(scope="module")
def other_opinion() -> Phi3ForCausalLM:
    """An assistant for that vocabulary whose drafts are often rejected."""
    changes = {"vocab_size": VOCABULARY, "num_hidden_layers": 1, "initializer_range": 0.1}
    return Phi3ForCausalLM(small_config(**CONTEXT | changes), rngs=9)


@stored(whole=True)
def probabilities(reference: Any, length: int, top_k: int) -> np.ndarray:
    """Returns each text's probability after `PROMPT`, for all texts of `itertools.product` in its order."""
    import torch

    texts = np.array(list(itertools.product(range(VOCABULARY), repeat=length)))
    with torch.no_grad():
        ids = torch.tensor(np.concatenate([np.repeat(PROMPT, len(texts), axis=0), texts], axis=1))
        logits = reference.model(ids, use_cache=False).logits[:, PROMPT.shape[1] - 1 : -1].numpy()
    least = np.sort(logits, axis=-1)[..., -top_k, None]
    likely = softmax(np.where(logits < least, -np.inf, logits))
    return np.take_along_axis(likely, texts[..., None], axis=-1)[..., 0].prod(axis=1)


def assert_drawn_from(counts: np.ndarray, likely: np.ndarray) -> None:
    """Does Pearson's test at a level of 1e-5; cells with fewer than eight expected draws are combined.

    The quantile is Wilson and Hilferty's approximation.
    """
    assert counts[likely == 0].sum() == 0
    expected = likely * counts.sum()
    rare = expected < 8
    expected, counts = (np.append(x[~rare], x[rare].sum()) for x in (expected, counts))
    expected, counts = expected[expected > 0], counts[expected > 0]
    freedom = len(expected) - 1
    assert freedom > 20
    limit = freedom * (1 - 2 / (9 * freedom) + 4.265 * np.sqrt(2 / (9 * freedom))) ** 3
    assert ((counts - expected) ** 2 / expected).sum() <= limit


def draw_counts(twins: Twins, length: int, **options: Any) -> np.ndarray:
    """Counts how often each text of `length` tokens is drawn, in the order of `probabilities`."""
    rows, counts = 2_000, np.zeros(VOCABULARY**length)
    for seed in range(DRAWS // rows):
        texts = answers(
            twins,
            PROMPT,
            np.ones_like(PROMPT),
            length,
            do_sample=True,
            num_return_sequences=rows,
            seed=seed,
            **options,
        )
        np.add.at(counts, np.ravel_multi_index(texts.T, (VOCABULARY,) * length), 1)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("top_k", "confidence"), [(VOCABULARY, 0.0), slow(VOCABULARY, 0.15), slow(4, 0.0), slow(4, 0.4)]
)
def test_an_assistant_keeps_the_distribution(
    few_tokens: Twins, other_opinion: Phi3ForCausalLM, top_k: int, confidence: float
) -> None:
    """The first token comes without a draft, the others from drafts or, if rejected, the model."""
    counts = draw_counts(
        few_tokens,
        4 if top_k < VOCABULARY else 3,
        assistant_model=other_opinion,
        num_assistant_tokens=3,
        assistant_confidence_threshold=confidence,
        top_k=top_k,
    )
    length = 4 if top_k < VOCABULARY else 3
    assert_drawn_from(counts, probabilities(few_tokens.reference, length, top_k))


def test_the_test_detects_another_distribution(few_tokens: Twins) -> None:
    """`assert_drawn_from` passes right draws and fails draws from a distribution a little off."""
    likely = probabilities(few_tokens.reference, 3, VOCABULARY)
    np.testing.assert_allclose(likely.sum(), 1.0, rtol=1e-6)
    rng = np.random.default_rng(0)
    assert_drawn_from(rng.multinomial(DRAWS, likely / likely.sum()), likely)
    tilted = likely * rng.uniform(0.8, 1.2, likely.shape)
    with pytest.raises(AssertionError):
        assert_drawn_from(rng.multinomial(DRAWS, tilted / tilted.sum()), likely)


def test_prompt_lookup_draws_the_same_text(pair_of: Twins) -> None:
    for seed in (0, 1):
        options = {"do_sample": True, "temperature": 0.3, "seed": seed}
        plain = answers(pair_of, *BATCH, COUNT, **options)
        np.testing.assert_array_equal(
            answers(pair_of, *BATCH, COUNT, prompt_lookup_num_tokens=3, **options), plain
        )


@pytest.mark.slow
def test_prompt_lookup_keeps_the_distribution(few_tokens: Twins) -> None:
    counts = draw_counts(
        few_tokens, 3, prompt_lookup_num_tokens=2, max_matching_ngram_size=1, top_k=VOCABULARY
    )
    assert_drawn_from(counts, probabilities(few_tokens.reference, 3, VOCABULARY))
