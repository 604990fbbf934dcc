"""Tests the outputs of `return_dict_in_generate`, and continuing from the cache in them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from answers import stored
from reference import Reference, distance
from rows import alone
from twins import PAD, Twins, ask, prompts

from phi3_jax.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from phi3_jax.generation import prompts as sizes

LENGTHS = (20, 13, 5)
NAMES = ("scores", "logits", "attentions", "hidden_states")
ALL = {"return_dict_in_generate": True, **{f"output_{name}": True for name in NAMES}}


@pytest.fixture(params=["whole", "in chunks"])
def prefill(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes prompts at once, or 8 slots at a time."""
    if request.param == "in chunks":
        monkeypatch.setattr(sizes, "PREFILL_CHUNK", 8)


def assert_same_output(ours: Any, theirs: Any, mask: np.ndarray) -> None:
    """Compares all four tuples; prompts without padding, windows without keys that the reference dropped."""
    np.testing.assert_array_equal(ours.sequences, theirs.sequences)
    rows, width = mask.shape
    for name in ("scores", "logits"):
        assert len(getattr(ours, name)) == len(getattr(theirs, name))
        for own, other in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            assert distance(own, other) < 1e-5
    for name in ("attentions", "hidden_states"):
        own_steps, other_steps = getattr(ours, name), getattr(theirs, name)
        assert len(own_steps) == len(other_steps)
        for step, (own, other) in enumerate(zip(own_steps, other_steps, strict=True)):
            assert len(own) == len(other)
            queries = mask.astype(bool) if step == 0 else np.ones((rows, 1), bool)
            for layer, expected in zip(own, other, strict=True):
                if name == "hidden_states":
                    assert distance(layer, expected, queries[:, :, None]) < 1e-5
                    continue
                keys = expected.shape[-1]
                is_query = queries[:, None, :, None]
                assert layer.shape == (rows, 4, queries.shape[1], width + step)
                assert distance(layer[..., -keys:], expected, is_query) < 1e-5
                assert not np.asarray(layer[..., :-keys]).any()
                if step == 0:
                    assert not np.asarray(layer)[np.broadcast_to(~is_query, layer.shape)].any()


def test_tuples(twins: Twins, prefill: None) -> None:
    ids, mask = prompts(LENGTHS)
    ours = twins.ours(ids, mask, max_new_tokens=6, **ALL)
    assert isinstance(ours, GenerateDecoderOnlyOutput)
    assert_same_output(ours, twins.sampled(ids, mask, max_new_tokens=6, **ALL), mask)


def test_tuples_of_a_sliding_window(twins_of: Callable[..., Twins], prefill: None) -> None:
    windowed = twins_of(sliding_window=7)
    ids, mask = prompts(LENGTHS)
    ours = windowed.ours(ids, mask, max_new_tokens=6, **ALL)
    assert_same_output(ours, windowed.sampled(ids, mask, max_new_tokens=6, **ALL), mask)


def test_tuples_of_right_padded_prompts(twins: Twins) -> None:
    """Each row's tuples are those of the reference for that row alone."""
    ids, mask = prompts(LENGTHS, "right")
    ours = twins.ours(ids, mask, max_new_tokens=4, **ALL)
    for row, length in enumerate(LENGTHS):
        tokens = ids[row : row + 1, :length]
        theirs = twins.sampled(tokens, np.ones_like(tokens), max_new_tokens=4, **ALL)
        only = slice(row, row + 1)
        assert distance(ours.hidden_states[0][2][only, :length], theirs.hidden_states[0][2]) < 1e-5
        assert distance(ours.attentions[0][1][only, :, :length, :length], theirs.attentions[0][1]) < 1e-5
        for step in range(1, 4):
            keys = [*range(length), *range(20, 20 + step)]
            own = np.asarray(ours.attentions[step][1])[only][..., keys]
            assert distance(own, theirs.attentions[step][1]) < 1e-5
            assert distance(ours.hidden_states[step][2][only], theirs.hidden_states[step][2]) < 1e-5


def test_returns_only_the_requested_tuples(twins: Twins) -> None:
    for name in ("scores", "hidden_states"):
        options = {"return_dict_in_generate": True, f"output_{name}": True, "max_new_tokens": 3}
        out = twins.ours(*prompts(LENGTHS), **options)
        assert len(getattr(out, name)) == 3
        assert all(getattr(out, other) is None for other in NAMES if other != name)
    ids = twins.ours(*prompts(LENGTHS), max_new_tokens=3)
    np.testing.assert_array_equal(out.sequences, ids)


