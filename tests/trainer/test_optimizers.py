"""Optimizers: schedules against transformers, clipping against PyTorch, and weight decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answers import stored
from flax import nnx
from marks import slow
from reference import small_config

from phi3_jax.model import Phi3ForTokenClassification
from phi3_jax.trainer import Trainer
from phi3_jax.trainer.optimizers import OPTIMIZERS, clip_by_global_norm, decays, make_optimizer, make_schedule


@stored
def learning_rates(kind, steps, warmup):
    """Returns the learning rate of each step under transformers' schedule."""
    import torch
    import transformers

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = transformers.get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_schedules_match_transformers(name, warmup):
    kind = "constant_with_warmup" if name == "constant" else name
    ours = make_schedule(name, 0.5, total_steps=11, warmup_steps=warmup)
    rates = [float(ours(step)) for step in range(11)]
    np.testing.assert_allclose(rates, learning_rates(kind, 11, warmup), rtol=1e-6, atol=1e-7)


def test_norms_and_biases_do_not_decay():
    model = Phi3ForTokenClassification(small_config(num_labels=3))
    flags = jax.tree_util.tree_flatten_with_path(decays(nnx.state(model, nnx.Param)))[0]
    exempt = [jax.tree_util.keystr(path, simple=True, separator=".") for path, decays in flags if not decays]
    assert len(flags) == 2 * 6 + 4
    assert len(exempt) == 2 * 2 + 2  # two norms in each layer, the last norm, the bias of score
    assert all("norm" in name or "bias" in name for name in exempt)


@stored
def clipped(gradients, most):
    """Returns the gradients after PyTorch's clipping of their common norm."""
    import torch

    parameters = {name: torch.nn.Parameter(torch.zeros(x.shape)) for name, x in gradients.items()}
    for name, parameter in parameters.items():
        parameter.grad = torch.from_numpy(gradients[name].copy())
    torch.nn.utils.clip_grad_norm_(parameters.values(), most)
    return {name: parameter.grad for name, parameter in parameters.items()}


@pytest.mark.parametrize("most", [0.5, 1e3])
def test_clipping_matches_pytorch(most):
    gradients = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3), "b": np.float32([-7.0])}
    clip = clip_by_global_norm(most)
    ours, _ = clip.update(gradients, clip.init(gradients))
    for name, expected in clipped(gradients, most).items():
        np.testing.assert_allclose(ours[name], expected, rtol=1e-6)
    zeros, _ = clip.update({"a": jnp.zeros(3)}, clip.init(None))
    assert not zeros["a"].any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_follows_the_learning_rate(name):
    """Without gradients an update is the learning rate times the decay of the weight."""
    parameters = {"weight": jnp.full((40, 40), 2.0), "norm": jnp.full(40, 2.0)}
    optimizer = make_optimizer(name, 0.1, weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    updates = jax.jit(lambda *a: optimizer.update(a[0], optimizer.init(a[1]), a[1])[0])(zeros, parameters)
    np.testing.assert_allclose(updates["weight"], -0.1 * 0.5 * 2.0, rtol=1e-6)
    assert not np.asarray(updates["norm"]).any()


@pytest.mark.parametrize("name", [name if name == "adamw" else slow(name) for name in OPTIMIZERS])
def test_optimizers_lower_the_loss(name):
    model = Phi3ForTokenClassification(small_config(num_labels=3))
    ids = np.random.default_rng(0).integers(4, 96, (4, 10))
    batch = {"input_ids": ids, "labels": ids % 3}
    trainer = Trainer(model, make_optimizer(name, 3e-3))
    state, losses = trainer.start(model), []
    for _ in range(12):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.8 * losses[0]


def test_adafactor_factors_over_the_axes_of_heads():
    state = make_optimizer("adafactor", 0.1).init({"qkv": jnp.zeros((4, 8, 3, 96, 3072))})
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 4 * 8 * 3 * (96 + 3072) * 1.1


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (lambda: make_optimizer("sgd", 0.1), "optim='sgd' is unknown; use adamw, adafactor, lion"),
        (lambda: make_optimizer("adamw", 0.1, weight_decay=-1), "weight_decay=-1"),
        (lambda: make_schedule("step", 0.1, total_steps=3, warmup_steps=0), "lr_scheduler_type='step'"),
        (lambda: make_schedule("linear", 0.1, total_steps=3, warmup_steps=3), "warm-up has 3 steps"),
    ],
)
def test_rejects_unknown_names_and_numbers_out_of_range(work, words):
    with pytest.raises(ValueError, match=words):
        work()
