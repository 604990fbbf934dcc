"""The state of a run on disk: Orbax checkpoints, written while training goes on."""

import logging
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, UInt32
from orbax.checkpoint import checkpoint_managers as policies

from phi3_jax.checkpoint.source import CheckpointError
from phi3_jax.errors import UserError
from phi3_jax.trainer.step import TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint gives back."""

    step: int
    state: TrainState
    about: dict[str, Any]


class Checkpoints:
    """Checkpoints of a run, of which the last two and the best stay.

    They hold what training changes: trained parameters, optimizer, step; frozen parameters are the base
    model's. Each has a checksum of its numbers, as the format has none. Over several processes each writes
    what its devices hold, and all call the same methods.

    Args:
        directory: made if absent; what killed processes left in it is removed.
        greater_is_better: of the score that checkpoints are saved with.
    """

    def __init__(self, directory: Path, *, greater_is_better: bool):
        self.directory = directory.absolute()

        def score(metrics: Any) -> float:
            return metrics["score"]

        def rank(metrics: Any) -> Any:
            """Of equal scores the first is the best, as the run's own record has it; Orbax keeps the last."""
            step = metrics.get("step", 0)
            return metrics["score"], -step if greater_is_better else step

        best = policies.BestN(get_metric_fn=rank, n=1, reverse=not greater_is_better)
        options = ocp.CheckpointManagerOptions(
            best_fn=score,  # without it scores are not written, nor read again
            best_mode="max" if greater_is_better else "min",
            cleanup_tmp_directories=True,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(2), best]),
        )
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            raise CheckpointError(f"{directory} cannot be written: {error.strerror or error}") from error

    def save(self, step: int, state: TrainState, about: dict[str, Any], score: float) -> None:
        """Begins to write a checkpoint; returns when its numbers are copied, so that training may go on.

        Raises:
            CheckpointError: this or the one before could not be written; those before are as they were.
        """
        changing = _changing(state)
        about = {**about, "checksum": int(_checksum(changing))}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(changing), about=ocp.args.JsonSave(about)
                ),
                metrics={"score": score, "step": step},
            )
        except Exception as error:
            raise self._not_written(step, error) from error

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
            CheckpointError: it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_written(None, error) from error

    def steps(self) -> list[int]:
        """Of the checkpoints that are there, ascending."""
        return sorted(self._manager.all_steps())

    def restore(self, step: int, state: TrainState) -> Resumed:
        """The state at `step`; frozen parameters, shapes and places are taken from `state`.

        Raises:
            CheckpointError: the checkpoint is damaged.
        """
        where = jax.tree.map(_abstract, _changing(state))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)  # Orbax leaves files for the collector
                made = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(where), about=ocp.args.JsonRestore()
                    ),
                )
            about = made["about"]
            if int(_checksum(made["state"])) != about["checksum"]:
                raise UserError("its numbers are not those that were saved")
        except Exception as error:  # whatever a damaged file makes the libraries raise
            reason = str(error).strip().splitlines()
            raise CheckpointError(
                f"{self.directory / str(step)} cannot be read: {reason[0][:200] if reason else error!r}"
            ) from error
        changed = made["state"]
        return Resumed(
            step, TrainState(changed["trained"], state.frozen, changed["optimizer"], changed["step"]), about
        )

    def restore_last(self, state: TrainState) -> Resumed | None:
        """The last checkpoint that can be read; damaged ones after it are deleted, with a warning.

        Raises:
            CheckpointError: there are checkpoints and none can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                resumed = self.restore(step, state)
            except CheckpointError as error:
                if step == steps[0]:
                    raise
                logger.warning("%s; going on from the checkpoint before it", error)
                continue
            for damaged in (later for later in steps if later > step):
                self._manager.delete(damaged)
            return resumed
        return None

    def keep(self, best: int | None) -> None:
        """Deletes all but the last two and the best; a process killed while it deleted leaves more."""
        for step in self.steps()[:-2]:
            if step != best:
                self._manager.delete(step)

    def close(self) -> None:
        """Waits for what is being written, whatever comes of it, and ends the threads."""
        self._manager.close()

    def _not_written(self, step: int | None, error: Exception) -> CheckpointError:
        texts = [str(each) for each in _chain(error)]
        full = any(
            "No space left" in text or "RESOURCE_EXHAUSTED" in text or "quota" in text for text in texts
        )
        reason = "there is no space left on the disk" if full else texts[0].strip().splitlines()[0][:200]
        name = self.directory if step is None else self.directory / str(step)
        return CheckpointError(f"{name} cannot be written: {reason}; the checkpoint before it is as it was")


def remove(directory: Path) -> None:
    """Deletes the checkpoints of a run that begins anew."""
    shutil.rmtree(directory, ignore_errors=True)


def _changing(state: TrainState) -> dict[str, Any]:
    # Plain containers, whose names the files then have, and not those of libraries' classes.
    return {"trained": state.trained, "optimizer": state.optimizer, "step": state.step}


def _abstract(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


@jax.jit
def _checksum(tree: Any) -> UInt32[Array, ""]:
    """Changes with any bit of any number, and with two numbers that change places."""
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        bits = jax.lax.bitcast_convert_type(leaf, np.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(
            jnp.uint32
        )
        weight = jnp.ones((), jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            shape = [size if each == axis else 1 for each in range(leaf.ndim)]
            weight = weight * (2 * jnp.arange(size, dtype=jnp.uint32) + 1).reshape(shape)
        total = total * jnp.uint32(31) + jnp.sum(bits * weight, dtype=jnp.uint32)
    return total


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
