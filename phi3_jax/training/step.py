"""One training step: loss, gradients, update; parameters and optimizer state go in and come out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from phi3_jax.model import Phi3PreTrainedModel
from phi3_jax.model.abstract import placed
from phi3_jax.model.layer_stack import stack_layers, unstack_layers

REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "none": None,
}
"""What a layer keeps for the backward pass: its input; the results of its projections too; everything."""

Batch = dict[str, Any]
"""Arguments of a head: input_ids, attention_mask, labels and whatever else it takes."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What changes from step to step, and the parameters that do not."""

    trained: nnx.State
    """Parameters that the optimizer changes, in the dtype that it works in."""
    frozen: nnx.State
    """All others, in the dtype that is computed with."""
    optimizer: optax.OptState
    step: Int[Array, ""]


class Metrics(NamedTuple):
    """Of one step, before its update."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]


class Trainer:
    """Trains the parameters of a model that `wrt` selects.

    The layers are stacked and scanned, each computed again in the backward pass unless `remat` keeps
    what it made, so that a step compiles in the time of one layer.

    Args:
        model: any of the package's, whole or abstract (`abstract_model`); it is not changed.
        optimizer: of optax.
        wrt: `nnx.Param`: all parameters; `nnx.LoRAParam`: adapters only; or any filter of nnx.
        master_dtype: of trained parameters between steps, and of the optimizer's state.
        compute_dtype: of parameters and activations within a step; default: the model's.
        remat: of `REMAT_POLICIES`.

    Raises:
        ValueError: an unknown `remat`.
    """

    def __init__(
        self,
        model: Phi3PreTrainedModel,
        optimizer: optax.GradientTransformation,
        *,
        wrt: Any = nnx.Param,
        master_dtype: Any = jnp.float32,
        compute_dtype: Any = None,
        remat: str = "full",
    ):
        if remat not in REMAT_POLICIES:
            raise ValueError(f"remat={remat!r} is not known; use {', '.join(REMAT_POLICIES)}")
        self.optimizer = optimizer
        self.master_dtype = jnp.dtype(master_dtype)
        self.compute_dtype = jnp.dtype(compute_dtype or model.dtype)
        self._wrt = wrt
        mesh = model.decoder.mesh
        shapes = jax.eval_shape(stack_layers, model)
        shapes.decoder.remat_policy = REMAT_POLICIES[remat]
        self._structure: nnx.GraphDef[Any] = nnx.graphdef(shapes)
        self.state_shapes = placed(jax.eval_shape(self._start, model), mesh)
        """The state as `jax.ShapeDtypeStruct`s with their shardings."""
        where = None if mesh is None else jax.tree.map(lambda x: x.sharding, self.state_shapes)
        both = None if mesh is None else (where, NamedSharding(mesh, PartitionSpec()))
        self.start = jax.jit(self._start, out_shardings=where)
        self.step = jax.jit(self._step, donate_argnames="state", out_shardings=both)

    def _start(self, model: Phi3PreTrainedModel) -> TrainState:
        """The state before the first step."""
        trained, frozen = nnx.state(stack_layers(model), self._wrt, ...)
        trained = _cast(trained, self.master_dtype)
        frozen = _cast(frozen, self.compute_dtype)
        return TrainState(trained, frozen, self.optimizer.init(trained), jnp.zeros((), jnp.int32))

    def model(self, state: TrainState) -> Any:
        """The model with the parameters of `state`, its layers a list again."""
        return unstack_layers(nnx.merge(self._structure, state.trained, state.frozen))

    def _step(
        self, state: TrainState, batch: Batch, key: Key[Array, ""] | None = None
    ) -> tuple[TrainState, Metrics]:
        """The state after one update, and metrics; `key` turns dropout on."""

        def loss(trained: nnx.State) -> Float[Array, ""]:
            # Cast before the scan, so that a mesh gathers the narrow numbers.
            trained = _cast(trained, self.compute_dtype)
            model = nnx.merge(self._structure, trained, state.frozen)
            return model(**batch, rngs=key).loss

        value, gradients = jax.value_and_grad(loss)(state.trained)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        metrics = Metrics(value, optax.tree.norm(gradients))
        return TrainState(trained, state.frozen, optimizer, state.step + 1), metrics


def _cast(tree: Any, dtype: jnp.dtype) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), tree)
