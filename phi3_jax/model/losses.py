"""The losses of the heads, in float32: sums of losses, and the counts that divide them.

Sums and counts are separate functions, so that micro-batches and devices add up to exactly the loss of the
whole batch, however unevenly the labels fall on them.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Num

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.model.layers import across

IGNORE_INDEX = -100
"""The label of a token or row that does not count."""


def cross_entropy(
    logits: Float[Array, "... C"],
    labels: Int[Array, "..."],
    num_items_in_batch: Int[Array, ""] | int | None = None,
) -> Float[Array, ""]:
    """Returns the mean cross entropy over the labels that are not -100; 0 when all are.

    `num_items_in_batch` replaces the count of labels. Shards and micro-batches that share one such number
    add up to the loss of the whole batch.
    """
    count = cross_entropy_count(labels) if num_items_in_batch is None else num_items_in_batch
    return cross_entropy_sum(logits, labels) / jnp.asarray(count, jnp.float32)


def cross_entropy_sum(
    logits: Float[Array, "... C"],
    labels: Int[Array, "..."],
    class_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Returns the sum that `torch.nn.CrossEntropyLoss(weight, label_smoothing=...)` divides by the count."""
    logits = logits.astype(jnp.float32)
    weights = _label_weights(labels, class_weights)
    counted = labels != IGNORE_INDEX
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counted, labels, 0))
    total = jnp.sum(jnp.where(counted, weights * losses, 0.0))
    if not label_smoothing:
        return total
    classes = logits.shape[-1]
    weights = jnp.asarray((1.0,) * classes if class_weights is None else class_weights, jnp.float32)
    uniform = across(weights / classes, logits.ndim)
    spread = optax.losses.softmax_cross_entropy(logits, uniform)
    return (1 - label_smoothing) * total + label_smoothing * jnp.sum(jnp.where(counted, spread, 0.0))


def cross_entropy_count(
    labels: Int[Array, "..."], class_weights: Sequence[float] | None = None
) -> Float[Array, ""]:
    """Returns how many labels count, each by the weight of its class; 1 where none does."""
    return _one_if_zero(jnp.sum(_label_weights(labels, class_weights)))


def _label_weights(labels: Int[Array, "..."], class_weights: Sequence[float] | None) -> Float[Array, "..."]:
    counted = labels != IGNORE_INDEX
    if class_weights is None:
        return counted.astype(jnp.float32)
    by_class = jnp.asarray(class_weights, jnp.float32)
    return jnp.where(counted, by_class[jnp.where(counted, labels, 0)], 0.0)


def problem_type(config: Phi3Config, labels: Num[Array, "..."] | None = None) -> str:
    """Returns the problem type of a sequence classifier.

    Where the config names none, one output means regression, and for several outputs integer labels (or
    none at hand) mean a single label for each row, other labels several.
    """
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    if labels is None or jnp.issubdtype(labels.dtype, jnp.integer):
        return "single_label_classification"
    return "multi_label_classification"


def sequence_loss_sum(
    config: Phi3Config,
    logits: Float[Array, "B C"],
    labels: Num[Array, "..."],
    row_weights: Num[Array, "B"] | None = None,
    class_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Returns the sum of a sequence classifier's losses.

    These are squared errors, cross entropies of a single label, or binary cross entropies of several labels.

    Args:
        config: of the model.
        logits: of each row.
        labels: classes [B], -100 for a row that does not count; or numbers [B, C], or [B] for one output.
        row_weights: how much the numbers of each row count; default: 1.
        class_weights: how much each class counts; not for regression.
        label_smoothing: the share of each label that is spread over all classes; not for regression.
    """
    problem = problem_type(config, labels)
    if problem == "single_label_classification":
        return cross_entropy_sum(logits, labels.reshape(-1), class_weights, label_smoothing)
    logits = logits.astype(jnp.float32)
    labels = labels.astype(jnp.float32).reshape(logits.shape)
    if problem == "regression":
        losses = jnp.square(logits - labels)
    else:
        labels = (1 - label_smoothing) * labels + label_smoothing / 2
        losses = optax.sigmoid_binary_cross_entropy(logits, labels)
        if class_weights is not None:
            losses = losses * jnp.asarray(class_weights, jnp.float32)[None]
    if row_weights is not None:
        losses = losses * row_weights[:, None].astype(jnp.float32)
    return jnp.sum(losses)


def sequence_loss_count(
    config: Phi3Config,
    labels: Num[Array, "..."],
    row_weights: Num[Array, "B"] | None = None,
    class_weights: Sequence[float] | None = None,
) -> Float[Array, ""]:
    """Returns what divides `sequence_loss_sum`: labels, or numbers by the weights of their rows."""
    if problem_type(config, labels) == "single_label_classification":
        return cross_entropy_count(labels, class_weights)
    if row_weights is None:
        return jnp.float32(labels.size)
    return _one_if_zero(jnp.sum(row_weights.astype(jnp.float32)) * config.num_labels)


def _one_if_zero(count: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.where(count == 0, 1.0, count)
