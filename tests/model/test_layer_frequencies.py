"""Tests rope frequencies that differ by layer, by key/value head and by row."""

import jax
import numpy as np
import pytest
from compilations import compilations
from reference import (
    GROUPED,
    assert_same_leaves,
    distance,
    gradients,
    on_mesh,
    pair,
    random_ids,
    run,
    small_config,
    small_vocabulary_config,
)
from strict_settings import strict_settings
from their_layer_ropes import outputs_of_theirs, unequal_frequencies

from phi3_jax import LayerFrequencies, Phi3ForCausalLM, make_mesh
from phi3_jax.model.layer_stack import stack_layers, unstack_layers
from phi3_jax.model.remat import REMAT_POLICIES

TOLERANCE = 1e-5
LENGTH = 20

CASES = {
    "by layer": {"by_head": False},
    "by head": {},
    "by row": {"rows": 2},
}


def ids_of(config, rows=2):
    return random_ids(config, np.ones((rows, LENGTH), np.int64))


def whole(frequencies, config, rows=2):
    """Returns the arrays that the reference takes."""
    inv_freq, scaling = frequencies.with_all_axes(config, rows)
    return inv_freq.squeeze(1), scaling


@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(case, tmp_path):
    partial = {"partial_rotary_factor": 0.5} if case == "by head" else {}
    config = small_vocabulary_config(**partial)
    ours, theirs = pair("causal", config, tmp_path)
    ids, frequencies = ids_of(config), unequal_frequencies(config, **CASES[case])
    expected = outputs_of_theirs(theirs, ids, *whole(frequencies, config))
    with strict_settings():
        out, gradient = gradients(ours, input_ids=ids, labels=ids, inv_freq=frequencies)
    assert distance(out.logits, expected["logits"]) <= TOLERANCE
    assert float(out.loss) == pytest.approx(float(expected["loss"]), rel=TOLERANCE)
    assert gradient.keys() == expected["gradients"].keys()
    for name, each in expected["gradients"].items():
        assert distance(gradient[name], each) <= TOLERANCE, name


def test_stacked_layers_have_the_same_gradients():
    config = small_vocabulary_config(num_hidden_layers=3)
    model, ids = Phi3ForCausalLM(config), ids_of(config)
    frequencies = unequal_frequencies(config, rows=2)

    @jax.jit
    def gradient(model, frequencies):
        def loss(model, frequencies):
            return model(ids, labels=ids, inv_freq=frequencies).loss

        return jax.grad(loss, argnums=(0, 1))(model, frequencies)

    expected = gradient(model, frequencies)
    stacked = stack_layers(model)
    stacked.decoder.remat_policy = REMAT_POLICIES["full"]
    layers, by_frequency = gradient(stacked, frequencies)
    assert_same_leaves(unstack_layers(layers), expected[0])
    assert_same_leaves(by_frequency, expected[1])
    assert min(float(np.abs(each).min()) for each in jax.tree.leaves(expected[1])) > 0


def test_chunks_through_a_cache_match_the_whole_forward():
    config = small_vocabulary_config(sliding_window=7)
    model, ids = Phi3ForCausalLM(config), ids_of(config)
    frequencies = unequal_frequencies(config, rows=2)
    expected = run(model, input_ids=ids, inv_freq=frequencies).logits
    cache, parts = model.init_cache(2, 32), []
    for part in np.split(ids, [10], axis=1):
        out = run(model, input_ids=part, past_key_values=cache, inv_freq=frequencies)
        cache = out.past_key_values
        parts.append(out.logits)
    assert distance(np.concatenate(parts, axis=1), expected) <= TOLERANCE
    plain = run(model, input_ids=ids).logits
    assert distance(plain, expected) > 1e-2


def test_equal_frequencies_of_all_layers_are_those_of_the_rope():
    config = small_vocabulary_config()
    model, ids = Phi3ForCausalLM(config), ids_of(config)
    inv_freq = config.rope_base.inv_freq() / np.linspace(1, 3, 6, dtype=np.float32)
    expected = run(model, input_ids=ids, inv_freq=inv_freq, attention_scaling=1.2).logits
    by_position = np.tile(inv_freq, (1, LENGTH, 2, 1, 1))
    for frequencies in (
        LayerFrequencies(np.tile(inv_freq, (2, 1)), 1.2),
        LayerFrequencies(by_position, np.full((1, 2, 1), 1.2, np.float32)),
    ):
        assert distance(run(model, input_ids=ids, inv_freq=frequencies).logits, expected) <= 1e-6


