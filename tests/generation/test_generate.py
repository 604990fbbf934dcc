"""Tests greedy search and sampling of whole batches against transformers' generate."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from answers import stored
from twins import PAD, Twins, ask, prompts, softmax

from phi3_jax.config.generation_config import GenerationConfig

LENGTHS = (20, 13, 5)


@pytest.fixture(scope="module")
def free(shallow: Twins) -> np.ndarray:
    """40 new tokens after the usual prompts, without end tokens."""
    return shallow.theirs(*prompts(LENGTHS), max_new_tokens=40)[:, max(LENGTHS) :]


@pytest.mark.optimized
def test_greedy_tokens(twins: Twins) -> None:
    answer = twins.same(*prompts(LENGTHS), max_new_tokens=256)
    assert answer.shape == (3, 276)
    assert all(len(set(row[20:])) > 5 for row in answer), "a model that repeats itself tests nothing"


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"num_key_value_heads": 4, "tie_word_embeddings": True}, {"sliding_window": 7}]
)
def test_other_models(twins_of: Callable[..., Twins], changes: dict[str, Any]) -> None:
    twins_of(**changes).same(*prompts(LENGTHS), max_new_tokens=40)


@pytest.mark.parametrize("lengths", [(1,), (16,), (17, 16), (33, 1, 2, 30, 4)])
def test_prompts_of_other_sizes(shallow: Twins, lengths: tuple[int, ...]) -> None:
    shallow.same(*prompts(lengths), max_new_tokens=12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_is_as_alone(shallow: Twins, side: str) -> None:
    ids, mask = prompts(LENGTHS, side)
    answer = shallow.ours(ids, mask, max_new_tokens=40)
    np.testing.assert_array_equal(answer[:, :20], ids)
    for row in range(3):
        alone = ids[row : row + 1, mask[row] == 1]
        expected = shallow.theirs(alone, np.ones_like(alone), max_new_tokens=40)
        np.testing.assert_array_equal(answer[row, 20:], expected[0, LENGTHS[row] :])


def test_padding_between_the_tokens_of_a_prompt(shallow: Twins) -> None:
    ids, mask = prompts((20, 20, 20))
    mask[1, [3, 4, 11]], mask[2, 17:] = 0, 0
    answer = shallow.ours(ids, mask, max_new_tokens=20)
    for row in range(3):
        alone = ids[row : row + 1, mask[row] == 1]
        expected = shallow.theirs(alone, np.ones_like(alone), max_new_tokens=20)
        np.testing.assert_array_equal(answer[row, 20:], expected[0, alone.shape[1] :])


def test_pad_token_id_marks_padding(shallow: Twins, free: np.ndarray) -> None:
    ids, mask = prompts(LENGTHS)
    np.testing.assert_array_equal(shallow.same(ids, None, max_new_tokens=40)[:, 20:], free)
    # If it is also an end token, it may be part of the prompt, so nothing counts as padding.
    as_tokens = shallow.same(ids, None, max_new_tokens=40, eos_token_id=PAD)
    assert (as_tokens[1:, 20:] != free[1:]).any(axis=1).all()
    shallow.same(ids, mask, max_new_tokens=40, eos_token_id=PAD)


def test_ids_in_the_padding_do_not_matter(shallow: Twins, free: np.ndarray) -> None:
    ids, mask = prompts(LENGTHS)
    answer = shallow.ours(np.where(mask == 1, ids, 77), mask, max_new_tokens=40)
    np.testing.assert_array_equal(answer[:, 20:], free)
    for other in (mask.astype(bool), mask.astype(np.float32), jax.numpy.asarray(mask), mask * 5):
        np.testing.assert_array_equal(shallow.ours(ids, other, max_new_tokens=40)[:, 20:], free)


def test_end_tokens(shallow: Twins, free: np.ndarray) -> None:
    unseen = next(token for token in range(4, 96) if token not in free)
    for ends in ([free[0, 4], unseen], [free[0, 9], free[1, 3]], [free[2, 0], free[0, 30]], [unseen, 0]):
        ends = [int(token) for token in ends]
        answer = shallow.same(*prompts(LENGTHS), max_new_tokens=40, eos_token_id=ends)[:, 20:]
        lengths = []
        for row, whole in zip(answer, free, strict=True):
            first = next((index for index, token in enumerate(whole) if token in ends), 39)
            np.testing.assert_array_equal(row[: first + 1], whole[: first + 1])
            assert (row[first + 1 :] == PAD).all()
            lengths.append(first + 1)
        assert answer.shape[1] == max(lengths)
        assert len(set(lengths)) > 1 or ends == [unseen, 0]
    shallow.same(*prompts(LENGTHS), max_new_tokens=40, eos_token_id=int(free[1, 7]))


def test_the_padding_is_an_end_token(shallow: Twins, free: np.ndarray) -> None:
    end = int(free[1, 7])
    answer = shallow.same(*prompts(LENGTHS), max_new_tokens=40, eos_token_id=end, pad_token_id=end)
    assert (answer[1, 27:] == end).all()


def test_every_row_ends_at_once(shallow: Twins, free: np.ndarray) -> None:
    answer = shallow.same(*prompts(LENGTHS), max_new_tokens=40, eos_token_id=sorted(set(free[:, 0].tolist())))
    assert answer.shape == (3, 21)


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 33},
        {"max_length": 21},
        {"max_new_tokens": 1},
        {"max_length": 60, "min_length": 31},
        {"max_new_tokens": 40, "min_new_tokens": 11},
        {"max_new_tokens": 40, "min_length": 36},
        {"max_length": 60, "min_new_tokens": 40},
        {"max_new_tokens": 30, "min_length": 7},
    ],
)
def test_lengths(shallow: Twins, free: np.ndarray, options: dict[str, int]) -> None:
    ends = [int(free[0, 3]), int(free[1, 6])]
    expected = shallow.same(*prompts(LENGTHS), **options, eos_token_id=ends)
    assert expected.shape[1] - 20 >= max(options.get("min_length", 0) - 20, options.get("min_new_tokens", 0))
    if not any(name.startswith("min") for name in options):
        shallow.same(*prompts(LENGTHS), **options)


@stored(whole=True)
def without_a_length(reference: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns the reference's answer without any length, of which it warns."""
    with pytest.warns(UserWarning, match="model-agnostic default"):
        return ask(reference, ids, mask)


