"""A user's rope types whose frequencies change with the length, against full forwards without a cache."""

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow
from reference import run, small_config
from rows import assert_varied, rows_of
from twins import CONTEXT, PAD, prompts

from phi3_jax import Phi3ForCausalLM
from phi3_jax.config.rope_types import ROPE_TYPES, rope_type

LENGTHS = (5, 15, 16, 17, 30, 9)
COUNT = 40
"""New tokens that bring every row past the lengths at which its frequencies change."""

BATCH = prompts(LENGTHS, seed=1)


def switching(base: Any, seq_len: Any, *, at: Any) -> Any:
    """Changes at `at` tokens, which no other part of the config knows."""
    stretch = jnp.where(seq_len > at, 4.0, 1.0)
    return base.inv_freq() / stretch[:, None], jnp.where(seq_len > at, 1.2, 1.0)


def growing(base: Any, seq_len: Any, *, until: Any) -> Any:
    """Changes at every length up to `until` tokens."""
    return base.inv_freq() / (1 + jnp.minimum(seq_len, until) / 8)[:, None], 1.0


TYPES = {
    "switching": ("test-switching", switching, {"at": 20}),
    "growing": ("test-growing", growing, {"until": 1000}),
    "growing at first": ("test-growing-at-first", growing, {"until": 26}),
}


@pytest.fixture(scope="module")
def register() -> Iterator[Callable[..., None]]:
    """Registers rope types that do not outlive this module."""
    with patch.dict(ROPE_TYPES):
        yield lambda name, formula, **options: rope_type(name, **options)(formula) and None


def model_of(rope_type: str, layers: int = 2, **parameters: int) -> Phi3ForCausalLM:
    rope = {"rope_type": rope_type, **parameters}
    return Phi3ForCausalLM(
        small_config(**CONTEXT, rope_scaling=rope, num_hidden_layers=layers), dtype="float32", rngs=0
    )


@pytest.fixture(scope="module", params=[name if name == "growing at first" else slow(name) for name in TYPES])
def model(register: Callable[..., None], request: pytest.FixtureRequest) -> Phi3ForCausalLM:
    name, formula, parameters = TYPES[request.param]
    register(name, formula)
    return model_of(name, **parameters)


@pytest.fixture(scope="module")
def expected(model: Phi3ForCausalLM) -> np.ndarray:
    """The greedy tokens of full forwards over prompt and tokens."""
    rows = rows_of(*BATCH)
    ids = np.full((len(rows), max(LENGTHS) + COUNT), PAD)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
    length = np.array(LENGTHS)
    for _ in range(COUNT):
        mask = np.arange(ids.shape[1]) < length[:, None]
        logits = np.asarray(run(model, input_ids=ids, attention_mask=mask.astype(np.int32)).logits)
        ids[np.arange(len(rows)), length] = logits[np.arange(len(rows)), length - 1].argmax(axis=-1)
        length += 1
    new = np.stack([row[start : start + COUNT] for row, start in zip(ids, LENGTHS, strict=True)])
    assert_varied(new)
    return new


def generate(model: Phi3ForCausalLM, **options: Any) -> np.ndarray:
    settings = {"max_new_tokens": COUNT, "eos_token_id": [], "pad_token_id": PAD, "do_sample": False}
    return np.asarray(model.generate(*BATCH, **settings | options))[:, BATCH[0].shape[1] :]


def test_matches_full_forwards(model: Phi3ForCausalLM, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(generate(model), expected)


@pytest.mark.parametrize("drafted", [10, slow(3)])
def test_prompt_lookup_matches_full_forwards(
    model: Phi3ForCausalLM, expected: np.ndarray, drafted: int
) -> None:
    np.testing.assert_array_equal(generate(model, prompt_lookup_num_tokens=drafted), expected)


@pytest.mark.slow
def test_an_assistant_matches_full_forwards(model: Phi3ForCausalLM, expected: np.ndarray) -> None:
    """A model that assists itself drafts only right tokens, so its drafts are as long as allowed."""
    options = {"num_assistant_tokens": 6, "assistant_confidence_threshold": 0.0}
    np.testing.assert_array_equal(generate(model, assistant_model=model, **options), expected)


def test_host_steps_match_full_forwards(model: Phi3ForCausalLM, expected: np.ndarray) -> None:
    new = generate(model, logits_processor=[lambda ids, scores: scores])
    np.testing.assert_array_equal(new, expected)


@pytest.mark.parametrize("model", ["switching"], indirect=True)
def test_without_recomputation_tokens_differ(
    register: Callable[..., None], model: Phi3ForCausalLM, expected: np.ndarray
) -> None:
    register("test-kept", switching, recompute=False)
    new = generate(model_of("test-kept", at=20))
    short = np.array(LENGTHS) <= 20
    np.testing.assert_array_equal((new != expected).any(axis=1), short)
