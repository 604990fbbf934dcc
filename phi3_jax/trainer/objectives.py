"""What training makes small: the loss of each head, as a sum and what that is divided by.

Apart, because micro-batches and devices then add up to exactly the loss of the whole batch, however unevenly
labels fall on them. With neither weights nor smoothing these are the losses of the heads themselves.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.errors import UserError
from phi3_jax.model import Phi3ForCausalLM, Phi3ForSequenceClassification, Phi3PreTrainedModel
from phi3_jax.model.losses import IGNORE_INDEX

Batch = Mapping[str, Any]
"""Arguments of a head, `labels` among them; and `weights` [B], 0 for a row that does not count."""


@dataclass(frozen=True)
class Objective:
    """The loss of a head.

    Raises:
        ValueError: smoothing outside [0, 1); weights of classes that are not positive, or not one for each.
    """

    label_smoothing: float = 0.0
    """Share of each label's weight that goes to all classes alike."""
    class_weights: tuple[float, ...] | None = field(default=None)
    """How much a label of each class counts; of several labels at once, how much each label does."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing={self.label_smoothing} must be at least 0 and below 1")
        if self.class_weights is not None and min(self.class_weights) <= 0:
            raise UserError(f"class_weights has {min(self.class_weights)}; each must be above 0")

    def check(self, model: Phi3PreTrainedModel) -> None:
        """Whether this can be asked of `model`.

        Raises:
            ValueError: it can not.
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
        if not causal and config.problem_type == "regression":
            given = [name for name in ("label_smoothing", "class_weights") if getattr(self, name)]
            if given:
                raise UserError(f"{given[0]} is for classes, and this is a regression")

    def count(self, model: Phi3PreTrainedModel, batch: Batch) -> Float[Array, ""]:
        """What the sum of a batch's losses is divided by: labels that count, by their weights; at least 1
        where none does."""
        labels = batch["labels"]
        if isinstance(model, Phi3ForSequenceClassification) and not _classes(model.config, labels):
            total = jnp.sum(_row_weights(batch)) * model.config.num_labels
        else:
            labels = labels[:, 1:] if isinstance(model, Phi3ForCausalLM) else labels
            total = jnp.sum(self._label_weights(labels))
        return jnp.where(total == 0, 1.0, total)

    def __call__(
        self, model: Phi3PreTrainedModel, batch: Batch, key: Key[Array, ""] | None = None
    ) -> Float[Array, ""]:
        """The sum of the batch's losses; `key` turns dropout on."""
        return self.of_logits(model, model(**inputs_of(batch), rngs=key).logits, batch)

    def of_logits(
        self, model: Phi3PreTrainedModel, logits: Float[Array, "..."], batch: Batch
    ) -> Float[Array, ""]:
        """The sum of the batch's losses, given what the model said."""
        logits = logits.astype(jnp.float32)
        labels = batch["labels"]
        if isinstance(model, Phi3ForCausalLM):
            return self._of_classes(logits[:, :-1], labels[:, 1:])
        if not isinstance(model, Phi3ForSequenceClassification) or _classes(model.config, labels):
            return self._of_classes(logits, labels)
        weights = _row_weights(batch)[:, None]
        labels = labels.astype(jnp.float32).reshape(logits.shape)
        if _problem(model.config, labels) == "regression":
            return jnp.sum(weights * jnp.square(logits - labels))
        if self.class_weights is not None:
            weights = weights * jnp.asarray(self.class_weights, jnp.float32)
        labels = (1 - self.label_smoothing) * labels + self.label_smoothing / 2
        return jnp.sum(weights * optax.sigmoid_binary_cross_entropy(logits, labels))

    def _label_weights(self, labels: Int[Array, "..."]) -> Float[Array, "..."]:
        counted = labels != IGNORE_INDEX
        if self.class_weights is None:
            return counted.astype(jnp.float32)
        by_class = jnp.asarray(self.class_weights, jnp.float32)
        return jnp.where(counted, by_class[jnp.where(counted, labels, 0)], 0.0)

    def _of_classes(self, logits: Float[Array, "... C"], labels: Int[Array, "..."]) -> Float[Array, ""]:
        """As torch.nn.CrossEntropyLoss defines it with `weight` and `label_smoothing`, times its divisor."""
        weights = self._label_weights(labels)
        safe = jnp.where(labels == IGNORE_INDEX, 0, labels)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, safe)
        total = jnp.sum(jnp.where(weights > 0, weights * losses, 0.0))
        if not self.label_smoothing:
            return total
        surprise = optax.losses.softmax_cross_entropy(logits, self._smooth(logits.shape[-1]))
        spread = jnp.sum(jnp.where(labels != IGNORE_INDEX, surprise, 0.0))
        return (1 - self.label_smoothing) * total + self.label_smoothing * spread

    def _smooth(self, classes: int) -> Float[Array, " C"]:
        weights = jnp.ones(classes) if self.class_weights is None else jnp.asarray(self.class_weights)
        return weights.astype(jnp.float32) / classes


def inputs_of(batch: Batch) -> dict[str, Any]:
    """What of a batch the model is given."""
    return {name: x for name, x in batch.items() if name not in ("labels", "weights")}


def _row_weights(batch: Batch) -> Float[Array, " B"]:
    if (weights := batch.get("weights")) is None:
        return jnp.ones(batch["labels"].shape[0], jnp.float32)
    return weights.astype(jnp.float32)


def _problem(config: Phi3Config, labels: Array) -> str:
    """The problem type of rows of text, told by their labels where the config leaves it open."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    integers = jnp.issubdtype(labels.dtype, jnp.integer)
    return "single_label_classification" if integers else "multi_label_classification"


def _classes(config: Phi3Config, labels: Array) -> bool:
    return _problem(config, labels) == "single_label_classification"