def test_default_length(shallow: Twins) -> None:
    ids, mask = prompts(LENGTHS)
    answer = shallow.ours(ids, mask)
    np.testing.assert_array_equal(answer, without_a_length(shallow.reference, ids, mask))
    assert answer.shape == (3, 40)


def test_the_context_ends_the_answer(twins_of: Callable[..., Twins]) -> None:
    small = twins_of(num_hidden_layers=1, max_position_embeddings=64, original_max_position_embeddings=64)
    ids, mask = prompts((50, 31))
    with pytest.warns(UserWarning, match="at most 14 are generated"):
        answer = small.ours(ids, mask, max_new_tokens=1000)
    np.testing.assert_array_equal(answer, small.theirs(ids, mask, max_new_tokens=14))


def test_generation_configs(shallow: Twins, free: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = prompts(LENGTHS)

    def ours(**options: Any) -> np.ndarray:
        return np.asarray(shallow.model.generate(ids, mask, **options))[:, 20:]

    config = GenerationConfig(max_new_tokens=9, eos_token_id=[], pad_token_id=PAD)
    np.testing.assert_array_equal(ours(generation_config=config), free[:, :9])
    np.testing.assert_array_equal(ours(generation_config=config, max_new_tokens=4), free[:, :4])
    np.testing.assert_array_equal(ours(generation_config=config, max_length=25), free[:, :5])
    np.testing.assert_array_equal(np.asarray(shallow.model.generate(ids, mask, config))[:, 20:], free[:, :9])
    ended = ours(generation_config=config, eos_token_id=int(free[0, 2]))
    assert (ended[0] == [*free[0, :3], *[PAD] * 6]).all()

    # The model's own config, and calls that override its end token.
    own = shallow.model.generation_config
    assert own.eos_token_id == 2
    try:
        shallow.model.generation_config = own.replace(eos_token_id=int(free[0, 2]), max_new_tokens=9)
        np.testing.assert_array_equal(ours(), ended)
        np.testing.assert_array_equal(
            ours(generation_config=GenerationConfig(max_new_tokens=5)), ended[:, :5]
        )
        np.testing.assert_array_equal(ours(eos_token_id=[]), free[:, :9])
        np.testing.assert_array_equal(ours(generation_config=config.replace(max_new_tokens=7)), free[:, :7])
    finally:
        shallow.model.generation_config = own


# --- sampling ------------------------------------------------------------------------------------------


def too_far(counts: np.ndarray, p: np.ndarray) -> bool:
    """Returns whether counts are not drawn from `p`: a chi-square test at 0.05%, rare outcomes combined."""
    expected = p * counts.sum()
    rare = expected < 5
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        counts = np.append(counts[~rare], counts[rare].sum())
        counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    spread = 2 / (9 * freedom)
    quantile = freedom * (1 - spread + 3.29 * np.sqrt(spread)) ** 3  # by Wilson and Hilferty
    return bool(((counts - expected) ** 2 / expected).sum() > quantile)


@pytest.mark.slow
def test_draws_follow_the_distribution(shallow: Twins) -> None:
    """Checks the first token, and the second one after the most frequent first one."""
    ids, mask = prompts((11,))
    options = {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.95, "max_new_tokens": 2}
    drawn = np.concatenate(
        [shallow.ours(ids, mask, **options, num_return_sequences=2500, seed=seed) for seed in range(8)]
    )
    assert drawn.shape == (20_000, 13)
    (first, _), *_ = Counter(drawn[:, 11].tolist()).most_common(1)
    recorded = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 1}
    for new in ([], [first]):
        before = np.concatenate([ids, [new]], axis=1).astype(np.int64)
        (scores,) = shallow.theirs(before, np.ones_like(before), **options | recorded).scores
        p = softmax(scores[0])
        follows = (drawn[:, 11 : 11 + len(new)] == new).all(axis=1)
        counts = np.bincount(drawn[follows, 11 + len(new)], minlength=96)
        assert counts[p == 0].sum() == 0
        assert (p > 0).sum() > 8, "a distribution of a few tokens tests nothing"
        assert not too_far(counts, p)
        assert too_far(counts, np.roll(p, 1) * 0.5 + p * 0.5)


