"""Scores a state on examples: the loss and metrics of the task, and what was predicted of each row."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from phi3_jax.data.batches import BatchPlan, bucket_widths
from phi3_jax.data.examples import Examples
from phi3_jax.data.labels import Labels
from phi3_jax.data.loader import load
from phi3_jax.parallel.sharding import replicate
from phi3_jax.trainer.batches import local_rows, to_devices, width_multiple
from phi3_jax.trainer.objectives import Batch, Objective, model_inputs
from phi3_jax.trainer.step import Trainer, TrainState

from .metrics import SEQUENCE_TASKS, language_metrics, predict, sequence_metrics, token_metrics
from .predictions import Predictions

Score = Callable[[Any, Any], tuple[Any, Any, tuple[Any, ...]]]


class Evaluator:
    """Scores one split, the same way each time it is called.

    Args:
        score: of a state and a batch: the sum of the losses, its divisor, and what the task measures of each
            row (`scorer`).
        kind: the task, or the problem type of sequence classification: a key of `METRICS`.
        split: its name.
        labels: of classes; None for a language model.
        rows: of a batch, over all devices.
        most: row widths, each compiled once.
    """

    def __init__(
        self,
        score: Score,
        examples: Examples,
        *,
        kind: str,
        split: str,
        labels: Labels | None,
        pad_token_id: int,
        rows: int,
        most: int,
        mesh: Mesh | None,
    ):
        self.kind, self.split, self._labels = kind, split, labels
        self._examples, self._pad_token_id, self._mesh = examples, pad_token_id, mesh
        widths = bucket_widths(examples.lengths, most=most, multiple=width_multiple(mesh))
        self._plan = BatchPlan(examples.lengths, rows=rows, widths=widths, shuffle=False)
        self._own = local_rows(rows, mesh)
        self._score = score

    def __call__(self, state: Any) -> tuple[dict[str, float], Predictions | None]:
        """Metrics by name, "loss" among them; and predictions, in the order of the examples."""
        total = count = 0.0
        found: list[Any] = [None] * len(self._examples)
        batches = load(
            self._examples,
            self._plan,
            pad_token_id=self._pad_token_id,
            stop=self._plan.steps_per_epoch,
            local_rows=self._own,
        )
        try:
            for batch in batches:
                arrays = to_devices(batch.arrays, self._plan.rows, self._mesh, self._own)
                loss, counted, said = jax.device_get(self._score(state, arrays))
                total, count = total + float(loss), count + float(counted)
                for row, index in enumerate(batch.indices):
                    if index >= 0:
                        found[index] = [part[row] for part in said]
        finally:
            batches.close()
        return self._measure(total, count, found)

    def _measure(
        self, total: float, count: float, found: list[Any]
    ) -> tuple[dict[str, float], Predictions | None]:
        if self.kind == "causal-lm":
            return language_metrics(total, int(count)), None
        places = [self._examples.place(index) for index in range(len(self._examples))]
        loss = {"loss": total / max(count, 1.0)}
        if self.kind in SEQUENCE_TASKS:
            logits = np.stack([row[0] for row in found])
            labels = self._examples.labels
            assert labels is not None
            predicted, scores = predict(self.kind, logits)
            metrics = sequence_metrics(self.kind, logits, labels)
            return loss | metrics, Predictions(self.split, labels, predicted, scores, places)
        assert self._labels is not None
        names = self._labels.names
        true: list[list[str]] = []
        tags: list[list[str]] = []
        sure: list[np.ndarray] = []
        for index, (ids, probabilities) in enumerate(found):
            first = self._examples.firsts(index)
            assert first is not None
            where = np.flatnonzero(first)
            true.append(_named(self._examples.token_labels(index)[where], names))
            tags.append(_named(ids[where], names))
            sure.append(probabilities[where])
        return loss | token_metrics(true, tags), Predictions(self.split, true, tags, sure, places)


def scorer(trainer: Trainer, kind: str, mesh: Mesh | None) -> Score:
    """What an `Evaluator` needs for states of `trainer`."""
    objective = Objective()

    def score(state: TrainState, batch: Batch) -> Any:
        model = trainer.computing(state)
        logits = model(**model_inputs(batch)).logits.astype(jnp.float32)
        losses = objective.loss_sum_of_logits(model, logits, batch), objective.count(model, batch)
        said: tuple[Any, ...] = ()
        if kind in SEQUENCE_TASKS:
            said = (logits,)
        elif kind == "token-classification":
            said = jnp.argmax(logits, axis=-1), jnp.max(jax.nn.softmax(logits), axis=-1)
        return replicate((*losses, said), mesh)

    return jax.jit(score)


def _named(ids: np.ndarray, names: Sequence[str]) -> list[str]:
    return [names[each] for each in ids]
