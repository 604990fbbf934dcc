"""Tests streamed tokens and text against transformers, and how a stream ends."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import stored
from marks import slow
from reference import longrope
from small_checkpoint import PROMPT, write_checkpoint
from twins import Twins

from phi3_jax import Phi3ForCausalLM, Phi3Tokenizer
from phi3_jax.generation import CompiledModel, stream_text, stream_tokens
from phi3_jax.generation import prompts as prompts_module
from phi3_jax.generation.prompts import cache_length, padded_length
from phi3_jax.generation.stream import single_sequence_call

CASES: dict[str, dict[str, Any]] = {
    "multi-head": {"num_hidden_layers": 1, "num_key_value_heads": 4},
    "window": {"num_hidden_layers": 1, "sliding_window": 7},
    "tied": {"num_hidden_layers": 1, "tie_word_embeddings": True},
}
TwinsOf = Callable[..., Twins]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(4, 96, length).tolist()


def theirs(twins: Twins, prompt: list[int], count: int, **options: Any) -> list[int]:
    ids = np.array([prompt])
    return twins.theirs(ids, np.ones_like(ids), max_new_tokens=count, **options)[0, len(prompt) :].tolist()


def ours(twins: Twins, prompt: list[int], count: int, **options: Any) -> list[int]:
    options = {"eos_token_id": [], "do_sample": False} | options
    return list(stream_tokens(twins.model, prompt, max_new_tokens=count, **options))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, slow(15), 16, slow(17), 100])
def test_greedy_tokens(twins_of: TwinsOf, case: str, length: int) -> None:
    twins = twins_of(**CASES[case])
    prompt = prompt_of(length)
    expected = theirs(twins, prompt, 40)
    assert ours(twins, prompt, 40) == expected
    assert len(set(expected)) > 3, "a model that repeats itself tests nothing"


@pytest.mark.parametrize("case", ["multi-head", "window"])
@pytest.mark.parametrize(
    "length",
    [slow(7), 8, 9, slow(16), 23, 70],
)
def test_prompts_in_chunks(
    twins_of: TwinsOf, monkeypatch: pytest.MonkeyPatch, case: str, length: int
) -> None:
    monkeypatch.setattr(prompts_module, "PREFILL_CHUNK", 8)
    twins = twins_of(**CASES[case])
    prompt = prompt_of(length, seed=1)
    assert ours(twins, prompt, 40) == theirs(twins, prompt, 40)


@pytest.mark.parametrize("chunk", [8, 512])
@pytest.mark.parametrize("length", [1, 14, 15, 16, 17, 24])
def test_longrope_across_its_original_length(
    twins_of: TwinsOf, monkeypatch: pytest.MonkeyPatch, length: int, chunk: int
) -> None:
    """Tokens up to 16 use the short list, later ones the long list."""
    monkeypatch.setattr(prompts_module, "PREFILL_CHUNK", chunk)
    twins = twins_of(**longrope())
    prompt = prompt_of(length, seed=2)
    assert ours(twins, prompt, 40) == theirs(twins, prompt, 40)


@pytest.mark.slow
def test_matches_generate_with_every_option(twins: Twins) -> None:
    ids = np.array([prompt_of(20)])
    for options in (
        {"prompt_lookup_num_tokens": 3},
        {"do_sample": True, "temperature": 2.0, "top_k": 9, "seed": 4},
        {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2},
        {"max_length": 29},
    ):
        count = {} if "max_length" in options else {"max_new_tokens": 17}
        whole = twins.ours(ids, None, **{"do_sample": False} | count | options)[0, 20:].tolist()
        stream = stream_tokens(
            twins.model, ids[0].tolist(), **{"eos_token_id": [], "do_sample": False} | count | options
        )
        assert list(stream) == whole


def test_end_tokens_stop(shallow: Twins) -> None:
    prompt = prompt_of(10)
    free = ours(shallow, prompt, 30)
    for ends in ([free[4]], [free[9], free[6]], [90, free[0]]):
        stopped = ours(shallow, prompt, 30, eos_token_id=ends)
        first = min(free.index(token) for token in ends if token in free)
        assert stopped == free[: first + 1]
        assert stopped == theirs(shallow, prompt, 30, eos_token_id=ends)
    unseen = next(token for token in range(96) if token not in free)
    assert ours(shallow, prompt, 30, eos_token_id=unseen) == free
    assert ours(shallow, prompt, 30, max_time=1e-9) == free[:1]


def test_the_padding_token_is_a_token(shallow: Twins) -> None:
    """A streamed prompt has no padding."""
    prompt = prompt_of(12)
    prompt[5] = shallow.config.pad_token_id or 0
    assert ours(shallow, prompt, 20) == theirs(shallow, prompt, 20)


@pytest.mark.parametrize("length", [40, 62, 63])
def test_the_context_ends_the_answer(twins_of: TwinsOf, length: int) -> None:
    twins = twins_of(num_hidden_layers=1, max_position_embeddings=64, original_max_position_embeddings=64)
    prompt = prompt_of(length)
    with pytest.warns(UserWarning, match="context of 64") if length > 44 else nullcontext():
        answer = ours(twins, prompt, 20)
    assert len(answer) == min(20, 64 - length)
    assert answer == theirs(twins, prompt, len(answer))


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("draft", [{}, {"prompt_lookup_num_tokens": 3}])
def test_a_reader_stops_early(shallow: Twins, count: int, draft: dict[str, int]) -> None:
    """The tokens up to then are the result, and its cache continues them."""
    prompt, options = prompt_of(10), {"eos_token_id": [], "do_sample": False, "max_new_tokens": 20}
    whole = ours(shallow, prompt, 20)
    call = single_sequence_call(shallow.model, prompt, return_dict_in_generate=True, **options, **draft)
    steps = call.run()
    assert [int(next(steps)[0]) for _ in range(count)] == whole[:count]
    steps.close()
    out = call.result()
    assert out.sequences.tolist() == [prompt + whole[:count]]
    assert out.past_key_values.tokens.tolist() == [10 + count - 1]
    more = stream_tokens(
        shallow.model, prompt + whole[:count], past_key_values=out.past_key_values, **options
    )
    assert [next(more) for _ in range(20 - count)] == whole[count:]


def test_computes_nothing_before_the_first_read(shallow: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a step")

    monkeypatch.setattr(CompiledModel, "__call__", fail)
    stream = stream_tokens(shallow.model, prompt_of(10), max_new_tokens=20)
    with pytest.raises(AssertionError, match="a step"):
        next(stream)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([5] * 512, {}, r"has 512 tokens and the model's context is 512; shorten the prompt"),
        ([5, 96], {}, r"input_ids\[0, 1\] = 96 is outside the vocabulary of 96"),
        ([5], {"max_new_tokens": 0}, "max_new_tokens=0 must be"),
        ([5], {"temperature": -1.0}, r"temperature=-1\.0 must be"),
        ([5], {"top_p": 0.5}, r"top_p=0\.5 has no effect"),
        ([5], {"num_beams": 2}, "num_beams=2 and num_return_sequences=1 cannot be streamed"),
        ([5], {"do_sample": True, "num_return_sequences": 3}, "num_return_sequences=3 cannot be streamed"),
        ([5], {"stop_strings": ["x"]}, "stop_strings need the tokenizer"),
    ],
)
def test_errors_come_before_the_first_token(
    shallow: Twins, prompt: list[int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        stream_tokens(shallow.model, prompt, **{"max_new_tokens": 5} | options)


def test_seeds_reproduce(shallow: Twins) -> None:
    prompt, hot = prompt_of(9), {"do_sample": True, "temperature": 1.0, "top_k": 0}
    answers = [ours(shallow, prompt, 20, **hot, seed=seed) for seed in (0, 0, 1, None, None)]
    assert answers[0] == answers[1]
    assert len({tuple(answer) for answer in answers}) == 4
    assert ours(shallow, prompt, 20, **hot | {"top_k": 1}, seed=7) == ours(shallow, prompt, 20)


@stored(whole=True)
def ranks(reference: Any, prompt: list[int], answer: list[int]) -> np.ndarray:
    """Returns how many tokens the reference ranks above each token of the answer."""
    import torch

    with torch.no_grad():
        logits = reference.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return (logits > logits.gather(1, torch.tensor(answer)[:, None])).sum(-1)


def test_draws_stay_within_top_k(shallow: Twins) -> None:
    prompt = prompt_of(9)
    answer = ours(shallow, prompt, 40, do_sample=True, temperature=5.0, top_k=4, seed=3)
    drawn = set(ranks(shallow.reference, prompt, answer).tolist())
    assert drawn == {0, 1, 2, 3}, "the temperature is high enough to draw each of them"


def test_padded_sizes_are_few() -> None:
    assert [padded_length(n) for n in (1, 16, 17, 33, 129, 512, 513, 1024, 1025)] == [
        *(16, 16, 32, 64, 256, 512, 640, 1024, 1152)
    ]
    for slots in range(1, 5000, 7):
        assert slots <= cache_length(slots) <= max(128, 1.25 * slots + 128)
    assert len({cache_length(slots) for slots in range(1, 131073)}) < 70


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompiledModel, Phi3Tokenizer]:
    folder: Path = tmp_path_factory.mktemp("model")
    write_checkpoint(folder, num_hidden_layers=1)
    return CompiledModel(Phi3ForCausalLM.from_pretrained(folder)), Phi3Tokenizer.from_pretrained(folder)


@pytest.mark.slow
def test_pieces_add_up_to_the_decoded_text(chat_model: tuple[CompiledModel, Phi3Tokenizer]) -> None:
    compiled, tokenizer = chat_model
    ids = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
    for prompt, encoded in ((PROMPT, tokenizer.encode(PROMPT)), (ids, ids)):
        options = {"max_new_tokens": 30, "do_sample": False}
        tokens = list(stream_tokens(compiled, encoded, **options))
        for skip in (True, False):
            pieces = list(stream_text(compiled, tokenizer, prompt, skip_special_tokens=skip, **options))
            assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=skip)
            assert all(pieces)
            assert len(pieces) > 3
    first = next(stream := stream_text(compiled, tokenizer, ids, **options))
    stream.close()  # type: ignore[attr-defined]
    assert first == pieces[0] or "\ufffd" in first


def test_stop_strings_end_the_text(chat_model: tuple[CompiledModel, Phi3Tokenizer]) -> None:
    compiled, tokenizer = chat_model
    options = {"max_new_tokens": 30, "do_sample": False}
    text = "".join(stream_text(compiled, tokenizer, PROMPT, **options))
    stop = next(letter for letter in text[3:20] if letter.isascii() and letter.isprintable())
    stopped = "".join(stream_text(compiled, tokenizer, PROMPT, stop_strings=[stop], **options))
    assert stopped == text[: text.index(stop) + 1]
    with pytest.raises(ValueError, match="the prompt is empty"):
        stream_text(compiled, tokenizer, "")
