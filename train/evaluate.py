"""Scoring a state on examples: the loss, the metrics of the task, and the prediction for each row."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from phi3_jax.config.model_checks import PROBLEM_TYPES
from phi3_jax.data.batches import BatchPlan, bucket_widths
from phi3_jax.data.examples import Examples
from phi3_jax.data.loader import load
from phi3_jax.errors import UserError
from phi3_jax.model.losses import IGNORE_INDEX
from phi3_jax.parallel.sharding import replicate
from phi3_jax.trainer.batches import local_rows, to_devices, width_multiple
from phi3_jax.trainer.objectives import Batch, Objective, model_inputs
from phi3_jax.trainer.step import Trainer, TrainState

from .metrics import language_metrics, predict, sequence_metrics, token_metrics
from .predictions import Predictions
from .recipe import Recipe

Score = Callable[[Any, Any], tuple[Any, Any, tuple[Any, ...]]]
"""From a state and a batch to the sum of the losses, the count that divides it, and arrays of the rows."""


class StoppedEvaluationError(Exception):
    """An evaluation was not finished, because a signal came."""


class NotFiniteError(UserError):
    """The loss, the gradient norm or a metric is infinite or NaN."""


@dataclass(frozen=True)
class EvaluationState:
    """The best of a run's evaluations so far."""

    best_step: int | None = None
    best_score: float | None = None
    worse: int = 0
    """How many evaluations came after the best one."""

    def with_score(self, step: int, score: float, sign: int) -> "EvaluationState":
        """Returns the state after one more evaluation; `sign` is 1 if greater scores are better, else -1."""
        better = self.best_score is None or sign * score > sign * self.best_score
        return EvaluationState(step, score) if better else replace(self, worse=self.worse + 1)

    def patience_is_over(self, patience: int | None) -> bool:
        """Returns whether `patience` evaluations came after the best one."""
        return patience is not None and self.worse >= patience


def check_finite(metrics: Mapping[str, float], metric: str, what: str) -> None:
    """Checks the loss and the metric of an evaluation, which say nothing if they are not finite.

    Args:
        metrics: of the evaluation.
        metric: the name of the metric that chooses the best parameters.
        what: the step and the split, for the message.

    Raises:
        NotFiniteError: one is not finite.
    """
    odd = {name: metrics[name] for name in ("loss", metric) if not math.isfinite(metrics[name])}
    if odd:
        values = " and ".join(f"{name} {value}" for name, value in odd.items())
        raise NotFiniteError(
            f"{what} has {values}. Nothing was saved since the last checkpoint before it, and no model was "
            "written; try a smaller learning_rate, a longer warm-up, a smaller max_grad_norm or dtype "
            "float32, and look at the rows of that data"
        )


