"""Tests what runs on the host between steps (processors, criteria, streamers) and rejected arguments."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answers import stored
from marks import slow
from rows import alone
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from twins import PAD, Twins, ask, named, prompts

from phi3_jax.generation import AllowedTokensLogitsProcessor, LogitsProcessor, Sequences
from phi3_jax.generation.request import GenerationRequest
from phi3_jax.generation.stopping import JoinedTokens
from phi3_jax.tokenizer import JsonBackend, Phi3Tokenizer

LENGTHS = (20, 13, 5)


# --- streamers -----------------------------------------------------------------------------------------


class Notes:
    """A streamer that records its calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def put(self, value: Any) -> None:
        self.calls.append(np.asarray(value).tolist())

    def end(self) -> None:
        self.calls.append("end")


@stored
def streamed(reference: Any, ids: np.ndarray, mask: np.ndarray, **options: Any) -> list[Any]:
    """Returns the reference's calls of a streamer."""
    notes = Notes()
    ask(reference, ids, mask, streamer=notes, **options)
    return notes.calls


def test_streamers(shallow: Twins) -> None:
    ids, mask = prompts((17,))
    free = shallow.theirs(ids, mask, max_new_tokens=12)[0, 17:]
    for ends in ([], [int(free[5]), 0]):
        ours = Notes()
        answer = shallow.ours(ids, mask, max_new_tokens=12, eos_token_id=ends, streamer=ours)
        assert ours.calls == streamed(shallow.reference, ids, mask, max_new_tokens=12, eos_token_id=ends)
        assert ours.calls[0] == ids.tolist()
        assert [token for tokens in ours.calls[1:-1] for token in tokens] == answer[0, 17:].tolist()


def test_streamed_batches(shallow: Twins) -> None:
    ids, mask = prompts(LENGTHS)
    free = shallow.theirs(ids, mask, max_new_tokens=12)[:, 20:]
    notes = Notes()
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": [int(free[0, 2]), int(free[1, 6])]}
    answer = shallow.ours(ids, mask, **options, streamer=notes)
    assert notes.calls == [ids.tolist(), *answer[:, 20:].T.tolist(), "end"]


# --- processors ----------------------------------------------------------------------------------------


def bias_of(last: Any) -> Any:
    """Returns the token that a rule favours after `last`."""
    return (7 * last + 3) % 96


