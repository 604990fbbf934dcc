"""Losses against PyTorch, and sums over divided batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from answers import stored
from flax import nnx
from marks import slow
from reference import on_mesh, padding_mask, pair, run, small_config

from phi3_jax.lora import add_lora
from phi3_jax.lora.adapters import projections
from phi3_jax.model import (
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
    Phi3ForTokenClassification,
    blocked_loss,
)
from phi3_jax.parallel.sharding import make_mesh
from phi3_jax.trainer import Trainer
from phi3_jax.trainer.objectives import Objective

HEADS = {
    "causal": Phi3ForCausalLM,
    "sequence": Phi3ForSequenceClassification,
    "several": Phi3ForSequenceClassification,
    "regression": Phi3ForSequenceClassification,
    "token": Phi3ForTokenClassification,
}
PROBLEMS = {
    "sequence": "single_label_classification",
    "several": "multi_label_classification",
    "regression": "regression",
}


def config_of(kind, **changes):
    settings = {"num_hidden_layers": 2, "num_labels": 3, "classifier_dropout": 0.0}
    return small_config(**(settings | {"problem_type": PROBLEMS.get(kind)} | changes))


def model_of(kind, **changes):
    return HEADS[kind](config_of(kind, **changes))


def ragged(kind, rows=8, length=12):
    """Returns rows of different lengths with few labels in most of them, and one padding row."""
    rng = np.random.default_rng(5)
    mask = padding_mask(rows, length, "right")
    mask[:, 0] = 1
    mask[3] = 0
    ids = np.where(mask, rng.integers(4, 96, mask.shape), 3)
    dropped = rng.random(mask.shape) < 0.4
    dropped[5:] = True
    batch = {"input_ids": ids, "attention_mask": mask}
    if kind in ("causal", "token"):
        labels = ids if kind == "causal" else ids % 3
        return batch | {"labels": np.where(mask * ~dropped, labels, -100)}
    weights = np.ones(rows, np.float32)
    weights[3] = 0
    if kind == "sequence":
        return batch | {"labels": np.where(weights > 0, np.arange(rows) % 3, -100), "weights": weights}
    labels = rng.normal(size=(rows, 3)).astype(np.float32)
    return batch | {
        "labels": (labels > 0).astype(np.float32) if kind == "several" else labels,
        "weights": weights,
    }


def keeping_gradients():
    """Returns an optimizer that keeps the gradients as its state and changes nothing."""

    def zeros(tree):
        return jax.tree.map(jnp.zeros_like, tree)

    return optax.GradientTransformation(zeros, lambda updates, state, params=None: (zeros(updates), updates))


def gradients(model, batch, **options):
    trainer = Trainer(model, keeping_gradients(), **options)
    state, metrics = trainer.step(trainer.start(model), batch)
    return metrics, state.optimizer


def close(ours, expected, tolerance):
    """Compares all numbers at once, by the norm of the difference relative to the expected norm."""
    ours, expected = (
        np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])
        for tree in (ours, expected)
    )
    assert np.linalg.norm(ours - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "kind",
    [
        "causal",
        *(slow(each) for each in ("several", "sequence", "regression", "token")),
    ],
)
def test_micro_batches_add_up_to_the_whole_batch(kind):
    model, batch = model_of(kind), ragged(kind)
    whole, expected = gradients(model, batch)
    parts, ours = gradients(model, batch, accumulate=4)
    assert whole.loss > 0.1
    close(parts.loss, whole.loss, 1e-6)
    close(ours, expected, 1e-6)


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        ("sequence", Objective(class_weights=(0.5, 1.0, 3.0))),
        *(slow(each, Objective()) for each in ("token", "causal", "several", "regression")),
    ],
)
def test_batches_of_different_widths_add_up_to_the_whole_batch(kind, objective):
    """One batch has only the padding row, and the labels of the others are uneven."""
    model, batch = model_of(kind), ragged(kind)
    whole, expected = gradients(model, batch, objective=objective)
    groups = [[3], [0, 1, 2], [4, 5, 6, 7]]
    widths = [max(int(batch["attention_mask"][rows].sum(1).max()), 4) for rows in groups]
    assert len(set(widths)) > 1
    batches = [
        {name: x[rows][:, :width] if x.shape == (8, 12) else x[rows] for name, x in batch.items()}
        for rows, width in zip(groups, widths, strict=True)
    ]
    trainer = Trainer(model, keeping_gradients(), objective=objective)
    state, metrics = trainer.step_in_batches(trainer.start(model), batches)
    close(metrics.loss, whole.loss, 1e-6)
    close(metrics.gradient_norm, whole.gradient_norm, 1e-6)
    close(state.optimizer, expected, 1e-6)
    assert int(state.step) == 1


@pytest.mark.parametrize("kind", ["causal", *(slow(each) for each in ("several", "token"))])
def test_devices_add_up_to_the_whole_batch(kind):
    """Four devices divide the rows, whose labels are uneven."""
    model, batch = model_of(kind), ragged(kind)
    whole, expected = gradients(model, batch)
    mesh = make_mesh("data=4", jax.devices()[:4])
    several = on_mesh(model, mesh)
    parts, ours = gradients(several, batch)
    close(parts.loss, whole.loss, 1e-6)
    close(ours, expected, 2e-6)  # float32 sums in another order


def with_small_blocks(monkeypatch):
    """Makes the causal loss compute the logits of 16 positions or fewer at a time."""
    for name in ("LEAST_POSITIONS", "LEAST_TRAINED_POSITIONS", "BLOCK_BYTES", "WHOLE_BYTES"):
        monkeypatch.setattr(blocked_loss, name, 16)


def test_the_loss_with_logits_in_blocks_is_that_with_whole_logits(monkeypatch):
    model, batch, objective = model_of("causal"), ragged("causal"), Objective(label_smoothing=0.2)
    whole = jax.jit(lambda model: objective.loss_sum(model, batch))(model)
    with_small_blocks(monkeypatch)
    lowered = jax.jit(lambda model: objective.loss_sum(model, batch)).lower(model)
    assert "tensor<16x96xf32>" in lowered.as_text()  # the logits of a block
    close(lowered.compile()(model), whole, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [None, "fsdp=2,tensor=2"])
def test_a_step_with_logits_in_blocks_is_that_with_whole_logits(sizes, monkeypatch):
    """One device has 48 positions of a micro-batch, four have 24 each; on one, the head is frozen."""
    model, batch, options = model_of("causal"), ragged("causal"), {"accumulate": 2}
    if sizes is None:
        model, options["wrt"] = add_lora(model, 4), nnx.LoRAParam
        for _, linear in projections(model):
            b = linear.adapter.b
            b.set_value(0.1 * jax.random.normal(jax.random.key(b.size), b.shape))
    whole, expected = gradients(model, batch, **options)
    with_small_blocks(monkeypatch)
    if sizes is not None:
        model = on_mesh(model, make_mesh(sizes, jax.devices()[:4]))
    parts, ours = gradients(model, batch, **options)
    close(parts.loss, whole.loss, 1e-6)
    close(ours, expected, 2e-6)  # float32 sums in another order


@pytest.mark.parametrize("kind", HEADS)
def test_the_plain_objective_is_the_loss_of_the_head(kind):
    model, batch = model_of(kind), ragged(kind)
    rows = [row for row in range(8) if row != 3]
    kept = {name: x[rows] for name, x in batch.items() if name != "weights"}
    close(mean_loss(model, batch, Objective()), run(model, **kept).loss, 1e-6)


@jax.jit(static_argnums=2)
def mean_loss(model, batch, objective):
    return objective.loss_sum(model, batch) / objective.count(model, batch)


@stored
def pytorch_loss(theirs, batch, weights, smoothing):
    """Returns PyTorch's loss of the reference's logits."""
    import torch

    given = {name: torch.tensor(x) for name, x in batch.items()}
    weight = None if weights is None else torch.tensor(weights)
    with torch.no_grad():
        logits = theirs.model(given["input_ids"], attention_mask=given["attention_mask"]).logits
        if logits.ndim == 3:
            loss = torch.nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)
            return loss(logits.reshape(-1, 3), given["labels"].reshape(-1)).item()
        rows = given["weights"] > 0
        labels = given["labels"] * (1 - smoothing) + smoothing / 2
        return torch.nn.BCEWithLogitsLoss(weight=weight)(logits[rows], labels[rows]).item()


@pytest.mark.parametrize(
    ("kind", "weights", "smoothing"),
    [
        ("token", None, 0.0),
        ("token", (0.5, 1.0, 3.0), 0.0),
        ("token", None, 0.2),
        ("token", (0.5, 1.0, 3.0), 0.2),
        ("several", (0.5, 1.0, 3.0), 0.1),
    ],
)
def test_weights_and_smoothing_match_pytorch(kind, weights, smoothing, tmp_path):
    ours, theirs = pair({"several": "sequence"}.get(kind, kind), config_of(kind), tmp_path)
    batch = ragged(kind)
    loss = mean_loss(ours, batch, Objective(smoothing, weights))
    close(loss, pytorch_loss(theirs, batch, weights, smoothing), 1e-5)


def test_a_batch_without_labels_changes_nothing():
    model, batch = model_of("token"), ragged("token")
    batch["labels"] = np.full_like(batch["labels"], -100)
    metrics, ours = gradients(model, batch, accumulate=2)
    assert float(metrics.loss) == 0
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(ours))


@pytest.mark.slow
def test_dropout_differs_between_steps_and_micro_batches():
    model = model_of("causal", resid_pdrop=0.5)
    batch = {name: np.repeat(x[:1], 4, axis=0) for name, x in ragged("causal").items()}
    trainer = Trainer(model, optax.sgd(0.0), accumulate=2)
    state = trainer.start(model)
    state, first = trainer.step(state, batch, jax.random.key(0))
    state, second = trainer.step(state, batch, jax.random.key(0))
    _, again = Trainer(model, optax.sgd(0.0), accumulate=2).step(
        trainer.start(model), batch, jax.random.key(0)
    )
    assert float(first.loss) != float(second.loss)
    assert float(first.loss) == float(again.loss)


@pytest.mark.parametrize(
    ("kind", "objective", "words"),
    [
        ("causal", {"class_weights": (1.0, 2.0)}, "class_weights are for classification"),
        ("token", {"class_weights": (1.0, 2.0)}, "class_weights has 2 numbers for 3 labels"),
        ("regression", {"label_smoothing": 0.1}, "label_smoothing is for classes"),
    ],
)
def test_rejects_objectives_that_do_not_fit_the_model(kind, objective, words):
    with pytest.raises(ValueError, match=words):
        Trainer(model_of(kind), optax.sgd(1.0), objective=Objective(**objective))


def test_rejects_smoothing_of_an_inferred_regression():
    model = model_of("regression", num_labels=1, problem_type=None)
    with pytest.raises(ValueError, match="label_smoothing is for classes"):
        Trainer(model, optax.sgd(1.0), objective=Objective(label_smoothing=0.1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 must be at least 0 and below 1"),
        ({"class_weights": (1.0, 0.0)}, "class_weights has 0.0; each must be above 0"),
    ],
)
def test_rejects_objectives_out_of_range(arguments, words):
    with pytest.raises(ValueError, match=words):
        Objective(**arguments)


def test_rejects_rows_that_micro_batches_do_not_divide():
    model = model_of("token")
    trainer = Trainer(model, optax.sgd(1.0), accumulate=3)
    state = trainer.start(model)
    with pytest.raises(ValueError, match="8 rows does not divide into 3 micro-batches"):
        trainer.step(state, ragged("token"))
    with pytest.raises(ValueError, match="accumulate=0"):
        Trainer(model, optax.sgd(1.0), accumulate=0)


@pytest.mark.slow
def test_a_list_of_layers_has_the_gradients_of_a_stack():
    model, batch = model_of("causal"), ragged("causal")
    (_, expected), (_, ours) = (gradients(model, batch, scan_layers=scan) for scan in (True, False))
    stacked = np.asarray(expected.model.layers.layer.mlp.down_proj.weight[...])
    listed = [np.asarray(layer.mlp.down_proj.weight[...]) for layer in ours.model.layers.values()]
    close(np.stack(listed), stacked, 1e-6)
    assert jnp.dtype(stacked.dtype) == jnp.float32
