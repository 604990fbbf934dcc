"""Tests Phi-3-small's classifiers, and its training: stacked layers, packed rows, dropout, meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow
from phi3small import formulas, small_config
from reference import (
    CLASSES,
    assert_same_gradients,
    assert_same_leaves,
    distance,
    gradients,
    on_mesh,
    padding_mask,
    pair,
    random_ids,
    run,
)

from phi3_jax import Phi3SmallForCausalLM
from phi3_jax.errors import UserError
from phi3_jax.model.layer_stack import stack_layers, unstack_layers
from phi3_jax.parallel.sharding import make_mesh

TOLERANCE = 1e-5
LENGTH = 45


def split(mask, values):
    return [row[own == 1] for row, own in zip(values, mask, strict=True)]


@pytest.mark.parametrize(("kind", "side"), [("sequence", "left"), ("token", "right")])
def test_classifiers_match_the_formulas(kind, side, tmp_path):
    config = small_config(num_labels=3, classifier_dropout=0.0)
    ours, theirs = pair(kind, config, tmp_path)
    assert type(ours).__name__ == f"Phi3SmallFor{kind.title()}Classification"
    mask = padding_mask(3, LENGTH, side)
    ids = random_ids(config, mask)
    labels = np.arange(3) % 3 if kind == "sequence" else np.where(mask == 1, ids % 3, -100)
    out, ours_gradient = gradients(ours, input_ids=ids, attention_mask=mask, labels=labels)
    own_labels = [labels[i : i + 1] for i in range(3)] if kind == "sequence" else split(mask, labels)
    ref = formulas(theirs, split(mask, ids), own_labels)
    for row, expected in enumerate(ref.logits):
        logits = out.logits[row : row + 1] if kind == "sequence" else out.logits[row][mask[row] == 1]
        assert distance(logits, expected) <= TOLERANCE
    assert distance(out.loss, ref.loss) <= TOLERANCE
    assert_same_gradients(ours_gradient, ref, TOLERANCE)


STACKS = {
    "two kinds in turn": {"num_hidden_layers": 4},
    "three layers repeat": {"num_hidden_layers": 6, "dense_attention_every_n_layers": 3},
    "no repetition": {"num_hidden_layers": 3},
    "one kind": {"dense_attention_every_n_layers": None},
}


@pytest.mark.parametrize("case", [slow(case) if case != "one kind" else case for case in STACKS])
def test_stacked_layers_equal_a_list(case):
    model = Phi3SmallForCausalLM(small_config(**STACKS[case]), rngs=1)
    stack = stack_layers(model)
    ids = random_ids(model.config, np.ones((2, LENGTH), int))
    expected, expected_gradient = gradients(model, input_ids=ids, labels=ids)
    loss = jax.jit(jax.value_and_grad(lambda model: model(ids, labels=ids).loss))
    found, gradient = loss(stack)
    assert distance(found, expected.loss) <= 1e-6
    back = unstack_layers(gradient)
    assert [layer.self_attn.is_sparse for layer in back.model.layers] == [
        model.config.is_sparse(index) for index in range(model.config.num_hidden_layers)
    ]
    for index, layer in enumerate(back.model.layers):
        found_bias = np.asarray(layer.self_attn.dense.bias[...])
        expected_bias = expected_gradient[f"model.layers.{index}.self_attn.dense.bias"]
        assert distance(found_bias, expected_bias) <= TOLERANCE
    again = unstack_layers(stack)
    assert_same_leaves(again, model, 0)


def test_number_of_layers_in_a_stack():
    kinds = {}
    for case, changes in STACKS.items():
        kinds[case] = len(stack_layers(Phi3SmallForCausalLM(small_config(**changes))).model.layers.kinds)
    assert kinds == {"two kinds in turn": 2, "three layers repeat": 3, "no repetition": 3, "one kind": 1}


def test_packed_texts_restart_their_blocks():
    model = Phi3SmallForCausalLM(small_config(), rngs=1)
    rng = np.random.default_rng(0)
    texts = [rng.integers(4, 96, length) for length in (29, 37, 18)]
    row = np.concatenate(texts)[None]
    segments = np.concatenate([np.full(len(text), i + 1) for i, text in enumerate(texts)])[None]
    packed = np.split(np.asarray(run(model, input_ids=row, segment_ids=segments).logits[0]), [29, 66])
    for text, logits in zip(texts, packed, strict=True):
        assert distance(logits, run(model, input_ids=text[None]).logits[0]) <= TOLERANCE


def outputs(model, key):
    ids = random_ids(model.config, np.ones((1, LENGTH), int))
    return np.asarray(jax.jit(lambda model, key: model(ids, rngs=key).logits)(model, key))


def test_dropout_of_attention_acts_in_dense_layers_only():
    rates = {"attention_dropout": 0.5, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "num_hidden_layers": 1}
    key = jax.random.key(0)
    sparse = Phi3SmallForCausalLM(small_config(**rates, dense_attention_every_n_layers=None), rngs=1)
    np.testing.assert_array_equal(outputs(sparse, key), outputs(sparse, None))
    dense = Phi3SmallForCausalLM(small_config(**rates, dense_attention_every_n_layers=1), rngs=1)
    assert distance(outputs(dense, key), outputs(dense, None)) > 0.01


def test_dropout_of_a_layer_acts_after_the_mlp_only():
    rates = {"embd_pdrop": 0.0, "resid_pdrop": 0.5, "num_hidden_layers": 1}
    model, key = Phi3SmallForCausalLM(small_config(**rates), rngs=1), jax.random.key(0)
    assert distance(outputs(model, key), outputs(model, None)) > 0.01
    for layer in model.model.layers:
        for parameter in (layer.mlp.down_proj.weight, layer.mlp.down_proj.bias):
            parameter.set_value(jnp.zeros_like(parameter[...]))
    np.testing.assert_array_equal(outputs(model, key), outputs(model, None))


def test_dropout_of_embeddings_comes_before_their_multiplier():
    """A dropped element is zero, the others are larger by the rate and by the multiplier."""
    config = small_config(embd_pdrop=0.5, resid_pdrop=0.0, num_hidden_layers=1)
    model = Phi3SmallForCausalLM(config, rngs=1)
    ids = random_ids(config, np.ones((1, LENGTH), int))
    states = model(ids, rngs=jax.random.key(0), output_hidden_states=True).hidden_states[0]
    kept = np.asarray(states != 0)
    assert 0.4 < kept.mean() < 0.6
    whole = model(ids, output_hidden_states=True).hidden_states[0]
    assert distance(states, np.where(kept, 2 * np.asarray(whole), 0)) <= 1e-6
    assert distance(whole, 1.7 * np.asarray(model.model.embed_tokens(jnp.asarray(ids)))) <= 1e-6


def test_new_weights_are_drawn_as_by_the_remote_code():
    config = small_config(hidden_size=256, intermediate_size=512, initializer_range=0.02)
    layer = Phi3SmallForCausalLM(config).model.layers[0]
    up, down = layer.mlp.up_proj, layer.mlp.down_proj
    assert np.std(up.weight[...]) == pytest.approx(0.02, rel=0.02)
    assert np.std(down.weight[...]) == pytest.approx(0.02 / 4**0.5, rel=0.02)
    assert np.std(layer.self_attn.dense.weight[...]) == pytest.approx(0.02, rel=0.02)
    assert np.abs(up.bias[...]).max() == pytest.approx(256**-0.5, rel=0.02)
    assert np.abs(down.bias[...]).max() == pytest.approx(512**-0.5, rel=0.02)
    assert not np.asarray(layer.input_layernorm.bias[...]).any()


@pytest.mark.parametrize("mesh", ["fsdp=2,context=2,tensor=2", slow("fsdp=8"), slow("data=4,tensor=2")])
@pytest.mark.parametrize("kind", ["causal", slow("token")])
def test_loss_and_gradients_on_a_mesh_equal_one_device(kind, mesh):
    config = small_config(num_labels=3)
    one = CLASSES[kind][1].for_config(config)(config, rngs=1)
    mask = padding_mask(8, 48, "left")
    ids = random_ids(config, mask)
    labels = np.where(mask == 1, ids % (96 if kind == "causal" else 3), -100)
    if kind == "causal":
        labels[np.cumsum(mask, axis=1) == 1] = -100  # padding would predict the first token of a row

    @jax.jit
    def step(model):
        return jax.value_and_grad(lambda model: model(ids, mask, labels=labels).loss)(model)

    several = stack_layers(on_mesh(one, make_mesh(mesh)))
    expected, expected_gradient = step(one)
    loss, gradient = step(several)
    assert distance(loss, expected) <= TOLERANCE
    assert_same_leaves(unstack_layers(gradient), expected_gradient, 2e-5)


def test_rejects_label_smoothing_of_dummy_tokens():
    config = small_config(vocab_size=100352, num_hidden_layers=1, hidden_size=16, intermediate_size=8)
    model = Phi3SmallForCausalLM(config)
    ids = np.array([[4, 5, 6]])
    hidden = model.model(ids).last_hidden_state
    with pytest.raises(UserError, match=r"label_smoothing=0\.1 would give probability to ids of no token"):
        model.cross_entropy_sum(hidden, jnp.asarray(ids), 0.1)