def favour(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Favours one token: a rule of transformers' kind, in NumPy."""
    scores[np.arange(len(ids)), bias_of(ids[:, -1])] += 3.0
    return scores


def halve(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Halves the scores of every other token; its order with `favour` matters."""
    factor = np.where((np.arange(96) + ids.shape[1]) % 2 == 0, 0.5, 1.0)
    return scores * factor.astype(np.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Favour(LogitsProcessor):
    """Does what `favour` does, on the device."""

    by: Any

    def __call__(self, sequences: Sequences, scores: Any) -> Any:
        last, _ = sequences.last(1)
        return scores.at[jnp.arange(len(scores)), bias_of(last[:, 0])].add(self.by)


MIXES: dict[str, tuple[list[Any], list[Any]]] = {
    "host": ([favour], [favour]),
    "device": ([Favour(3.0)], [favour]),
    "host before device": ([halve, Favour(3.0)], [halve, favour]),
    "device before host": ([Favour(3.0), halve], [favour, halve]),
    "device between hosts": ([favour, Favour(3.0), halve], [favour, favour, halve]),
}


GREEDY: dict[str, Any] = {}
BEAMS = {"repetition_penalty": 1.2, "num_beams": 2}


@pytest.mark.parametrize(
    ("mix", "options"),
    [
        *((mix, GREEDY) for mix in MIXES),
        slow("device", BEAMS),
        ("device between hosts", BEAMS),
    ],
)
def test_user_processors(shallow: Twins, mix: str, options: dict[str, Any]) -> None:
    ids, mask = prompts(LENGTHS)
    own, others = MIXES[mix]
    theirs = list(map(named, others))
    expected = shallow.theirs(ids, mask, max_new_tokens=20, logits_processor=theirs, **options)
    answer = shallow.ours(ids, mask, max_new_tokens=20, logits_processor=own, **options)
    np.testing.assert_array_equal(answer, expected)
    assert (answer != shallow.theirs(ids, mask, max_new_tokens=20, **options)).any()


class Seen:
    """A rule that changes nothing and records its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[np.ndarray, np.ndarray]] = []

    def __call__(self, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        self.calls.append((ids.copy(), scores.copy()))
        return scores


@stored(whole=True)
def shown(reference: Any, ids: np.ndarray, mask: np.ndarray, **options: Any) -> list[Any]:
    """Returns the ids and scores that the reference passes to a processor at each step."""
    seen = Seen()
    ask(reference, ids, mask, logits_processor=[seen], **options)
    return seen.calls


def test_a_host_processor_gets_the_arguments_of_transformers(shallow: Twins) -> None:
    """Compares ids with padding and ended rows, and the scores of the other rows."""
    ids, mask = prompts(LENGTHS)
    free = shallow.theirs(ids, mask, max_new_tokens=12)[:, 20:]
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": [int(free[0, 2]), int(free[1, 6])]}
    ours = Seen()
    shallow.ours(ids, mask, logits_processor=[ours], **options)
    theirs = shown(shallow.reference, ids, mask, **options)
    for (own, scores), (other, expected) in zip(ours.calls, theirs, strict=True):
        np.testing.assert_array_equal(own, other)
        live = ~np.isin(own[:, -1], [PAD, *options["eos_token_id"]])
        np.testing.assert_allclose(scores[live], expected[live], rtol=1e-3, atol=1e-4)


def test_allowed_tokens(shallow: Twins) -> None:
    """Compares the host's form, the device's and the reference's."""

    def allowed(row: int, ids: Any) -> list[int]:
        return [token for token in range(96) if (token + int(ids[-1]) + row) % 3 == 0]

    def mask_fn(sequences: Sequences) -> Any:
        last, _ = sequences.last(1)
        rows = jnp.arange(len(last))[:, None]
        return (jnp.arange(96) + last + rows) % 3 == 0

    ids, mask = prompts(LENGTHS)
    expected = shallow.same(ids, mask, max_new_tokens=20, prefix_allowed_tokens_fn=named(allowed))
    assert all((int(b) + int(a) + row) % 3 == 0 for row in range(3) for a, b in pairwise(expected[row, 19:]))
    device = AllowedTokensLogitsProcessor(mask_fn)
    np.testing.assert_array_equal(
        shallow.ours(ids, mask, max_new_tokens=20, logits_processor=[device]), expected
    )


# --- criteria ------------------------------------------------------------------------------------------


def unseen(twins: Twins) -> list[int]:
    """Returns two tokens that never occur: the reference pads ended rows only if it has end tokens."""
    answer = twins.theirs(*prompts(LENGTHS), max_new_tokens=40)
    return [token for token in range(4, 96) if token not in answer[:, 20:]][:2]


@pytest.mark.slow
def test_a_criterion_ends_single_rows(twins: Twins) -> None:
    """Rows end where the criterion says, the others continue, and the cache continues a conversation."""
    ids, mask = prompts(LENGTHS)
    free = twins.theirs(ids, mask, max_new_tokens=30)[:, 20:]
    stops = np.array([23, 41, 36])

    def stop(ids: np.ndarray, scores: Any, **_: Any) -> np.ndarray:
        return ids.shape[1] >= stops

    out = twins.ours(ids, mask, max_new_tokens=30, stopping_criteria=[stop], return_dict_in_generate=True)
    answer = np.asarray(out.sequences)[:, 20:]
    assert answer.shape == (3, 21)
    for row, length in enumerate(stops - 20):
        np.testing.assert_array_equal(answer[row, :length], free[row, :length])
        assert (answer[row, length:] == PAD).all()
    more, more_mask = prompts((4, 6, 2), "right", seed=1)
    is_token = np.arange(21) < (stops - 20)[:, None]
    longer = np.concatenate([ids, answer, more], axis=1)
    longer_mask = np.concatenate([mask, is_token, more_mask], axis=1)
    second = twins.ours(longer, longer_mask, max_new_tokens=10, past_key_values=out.past_key_values)
    np.testing.assert_array_equal(second[:, longer.shape[1] :], alone(twins, longer, longer_mask, 10))


def test_criteria_match_transformers(shallow: Twins) -> None:
    def thirteenth(ids: np.ndarray, scores: Any, **_: Any) -> np.ndarray:
        return ids[:, -1] % 13 == 0

    ids, mask = prompts(LENGTHS)
    options: dict[str, Any] = {
        "max_new_tokens": 40,
        "eos_token_id": unseen(shallow),
    }  # so that the reference pads
    options["stopping_criteria"] = [named(thirteenth)]
    expected = shallow.same(ids, mask, **options)
    assert (expected[:, -1] == PAD).any()
    drafted = shallow.ours(ids, mask, **options, prompt_lookup_num_tokens=3)
    np.testing.assert_array_equal(drafted, expected)


class Characters:
    """A tokenizer with a token for each visible ASCII character, space and newline."""

    def __init__(self) -> None:
        characters = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
        self.answer_key = tuple(characters)
        self.tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(characters)}, []))
        self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.tokenizer.decoder = decoders.ByteLevel()


