"""Tests numbers that other implementations of Phi-3 publish in their tests, and sizes of the family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answers import stored
from flax import nnx
from reference import run

from phi3_jax import Phi3Config, Phi3ForCausalLM, Phi3ForSequenceClassification
from phi3_jax.model.rope import apply_rope, rope_tables


@pytest.mark.live  # for PyTorch's random numbers
def test_rope_matches_torchtune():
    import torch

    torch.manual_seed(0)
    x = torch.randn(4, 60, 32, 96).numpy()
    config = Phi3Config.preset("phi-3-mini-4k-instruct")
    at = jnp.arange(60)[None]
    rotated = np.asarray(apply_rope(jnp.asarray(x), *rope_tables(config, at, jnp.array([60]))), np.float64)
    assert rotated.mean() == pytest.approx(-0.0005, abs=1e-4)
    assert rotated.sum() == pytest.approx(-381.062, abs=2e-3)
    # The sums do not show that it is a rotation by position; lengths and the first position do.
    np.testing.assert_array_equal(rotated[:, 0], x[:, 0])
    np.testing.assert_allclose(np.square(rotated).sum(axis=-1), np.square(x).sum(axis=-1), rtol=1e-5)


def ramp(*shape):
    """Returns a tensor filled as torchtune's tests fill it."""
    size = int(np.prod(shape))
    return (-0.25 + np.arange(size) * (0.75 / size)).astype(np.float32).reshape(shape)


@stored
def random_tokens(seed, vocab):
    """Returns PyTorch's random token ids, [2, 100]."""
    import torch

    torch.manual_seed(seed)
    return torch.randint(0, vocab, (2, 100))


def test_tiny_model_matches_torchtune():
    """Every unfused tensor is a ramp, so the order of the fused rows matters."""
    vocab, hidden, ffn, head_dim = 32000, 128, 256, 8
    config = Phi3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        pad_token_id=None,
        eos_token_id=None,
    )
    model = Phi3ForCausalLM(config)
    queries = ramp(16 * head_dim, hidden).reshape(8, 2, head_dim, hidden)
    keys = ramp(8 * head_dim, hidden).reshape(8, 1, head_dim, hidden)
    gate = up = ramp(ffn, hidden)
    model.model.embed_tokens.weight.set_value(jnp.asarray(ramp(vocab, hidden)))
    model.lm_head.weight.set_value(jnp.asarray(ramp(vocab, hidden)))
    model.model.norm.weight.set_value(jnp.asarray(ramp(hidden)))
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        attention.qkv_proj.weight.set_value(jnp.asarray(np.concatenate([queries, keys, keys], axis=1)))
        attention.o_proj.weight.set_value(jnp.asarray(ramp(hidden, hidden).reshape(hidden, 8, 2, head_dim)))
        mlp.gate_up_proj.weight.set_value(jnp.asarray(np.stack([gate, up])))
        mlp.down_proj.weight.set_value(jnp.asarray(ramp(hidden, ffn)))
        layer.input_layernorm.weight.set_value(jnp.asarray(ramp(hidden)))
        layer.post_attention_layernorm.weight.set_value(jnp.asarray(ramp(hidden)))
    mean = np.asarray(run(model, input_ids=random_tokens(16, vocab)).logits, np.float64).mean()
    assert mean == pytest.approx(3.9763, abs=1e-4)


SIZES = {
    "phi-3-mini-4k-instruct": 3_821_079_552,
    "phi-3-mini-128k-instruct": 3_821_079_552,
    "phi-3.5-mini-instruct": 3_821_079_552,
    "phi-3-medium-4k-instruct": 13_960_238_080,
    "phi-3-medium-128k-instruct": 13_960_238_080,
    "phi-4": 14_659_507_200,
    "phi-4-mini-instruct": 3_836_021_760,
}


@pytest.mark.parametrize("name", SIZES)
def test_preset_has_the_published_number_of_parameters(name):
    config = Phi3Config.preset(name)
    shapes = nnx.eval_shape(lambda: Phi3ForCausalLM(config, dtype=jnp.bfloat16))
    assert shapes.num_parameters() == SIZES[name]
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}


def test_classifier_has_a_score_in_place_of_the_lm_head():
    config = Phi3Config.preset("phi-3-mini-4k-instruct").replace(num_labels=5)
    shapes = nnx.eval_shape(lambda: Phi3ForSequenceClassification(config))
    assert shapes.num_parameters() == 3_821_079_552 - 32064 * 3072 + 5 * 3072