def test_draws_of_equal_prompts_and_of_steps_are_independent(shallow: Twins) -> None:
    ids, mask = prompts((11,))
    rows = np.repeat(ids, 40, axis=0), np.repeat(mask, 40, axis=0)
    drawn = shallow.ours(*rows, do_sample=True, top_k=0, temperature=100.0, max_new_tokens=20, seed=1)[:, 11:]
    for pairs in (drawn[:-1] == drawn[1:], drawn[:, :-1] == drawn[:, 1:]):
        assert 0.3 / 96 < pairs.mean() < 3 / 96


def test_seeds(shallow: Twins) -> None:
    def answer(rows: int = 3, **options: Any) -> np.ndarray:
        ids, mask = prompts((20, 13, 5, 9, 18))
        return shallow.ours(ids[:rows], mask[:rows], do_sample=True, max_new_tokens=20, **options)

    first = answer(seed=5)
    np.testing.assert_array_equal(answer(seed=5), first)
    assert (answer(seed=6)[:, 20:] != first[:, 20:]).any(axis=1).all()
    assert (answer()[:, 20:] != answer()[:, 20:]).any(axis=1).all(), (
        "without a seed each call draws other tokens"
    )
    np.testing.assert_array_equal(answer(rows=5, seed=5)[:3], first, "other rows do not change a row's draw")


@pytest.mark.slow
def test_sampling_that_leaves_one_token_is_greedy(shallow: Twins, free: np.ndarray) -> None:
    for options in ({"top_k": 1}, {"top_p": 1e-6, "top_k": 0}, {"temperature": 1e-4}):
        answer = shallow.ours(*prompts(LENGTHS), do_sample=True, max_new_tokens=40, seed=7, **options)
        np.testing.assert_array_equal(answer[:, 20:], free)


@pytest.mark.slow
def test_several_answers_to_each_prompt(shallow: Twins) -> None:
    ids, mask = prompts(LENGTHS)
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 15, "num_return_sequences": 4, "seed": 3}
    answer = shallow.ours(ids, mask, **options)
    np.testing.assert_array_equal(answer[:, :20], np.repeat(ids, 4, axis=0))
    assert len({tuple(row) for row in answer.tolist()}) == 12
    end = int(answer[5, 22])
    ended = shallow.ours(ids, mask, **options, eos_token_id=end)
    for row, whole in zip(ended[:, 20:], answer[:, 20:], strict=True):
        length = whole.tolist().index(end) + 1 if end in whole else 15
        np.testing.assert_array_equal(row[:length], whole[:length])
        assert (row[length:] == PAD).all()


# --- compilation ---------------------------------------------------------------------------------------


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """A list that gets an entry for each program that XLA compiles."""
    events: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
def test_few_programs_for_many_prompts(twins_of: Callable[..., Twins], compilations: list[str]) -> None:
    """After one call for each of 2 * 3 sizes, 300 batches of other shapes compile nothing more."""
    model = twins_of(num_hidden_layers=1, vocab_size=97).model
    rng = np.random.default_rng(0)

    def answer(lengths: list[int], new: int) -> None:
        ids, mask = prompts(lengths)
        model.generate(ids, mask, max_new_tokens=new, eos_token_id=[])

    for rows in (1, 2):
        for length in (16, 32, 64):
            answer([length] * rows, 24)
    assert 0 < len(compilations) < 100
    compilations.clear()
    shapes = set()
    for _ in range(300):
        lengths = rng.integers(1, rng.integers(2, 64), rng.integers(1, 3)).tolist()
        shapes.add((len(lengths), max(lengths)))
        answer(lengths, int(rng.integers(1, 25)))
    assert len(shapes) > 80
    assert len(compilations) == 0
