"""Tests that generation on eight devices returns the same ids as on one device."""

import numpy as np
import pytest
from marks import slow
from reference import longrope, on_mesh, small_config
from twins import PAD, prompts

from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.parallel.sharding import make_mesh

GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 12, "num_hidden_layers": 1}
LONG = {"max_position_embeddings": 64, **longrope()}

OTHERS = [slow(mesh) for mesh in ("fsdp=8", "data=2,tensor=4", "context=8")]

MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8, "seed": 7},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "guidance": {"do_sample": False, "guidance_scale": 1.4},
    "int8": {"do_sample": False, "cache_implementation": "quantized"},
}


@pytest.fixture(scope="module")
def one():
    """A longrope model whose short list ends at 16 tokens, which some rows pass."""
    return Phi3ForCausalLM(small_config(**GROUPED, **LONG))


FEW = ("greedy",)


@pytest.mark.parametrize("mode", [*FEW, *(slow(mode) for mode in MODES if mode not in FEW)])
@pytest.mark.parametrize("mesh", ["fsdp=2,context=2,tensor=2", *OTHERS])
def test_generate_matches_one_device(one, mesh, mode):
    """Three rows of different lengths, padded on the left, run on two or eight devices."""
    ids, mask = prompts([5, 14, 11])
    options = {"max_new_tokens": 12, "eos_token_id": [], "pad_token_id": PAD} | MODES[mode]
    several = on_mesh(one, make_mesh(mesh))
    expected = np.asarray(one.generate(ids, mask, **options))
    np.testing.assert_array_equal(np.asarray(several.generate(ids, mask, **options)), expected)


@pytest.mark.slow
def test_an_assistant_on_the_same_mesh(one):
    mesh = make_mesh("data=2,tensor=4")
    assistant = Phi3ForCausalLM(small_config(**GROUPED, **LONG), rngs=5)
    ids, mask = prompts([5, 14, 11])
    options = {"max_new_tokens": 12, "eos_token_id": [], "pad_token_id": PAD, "do_sample": False}
    expected = np.asarray(one.generate(ids, mask, assistant_model=assistant, **options))
    ids_on_mesh = on_mesh(one, mesh).generate(ids, mask, assistant_model=on_mesh(assistant, mesh), **options)
    np.testing.assert_array_equal(np.asarray(ids_on_mesh), expected)


@pytest.mark.slow
def test_continues_from_a_returned_cache(one):
    several = on_mesh(one, make_mesh("fsdp=2,context=2,tensor=2"))
    options = {"eos_token_id": [], "pad_token_id": PAD, "do_sample": False, "return_dict_in_generate": True}
    results = []
    for model in (one, several):
        ids, _ = prompts([9, 9])
        first = model.generate(ids, max_new_tokens=5, **options)
        more = np.concatenate([np.asarray(first.sequences), [[7, 8], [9, 10]]], axis=1)
        second = model.generate(more, max_new_tokens=8, past_key_values=first.past_key_values, **options)
        results.append(np.asarray(second.sequences))
    np.testing.assert_array_equal(results[1], results[0])


@pytest.mark.slow
def test_a_ring_on_a_mesh():
    one = Phi3ForCausalLM(small_config(**GROUPED, sliding_window=9))
    several = on_mesh(one, make_mesh("fsdp=2,context=2,tensor=2"))
    ids, mask = prompts([5, 14, 11])
    options = {"max_new_tokens": 20, "eos_token_id": [], "pad_token_id": PAD, "do_sample": False}
    options["cache_implementation"] = "sliding_window"
    expected = np.asarray(one.generate(ids, mask, **options))
    np.testing.assert_array_equal(np.asarray(several.generate(ids, mask, **options)), expected)
