"""Tests models as pytrees, gradient checkpointing, and changes of the vocabulary's size."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answers import stored
from flax import nnx
from marks import slow
from reference import distance, gradients, pair, random_ids, run, small_config

from phi3_jax import Phi3ForCausalLM, Phi3ForSequenceClassification, Phi3ForTokenClassification, Phi3Model
from phi3_jax.model.abstract import abstract_model

TOLERANCE = 1e-5
IDS = np.array([[5, 6, 7, 8], [9, 10, 11, 12]])


# Pytrees


def test_a_model_is_a_pytree():
    config = small_config()
    model = Phi3ForCausalLM(config)
    doubled = jax.tree.map(lambda x: 2 * x, model)
    assert isinstance(doubled, Phi3ForCausalLM)
    assert doubled.config == config
    np.testing.assert_array_equal(doubled.model.norm.weight[...], 2 * model.model.norm.weight[...])
    other = Phi3ForCausalLM(config, rngs=1)
    assert jax.tree.structure(other) == jax.tree.structure(model)
    difference = jax.tree.map(lambda a, b: a - b, model, other)
    assert float(jnp.abs(difference.lm_head.weight[...]).max()) > 0
    assert jax.tree.structure(Phi3ForCausalLM(config.replace(rope_theta=5e4))) != jax.tree.structure(model)


@pytest.mark.parametrize("tied", [False, True])
def test_no_variable_is_shared(tied):
    model = Phi3ForCausalLM(small_config(tie_word_embeddings=tied))
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))]
    variables = [v for _, v in nnx.iter_graph(model) if isinstance(v, nnx.Variable)]
    leaves = jax.tree.leaves(model)
    assert len(paths) == len(variables) == len(leaves) == len({id(leaf) for leaf in leaves})
    assert any("lm_head" in path for path in paths) is not tied


def test_split_merge_and_pickle_keep_the_model():
    model = Phi3ForCausalLM(small_config())
    expected = run(model, input_ids=IDS).logits
    again = nnx.merge(*nnx.split(model))
    np.testing.assert_array_equal(run(again, input_ids=IDS).logits, expected)
    loaded = pickle.loads(pickle.dumps(model))
    assert loaded.config == model.config
    np.testing.assert_array_equal(run(loaded, input_ids=IDS).logits, expected)


def test_flax_transforms_take_models():
    model = Phi3ForCausalLM(small_config())
    logits = nnx.jit(lambda m: m(IDS).logits)(model)
    assert distance(logits, run(model, input_ids=IDS).logits) <= TOLERANCE
    mine = nnx.jit(nnx.grad(lambda m: m(IDS, labels=IDS).loss))(model)
    _, expected = gradients(model, input_ids=IDS, labels=IDS)
    flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(mine)}
    assert flat.keys() == expected.keys()
    assert distance(flat["lm_head.weight"][...], expected["lm_head.weight"]) <= TOLERANCE


def test_classes_have_config_dtype_and_output_shapes():
    config = small_config(num_labels=3)
    for cls, shape in (
        (Phi3ForTokenClassification, (2, 4, 3)),
        (Phi3ForSequenceClassification, (2, 3)),
        (Phi3ForCausalLM, (2, 4, 96)),
    ):
        model = cls(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        assert model.config == config
        assert model.dtype == jnp.bfloat16
        assert model.num_parameters() == sum(leaf.size for leaf in jax.tree.leaves(model))
        assert jax.eval_shape(lambda m: m(IDS).logits, model).shape == shape
    assert jax.eval_shape(lambda m: m(IDS), Phi3Model(config)).last_hidden_state.shape == (2, 4, 48)


def test_initial_weights_have_the_scale_of_the_config():
    config = small_config(initializer_range=0.05, hidden_size=96)
    model = Phi3ForCausalLM(config)
    embedding = np.asarray(model.get_input_embeddings().weight[...])
    assert (embedding[config.pad_token_id] == 0).all()
    assert embedding.std() == pytest.approx(0.05, rel=0.05)
    layer = model.model.layers[1]
    for weight in (layer.self_attn.qkv_proj.weight, layer.mlp.down_proj.weight, model.lm_head.weight):
        assert np.std(weight[...]) == pytest.approx(0.05, rel=0.05)
        assert abs(np.mean(weight[...])) < 0.005
    assert (np.asarray(layer.input_layernorm.weight[...]) == 1).all()
    same, other = Phi3ForCausalLM(config, rngs=0), Phi3ForCausalLM(config, rngs=1)
    np.testing.assert_array_equal(same.lm_head.weight[...], model.lm_head.weight[...])
    assert (np.asarray(other.lm_head.weight[...]) != np.asarray(model.lm_head.weight[...])).any()


# Gradient checkpointing


POLICIES = {"nothing": None, "dots": jax.checkpoint_policies.dots_saveable}


def count_remats(model):
    """Counts the rematerialised pieces of the gradient, under both names in JAX, and its products."""
    text = str(jax.make_jaxpr(jax.grad(lambda m: m(IDS, labels=IDS).loss))(model))
    return text.count("= remat"), text.count("= checkpoint"), text.count("dot_general")


@pytest.mark.parametrize("policy", [name if name == "nothing" else slow(name) for name in POLICIES])
def test_gradient_checkpointing_keeps_the_gradients(policy):
    config = small_config(resid_pdrop=0.2, attention_dropout=0.2, sliding_window=3)
    model = Phi3ForCausalLM(config)
    arguments = {"input_ids": IDS, "labels": IDS, "rngs": jax.random.key(0)}
    plain_out, plain = gradients(model, **arguments)
    without = count_remats(model)
    assert without[:2] == (0, 0)
    model.gradient_checkpointing_enable(POLICIES[policy])
    out, mine = gradients(model, **arguments)
    remat, checkpoint, products = count_remats(model)
    assert remat + checkpoint >= config.num_hidden_layers
    assert (products > without[2]) == (policy == "nothing"), (
        "the policy decides whether products are computed again"
    )
    assert distance(out.loss, plain_out.loss) <= 1e-6
    for name, value in plain.items():
        assert distance(mine[name], value) <= 1e-6, name
    model.gradient_checkpointing_disable()
    assert count_remats(model) == without


# Vocabularies


@stored
def grown(theirs, ids):
    """Returns the reference's size and logits at 300 or more tokens; new rows are the mean of the old."""
    import torch

    model, old = theirs.model, theirs.config.vocab_size
    model.resize_token_embeddings(300, pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            weight[old:] = weight[:old].mean(dim=0)
        return model.config.vocab_size, model(torch.tensor(ids), use_cache=False).logits


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("tied", [False, True])
def test_grown_vocabulary_matches_transformers(tied, mean, tmp_path):
    ours, theirs = pair("causal", small_config(tie_word_embeddings=tied), tmp_path / "first")
    before = [np.asarray(w[...]) for w in ours._vocabulary_weights()]
    assert len(before) == (1 if tied else 2)
    embeddings = ours.resize_token_embeddings(300, pad_to_multiple_of=64, mean_resizing=mean)
    assert embeddings is ours.get_input_embeddings()
    after = [np.asarray(w[...]) for w in ours._vocabulary_weights()]
    for old, new in zip(before, after, strict=True):
        assert new.shape == (320, 48)
        np.testing.assert_array_equal(new[:96], old)
        if mean:
            np.testing.assert_allclose(new[96:], np.broadcast_to(old.mean(axis=0), (224, 48)), atol=1e-6)
        else:
            assert new[96:].std() == pytest.approx(0.15, rel=0.05)
            assert len(np.unique(new[96:, 0])) > 200
    if not tied and not mean:
        assert (after[0][96:] != after[1][96:]).any()
    ids = random_ids(ours.config, np.ones((2, 6), np.int64))
    assert ids.max() > 96
    size, logits = grown(theirs, ids)
    assert ours.config.vocab_size == size == 320
    assert jax.tree.structure(abstract_model(Phi3ForCausalLM, ours.config)) == jax.tree.structure(ours)
    if mean:
        assert distance(run(ours, input_ids=ids).logits, logits) <= TOLERANCE


@pytest.mark.live
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_a_grown_model(tied, mean, tmp_path):
    import torch
    import transformers

    ours = Phi3ForCausalLM(small_config(tie_word_embeddings=tied))
    ours.resize_token_embeddings(300, pad_to_multiple_of=64, mean_resizing=mean)
    ours.save_pretrained(tmp_path)
    theirs = transformers.Phi3ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = random_ids(ours.config, np.ones((2, 6), np.int64))
    with torch.no_grad():
        assert distance(run(ours, input_ids=ids).logits, theirs(torch.tensor(ids)).logits) <= TOLERANCE


def test_rows_are_rounded_up_alone():
    model = Phi3ForCausalLM(small_config())
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert model.config.vocab_size == 96
    assert model.resize_token_embeddings(pad_to_multiple_of=64).weight.shape == (128, 48)


@pytest.mark.parametrize("tied", [False, True])
def test_replaces_embeddings(tied):
    """The logits are those of the model that the layers come from, where all else is equal."""
    model, other = (
        Phi3ForCausalLM(small_config(tie_word_embeddings=tied, num_hidden_layers=1), rngs=n) for n in (0, 1)
    )
    expected = jax.tree.map(lambda x: x, model)
    expected.model.embed_tokens = other.model.embed_tokens
    expected.lm_head = other.lm_head
    assert model.get_output_embeddings() is (model.get_input_embeddings() if tied else model.lm_head)
    model.set_output_embeddings(other.get_output_embeddings())
    if not tied:
        model.set_input_embeddings(other.get_input_embeddings())
    assert jax.tree.all(jax.tree.map(np.array_equal, model, expected))
    wrong = Phi3ForCausalLM(small_config(tie_word_embeddings=tied, vocab_size=64, num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"with a weight of shape \[64, 48\]; expected .* with \[96, 48\]"):
        model.set_input_embeddings(wrong.get_input_embeddings())
    with pytest.raises(ValueError, match=r"the new (output )?embeddings are a RMSNorm"):
        model.set_output_embeddings(other.model.norm)


def test_models_without_an_output_layer():
    assert Phi3Model(small_config(num_hidden_layers=1)).get_output_embeddings() is None


def test_new_rows_depend_on_the_seed():
    def new_rows(seed):
        model = Phi3ForCausalLM(small_config())
        return np.asarray(model.resize_token_embeddings(100, mean_resizing=False, rngs=seed).weight[96:])

    np.testing.assert_array_equal(new_rows(0), new_rows(0))
    assert (new_rows(0) != new_rows(1)).all()


@pytest.mark.parametrize("tied", [False, True])
def test_shrunk_vocabulary_keeps_its_first_logits(tied):
    model = Phi3ForCausalLM(small_config(tie_word_embeddings=tied))
    expected = np.asarray(run(model, input_ids=IDS).logits)
    model.resize_token_embeddings(20)
    assert model.config.vocab_size == 20
    assert distance(run(model, input_ids=IDS).logits, expected[..., :20]) <= TOLERANCE
    with pytest.raises(ValueError, match=r"input_ids\[0, 0\] = 20 is outside the vocabulary of 20"):
        model(np.array([[20]]))


def test_classifier_with_a_resized_vocabulary_keeps_its_score():
    model = Phi3ForSequenceClassification(small_config(num_labels=3))
    model.resize_token_embeddings(128)
    assert model.config.vocab_size == 128
    assert model.score.weight.shape == (3, 48)
    assert run(model, input_ids=np.array([[127]])).logits.shape == (1, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"new_num_tokens": 0}, "vocab_size=0 must be a positive integer"),
        ({"new_num_tokens": 3}, "pad_token_id=3 is outside the vocabulary; with vocab_size=3"),
        ({"new_num_tokens": 2, "pad_to_multiple_of": 3}, "pad_token_id=3 is outside the vocabulary"),
        ({"new_num_tokens": 100, "pad_to_multiple_of": 0}, "pad_to_multiple_of=0 must be positive"),
    ],
)
def test_rejects_impossible_vocabulary_sizes(arguments, message):
    model = Phi3ForCausalLM(small_config())
    with pytest.raises(ValueError, match=message):
        model.resize_token_embeddings(**arguments)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == 96