@stored
def stopped_by_strings(
    reference: Any, characters: Characters, ids: np.ndarray, mask: np.ndarray, **options: Any
) -> np.ndarray:
    """Returns the reference's answer with a tokenizer of those characters."""
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=characters.tokenizer)
    return ask(reference, ids, mask, tokenizer=tokenizer, **options)


def test_stop_strings(shallow: Twins) -> None:
    ids, mask = prompts(LENGTHS)
    characters = Characters()
    own = Phi3Tokenizer(JsonBackend(characters.tokenizer.to_str()))
    free = shallow.theirs(ids, mask, max_new_tokens=40)[:, 20:]
    texts = [characters.tokenizer.decode(row) for row in free.tolist()]
    stops = [texts[0][4:7], texts[1][9:12]]
    options: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": unseen(shallow), "stop_strings": stops}
    expected = stopped_by_strings(shallow.reference, characters, ids, mask, **options)
    answer = shallow.ours(ids, mask, **options, tokenizer=own)
    np.testing.assert_array_equal(answer, expected)
    assert own.decode(answer[0, 20:27].tolist()).endswith(stops[0])
    assert (answer[0, 27:] == PAD).all()
    single = shallow.ours(ids[:1], mask[:1], max_new_tokens=40, stop_strings=stops[0], tokenizer=own)
    np.testing.assert_array_equal(single[:, 20:], free[:1, :7])


def test_stop_strings_read_no_more_of_a_longer_prompt(
    shallow: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def count(owner: type, name: str) -> None:
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments: calls.append(name) or method(*arguments))

    count(JoinedTokens, "__getitem__")
    count(GenerationRequest, "with_prompts")
    tokenizer = Phi3Tokenizer(JsonBackend(Characters().tokenizer.to_str()))
    for length in (20, 200):
        calls.clear()
        shallow.ours(*prompts((length,)), max_new_tokens=10, stop_strings="~^~", tokenizer=tokenizer)
        assert calls.count("__getitem__") == 10 * 3
        assert calls.count("with_prompts") == 1, "only the result has the prompt"


def test_stop_strings_end_each_row_of_a_batch_with_drafts(shallow: Twins) -> None:
    """Rows accept different numbers of drafted tokens, so some are shorter than others when judged."""
    ids, mask = prompts(LENGTHS)
    characters = Characters()
    tokenizer = Phi3Tokenizer(JsonBackend(characters.tokenizer.to_str()))
    free = shallow.ours(ids, mask, max_new_tokens=40)[:, ids.shape[1] :]
    for row in (1, 2):
        stop = characters.tokenizer.decode(free[row, 17:19].tolist())
        options = {"max_new_tokens": 40, "stop_strings": stop, "tokenizer": tokenizer}
        expected = shallow.ours(ids, mask, **options)
        assert (expected[row, -20:] == PAD).all()
        drafted = shallow.ours(ids, mask, prompt_lookup_num_tokens=6, **options)
        np.testing.assert_array_equal(drafted, expected)


@pytest.mark.slow
def test_max_time(shallow: Twins) -> None:
    ids, mask = prompts(LENGTHS)
    answer = shallow.ours(ids, mask, max_new_tokens=400, max_time=1e-9)
    free = shallow.theirs(ids, mask, max_new_tokens=1)
    np.testing.assert_array_equal(answer, free)
    beams = shallow.ours(ids, mask, max_new_tokens=400, max_time=1e-9, num_beams=2)
    assert beams.shape[1] < 30


# --- rejected arguments --------------------------------------------------------------------------------