@stored(whole=True)
def newly_recorded(reference: Reference, ids: np.ndarray, mask: np.ndarray, **options: Any) -> dict[str, Any]:
    """Returns the reference's logits, and one layer's states and attentions of all tokens after the first."""
    out = ask(reference, ids, mask, **options)
    return {
        "sequences": out["sequences"],
        "logits": out["logits"],
        "hidden_states": [layers[-1] for layers in out["hidden_states"][1:]],
        "attentions": [layers[0] for layers in out["attentions"][1:]],
    }


def test_rows_that_have_ended(twins: Twins) -> None:
    """Tuples are as long as the longest row, and right in each row up to its end."""
    ids, mask = prompts(LENGTHS)
    free = SimpleNamespace(**newly_recorded(twins.reference, ids, mask, max_new_tokens=12, **ALL))
    new = free.sequences[:, 20:]
    ends = [int(new[0, 2]), int(new[1, 6])]
    out = twins.ours(ids, mask, max_new_tokens=12, eos_token_id=ends, **ALL)
    lengths = [next((at + 1 for at, token in enumerate(row) if token in ends), 12) for row in new]
    assert len(set(lengths)) > 1
    assert [len(getattr(out, name)) for name in NAMES] == [max(lengths)] * 4
    for row, length in enumerate(lengths):
        for step in range(length):
            assert distance(out.logits[step][row], free.logits[step][row]) < 1e-5
            if step:
                assert distance(out.hidden_states[step][-1][row], free.hidden_states[step - 1][row]) < 1e-5
                assert distance(out.attentions[step][0][row], free.attentions[step - 1][row]) < 1e-5


def test_tuples_of_prompt_lookup(twins: Twins) -> None:
    """The tuples are by token, as without drafts."""
    ids, mask = prompts(LENGTHS)
    ids[0] = np.tile(ids[0, :5], 4)
    ours = twins.ours(ids, mask, max_new_tokens=20, prompt_lookup_num_tokens=3, **ALL)
    assert_same_output(ours, twins.sampled(ids, mask, max_new_tokens=20, **ALL), mask)


@pytest.mark.slow
def test_tuples_of_several_answers(twins: Twins) -> None:
    """A prompt's entries are repeated for each of its answers."""
    ids, mask = prompts(LENGTHS)
    options: dict[str, Any] = {"max_new_tokens": 6} | ALL
    ours = twins.ours(ids, mask, do_sample=True, top_k=1, num_return_sequences=2, seed=0, **options)
    theirs = twins.sampled(ids, mask, **options)
    for answer in range(2):
        for step in range(6):
            assert distance(ours.logits[step][answer::2], theirs.logits[step]) < 1e-5
            where = mask.astype(bool) if step == 0 else np.ones((3, 1), bool)
            for name, at in (("hidden_states", where[..., None]), ("attentions", where[:, None, :, None])):
                own, other = getattr(ours, name)[step][1][answer::2], getattr(theirs, name)[step][1]
                assert distance(own, other, at) < 1e-5


def test_tuples_of_beams(twins: Twins, prefill: None) -> None:
    ids, mask = prompts(LENGTHS)
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": 3} | ALL
    ours, theirs = twins.ours(ids, mask, **options), twins.sampled(ids, mask, **options)
    assert isinstance(ours, GenerateBeamDecoderOnlyOutput)
    for step in range(6):
        at = np.repeat(mask, 3, axis=0).astype(bool) if step == 0 else np.ones((9, 1), bool)
        for own, other in zip(ours.hidden_states[step], theirs.hidden_states[step], strict=True):
            assert distance(own, other, at[..., None]) < 1e-5
        for own, other in zip(ours.attentions[step], theirs.attentions[step], strict=True):
            assert distance(own, other, at[:, None, :, None]) < 1e-5


# --- continuing ----------------------------------------------------------------------------------------


