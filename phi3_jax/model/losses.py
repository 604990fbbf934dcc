"""The losses of the heads, each in float32."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Num

IGNORE_INDEX = -100
"""The label of what is not counted."""


def cross_entropy(
    logits: Float[Array, "... C"],
    labels: Int[Array, "..."],
    num_items_in_batch: Int[Array, ""] | int | None = None,
) -> Float[Array, ""]:
    """Mean cross entropy over the labels that are not -100; 0 when all are.

    With `num_items_in_batch` it is the sum divided by that count instead: shards and accumulated
    micro-batches that share one count then add up to the loss of the whole batch.
    """
    counted = labels != IGNORE_INDEX
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), jnp.where(counted, labels, 0)
    )
    total = jnp.sum(jnp.where(counted, losses, 0.0))
    count = jnp.maximum(jnp.sum(counted), 1) if num_items_in_batch is None else num_items_in_batch
    return total / count


def causal_lm_loss(
    logits: Float[Array, "B T V"],
    labels: Int[Array, "B T"],
    num_items_in_batch: Int[Array, ""] | int | None = None,
) -> Float[Array, ""]:
    """Cross entropy of each token given the ones before it: labels are shifted by one here."""
    return cross_entropy(logits[:, :-1], labels[:, 1:], num_items_in_batch)


def sequence_classification_loss(
    logits: Float[Array, "B C"], labels: Num[Array, "..."], problem_type: str | None
) -> Float[Array, ""]:
    """Regression: mean squared error; one label of several: cross entropy; several labels: binary ones.

    Without a `problem_type`, one output means regression, integer labels a single class, others several.
    """
    num_labels = logits.shape[-1]
    logits = logits.astype(jnp.float32)
    if problem_type is None:
        single = jnp.issubdtype(labels.dtype, jnp.integer)
        problem_type = (
            "regression"
            if num_labels == 1
            else "single_label_classification"
            if single
            else "multi_label_classification"
        )
    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels.reshape(-1))
    labels = labels.astype(jnp.float32).reshape(logits.shape)
    if problem_type == "regression":
        return jnp.mean(jnp.square(logits - labels))
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels))