LONG = np.full((1, 512), 5)
GOOD = np.full((2, 4), 5)
BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "context": ({"input_ids": LONG}, ValueError, "row 0 has 512 tokens and the model's context is 512"),
    "one dimension": ({"input_ids": GOOD[0]}, ValueError, r"int64\[4\]; expected integers of shape"),
    "floats": ({"input_ids": GOOD * 1.0}, ValueError, r"float64\[2, 4\]"),
    "nothing": ({"input_ids": GOOD[:, :0]}, ValueError, "nothing to continue"),
    "empty row": ({"attention_mask": [[1] * 4, [0] * 4]}, ValueError, "row 1 of input_ids"),
    "too large an id": ({"input_ids": GOOD + 91}, ValueError, "96 is outside the vocabulary of 96"),
    "negative id": ({"input_ids": GOOD - 9}, ValueError, "-4 is outside the vocabulary"),
    "mask": ({"attention_mask": np.ones((2, 5))}, ValueError, r"attention_mask has shape \[2, 5\]"),
    "name": ({"max_new_token": 5}, TypeError, "did you mean 'max_new_tokens'"),
    "max_length": (
        {"max_length": 4, "max_new_tokens": None},
        ValueError,
        "leaves no room for new tokens: the prompt has 4",
    ),
    "no new tokens": ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0 must be a positive integer"),
    "min above max": ({"max_new_tokens": 3, "min_new_tokens": 4}, ValueError, "contradict each other"),
    "two lengths": ({"max_new_tokens": 3, "max_length": 40}, ValueError, "limit the same length"),
    "streamed beams": ({"streamer": Notes(), "num_beams": 2}, ValueError, "leave num_beams at 1"),
    "drafted beams": ({"prompt_lookup_num_tokens": 2, "num_beams": 2}, ValueError, "exclude each other"),
    "guided drafts": ({"prompt_lookup_num_tokens": 2, "guidance_scale": 2}, ValueError, "exclude each other"),
    "unguided": ({"negative_prompt_ids": GOOD}, ValueError, "do nothing without guidance_scale"),
    "negative mask": ({"negative_prompt_attention_mask": GOOD}, ValueError, "negative_prompt_ids"),
    "negative rows": (
        {"negative_prompt_ids": np.full((3, 2), 5), "guidance_scale": 2.0},
        ValueError,
        "has 3 rows; expected one for each of 2",
    ),
    "greedy copies": ({"num_return_sequences": 2}, ValueError, "2 times the same greedy answer"),
    "more than beams": ({"num_return_sequences": 3, "num_beams": 2}, ValueError, "raise num_beams"),
    "no tokenizer": ({"stop_strings": "a"}, ValueError, "stop_strings need the tokenizer"),
    "shape": ({"logits_processor": [lambda ids, s: s[:, 1:]]}, ValueError, r"\(2, 95\); expected \(2, 96\)"),
    "criterion": ({"stopping_criteria": [lambda ids, s: [True]]}, ValueError, "returned shape"),
    "not a bool": ({"stopping_criteria": [lambda ids, s: 1]}, TypeError, "returned 1; expected a bool"),
    "no token": ({"prefix_allowed_tokens_fn": lambda row, ids: []}, ValueError, "allows no token for row 0"),
    "cold": ({"do_sample": True, "temperature": 0.0}, ValueError, "cannot be sampled from"),
    "unused setting": ({"temperature": 0.5}, ValueError, "set do_sample=True"),
    "unused scores": ({"output_scores": True}, ValueError, "return_dict_in_generate"),
    "end token": ({"eos_token_id": 96}, ValueError, "96"),
    "not supported": ({"num_beam_groups": 2}, ValueError, "num_beam_groups=2 is not supported"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_rejects_bad_calls(shallow: Twins, case: str) -> None:
    arguments, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        shallow.model.generate(**{"input_ids": GOOD, "max_new_tokens": 3, "eos_token_id": []} | arguments)


def test_rejects_other_models_and_caches(shallow: Twins) -> None:
    model = shallow.model
    with pytest.raises(ValueError, match="num_beams exclude each other"):
        model.generate(GOOD, assistant_model=model, num_beams=2)
    with pytest.raises(ValueError, match="give one of them"):
        model.generate(GOOD, assistant_model=model, prompt_lookup_num_tokens=2)
    past = shallow.ours(GOOD, None, max_new_tokens=3, return_dict_in_generate=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values has 2 rows and input_ids 1"):
        shallow.ours(np.full((1, 9), 5), None, past_key_values=past)
    with pytest.raises(ValueError, match="no unconditional rows"):
        shallow.ours(np.full((2, 9), 5), None, past_key_values=past, guidance_scale=2.0)
