"""generate with rope frequencies handed in: what models of those configs make, without compiling for each."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
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


def under(twins: Twins, rope: dict[str, Any]) -> Phi3ForCausalLM:
    """A model of this rope with the same weights."""
    model = Phi3ForCausalLM(twins.config.replace(rope_scaling=rope), rngs=0)
    model.model.embed_tokens, model.model.norm = twins.model.model.embed_tokens, twins.model.model.norm
    model.model.layers, model.lm_head = twins.model.model.layers, twins.model.lm_head
    return model


def answers(model: Any, ids: np.ndarray, mask: np.ndarray, **options: Any) -> np.ndarray:
    asked = {"eos_token_id": [], "pad_token_id": PAD, "max_new_tokens": NEW, "do_sample": False}
    return np.asarray(model.generate(ids, mask, **asked | options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"num_beams": 3, "num_return_sequences": 2}, marks=pytest.mark.slow),
        {"prompt_lookup_num_tokens": 3},
        pytest.param({"guidance_scale": 1.5}, marks=pytest.mark.slow),
        {"do_sample": True, "seed": 3, "num_return_sequences": 2},
    ],
    ids=["greedy", "beams", "lookup", "guided", "drawn"],
)
def test_each_row_is_answered_under_its_own(shallow: Twins, options: dict[str, Any]) -> None:
    ids, mask = prompts(LENGTHS)
    given = [frequencies(shallow, rope, max(LENGTHS)) for rope in ROPES]
    made = answers(
        shallow.model,
        ids,
        mask,
        inv_freq=[inv_freq for inv_freq, _ in given],
        attention_scaling=[scaling for _, scaling in given],
        **options,
    )
    times = len(made) // 3
    for row in range(3) if not options else (1,):
        expected = answers(under(shallow, ROPES[row]), ids, mask, **options)
        mine = slice(row * times, (row + 1) * times)
        np.testing.assert_array_equal(made[mine], expected[mine])
    plain = answers(shallow.model, ids, mask, **options)
    assert (made != plain).any(axis=1).all()


def test_by_position(shallow: Twins) -> None:
    """Each row with as many unscaled positions as it likes, against the model on the whole text."""
    ids, mask = prompts(LENGTHS)
    plain, (scaled, _) = shallow.config.rope_base.inv_freq(), frequencies(shallow, ROPES[0], 20)
    initial = np.array([0, 4, 7])
    by_position = np.where((np.arange(8) < initial[:, None])[..., None], plain, scaled)
    made = answers(shallow.model, ids, mask, inv_freq=by_position)
    for row, length in enumerate(LENGTHS):
        tokens = made[row, 20 - length :]
        positions = np.minimum(np.arange(len(tokens)), 7)
        out = run(shallow.model, input_ids=tokens[None], inv_freq=by_position[row, positions][None])
        likeliest = np.asarray(out.logits)[0].argmax(-1)
        np.testing.assert_array_equal(likeliest[length - 1 : -1], tokens[length:])
    alone = answers(shallow.model, ids, mask, inv_freq=scaled)
    assert (made == alone).all(axis=1).tolist() == [True, False, False]


def test_a_list_that_is_given_is_not_left(twins_of: Callable[..., Twins]) -> None:
    """Beyond the original length a longrope model would go over to the long list."""
    lists = {"short_factor": SHORT, "long_factor": LONG}
    twins = twins_of(
        num_hidden_layers=1, original_max_position_embeddings=32, rope_scaling={"type": "longrope"} | lists
    )
    ids, mask = prompts(LENGTHS)
    short, scaling = frequencies(twins, {"type": "longrope"} | lists, 1)
    for options in ({}, {"prompt_lookup_num_tokens": 3}):
        made = answers(twins.model, ids, mask, inv_freq=short, attention_scaling=scaling, **options)
        np.testing.assert_array_equal(made, answers(twins.model, ids, mask, rope_list="short"))
    assert (made != answers(twins.model, ids, mask)).any()


def test_a_conversation_goes_on_under_them(shallow: Twins) -> None:
    ids, mask = prompts((20, 20))
    inv_freq, scaling = frequencies(shallow, ROPES[1], 20)
    given = {"inv_freq": inv_freq, "attention_scaling": scaling}
    whole = answers(shallow.model, ids, mask, **given)
    asked = {"eos_token_id": [], "pad_token_id": PAD, "do_sample": False, "return_dict_in_generate": True}
    first = shallow.model.generate(ids, mask, max_new_tokens=10, **asked, **given)
    second = shallow.model.generate(
        first.sequences, max_new_tokens=NEW - 10, past_key_values=first.past_key_values, **asked, **given
    )
    np.testing.assert_array_equal(np.asarray(second.sequences), whole)


def test_other_frequencies_compile_nothing(shallow: Twins) -> None:
    ids, mask = prompts(LENGTHS)
    given = [frequencies(shallow, rope, 20) for rope in ROPES]
    made = []
    for again in (False, True):
        with compilations() as programs:
            for inv_freq, scaling in given if again else given[:1]:
                made.append(answers(shallow.model, ids, mask, inv_freq=inv_freq, attention_scaling=scaling))
    assert programs == []
    assert not np.array_equal(made[1], made[2])


def test_shapes_are_checked(shallow: Twins) -> None:
    ids, mask = prompts(LENGTHS)
    with pytest.raises(ValueError, match=r"inv_freq has shape \[5\]; expected \[6\], \[3, 6\] or"):
        answers(shallow.model, ids, mask, inv_freq=np.ones(5))
    with pytest.raises(ValueError, match=r"inv_freq has shape \[2, 6\]"):
        answers(shallow.model, ids, mask, inv_freq=np.ones((2, 6)))
    with pytest.raises(ValueError, match=r"attention_scaling has shape \[2\]; expected a number or \[3\]"):
        answers(shallow.model, ids, mask, attention_scaling=np.ones(2))
