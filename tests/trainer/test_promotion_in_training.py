"""Tests that losses and steps are the same with 64-bit numbers, and where JAX promotes nothing implicitly."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import CLASSES, padding_mask, small_config
from strict_settings import strict_settings

from phi3_jax.lora import add_lora
from phi3_jax.trainer import Trainer
from phi3_jax.trainer.objectives import Objective
from phi3_jax.trainer.optimizers import OPTIMIZERS, make_optimizer, make_schedule

ROWS, LENGTH = 2, 9
MASK = padding_mask(ROWS, LENGTH, "right")
IDS = np.where(MASK, np.random.default_rng(0).integers(4, 96, MASK.shape), 3)
SMOOTHED = Objective(label_smoothing=0.1, class_weights=(1.0, 2.0, 3.0))
HEADS: dict[str, tuple[str, dict[str, Any], Any, Objective]] = {
    "causal": ("causal", {}, np.where(MASK, IDS, -100), Objective(label_smoothing=0.1)),
    "token": ("token", {"num_labels": 3}, np.where(MASK, IDS % 3, -100), SMOOTHED),
    "sequence": ("sequence", {"num_labels": 3}, np.array([0, 2]), SMOOTHED),
    "several": (
        "sequence",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        np.array([[0, 1, 1], [1, 0, 0]]),
        SMOOTHED,
    ),
    "regression": ("sequence", {"num_labels": 1}, np.array([[0.5], [2.0]]), Objective()),
}


def model_of(kind: str, **changes: Any) -> Any:
    return CLASSES[kind][1](small_config(num_hidden_layers=1, **changes), rngs=1)


def trainer_of(model: Any, optimizer: str = "adamw", **options: Any) -> Trainer:
    schedule = make_schedule("cosine", 1e-2, total_steps=9, warmup_steps=2)
    return Trainer(model, make_optimizer(optimizer, schedule, weight_decay=0.1), **options)


@pytest.mark.parametrize("head", HEADS)
def test_traces_each_head(head: str) -> None:
    """Only traces, which is where JAX would promote: the model's own loss, and a step's."""
    kind, changes, labels, objective = HEADS[head]
    model = model_of(kind, **changes)
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    with strict_settings():
        loss, gradients = jax.eval_shape(jax.value_and_grad(lambda model: model(**batch).loss), model)
        trainer = trainer_of(model, objective=objective, accumulate=ROWS)
        weights = {"weights": np.ones(ROWS)} if kind == "sequence" else {}
        state, metrics = jax.eval_shape(trainer.step, trainer.state_shapes, batch | weights)
    assert loss.dtype == metrics.loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, (state, trainer.state_shapes))
    assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_traces_each_optimizer(optimizer: str, dtype: str) -> None:
    batch = {"input_ids": IDS, "labels": IDS, "segment_ids": np.cumsum(IDS % 5 == 0, axis=1) + 1}
    with strict_settings():
        trainer = trainer_of(model_of("causal"), optimizer, compute_dtype=dtype)
        state, _ = jax.eval_shape(trainer.step, trainer.state_shapes, batch)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, (state, trainer.state_shapes))
    assert dtypes[0] == dtypes[1]


@pytest.mark.slow
def test_a_step_is_the_same() -> None:
    """Dropout draws the same numbers."""
    model = add_lora(
        model_of("causal", resid_pdrop=0.2, attention_dropout=0.2, embd_pdrop=0.2),
        2,
        dora=True,
        lora_dropout=0.2,
    )
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": HEADS["causal"][2]}

    def losses() -> list[float]:
        trainer = trainer_of(model, wrt=nnx.LoRAParam, scan_layers=False)
        state, found = trainer.start(model), []
        for _ in range(3):
            state, metrics = trainer.step(state, batch, jax.random.key(3))
            found += [float(metrics.loss), float(metrics.gradient_norm)]
        return found

    expected = losses()
    with strict_settings():
        np.testing.assert_allclose(losses(), expected, rtol=1e-6)
