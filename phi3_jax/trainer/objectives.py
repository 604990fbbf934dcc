"""The loss that training minimizes, as a sum and the count that divides it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from phi3_jax.errors import UserError
from phi3_jax.model import Phi3ForCausalLM, Phi3ForSequenceClassification, Phi3PreTrainedModel
from phi3_jax.model.losses import (
    IGNORE_INDEX,
    cross_entropy_count,
    cross_entropy_sum,
    problem_type,
    sequence_loss_count,
    sequence_loss_sum,
)

Batch = Mapping[str, Any]
"""Arguments of a head with `labels`, and `weights` [B], 0 for a row that does not count."""


@dataclass(frozen=True)
class Objective:
    """The loss of a head, with class weights and label smoothing.

    Raises:
        UserError: smoothing is outside [0, 1), or a class weight is not positive.
    """

    label_smoothing: float = 0.0
    """The share of each label that is spread over all classes."""
    class_weights: tuple[float, ...] | None = None
    """How much a label of each class counts; with several labels for each row, how much each label counts."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing={self.label_smoothing} must be at least 0 and below 1")
        if self.class_weights is not None and min(self.class_weights) <= 0:
            raise UserError(f"class_weights has {min(self.class_weights)}; each must be above 0")

    def check(self, model: Phi3PreTrainedModel) -> None:
        """Checks that `model` can be trained with this objective.

        Raises:
            UserError: it cannot.
        """
        config = model.config
        causal = isinstance(model, Phi3ForCausalLM)
        if self.class_weights is not None:
            if causal:
                raise UserError("class_weights are for classification, and this is a language model")
            if len(self.class_weights) != config.num_labels:
                raise UserError(
                    f"class_weights has {len(self.class_weights)} numbers for {config.num_labels} labels"
                )
        if isinstance(model, Phi3ForSequenceClassification) and problem_type(config) == "regression":
            given = [name for name in ("label_smoothing", "class_weights") if getattr(self, name)]
            if given:
                raise UserError(f"{given[0]} is for classes, and this is a regression")

    def loss_sum(
        self, model: Phi3PreTrainedModel, batch: Batch, key: Key[Array, ""] | None = None
    ) -> Float[Array, ""]:
        """Returns the sum of the batch's losses; `key` turns dropout on."""
        if isinstance(model, Phi3ForCausalLM):
            hidden = model.decoder(**model_inputs(batch), rngs=key).last_hidden_state
            return model.cross_entropy_sum(hidden, batch["labels"], self.label_smoothing)
        return self.loss_sum_of_logits(model, model(**model_inputs(batch), rngs=key).logits, batch)

    def loss_sum_of_logits(
        self, model: Phi3PreTrainedModel, logits: Float[Array, "..."], batch: Batch
    ) -> Float[Array, ""]:
        """Returns the sum of the batch's losses, given the logits of a classifier."""
        labels, options = batch["labels"], (self.class_weights, self.label_smoothing)
        if isinstance(model, Phi3ForSequenceClassification):
            return sequence_loss_sum(model.config, logits, labels, batch.get("weights"), *options)
        return cross_entropy_sum(logits, labels, *options)

    def count(self, model: Phi3PreTrainedModel, batch: Batch) -> Float[Array, ""]:
        """Returns what divides the sum of a batch's losses: the labels that count, by their weights.

        It is 1 where none counts.
        """
        labels = batch["labels"]
        if isinstance(model, Phi3ForSequenceClassification):
            return sequence_loss_count(model.config, labels, batch.get("weights"), self.class_weights)
        if isinstance(model, Phi3ForCausalLM):
            labels = labels[:, 1:]
        return cross_entropy_count(labels, self.class_weights)

    def counted(self, model: Phi3PreTrainedModel, batch: Batch) -> Float[Array, ""]:
        """Returns `count`, or 0 where none counts, so that the counts of several batches add up."""
        labels, weights = batch["labels"], batch.get("weights")
        if isinstance(model, Phi3ForCausalLM):
            labels = labels[:, 1:]
        if not jnp.issubdtype(labels.dtype, jnp.floating):
            some = jnp.any(labels != IGNORE_INDEX)
        else:
            some = jnp.any(weights > 0) if weights is not None else jnp.bool_(labels.size)
        return jnp.where(some, self.count(model, batch), 0.0)


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Returns the parts of a batch that the model takes."""
    return {name: x for name, x in batch.items() if name not in ("labels", "weights")}