class Evaluator:
    """Scores one split, the same way each time it is called.

    Args:
        score: scores a batch (`scorer`).
        examples: of the split.
        recipe: of the run.
        split: the name of the split.
        mesh: the devices that share the batches.
    """

    def __init__(self, score: Score, examples: Examples, recipe: Recipe, *, split: str, mesh: Mesh | None):
        self._score, self._examples, self._recipe = score, examples, recipe
        self._split, self._mesh = split, mesh
        rows, most = recipe.settings.eval_batch_size, recipe.settings.max_buckets
        widths = bucket_widths(examples.lengths, most=most, multiple=width_multiple(mesh))
        self._plan = BatchPlan(examples.lengths, rows=rows, widths=widths, shuffle=False)
        self._own_rows = local_rows(rows, mesh)

    @property
    def padded_tokens(self) -> int:
        """The tokens of all batches, padding included."""
        return self._plan.padded_tokens

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of batches, each compiled once."""
        return self._plan.widths

    def __call__(
        self, state: Any, stops: Callable[[], bool] = lambda: False
    ) -> tuple[dict[str, float], Predictions | None]:
        """Returns metrics by name, "loss" among them, and predictions in the order of the examples.

        Args:
            state: of the trainer.
            stops: whether to stop; called after each batch.

        Raises:
            StoppedEvaluationError: it was true.
        """
        total = count = 0.0
        results: list[Any] = [None] * len(self._examples)
        batches = load(
            self._examples,
            self._plan,
            pad_token_id=self._recipe.pad_token_id,
            stop=self._plan.batches_per_epoch,
            local_rows=self._own_rows,
        )
        try:
            for batch in batches:
                own = self._with_known_labels(batch.arrays)
                arrays = to_devices(own, self._plan.rows, self._mesh, self._own_rows)
                loss, counted, outputs = jax.device_get(self._score(state, arrays))
                total, count = total + float(loss), count + float(counted)
                for row, index in enumerate(batch.indices):
                    if index >= 0:
                        results[index] = [output[row] for output in outputs]
                if stops():
                    raise StoppedEvaluationError
        finally:
            batches.close()
        return self._measure(total, count, results)

    def _with_known_labels(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns a batch whose loss leaves out the labels that the model does not have."""
        known, labels = self._recipe.data.labels, arrays["labels"]
        if known is None:
            return arrays
        if np.issubdtype(labels.dtype, np.floating):
            return arrays | {"labels": labels[:, : len(known)]}
        return arrays | {"labels": np.where(labels < len(known), labels, IGNORE_INDEX)}

    def _measure(
        self, total: float, count: float, results: list[Any]
    ) -> tuple[dict[str, float], Predictions | None]:
        kind = self._recipe.kind
        if kind == "causal-lm":
            return language_metrics(total, int(count)), None
        places = [self._examples.place(index) for index in range(len(self._examples))]
        loss = {"loss": total / max(count, 1.0)}
        if kind in PROBLEM_TYPES:
            logits = np.stack([row[0] for row in results])
            labels, every = self._examples.labels, self._recipe.data.all_labels
            assert labels is not None
            assert every is not None
            # No row is predicted to have a label that the model does not have.
            unknown = (0, 0), (0, len(every) - logits.shape[1])
            logits = np.pad(logits, unknown, constant_values=-np.inf)
            if labels.ndim == 2:
                labels = np.pad(labels, ((0, 0), (0, len(every) - labels.shape[1])))
            predicted, scores = predict(kind, logits)
            metrics = sequence_metrics(kind, logits, labels)
            return loss | metrics, Predictions(self._split, labels, predicted, scores, places)
        true, tags, confidences = self._word_tags(results)
        metrics = token_metrics(true, tags)
        return loss | metrics, Predictions(self._split, true, tags, confidences, places)

    def _word_tags(self, results: list[Any]) -> tuple[list[list[str]], list[list[str]], list[np.ndarray]]:
        """Returns the true tags, the predicted ones and their probabilities: the words of each sentence."""
        labels = self._recipe.data.all_labels
        assert labels is not None
        true: list[list[str]] = []
        tags: list[list[str]] = []
        confidences: list[np.ndarray] = []
        for index, (ids, probabilities) in enumerate(results):
            first = self._examples.firsts(index)
            assert first is not None
            positions = np.flatnonzero(first)
            true.append(_names(self._examples.token_labels(index)[positions], labels.names))
            tags.append(_names(ids[positions], labels.names))
            confidences.append(probabilities[positions])
        return true, tags, confidences


def scorer(trainer: Trainer, kind: str, mesh: Mesh | None) -> Score:
    """Returns the function that scores states of `trainer` for an `Evaluator`."""
    objective = Objective()

    def score(state: TrainState, batch: Batch) -> Any:
        model = trainer.computing(state)
        count = objective.count(model, batch)
        if kind == "causal-lm":
            return replicate((objective.loss_sum(model, batch), count, ()), mesh)
        logits = model(**model_inputs(batch)).logits.astype(jnp.float32)
        loss = objective.loss_sum_of_logits(model, logits, batch)
        outputs: tuple[Any, ...]
        if kind in PROBLEM_TYPES:
            outputs = (logits,)
        else:
            outputs = jnp.argmax(logits, axis=-1), jnp.max(jax.nn.softmax(logits), axis=-1)
        return replicate((loss, count, outputs), mesh)

    return jax.jit(score)


def _names(ids: np.ndarray, names: Sequence[str]) -> list[str]:
    return [names[each] for each in ids]