REJECTED = {
    "layers": (
        (3, 6),
        (),
        r"has shape \[3, 6\]; expected \[2, 6\], \[2, 2, 6\] or \[2, 2, 2, 6\], or \[2, 20,",
    ),
    "pairs": ((2, 5), (), r"inv_freq of LayerFrequencies has shape \[2, 5\]"),
    "all layers at once": ((1, 6), (), r"inv_freq of LayerFrequencies has shape \[1, 6\]"),
    "heads": ((2, 4, 6), (), r"inv_freq of LayerFrequencies has shape \[2, 4, 6\]"),
    "rows": ((3, 2, 2, 6), (), r"inv_freq of LayerFrequencies has shape \[3, 2, 2, 6\]"),
    "positions": ((2, 7, 2, 2, 6), (), r"inv_freq of LayerFrequencies has shape \[2, 7, 2, 2, 6\]"),
    "factors": ((2, 6), (3,), r"attention_scaling of .* shape \[3\]; expected a number, \[2\], \[2, 2\] or"),
    "factors of rows": ((2, 6), (3, 2, 2), r"attention_scaling of LayerFrequencies has shape \[3, 2, 2\]"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejects_other_shapes(case):
    inv_freq, scaling, message = REJECTED[case]
    model = Phi3ForCausalLM(small_vocabulary_config())
    frequencies = LayerFrequencies(np.ones(inv_freq, np.float32), np.ones(scaling, np.float32))
    with pytest.raises(ValueError, match=message):
        model(ids_of(model.config), inv_freq=frequencies)
    if case != "positions":
        with pytest.raises(ValueError, match=message.split("; ")[0]):
            model.generate(ids_of(model.config), inv_freq=frequencies)


def test_rejects_a_second_factor():
    model = Phi3ForCausalLM(small_vocabulary_config(num_hidden_layers=1))
    frequencies = unequal_frequencies(model.config)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="LayerFrequencies has its own attention_scaling; give no other"):
            call(ids_of(model.config), inv_freq=frequencies, attention_scaling=1.0)


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"num_beams": 2}, marks=pytest.mark.slow)], ids=["greedy", "beams"]
)
def test_generates_with_frequencies_of_layers(options):
    """Each row of a batch has its own; other frequencies compile nothing."""
    config = small_vocabulary_config()
    model = Phi3ForCausalLM(config, rngs=1)
    ids, frequencies = ids_of(config)[:, :9], unequal_frequencies(config, rows=2)
    settings = {"eos_token_id": [], "max_new_tokens": 11, "do_sample": False, **options}
    answers = np.asarray(model.generate(ids, inv_freq=frequencies, **settings))
    for row in range(2):
        own = LayerFrequencies(*(each[row] for each in frequencies))
        if options:
            alone = model.generate(ids[row : row + 1], inv_freq=own, **settings)
            np.testing.assert_array_equal(np.asarray(alone)[0], answers[row])
        else:
            greedy = np.asarray(run(model, input_ids=answers[row : row + 1], inv_freq=own).logits)[0].argmax(
                -1
            )
            np.testing.assert_array_equal(greedy[8:-1], answers[row, 9:])
    with compilations() as programs:
        swapped = LayerFrequencies(*(each[::-1] for each in frequencies))
        other = np.asarray(model.generate(ids, inv_freq=swapped, **settings))
    assert programs == []
    assert (other != answers).any(axis=1).all()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["fsdp=2,tensor=2,context=2", "data=2,tensor=4"])
def test_matches_one_device_on_a_mesh(sizes):
    config = small_config(**GROUPED)
    one, ids = Phi3ForCausalLM(config), random_ids(config, np.ones((4, 24), np.int64))
    frequencies = unequal_frequencies(config, rows=4)

    @jax.jit
    def gradient(model, frequencies):
        return jax.grad(lambda model: model(ids, labels=ids, inv_freq=frequencies).loss)(model)

    divided = gradient(stack_layers(on_mesh(one, make_mesh(sizes))), frequencies)
    assert_same_leaves(unstack_layers(divided), gradient(one, frequencies), 2e-5)
