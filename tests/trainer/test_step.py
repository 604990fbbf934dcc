"""Training steps against PyTorch, against plain gradients, and on meshes of eight devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from answers import stored
from flax import nnx
from marks import slow
from reference import distance, on_mesh, padding_mask, pair, run, small_config

from phi3_jax.lora import add_lora, merge_lora
from phi3_jax.lora.adapters import TARGETS
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.layer_stack import stack_layers, unstack_layers
from phi3_jax.model.saving import ModelSource
from phi3_jax.parallel.sharding import make_mesh
from phi3_jax.trainer import REMAT_POLICIES, Trainer

GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 12}
ADAMW = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


def batch_of(kind="causal", seed=0, rows=8):
    rng = np.random.default_rng(seed)
    mask = padding_mask(rows, 24, "right")
    mask[:, :2] = 1
    ids = np.where(mask, rng.integers(4, 96, mask.shape), 3)
    labels = {
        "causal": np.where(mask, ids, -100),
        "sequence": np.arange(rows) % 3,
        "token": np.where(mask, ids % 3, -100),
    }[kind]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def close(ours, expected, tolerance=1e-5):
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


@stored
def train(theirs, batches):
    """Takes PyTorch's steps of AdamW; returns losses, gradient norms, and the final parameters by name."""
    import torch

    model, losses, norms = theirs.model, [], []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    for batch in batches:
        loss = model(**{name: torch.tensor(x) for name, x in batch.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, dict(model.named_parameters())


@pytest.mark.parametrize("kind", ["causal", slow("sequence"), slow("token")])
def test_steps_match_pytorch(kind, tmp_path):
    """Compares the losses of twenty steps of AdamW, and the parameters at the end."""
    config = small_config(num_labels=3, classifier_dropout=0.0)
    ours, theirs = pair(kind, config, tmp_path)
    trainer = Trainer(ours, optax.adamw(1e-3, **ADAMW))
    state = trainer.start(ours)
    batches = [batch_of(kind, seed=step) for step in range(20)]
    losses, norms, after = train(theirs, batches)
    for batch, loss, norm in zip(batches, losses, norms, strict=True):
        state, metrics = trainer.step(state, batch)
        close(metrics.loss, loss)
        close(metrics.gradient_norm, norm)
    assert int(state.step) == 20
    source = ModelSource(trainer.model(state))
    assert set(source.names()) == after.keys()
    for name, expected in after.items():
        assert distance(source.read(name), expected) <= 1e-4, name


@pytest.mark.parametrize(
    "mesh",
    [
        "fsdp=2,context=2,tensor=2",
        slow("fsdp=8"),
        slow("data=2,tensor=4"),
    ],
)
def test_three_steps_on_a_mesh_match_one_device(mesh):
    one = Phi3ForCausalLM(small_config(**GROUPED))
    several = on_mesh(one, make_mesh(mesh))
    # With a smaller eps, Adam would scale rounding errors to full steps.
    optimizer = optax.adamw(1e-3, eps=1e-3)

    def run(model):
        trainer, losses = Trainer(model, optimizer), []
        state = trainer.start(model)
        for step in range(3):
            state, metrics = trainer.step(state, batch_of(seed=step))
            losses.append(np.asarray(metrics))
        return trainer, state, losses

    _, expected, losses = run(one)
    trainer, state, our_losses = run(several)
    close(our_losses, losses)
    for ours, wanted in zip(jax.tree.leaves(state.trained), jax.tree.leaves(expected.trained), strict=True):
        close(ours, wanted)
    for shape, leaf in zip(jax.tree.leaves(trainer.state_shapes), jax.tree.leaves(state), strict=True):
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
    weights = jax.tree.leaves(trainer.model(state))
    for weight, given in zip(weights, jax.tree.leaves(several), strict=True):
        assert weight.shape == given.shape


def test_stacked_and_unstacked_layers_are_the_same_model():
    model = Phi3ForCausalLM(small_config(resid_pdrop=0.2, attention_dropout=0.1, embd_pdrop=0.1))
    batch, key = batch_of(), jax.random.key(3)
    stacked = stack_layers(model)
    assert len(stacked.model.layers) == 2
    assert isinstance(model.model.layers, nnx.List)  # the given model is unchanged
    close(run(stacked, **batch).logits, run(model, **batch).logits)
    close(run(stacked, **batch, rngs=key).loss, run(model, **batch, rngs=key).loss)  # with the same dropout
    for ours, expected in zip(jax.tree.leaves(unstack_layers(stacked)), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(ours, expected)
    with pytest.raises(ValueError, match="unstack the model first"):
        stacked(**batch, use_cache=True)


@pytest.mark.slow
@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_remat_changes_no_number(remat):
    model = Phi3ForCausalLM(small_config())
    trainer = Trainer(model, optax.sgd(0.1), remat=remat)
    _, metrics = trainer.step(trainer.start(model), batch_of())
    loss, gradients = jax.jit(jax.value_and_grad(lambda model: model(**batch_of()).loss))(model)
    close(metrics.loss, loss)
    close(metrics.gradient_norm, optax.tree.norm(gradients))


def test_steps_compute_in_bfloat16_and_keep_float32_weights():
    model = Phi3ForCausalLM(small_config(), dtype=jnp.bfloat16)
    trainer = Trainer(model, optax.adamw(1e-6))
    state = trainer.start(model)
    before = jax.tree.leaves(state.trained)[0].copy()
    state, _ = trainer.step(state, batch_of())
    after = jax.tree.leaves(state.trained)[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trained)} == {jnp.dtype("float32")}
    assert np.abs(after - before).max() > 0  # 1e-6 would be lost in bfloat16
    text = trainer.step.lower(state, batch_of()).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    with_weights = [line for line in products if "batching_dims" not in line]
    assert len(with_weights) > 8
    narrow = re.compile(r": \(tensor<[\dx]+bf16>, tensor<[\dx]+bf16>\)")
    assert all(narrow.search(line) for line in with_weights)


def test_rejects_an_unknown_remat():
    with pytest.raises(
        ValueError,
        match="remat='some' is unknown; use full, attention_dots, attention, dots, dots_and_attention, none",
    ):
        Trainer(Phi3ForCausalLM(small_config()), optax.sgd(0.1), remat="some")


@pytest.mark.slow
def test_new_adapters_change_nothing_and_only_they_are_trained():
    model = Phi3ForCausalLM(small_config(**GROUPED))
    adapted = add_lora(model, 2, targets=("qkv_proj", "down_proj"))
    batch = batch_of()
    plain = run(model, **batch).logits
    np.testing.assert_array_equal(run(adapted, **batch).logits, plain)
    trainer = Trainer(adapted, optax.adamw(1e-2), wrt=nnx.LoRAParam)
    state = trainer.start(adapted)
    assert len(jax.tree.leaves(state.trained)) == 4  # a and b of two projections, stacked
    losses = []
    for _ in range(4):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.05
    trained = trainer.model(state)
    for name in ("o_proj", "qkv_proj"):
        before, after = (getattr(m.model.layers[0].self_attn, name).weight[...] for m in (model, trained))
        np.testing.assert_array_equal(before, after)
    merged = merge_lora(trained)
    merged_logits = run(merged, **batch).logits
    close(merged_logits, run(trained, **batch).logits)
    assert np.abs(merged_logits - plain).max() > 1e-2
    assert len(jax.tree.leaves(merged)) == len(jax.tree.leaves(model))


@pytest.mark.parametrize("target", TARGETS)
def test_an_adapter_adds_a_scaled_product(target):
    """Each projection computes y = W x + alpha / rank B A x."""
    model = Phi3ForCausalLM(small_config(**GROUPED))
    adapted = add_lora(model, 2, alpha=6.0, targets=(target,))
    layer = adapted.model.layers[1]
    linear = getattr(layer.self_attn if hasattr(layer.self_attn, target) else layer.mlp, target)
    rng = np.random.default_rng(0)
    linear.adapter.b.set_value(jnp.asarray(rng.normal(size=linear.adapter.b.shape), jnp.float32))
    a, b, weight = (
        np.asarray(x[...], np.float64) for x in (linear.adapter.a, linear.adapter.b, linear.weight)
    )
    inputs = weight.shape[weight.ndim - linear.input_axes :]
    x = rng.normal(size=(2, 3, *inputs)).astype(np.float32)
    flat = x.reshape(6, -1).astype(np.float64)
    out = weight.shape[: weight.ndim - linear.input_axes]
    width = flat.shape[1]
    expected = flat @ weight.reshape(-1, width).T
    expected += 3.0 * (flat @ a.reshape(2, width).T) @ b.reshape(-1, 2).T
    close(linear(jnp.asarray(x)), expected.reshape(2, 3, *out))


@pytest.mark.slow
def test_adapters_on_a_mesh_match_one_device():
    model = add_lora(Phi3ForCausalLM(small_config(**GROUPED)), 2)
    mesh = make_mesh("fsdp=2,context=2,tensor=2")
    plain = on_mesh(Phi3ForCausalLM(small_config(**GROUPED)), mesh)
    several = add_lora(plain, 2)
    losses = []
    for one in (model, several):
        trainer = Trainer(one, optax.adamw(1e-2, eps=1e-3), wrt=nnx.LoRAParam)
        state = trainer.start(one)
        for _ in range(3):
            state, metrics = trainer.step(state, batch_of())
        losses.append(float(metrics.loss))
    close(losses[1], losses[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"rank": 2, "targets": ("q_proj",)}, "there is no projection q_proj; use qkv_proj, o_proj"),
    ],
)
def test_rejects_ranks_and_targets_of_adapters(arguments, words):
    with pytest.raises(ValueError, match=words):
        add_lora(Phi3ForCausalLM(small_config()), **arguments)


def test_rejects_adapters_twice_or_on_stacked_layers():
    model = Phi3ForCausalLM(small_config())
    with pytest.raises(ValueError, match="already has adapters"):
        add_lora(add_lora(model, 2), 2)
    with pytest.raises(ValueError, match="layers are stacked"):
        add_lora(stack_layers(model), 2)
