"""One training step: loss, gradients, update; parameters and optimizer state go in and come out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from phi3_jax.errors import UserError
from phi3_jax.model import Phi3PreTrainedModel
from phi3_jax.model.abstract import with_shardings
from phi3_jax.model.layer_stack import can_stack, stack_layers, stack_states, unstack_layers, unstack_states
from phi3_jax.model.remat import REMAT_POLICIES, Remat
from phi3_jax.trainer.objectives import Batch, Objective


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The parameters, the optimizer's state and the step."""

    trained: nnx.State
    """Parameters that the optimizer changes, in the master dtype."""
    frozen: nnx.State
    """All other parameters, in the compute dtype."""
    optimizer: optax.OptState
    step: Int[Array, ""]


class Metrics(NamedTuple):
    """The metrics of one step, before its update."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]


class _Sums(NamedTuple):
    """What the batches of a step add up to."""

    loss: Float[Array, ""]
    counted: Float[Array, ""]
    """The labels that count."""
    gradients: nnx.State
    """Of the sum of the losses."""


class Trainer:
    """Trains the parameters of a model that `wrt` selects.

    The backward pass computes each layer again, except what `remat` keeps.

    Args:
        model: any model of this package, with numbers or abstract (`abstract_model`); it is not changed.
        optimizer: of optax.
        objective: the loss; default: the head's own.
        accumulate: how many micro-batches a batch is divided into. They run one after another, so that a step
            needs the memory of one; its result is the same but for rounding.
        wrt: `nnx.Param` for all parameters, `nnx.LoRAParam` for adapters only, or any filter of nnx.
        master_dtype: of trained parameters between steps, and of the optimizer's state.
        compute_dtype: of parameters and activations within a step; default: the model's.
        remat: a key of `REMAT_POLICIES`.
        scan_layers: stack the layers and scan them, so that a step compiles in the time of one layer. On CPU
            a scan copies what every layer keeps and its gradients; there a list is 1.6 times as fast.

    Raises:
        UserError: `remat` is unknown, the objective does not fit the model, or `accumulate` is below 1.
    """

    def __init__(
        self,
        model: Phi3PreTrainedModel,
        optimizer: optax.GradientTransformation,
        *,
        objective: Objective | None = None,
        accumulate: int = 1,
        wrt: Any = nnx.Param,
        master_dtype: Any = jnp.float32,
        compute_dtype: Any = None,
        remat: Remat = "full",
        scan_layers: bool = True,
    ):
        if remat not in REMAT_POLICIES:
            raise UserError(f"remat={remat!r} is unknown; use {', '.join(REMAT_POLICIES)}")
        if accumulate < 1:
            raise UserError(f"accumulate={accumulate} must be at least 1")
        self.objective = objective or Objective()
        self.objective.check(model)
        self.accumulate = accumulate
        self.optimizer = optimizer
        self.master_dtype = jnp.dtype(master_dtype)
        self.compute_dtype = jnp.dtype(compute_dtype or model.dtype)
        self._wrt = wrt
        self._arrange = stack_layers if scan_layers else unstack_layers
        self._stacks_saved = not scan_layers and can_stack(model.decoder.layers)
        mesh = model.decoder.mesh
        shapes = jax.eval_shape(self._arrange, model)
        shapes.decoder.remat_policy = REMAT_POLICIES[remat]
        self._structure: nnx.GraphDef[Any] = nnx.graphdef(shapes)
        self.state_shapes = with_shardings(jax.eval_shape(self._start, model), mesh)
        """The state as a tree of `jax.ShapeDtypeStruct` with shardings."""
        shardings = None if mesh is None else jax.tree.map(lambda x: x.sharding, self.state_shapes)
        everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        both = None if mesh is None else (shardings, everywhere)
        self.start = jax.jit(self._start, out_shardings=shardings)
        self.step = jax.jit(self._step, donate_argnames="state", out_shardings=both)
        of_sums: Any = (everywhere, everywhere, None if shardings is None else shardings.trained)
        sums = None if mesh is None else _Sums(*of_sums)
        self._zeros = jax.jit(self._no_sums, out_shardings=sums)
        self._add = jax.jit(self._add_batch, donate_argnames="sums", out_shardings=sums)
        self._finish = jax.jit(self._update, donate_argnames="state", out_shardings=both)

    def _start(self, model: Phi3PreTrainedModel) -> TrainState:
        """Returns the state before the first step."""
        trained, frozen = nnx.state(self._arrange(model), self._wrt, ...)
        trained = _cast(trained, self.master_dtype)
        frozen = _cast(frozen, self.compute_dtype)
        return TrainState(trained, frozen, self.optimizer.init(trained), jnp.zeros((), jnp.int32))

    def step_in_batches(
        self, state: TrainState, batches: Sequence[Batch], key: Key[Array, ""] | None = None
    ) -> tuple[TrainState, Metrics]:
        """Takes one step with several batches, which may have different widths.

        The result is that of one batch of all rows, but for rounding. Each width is compiled once. As with
        `step`, the buffers of `state` are reused.
        """
        if len(batches) == 1:
            return self.step(state, batches[0], key)
        sums = self._zeros(state)
        for number, batch in enumerate(batches):
            sums = self._add(sums, state, batch, key, number)
        return self._finish(state, sums)

    def _no_sums(self, state: TrainState) -> "_Sums":
        zero = jnp.zeros((), jnp.float32)
        return _Sums(zero, zero, jax.tree.map(jnp.zeros_like, state.trained))

    def _add_batch(
        self,
        sums: "_Sums",
        state: TrainState,
        batch: Batch,
        key: Key[Array, ""] | None,
        number: Int[Array, ""],
    ) -> "_Sums":
        """Returns the sums with those of one more batch."""
        key = None if key is None else jax.random.fold_in(jax.random.fold_in(key, state.step), number)
        counted = self.objective.counted(nnx.merge(self._structure, state.trained, state.frozen), batch)
        loss, gradients = self._gradients(state, batch, key, count=jnp.ones((), jnp.float32))
        return jax.tree.map(jnp.add, sums, _Sums(loss, counted, gradients))

    def _update(self, state: TrainState, sums: "_Sums") -> tuple[TrainState, Metrics]:
        """Returns the state after an update by the sums of all batches of a step, and metrics."""
        count = jnp.where(sums.counted == 0, 1.0, sums.counted)
        gradients = jax.tree.map(lambda x: x / count, sums.gradients)
        return self._updated(state, sums.loss / count, gradients)

    def to_save(self, state: TrainState) -> TrainState:
        """Returns the state for a checkpoint: with its layers stacked, also where a list of them is trained.

        So another machine can continue a run. What Adafactor keeps depends on the arrangement, and stays.
        """
        return self._rearranged(state, stack_states) if self._saves_stack(state) else state

    def from_saved(self, saved: TrainState) -> TrainState:
        """Returns the state that was made for a checkpoint by `to_save`, here or on another machine."""
        return self._rearranged(saved, unstack_states) if self._saves_stack(saved) else saved

    def _saves_stack(self, state: TrainState) -> bool:
        shapes = jax.tree.map(jnp.shape, state.trained)
        kept = jax.tree.leaves(state.optimizer, is_leaf=lambda node: isinstance(node, nnx.State))
        alike = (jax.tree.map(jnp.shape, node) == shapes for node in kept if isinstance(node, nnx.State))
        return self._stacks_saved and all(alike)

    @staticmethod
    def _rearranged(state: TrainState, change: Callable[[Any], Any]) -> TrainState:
        return replace(state, trained=change(state.trained), optimizer=change(state.optimizer))

    def model(self, state: TrainState) -> Any:
        """Returns the model with the parameters of `state` and a list of layers."""
        return unstack_layers(nnx.merge(self._structure, state.trained, state.frozen))

    def _step(
        self, state: TrainState, batch: Batch, key: Key[Array, ""] | None = None
    ) -> tuple[TrainState, Metrics]:
        """Returns the state after one update, and metrics; `key`, the same for all steps, turns dropout on.

        Raises:
            UserError: the rows do not divide into micro-batches.
        """
        key = None if key is None else jax.random.fold_in(key, state.step)
        return self._updated(state, *self._gradients(state, batch, key))

    def _updated(
        self, state: TrainState, loss: Float[Array, ""], gradients: nnx.State
    ) -> tuple[TrainState, Metrics]:
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies its step counts by floats
            updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        metrics = Metrics(loss, optax.tree.norm(gradients))
        return TrainState(trained, state.frozen, optimizer, state.step + 1), metrics

    def _gradients(
        self,
        state: TrainState,
        batch: Batch,
        key: Key[Array, ""] | None,
        count: Float[Array, ""] | None = None,
    ) -> tuple[Float[Array, ""], nnx.State]:
        """Returns the loss of a batch, and its gradients in the master dtype.

        Args:
            count: divides the sum of the losses; default: the labels that count.
        """
        if count is None:
            count = self.objective.count(nnx.merge(self._structure, state.trained, state.frozen), batch)

        def loss(trained: nnx.State, part: Batch, key: Key[Array, ""] | None) -> Float[Array, ""]:
            # Cast before the scan, so that a mesh gathers numbers of the compute dtype.
            model = self.computing(replace(state, trained=trained))
            return self.objective.loss_sum(model, part, key) / count

        if self.accumulate == 1:
            return jax.value_and_grad(loss)(state.trained, batch, key)

        def add(total: Any, item: tuple[Array, Batch]) -> tuple[Any, None]:
            number, part = item
            part_key = None if key is None else jax.random.fold_in(key, number)
            own = jax.value_and_grad(loss)(state.trained, part, part_key)
            return jax.tree.map(jnp.add, total, own), None

        zeros = jax.tree.map(jnp.zeros_like, (count, state.trained))
        parts = jax.tree.map(self._parts, batch)
        return jax.lax.scan(add, zeros, (jnp.arange(self.accumulate, dtype=jnp.int32), parts))[0]

    def _parts(self, x: Array) -> Array:
        """Returns [rows, ...] as [micro-batches, rows of each, ...]; every device keeps its own rows."""
        rows = x.shape[0]
        if rows % self.accumulate:
            raise UserError(f"a batch of {rows} rows does not divide into {self.accumulate} micro-batches")
        parts = jnp.reshape(x, (rows // self.accumulate, self.accumulate, *x.shape[1:]))
        return jnp.swapaxes(parts, 0, 1)

    def computing(self, state: TrainState) -> Any:
        """Returns the model as a step uses it: in the compute dtype, with its layers stacked or not."""
        return nnx.merge(self._structure, _cast(state.trained, self.compute_dtype), state.frozen)


def _cast(tree: Any, dtype: jnp.dtype) -> Any:
    """Casts all parameters but those that keep their dtype, such as the magnitudes of adapters."""

    def cast(node: Any) -> Any:
        return node if getattr(node, "keeps_dtype", False) else jax.tree.map(lambda x: x.astype(dtype), node)

    return jax.tree.map(cast, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
