"""Tests that rope frequencies as arguments act like those of a config, without compiling again."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from marks import slow
from reference import LONG, SHORT, run
from twins import PAD, Twins, prompts

from phi3_jax import Phi3ForCausalLM
from phi3_jax.config.rope_scaling import RopeScaling

LENGTHS = (20, 13, 5)
ROPES = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"type": "longrope", "short_factor": SHORT, "long_factor": LONG, "attention_factor": 1.3},
]
NEW = 24


def frequencies(twins: Twins, rope: dict[str, Any], length: int) -> tuple[np.ndarray, float]:
    config = twins.config.replace(rope_scaling=rope)
    found, scaling = RopeScaling.from_dict(rope).frequencies(config.rope_base, jnp.array([length]))
    return np.asarray(found).reshape(-1), float(scaling)


def model_with(twins: Twins, rope: dict[str, Any]) -> Phi3ForCausalLM:
    """Returns a model of this rope with the same weights."""
    model = Phi3ForCausalLM(twins.config.replace(rope_scaling=rope), rngs=0)
    model.model.embed_tokens, model.model.norm = twins.model.model.embed_tokens, twins.model.model.norm
    model.model.layers, model.lm_head = twins.model.model.layers, twins.model.lm_head
    return model


def answers(model: Any, ids: np.ndarray, mask: np.ndarray, **options: Any) -> np.ndarray:
    settings = {"eos_token_id": [], "pad_token_id": PAD, "max_new_tokens": NEW, "do_sample": False}
    return np.asarray(model.generate(ids, mask, **settings | options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        slow({"num_beams": 3, "num_return_sequences": 2}),
        slow({"prompt_lookup_num_tokens": 3}),
        slow({"guidance_scale": 1.5}),
        slow({"do_sample": True, "seed": 3, "num_return_sequences": 2}),
    ],
    ids=["greedy", "beams", "lookup", "guided", "drawn"],
)
def test_each_row_has_its_own_frequencies(shallow: Twins, options: dict[str, Any]) -> None:
    ids, mask = prompts(LENGTHS)
    ropes = [frequencies(shallow, rope, max(LENGTHS)) for rope in ROPES]
    new = answers(
        shallow.model,
        ids,
        mask,
        inv_freq=[inv_freq for inv_freq, _ in ropes],
        attention_scaling=[scaling for _, scaling in ropes],
        **options,
    )
    times = len(new) // 3
    for row in range(3) if not options else (1,):
        expected = answers(model_with(shallow, ROPES[row]), ids, mask, **options)
        own = slice(row * times, (row + 1) * times)
        np.testing.assert_array_equal(new[own], expected[own])
    plain = answers(shallow.model, ids, mask, **options)
    assert (new != plain).any(axis=1).all()


@pytest.mark.slow
def test_frequencies_by_position(shallow: Twins) -> None:
    """Gives each row its own number of unscaled positions; compares with the model on the whole text."""
    ids, mask = prompts(LENGTHS)
    plain, (scaled, _) = shallow.config.rope_base.inv_freq(), frequencies(shallow, ROPES[0], 20)
    initial = np.array([0, 4, 7])
    by_position = np.where((np.arange(8) < initial[:, None])[..., None], plain, scaled)
    new = answers(shallow.model, ids, mask, inv_freq=by_position)
    for row, length in enumerate(LENGTHS):
        tokens = new[row, 20 - length :]
        positions = np.minimum(np.arange(len(tokens)), 7)
        out = run(shallow.model, input_ids=tokens[None], inv_freq=by_position[row, positions][None])
        greedy = np.asarray(out.logits)[0].argmax(-1)
        np.testing.assert_array_equal(greedy[length - 1 : -1], tokens[length:])
    alone = answers(shallow.model, ids, mask, inv_freq=scaled)
    assert (new == alone).all(axis=1).tolist() == [True, False, False]


def test_an_explicit_list_never_switches(twins_of: Callable[..., Twins]) -> None:
    """Beyond the original length the model itself would switch to the long list."""
    lists = {"short_factor": SHORT, "long_factor": LONG}
    twins = twins_of(
        num_hidden_layers=1, original_max_position_embeddings=32, rope_scaling={"type": "longrope"} | lists
    )
    ids, mask = prompts(LENGTHS)
    short, scaling = frequencies(twins, {"type": "longrope"} | lists, 1)
    for options in ({}, {"prompt_lookup_num_tokens": 3}):
        new = answers(twins.model, ids, mask, inv_freq=short, attention_scaling=scaling, **options)
        np.testing.assert_array_equal(new, answers(twins.model, ids, mask, rope_list="short"))
    assert (new != answers(twins.model, ids, mask)).any()


@pytest.mark.slow
def test_a_second_call_continues_with_them(shallow: Twins) -> None:
    ids, mask = prompts((20, 20))
    inv_freq, scaling = frequencies(shallow, ROPES[1], 20)
    rope = {"inv_freq": inv_freq, "attention_scaling": scaling}
    whole = answers(shallow.model, ids, mask, **rope)
    settings = {"eos_token_id": [], "pad_token_id": PAD, "do_sample": False, "return_dict_in_generate": True}
    first = shallow.model.generate(ids, mask, max_new_tokens=10, **settings, **rope)
    second = shallow.model.generate(
        first.sequences, max_new_tokens=NEW - 10, past_key_values=first.past_key_values, **settings, **rope
    )
    np.testing.assert_array_equal(np.asarray(second.sequences), whole)


def test_other_frequencies_compile_nothing(shallow: Twins) -> None:
    ids, mask = prompts(LENGTHS)
    ropes = [frequencies(shallow, rope, 20) for rope in ROPES]
    results = []
    for again in (False, True):
        with compilations() as programs:
            for inv_freq, scaling in ropes if again else ropes[:1]:
                results.append(
                    answers(shallow.model, ids, mask, inv_freq=inv_freq, attention_scaling=scaling)
                )
    assert programs == []
    assert not np.array_equal(results[1], results[2])


def test_rejects_other_shapes(shallow: Twins) -> None:
    ids, mask = prompts(LENGTHS)
    with pytest.raises(ValueError, match=r"inv_freq has shape \[5\]; expected \[6\], \[3, 6\] or"):
        answers(shallow.model, ids, mask, inv_freq=np.ones(5))
    with pytest.raises(ValueError, match="inv_freq has values that are not finite in float32"):
        answers(shallow.model, ids, mask, inv_freq=np.array([1, 1, 1, np.nan, 1, 1]))
    with pytest.raises(ValueError, match="attention_scaling has values that are not finite in float32"):
        answers(shallow.model, ids, mask, attention_scaling=1e39)
    with pytest.raises(ValueError, match=r"inv_freq has shape \[2, 6\]"):
        answers(shallow.model, ids, mask, inv_freq=np.ones((2, 6)))
    with pytest.raises(ValueError, match=r"attention_scaling has shape \[2\]; expected a number or \[3\]"):
        answers(shallow.model, ids, mask, attention_scaling=np.ones(2))
