"""Optimizers and schedules from optax, under the names of transformers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from phi3_jax.errors import UserError

OPTIMIZERS = ("adamw", "adafactor", "lion")
SCHEDULES = ("linear", "cosine", "constant")

SMALLEST_FACTORED = 32
"""Adafactor factors second moments over the two largest axes if both have at least this size. Our projections
keep heads as an axis, so one of the two is head_dim where the checkpoint's matrix has all heads."""


def make_schedule(name: str, peak: float, *, total_steps: int, warmup_steps: int) -> optax.Schedule:
    """Returns the learning rate of each step: from 0 up to `peak`, then down to 0 unless "constant".

    As in transformers, the first of `warmup_steps` steps has the rate 0.

    Raises:
        UserError: the name is unknown, or the warm-up is longer than the run.
    """
    if name not in SCHEDULES:
        raise UserError(f"lr_scheduler_type={name!r} is unknown; use {', '.join(SCHEDULES)}")
    if not 0 <= warmup_steps < total_steps:
        raise UserError(f"the warm-up has {warmup_steps} steps and the whole run {total_steps}")
    rest = total_steps - warmup_steps
    after = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }[name]
    if warmup_steps == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps])


def make_optimizer(
    name: str,
    schedule: optax.Schedule | float,
    *,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
) -> optax.GradientTransformation:
    """Returns an optimizer that clips the gradients' norm, then updates; norms and biases do not decay.

    AdamW uses `beta1`, `beta2` and `epsilon`, Lion only the first two; Adafactor has its own numbers.

    Raises:
        UserError: the name is unknown, or a number is out of range.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"optim={name!r} is unknown; use {', '.join(OPTIMIZERS)}")
    if weight_decay < 0 or (max_grad_norm is not None and max_grad_norm <= 0):
        raise UserError(f"weight_decay={weight_decay}, max_grad_norm={max_grad_norm}: must not be negative")
    make: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adamw": lambda: optax.adamw(
            schedule, b1=beta1, b2=beta2, eps=epsilon, weight_decay=weight_decay, mask=decays
        ),
        "lion": lambda: optax.lion(schedule, b1=beta1, b2=beta2, weight_decay=weight_decay, mask=decays),
        # Decay follows the learning rate as in the other two; with optax's own argument it does not.
        "adafactor": lambda: optax.chain(
            optax.adafactor(
                multiply_by_parameter_scale=False, min_dim_size_to_factor=SMALLEST_FACTORED, momentum=None
            ),
            optax.scale(-1.0),
            optax.add_decayed_weights(weight_decay, mask=decays),
            optax.scale_by_learning_rate(schedule),
        ),
    }
    clip = [] if max_grad_norm is None else [clip_by_global_norm(max_grad_norm)]
    return optax.chain(*clip, make[name]())


def clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """Returns a transformation that scales gradients so that their common norm is at most `most`.

    It is optax's, but multiplies all numbers by one factor. XLA does not fuse optax's division and choice for
    each number with the update, so that gradients would pass through memory once more.
    """

    def update(updates: Any, state: Any, parameters: Any = None) -> tuple[Any, Any]:
        return optax.tree.scale(jnp.minimum(1.0, most / optax.tree.norm(updates)), updates), state

    return optax.GradientTransformation(lambda parameters: optax.EmptyState(), update)


def decays(parameters: Any) -> Any:
    """Returns which parameters decay: all but norms and biases."""

    def decay(path: tuple[Any, ...], _: Any) -> bool:
        names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        return not any(name.endswith("norm") or name == "bias" for name in names)

    return jax.tree_util.tree_map_with_path(decay, parameters)
