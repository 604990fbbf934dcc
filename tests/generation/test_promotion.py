"""Tests that generate answers alike with 64-bit numbers and where JAX promotes nothing implicitly."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from marks import slow
from reference import longrope, small_config
from strict_settings import strict_settings
from twins import CONTEXT, PAD, Twins, prompts

from phi3_jax import Phi3ForCausalLM
from phi3_jax.config.generation_config import GenerationConfig
from phi3_jax.generation import stream_tokens
from phi3_jax.generation.chain import logits_processors
from phi3_jax.generation.processors import LogitsProcessorList
from phi3_jax.generation.sequences import Sequences

BATCH = prompts((20, 13), seed=4)
RECORDED = {"return_dict_in_generate": True, "output_scores": True}


@pytest.fixture(scope="module")
def assistant() -> Phi3ForCausalLM:
    return Phi3ForCausalLM(small_config(num_hidden_layers=1, **CONTEXT), rngs=5)


ON_SEQUENCES: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[50], [7, 9]],
    "sequence_bias": {(9,): 1.5, (4, 5): 2.0},
    "min_new_tokens": 4,
    "suppress_tokens": [8, PAD],
    "begin_suppress_tokens": [11],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 6,
    "exponential_decay_length_penalty": (3, 1.1),
    "remove_invalid_values": True,
    "renormalize_logits": True,
}
ON_DISTRIBUTIONS: dict[str, Any] = {
    "temperature": 0.9,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.01,
    "typical_p": 0.95,
    "top_h": 0.9,
    "epsilon_cutoff": 1e-3,
    "eta_cutoff": 1e-3,
}


def test_traces_every_processor() -> None:
    """Tracing is where JAX would promote."""
    config = GenerationConfig(do_sample=True, **ON_SEQUENCES, **ON_DISTRIBUTIONS)
    chain = logits_processors(config, prompt_length=1, max_new_tokens=9, vocab_size=96, eos_token_ids=[12])
    assert len(chain) == len(ON_SEQUENCES) + len(ON_DISTRIBUTIONS)
    ids, counts = np.zeros((2, 9), np.int32), np.ones(2, np.int32)
    sequences = Sequences(ids, ids > 0, counts, counts)
    with strict_settings():
        arguments = LogitsProcessorList(chain), sequences, np.zeros((2, 96), np.float32)
        scores = jax.eval_shape(LogitsProcessorList.__call__, *arguments)
    assert (scores.shape, scores.dtype) == ((2, 96), np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3, "eos_token_id": [12]},
        slow({"guidance_scale": 1.6}),
    ],
)
def test_matches_transformers(shallow: Twins, options: dict[str, Any]) -> None:
    with strict_settings():
        shallow.same(*BATCH, max_new_tokens=12, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9, "num_return_sequences": 2},
        {"num_beams": 2, "early_stopping": True, "eos_token_id": [12]},
    ],
)
def test_draws_are_the_same(shallow: Twins, options: dict[str, Any]) -> None:
    """Draws depend on the dtype of the random numbers, and a seed on all of its bits."""
    options = {"do_sample": True, "seed": -3, "max_new_tokens": 10, **options}
    expected = shallow.ours(*BATCH, **options)
    with strict_settings():
        np.testing.assert_array_equal(shallow.ours(*BATCH, **options), expected)


@pytest.mark.parametrize("draft", [slow("assistant"), "lookup"])
def test_drafts(shallow: Twins, assistant: Phi3ForCausalLM, draft: str) -> None:
    options = {
        "assistant": {"assistant_model": assistant, "num_assistant_tokens": 3},
        "lookup": {"prompt_lookup_num_tokens": 3},
    }[draft]
    with strict_settings():
        answer = shallow.ours(*BATCH, max_new_tokens=12, **options)
    np.testing.assert_array_equal(answer, shallow.theirs(*BATCH, max_new_tokens=12))


@pytest.mark.slow
def test_drawn_drafts(shallow: Twins, assistant: Phi3ForCausalLM) -> None:
    options: dict[str, Any] = {
        "do_sample": True,
        "seed": 3,
        "max_new_tokens": 10,
        "assistant_model": assistant,
    }
    expected = shallow.ours(*BATCH, **options)
    with strict_settings():
        np.testing.assert_array_equal(shallow.ours(*BATCH, **options), expected)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"sliding_window": 7, **longrope(8)}, {"cache_implementation": "sliding_window"}),
        slow({}, {"cache_implementation": "quantized", "stopping_criteria": [lambda ids, scores: False]}),
    ],
    ids=["ring and longrope", "int8 and criteria"],
)
def test_caches_and_ropes(
    twins_of: Callable[..., Twins], changes: dict[str, Any], options: dict[str, Any]
) -> None:
    model = twins_of(num_hidden_layers=1, **changes)
    with strict_settings():
        answer = model.ours(*BATCH, max_new_tokens=12, **options)
    np.testing.assert_array_equal(answer, model.theirs(*BATCH, max_new_tokens=12))


@pytest.mark.slow
def test_a_cache_that_continues(shallow: Twins) -> None:
    """The first answer also streams; the second one records its scores."""
    ids, mask = prompts((20,), seed=4)
    options = {"eos_token_id": [], "pad_token_id": PAD}
    with strict_settings():
        first = shallow.ours(ids, mask, max_new_tokens=8, **RECORDED)
        streamed = list(stream_tokens(shallow.model, ids[0], max_new_tokens=8, **options))
        longer = np.asarray(first.sequences), np.ones((1, 28), np.int64)
        out = shallow.ours(*longer, max_new_tokens=8, past_key_values=first.past_key_values, **RECORDED)
    np.testing.assert_array_equal(out.sequences, shallow.theirs(ids, mask, max_new_tokens=16))
    np.testing.assert_array_equal(streamed, out.sequences[0, 20:28])
    arrays = jax.tree.leaves((out.sequences, out.scores, out.past_key_values))
    assert {leaf.dtype.itemsize for leaf in arrays} == {1, 4}, "a bool and numbers of 32 bits"
