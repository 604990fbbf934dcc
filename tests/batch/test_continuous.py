"""Continuous batching, compared with `generate` on each prompt alone."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from compilations import compilations
from marks import slow
from reference import longrope, small_config

from phi3_jax import Phi3ForCausalLM
from phi3_jax.batch.continuous import ContinuousBatch, Prompt
from phi3_jax.batch.options import RowOptions
from phi3_jax.batch.prefixes import PrefixFinder
from phi3_jax.batch.scheduler import PoolSize
from phi3_jax.generation import CompiledModel

END = 2
SMALL: dict[str, Any] = {"widths": (8, 16), "groups": ((4, 4),), "budget": 32}


def model_of(**changes: Any) -> CompiledModel:
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 128, "original_max_position_embeddings": 128}
    config = small_config(**sizes | changes)
    return CompiledModel(Phi3ForCausalLM(config))


def prompts(count: int, longest: int, seed: int = 0) -> list[Prompt]:
    draws = random.Random(seed)
    result = []
    for key in range(count):
        length = min(int(2 ** draws.uniform(0, np.log2(longest + 1))), longest)
        result.append(Prompt(key, [draws.randrange(4, 96) for _ in range(length)], draws.randrange(1, 25)))
    return result


def alone(compiled: CompiledModel, prompt: Prompt) -> list[int]:
    """Returns the answer of `generate` to the prompt alone."""
    sequences = compiled.model.generate(
        np.array([prompt.ids]), do_sample=False, max_new_tokens=prompt.max_new_tokens, eos_token_id=END
    )
    return np.asarray(sequences)[0, len(prompt.ids) :].tolist()


def answers(batch: ContinuousBatch, given: Sequence[Prompt]) -> dict[Any, Any]:
    results = list(batch.run(given))
    assert len(results) == len({each.key for each in results}) == len(given)
    return {each.key: each for each in results}


@pytest.mark.parametrize(
    "pools",
    [(PoolSize(1, 128),), (PoolSize(5, 128),), (PoolSize(3, 24), PoolSize(2, 64), PoolSize(1, 128))],
    ids=["one", "five", "pools"],
)
def test_answers_equal_those_of_each_prompt_alone(pools: tuple[PoolSize, ...]) -> None:
    compiled, given = model_of(), prompts(24, 90)
    results = answers(ContinuousBatch(compiled, pools, end_tokens=[END], **SMALL), given)
    reasons = set()
    for prompt in given:
        answer = results[prompt.key]
        assert answer.tokens == alone(compiled, prompt), len(prompt.ids)
        stopped = answer.tokens[-1] == END
        assert answer.finish_reason == ("stop" if stopped else "length")
        reasons.add(answer.finish_reason)
    assert len(results) == 24
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("window", [None, slow(7)])
def test_recomputes_rows_that_outgrow_the_short_factors(window: int | None) -> None:
    config = small_config(
        **longrope() | {"max_position_embeddings": 128, "original_max_position_embeddings": 32},
        num_hidden_layers=2,
        sliding_window=window,
    )
    compiled = CompiledModel(Phi3ForCausalLM(config))
    text = random.Random(3).choices(range(4, 96), k=80)
    given = [Prompt(key, text[key : 2 * key + 8], 4 + 3 * (key % 7)) for key in range(30)]
    crossing = [len(prompt.ids) <= 32 < len(prompt.ids) + prompt.max_new_tokens for prompt in given]
    assert 5 <= sum(crossing) < 30
    results = answers(ContinuousBatch(compiled, [PoolSize(4, 128)], end_tokens=[], **SMALL), given)
    for prompt in given:
        options: dict[str, Any] = {
            "do_sample": False,
            "max_new_tokens": prompt.max_new_tokens,
            "eos_token_id": [],
        }
        expected = compiled.model.generate(np.array([prompt.ids]), **options)
        assert results[prompt.key].tokens == np.asarray(expected)[0, len(prompt.ids) :].tolist()


@pytest.mark.parametrize("longest", [32, slow(128)], ids=["two-lists", "one-list"])
def test_computes_shared_prefixes_once(longest: int) -> None:
    config = small_config(
        **longrope() | {"max_position_embeddings": 128, "original_max_position_embeddings": longest},
        num_hidden_layers=2,
    )
    compiled = CompiledModel(Phi3ForCausalLM(config))
    draws = random.Random(3)
    systems = [draws.choices(range(4, 96), k=length) for length in (10, 21, 21, 50)]
    given = []
    for key in range(40):
        system = systems[key % 3 if key < 30 else 3]
        own = draws.choices(range(4, 96), k=draws.randrange(1, 30))
        given.append(Prompt(key, system + own, draws.randrange(1, 20)))
    prefixes = PrefixFinder(min_length=8, capacity=2)
    shared = ContinuousBatch(compiled, [PoolSize(3, 128)], end_tokens=[END], prefixes=prefixes, **SMALL)
    results = answers(shared, given)
    for prompt in given:
        assert results[prompt.key].tokens == alone(compiled, prompt)
    apart = ContinuousBatch(compiled, [PoolSize(3, 128)], end_tokens=[END], **SMALL)
    answers(apart, given)
    assert shared.load.prompt_tokens < 0.7 * apart.load.prompt_tokens


def test_answers_end_where_the_caller_stops_them() -> None:
    compiled, given = model_of(), [prompt._replace(max_new_tokens=20) for prompt in prompts(12, 40)]

    def fourth(tokens: Sequence[int]) -> bool:
        return tokens[-1] % 4 == 0

    results = answers(
        ContinuousBatch(compiled, [PoolSize(3, 64)], end_tokens=[END], **SMALL),
        [prompt._replace(should_stop=fourth) for prompt in given],
    )
    for prompt in given:
        expected = alone(compiled, prompt)
        end = next((number for number, token in enumerate(expected, 1) if token % 4 == 0), len(expected))
        assert results[prompt.key].tokens == expected[:end]
        stopped = expected[end - 1] % 4 == 0 or expected[end - 1] == END
        assert results[prompt.key].finish_reason == ("stop" if stopped else "length")


@pytest.mark.slow
def test_rows_have_options_of_their_own() -> None:
    compiled = model_of()
    row_options: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "seed": 3},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 2.0, "top_k": 5, "seed": 4},
        {"temperature": 1.3, "top_p": 0.6, "seed": 2**32 - 1},
        {"temperature": 1.3, "min_p": 0.2},
        {"repetition_penalty": 1.5},
        {"frequency_penalty": 2.0, "presence_penalty": 1.0},
        {"min_new_tokens": 9},
        {"temperature": 1.5, "repetition_penalty": 1.2, "top_k": 20, "top_p": 0.9, "min_new_tokens": 5},
    ]
    given = [
        Prompt(number, prompt.ids, 12, RowOptions.of(row_options[number % len(row_options)], RowOptions()))
        for number, prompt in enumerate(prompts(30, 16, seed=5))
    ]
    results = answers(ContinuousBatch(compiled, [PoolSize(4, 64)], end_tokens=[END], **SMALL), given)
    for prompt in given:
        options: dict[str, Any] = {"do_sample": False, "top_k": 0, "seed": 0}
        options |= row_options[prompt.key % len(row_options)]
        options["do_sample"] = "temperature" in options
        if not options["do_sample"]:
            del options["top_k"], options["seed"]
        expected = compiled.model.generate(
            np.array([prompt.ids]), max_new_tokens=12, eos_token_id=END, **options
        )
        assert results[prompt.key].tokens == np.asarray(expected)[0, len(prompt.ids) :].tolist(), options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"temperature": True}, "temperature=True"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
        ({"top_k": 0.5}, r"top_k=0\.5"),
        ({"seed": -1}, "seed=-1 must be an integer from 0"),
        ({"seed": True}, "seed=True must be an integer from 0"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
    ],
)
def test_rejects_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowOptions.of(options, RowOptions())


def test_compiles_nothing_for_more_prompts() -> None:
    compiled = model_of()
    batch = ContinuousBatch(compiled, [PoolSize(2, 32), PoolSize(2, 128)], end_tokens=[END], **SMALL)
    answers(
        batch, [Prompt((length, most), [7] * length, most) for most in (2, 27) for length in range(1, 100)]
    )
    with compilations() as counted:
        answers(batch, prompts(60, 100, seed=1))
    assert counted == []


def test_takes_prompts_as_slots_become_free() -> None:
    taken = []

    def take() -> Iterator[Prompt]:
        for prompt in prompts(40, 20):
            taken.append(prompt.key)
            yield prompt

    batch = ContinuousBatch(model_of(), [PoolSize(3, 64)], end_tokens=[END], **SMALL)
    for done, _ in enumerate(batch.run(take()), start=1):
        assert len(taken) <= done + 3 * 3
    assert len(taken) == 40


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt("a", [], 3), "prompt 'a' has no tokens, or max_new_tokens is below 1"),
        (Prompt("b", [5], 0), "prompt 'b' has no tokens, or max_new_tokens is below 1"),
        (Prompt("c", [5] * 60, 4), "prompt 'c' has 60 tokens and may get 4: slots hold 63"),
    ],
)
def test_rejects_invalid_prompts(prompt: Prompt, message: str) -> None:
    batch = ContinuousBatch(model_of(), [PoolSize(2, 64)], end_tokens=[END], **SMALL)
    with pytest.raises(ValueError, match=message):
        list(batch.run([prompt]))
