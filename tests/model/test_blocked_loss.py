"""The loss in blocks of positions against the loss of whole logits, with gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from marks import slow
from reference import on_mesh, small_config

from phi3_jax.model import Phi3ForCausalLM, blocked_loss
from phi3_jax.model.blocked_loss import block_positions
from phi3_jax.model.quantizing import quantize_model
from phi3_jax.parallel.sharding import make_mesh

SMOOTHING = 0.2


def batch(dtype=jnp.float32):
    """Returns hidden states, and labels of which a third and one whole row do not count."""
    rng = np.random.default_rng(3)
    labels = np.where(rng.random((8, 12)) < 0.3, -100, rng.integers(0, 96, (8, 12)))
    labels[5] = -100
    return jnp.asarray(rng.normal(size=(8, 12, 48)), dtype), jnp.asarray(labels, jnp.int32)


def loss_and_gradients(model, hidden, labels, *, smoothing=SMOOTHING, trained=nnx.Param):
    """Returns the mean loss, and its gradients for the trained parameters and for the hidden states."""
    structure, parameters, rest = nnx.split(model, trained, ...)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1))
    def loss(parameters, hidden):
        return nnx.merge(structure, parameters, rest).cross_entropy_sum(hidden, labels, smoothing) / 50

    value, gradients = loss(parameters, hidden)
    return [np.asarray(leaf, np.float64) for leaf in (value, *jax.tree.leaves(gradients))]


def in_blocks(monkeypatch, positions):
    """Makes blocks of at most so many positions."""
    for name in ("LEAST_POSITIONS", "LEAST_TRAINED_POSITIONS"):
        monkeypatch.setattr(blocked_loss, name, positions)
    monkeypatch.setattr(blocked_loss, "BLOCK_BYTES", 1)
    monkeypatch.setattr(blocked_loss, "WHOLE_BYTES", 1)


def compare(ours, expected, tolerance=1e-6):
    """Compares arrays by the norm of their difference; those that are zero are zero in both."""
    for one, other in zip(ours, expected, strict=True):
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)
    assert sum(other.any() for other in expected) > 1


@pytest.mark.parametrize(
    ("tied", "smoothing", "positions"),
    [(False, 0.0, 40), (True, SMOOTHING, 40), slow(False, SMOOTHING, 8), slow(True, 0.0, 95)],
)
def test_blocks_have_the_loss_and_gradients_of_whole_logits(tied, smoothing, positions, monkeypatch):
    """The 96 positions take blocks of 32, 8 or 48."""
    model = Phi3ForCausalLM(small_config(tie_word_embeddings=tied))
    expected = loss_and_gradients(model, *batch(), smoothing=smoothing)
    in_blocks(monkeypatch, positions)
    compare(loss_and_gradients(model, *batch(), smoothing=smoothing), expected)


def test_a_last_block_may_have_fewer_positions(monkeypatch):
    model = Phi3ForCausalLM(small_config())
    hidden, labels = (x[:, :11] for x in batch())
    expected = loss_and_gradients(model, hidden, labels)
    in_blocks(monkeypatch, 40)
    compare(loss_and_gradients(model, hidden, labels), expected)


@pytest.mark.parametrize(
    ("sizes", "tied"),
    [
        ("data=2,fsdp=2,tensor=2", False),
        slow("data=2,fsdp=2,tensor=2", True),
        slow("context=2,fsdp=2,tensor=2", True),
        slow("fsdp=8", False),
        slow("data=2,context=4", False),
    ],
)
def test_devices_have_the_loss_and_gradients_of_whole_logits(sizes, tied, monkeypatch):
    """Each device has 12 or more positions in blocks of 8; gradients are summed 7 rows at a time."""
    model = Phi3ForCausalLM(small_config(tie_word_embeddings=tied))
    expected = loss_and_gradients(model, *batch())
    in_blocks(monkeypatch, 8)
    monkeypatch.setattr(blocked_loss, "BLOCK_BYTES", 4 * 48 * 7)
    compare(loss_and_gradients(on_mesh(model, make_mesh(sizes)), *batch()), expected)


@pytest.mark.parametrize(
    ("quantization", "tied", "sizes"),
    [
        ("int4:group_size=8,symmetric=false,skip=none", False, "data=1"),
        slow("int8:skip=none", True, "data=1"),
        slow("int8:skip=none,activations=int8", False, "data=1"),
        slow("int8:skip=none", False, "fsdp=2,tensor=2"),
        slow("int4:group_size=8,symmetric=false,skip=none", True, "fsdp=2,tensor=2"),
    ],
)
def test_a_quantized_head_has_the_gradients_of_hidden_states(quantization, tied, sizes, monkeypatch):
    model = Phi3ForCausalLM(small_config(tie_word_embeddings=tied))
    mesh = make_mesh(sizes, jax.devices()[: 1 if sizes == "data=1" else 4])
    model = quantize_model(on_mesh(model, mesh), quantization)
    expected = loss_and_gradients(model, *batch(), trained=nnx.LoRAParam)
    in_blocks(monkeypatch, 8)
    compare(loss_and_gradients(model, *batch(), trained=nnx.LoRAParam), expected)


def test_a_frozen_head_takes_no_product_for_its_gradient(monkeypatch):
    """With adapters only, a block has two products, and a third one where the head is trained."""
    model = Phi3ForCausalLM(small_config())
    hidden, labels = batch()
    in_blocks(monkeypatch, 40)
    structure, parameters = nnx.split(model)

    def loss(hidden, parameters):
        return nnx.merge(structure, parameters).cross_entropy_sum(hidden, labels)

    def products(argnums):
        return str(jax.make_jaxpr(jax.grad(loss, argnums))(hidden, parameters)).count("dot_general[")

    assert [products(argnums) for argnums in (0, (0, 1))] == [2, 3]


@pytest.mark.slow
def test_gradients_in_bfloat16_are_as_close_to_float32_as_those_of_whole_logits(monkeypatch):
    model = Phi3ForCausalLM(small_config())
    exact = loss_and_gradients(model, *batch())
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    whole = loss_and_gradients(rounded, *batch(jnp.bfloat16))
    in_blocks(monkeypatch, 8)
    compare(loss_and_gradients(rounded, *batch(jnp.bfloat16)), exact, 0.01)
    compare(whole, exact, 0.01)


def test_labels_that_do_not_count_give_zeros(monkeypatch):
    model = Phi3ForCausalLM(small_config())
    in_blocks(monkeypatch, 40)
    hidden, labels = batch()
    assert not any(leaf.any() for leaf in loss_and_gradients(model, hidden, jnp.full_like(labels, -100)))


@pytest.mark.parametrize(
    ("positions", "vocabulary", "frozen", "trained"),
    [
        (4096, 200_064, 512, 1024),
        (4096, 32_064, 1024, 1024),
        (5000, 32_064, 1000, 1000),  # five blocks of equal size
        (1000, 200_064, 504, 1000),  # two blocks, or all at once
        (512, 200_064, 512, 512),
        (4096, 3, 4096, 4096),
    ],
)
def test_sizes_of_blocks(positions, vocabulary, frozen, trained):
    assert block_positions(positions, vocabulary, trained=False) == frozen
    assert block_positions(positions, vocabulary, trained=True) == trained
