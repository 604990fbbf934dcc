"""Streamed tokens against transformers' generate, across rope's lists, padding sizes and chunks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import longrope, pair, small_config

import phi3_jax.generation.step as step_module
from phi3_jax import Phi3Config, Phi3ForCausalLM
from phi3_jax.generation import CompiledModel, Sampling, stream_tokens
from phi3_jax.generation.step import cache_length, padded_length

CONTEXT = {"max_position_embeddings": 256, "original_max_position_embeddings": 256}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"num_key_value_heads": 4, **CONTEXT},
    "gqa and window": {"sliding_window": 7, **CONTEXT},
    "tied": {"tie_word_embeddings": True, **CONTEXT},
}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(4, 96, length).tolist()


def theirs_continue(theirs: Any, prompt: list[int], count: int, **options: Any) -> list[int]:
    """Greedy tokens of transformers' generate; end tokens only where they are given."""
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    ids = torch.tensor([prompt])
    out = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **(settings | options)
    )
    return out[0, len(prompt) :].tolist()


def ours_continue(compiled: CompiledModel, prompt: list[int], count: int, **options: Any) -> list[int]:
    return list(stream_tokens(compiled, prompt, max_new_tokens=count, **options))


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`twins(config)`: our compiled model and its twin, made once for each config."""
    made: dict[Phi3Config, tuple[CompiledModel, Any]] = {}

    def get(config: Phi3Config) -> tuple[CompiledModel, Any]:
        if config not in made:
            ours, theirs = pair("causal", config, tmp_path_factory.mktemp("twins"))
            theirs.generation_config.eos_token_id = None
            made[config] = CompiledModel(ours), theirs
        return made[config]

    return get


@pytest.fixture
def plain(twins: Any) -> tuple[CompiledModel, Any]:
    return twins(small_config(**CASES["plain"]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 100])
def test_greedy_tokens(twins: Any, case: str, length: int) -> None:
    compiled, theirs = twins(small_config(**CASES[case]))
    prompt = prompt_of(length)
    expected = theirs_continue(theirs, prompt, 40)
    assert ours_continue(compiled, prompt, 40) == expected
    assert len(set(expected)) > 3, "a model that repeats itself tests little"


@pytest.mark.parametrize("case", ["plain", "gqa and window"])
@pytest.mark.parametrize("length", [7, 8, 9, 16, 23, 70])
def test_prompts_in_chunks(twins: Any, monkeypatch: pytest.MonkeyPatch, case: str, length: int) -> None:
    monkeypatch.setattr(step_module, "PREFILL_CHUNK", 8)
    compiled, theirs = twins(small_config(**CASES[case]))
    prompt = prompt_of(length, seed=1)
    assert ours_continue(compiled, prompt, 40) == theirs_continue(theirs, prompt, 40)


@pytest.mark.parametrize("chunk", [8, 512])
@pytest.mark.parametrize("length", [1, 5, 14, 15, 16, 17, 23, 24])
def test_longrope_across_its_original_length(
    twins: Any, monkeypatch: pytest.MonkeyPatch, length: int, chunk: int
) -> None:
    """The tokens up to `orig` = 16 come from the short list, the others from the long one, in every layer."""
    monkeypatch.setattr(step_module, "PREFILL_CHUNK", chunk)
    compiled, theirs = twins(small_config(**longrope()))
    prompt = prompt_of(length, seed=2)
    assert ours_continue(compiled, prompt, 40) == theirs_continue(theirs, prompt, 40)


def test_longrope_computes_again_exactly_once(twins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, _ = twins(small_config(**longrope()))
    lengths = []
    prefill = CompiledModel.prefill

    def counted(self: CompiledModel, ids: np.ndarray, *arguments: Any) -> Any:
        lengths.append(len(ids))
        return prefill(self, ids, *arguments)

    monkeypatch.setattr(CompiledModel, "prefill", counted)
    for length, expected in {5: [5, 17], 16: [16, 17], 17: [17]}.items():
        lengths.clear()
        ours_continue(compiled, prompt_of(length), 20)
        assert lengths == expected


def test_end_tokens_stop(plain: tuple[CompiledModel, Any]) -> None:
    compiled, theirs = plain
    prompt = prompt_of(10)
    free = ours_continue(compiled, prompt, 30)
    for ends in ([free[4]], [free[9], free[6]], [90, free[0]]):
        stopped = ours_continue(compiled, prompt, 30, end_tokens=ends)
        first = min(free.index(token) for token in ends if token in free)
        assert stopped == free[: first + 1]
        assert stopped == theirs_continue(theirs, prompt, 30, eos_token_id=ends)
    unseen = next(token for token in range(96) if token not in free)
    assert ours_continue(compiled, prompt, 30, end_tokens={unseen}) == free


@pytest.mark.parametrize("length", [40, 62, 63])
def test_the_context_ends_the_answer(twins: Any, length: int) -> None:
    compiled, theirs = twins(small_config())
    prompt = prompt_of(length)
    answer = ours_continue(compiled, prompt, 1000)
    assert len(prompt) + len(answer) == 64
    assert answer == theirs_continue(theirs, prompt, 64 - length)


def test_a_token_at_a_time(plain: tuple[CompiledModel, Any]) -> None:
    compiled, _ = plain
    stream = stream_tokens(compiled, prompt_of(10), max_new_tokens=20)
    first = [next(stream), next(stream)]
    stream.close()  # as a reader who has seen enough does
    assert first == ours_continue(compiled, prompt_of(10), 2)
    assert ours_continue(compiled, np.asarray(prompt_of(10)), 2) == first


def test_few_programs_for_many_lengths(tmp_path: Path) -> None:
    compiled = CompiledModel(Phi3ForCausalLM(small_config(num_hidden_layers=1, **CONTEXT)))
    for length in range(1, 161, 8):
        ours_continue(compiled, prompt_of(length), 3)
    # Padded prompts of 16 to 256 tokens and one decode step, in caches of a few sizes.
    assert compiled._step._cache_size() <= 9
    before = compiled._step._cache_size()
    for length in (3, 44, 90, 150):
        ours_continue(compiled, prompt_of(length), 2)
    assert compiled._step._cache_size() == before


def test_padded_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [padded_length(n) for n in (1, 16, 17, 33, 512, 513, 1024, 1025)] == [
        *(16, 16, 32, 64, 512, 1024, 1024, 1536)
    ]
    for slots in range(1, 5000, 7):
        size = cache_length(slots)
        assert slots <= size <= max(128, 1.25 * slots + 128)
    assert len({cache_length(slots) for slots in range(1, 131073)}) < 70


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([5] * 64, {}, "the prompt has 64 tokens and the model's context is 64; shorten the prompt"),
        ([5] * 99, {}, "the prompt has 99 tokens"),
        ([5], {"max_new_tokens": 0}, "max_new_tokens=0 must be positive"),
        ([5], {"sampling": Sampling(temperature=-1.0)}, "temperature=-1.0 is negative"),
        ([5], {"sampling": Sampling(top_k=-1)}, "top_k=-1 is negative"),
        ([5], {"sampling": Sampling(1.0, 0, 0.0)}, "top_p=0.0"),
    ],
)
def test_what_cannot_be_streamed(
    twins: Any, prompt: list[int], options: dict[str, Any], message: str
) -> None:
    compiled, _ = twins(small_config())
    with pytest.raises(ValueError, match=message):
        next(stream_tokens(compiled, prompt, **({"max_new_tokens": 5} | options)))


def test_seeds_reproduce(plain: tuple[CompiledModel, Any]) -> None:
    compiled, _ = plain
    sampling = Sampling(temperature=1.0)
    answers = [
        ours_continue(compiled, prompt_of(9), 20, sampling=sampling, seed=seed) for seed in (0, 0, 1, 2)
    ]
    assert answers[0] == answers[1]
    assert len({tuple(answer) for answer in answers}) == 3
    greedy = ours_continue(compiled, prompt_of(9), 20)
    assert ours_continue(compiled, prompt_of(9), 20, sampling=Sampling(1.0, top_k=1), seed=7) == greedy
    assert ours_continue(compiled, prompt_of(9), 20, sampling=Sampling(1.0, top_p=1e-6), seed=7) == greedy
    assert ours_continue(compiled, prompt_of(9), 20, sampling=Sampling(0.0, 5, 0.5), seed=7) == greedy


def test_draws_stay_within_top_k(plain: tuple[CompiledModel, Any]) -> None:
    compiled, theirs = plain
    prompt = prompt_of(9)
    answer = ours_continue(compiled, prompt, 40, sampling=Sampling(5.0, top_k=4), seed=3)
    with torch.no_grad():
        logits = theirs(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    ranks = (logits > logits.gather(1, torch.tensor(answer)[:, None])).sum(-1)
    assert ranks.max() <= 3
    assert set(ranks.tolist()) == {0, 1, 2, 3}, "hot enough to draw each of them"


def test_longrope_draws_do_not_depend_on_the_recomputation(twins: Any) -> None:
    """A key belongs to a length, so the tokens after the crossing are those of a prompt that ends there."""
    compiled, _ = twins(small_config(**longrope()))
    sampling = Sampling(temperature=1.0)
    prompt = prompt_of(10)
    answer = ours_continue(compiled, prompt, 30, sampling=sampling, seed=5)
    again = ours_continue(compiled, prompt + answer[:7], 23, sampling=sampling, seed=5)
    assert again == answer[7:]