def extend(out: Any, mask: np.ndarray, more: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of `out` and `more` new ones in each row, padded on the right, and their mask."""
    sequences = np.asarray(out.sequences)
    old_mask = np.concatenate(
        [mask, np.ones((len(mask), sequences.shape[1] - mask.shape[1]), np.int64)], axis=1
    )
    added, added_mask = prompts(more, "right", seed)
    return np.concatenate([sequences, added], axis=1), np.concatenate([old_mask, added_mask], axis=1)


def check_continuation(twins: Twins, out: Any, ids: np.ndarray, mask: np.ndarray, **options: Any) -> Any:
    """Checks that 10 tokens from the cache of `out` equal those without a cache; returns the output."""
    continuation = twins.ours(
        ids,
        mask,
        past_key_values=out.past_key_values,
        max_new_tokens=10,
        return_dict_in_generate=True,
        **options,
    )
    new = np.asarray(continuation.sequences)[:, ids.shape[1] :]
    np.testing.assert_array_equal(new, alone(twins, ids, mask, 10))
    return continuation


@pytest.mark.parametrize("more", [[1, 1, 1], [3, 3, 3], [2, 20, 7]])
def test_continues(twins: Twins, more: list[int]) -> None:
    ids, mask = prompts(LENGTHS)
    out = twins.ours(ids, mask, max_new_tokens=10, return_dict_in_generate=True)
    longer, longer_mask = extend(out, mask, more)
    check_continuation(twins, out, longer, longer_mask)
    check_continuation(twins, out, longer, longer_mask)  # the user's cache is unchanged
    check_continuation(twins, out, *extend(out, mask, more, seed=1))


def test_continues_without_new_tokens(twins: Twins) -> None:
    ids, mask = prompts(LENGTHS)
    out = twins.ours(ids, mask, max_new_tokens=10, return_dict_in_generate=True)
    mask = np.concatenate([mask, np.ones((3, 10), np.int64)], axis=1)
    check_continuation(twins, out, np.asarray(out.sequences), mask)
    for cut in (1, 2, 7, 14):
        check_continuation(twins, out, np.asarray(out.sequences)[:, :-cut], mask[:, :-cut])


def test_a_conversation(twins: Twins) -> None:
    ids, mask = prompts(LENGTHS)
    out = twins.ours(ids, mask, max_new_tokens=10, return_dict_in_generate=True)
    for turn, more in enumerate(([4, 9, 1], [1, 3, 6], [18, 2, 2])):
        ids, mask = extend(out, mask, more, turn)
        out = check_continuation(twins, out, ids, mask)


def test_continues_after_rows_that_ended(twins: Twins) -> None:
    ids, mask = prompts(LENGTHS)
    new = twins.theirs(ids, mask, max_new_tokens=12)[:, 20:]
    out = twins.ours(
        ids,
        mask,
        max_new_tokens=12,
        eos_token_id=[int(new[0, 2]), int(new[1, 6])],
        return_dict_in_generate=True,
    )
    longer, longer_mask = extend(out, mask, [3, 5, 4])
    new = np.asarray(out.sequences)[:, 20:]
    longer_mask[:, 20:-5] = new != PAD
    assert (new == PAD).any()
    check_continuation(twins, out, longer, longer_mask)


@pytest.mark.slow
def test_continues_in_other_modes(twins: Twins) -> None:
    """Beams, drafts and several answers continue from the same cache."""
    ids, mask = prompts(LENGTHS)
    out = twins.ours(ids, mask, max_new_tokens=10, return_dict_in_generate=True)
    longer, longer_mask = extend(out, mask, [3, 5, 4])
    check_continuation(twins, out, longer, longer_mask, prompt_lookup_num_tokens=3)
    past = {"past_key_values": out.past_key_values, "max_new_tokens": 10}
    for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "seed": 0}):
        expected = twins.ours(longer, longer_mask, max_new_tokens=10, **options)
        np.testing.assert_array_equal(twins.ours(longer, longer_mask, **past, **options), expected)


@stored
def continued(
    reference: Reference,
    ids: np.ndarray,
    mask: np.ndarray,
    count: int,
    longer: np.ndarray,
    longer_mask: np.ndarray,
    **options: Any,
) -> Any:
    """Returns the reference's continuation of `longer` from the cache of its first `count` tokens."""
    import torch

    first = reference.model.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=PAD,
        return_dict_in_generate=True,
    )
    return ask(reference, longer, longer_mask, past_key_values=first.past_key_values, **options)


def test_tuples_of_a_continuation(twins: Twins) -> None:
    """Attentions and hidden states are those of new tokens over all keys, as in the reference."""
    ids, mask = prompts(LENGTHS)
    ours = twins.ours(ids, mask, max_new_tokens=5, return_dict_in_generate=True)
    longer, longer_mask = extend(ours, mask, [6, 6, 6])
    options: dict[str, Any] = {"max_new_tokens": 4} | ALL
    continuation = twins.ours(longer, longer_mask, past_key_values=ours.past_key_values, **options)
    expected = SimpleNamespace(**continued(twins.reference, ids, mask, 5, longer, longer_mask, **options))
    np.testing.assert_array_equal(continuation.sequences, expected.sequences)
    for step in range(4):
        assert distance(continuation.logits[step], expected.logits[step]) < 1e-5
        for name in ("hidden_states", "attentions"):
            for own, other in zip(
                getattr(continuation, name)[step], getattr(expected, name)[step], strict=True
            ):
                assert distance(own, other) < 1e-5
