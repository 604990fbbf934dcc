"""A run's state on disk: Orbax checkpoints, written while training continues."""

import logging
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
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
class RestoredCheckpoint:
    """The contents of a checkpoint."""

    step: int
    state: TrainState
    about: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run; the last ones and the best are kept.

    They hold what training changes: trained parameters, optimizer and step. Frozen parameters are the base
    model's. Each checkpoint has a checksum of its numbers, because the format has none. With several
    processes each writes what its devices hold, and all call the same methods.

    Args:
        directory: made if it does not exist; leftovers of killed processes in it are removed.
        greater_is_better: whether a greater score is better.
        last: how many checkpoints are kept beside the best.
    """

    def __init__(self, directory: Path, *, greater_is_better: bool, last: int = 2):
        self.directory = directory.absolute()

        def score(metrics: Any) -> float:
            return metrics["score"]

        def rank(metrics: Any) -> Any:
            """Ranks the first of equal scores highest, as `EvaluationState` does; Orbax takes the last."""
            step = metrics.get("step", 0)
            return metrics["score"], -step if greater_is_better else step

        best = policies.BestN(get_metric_fn=rank, n=1, reverse=not greater_is_better)
        options = ocp.CheckpointManagerOptions(
            best_fn=score,  # without it Orbax neither writes nor reads scores
            best_mode="max" if greater_is_better else "min",
            cleanup_tmp_directories=True,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(last), best]),
        )
        _silence_writes_after_a_failed_one()
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            raise CheckpointError(f"{directory} cannot be written: {error.strerror or error}") from error

    def save(self, step: int, state: TrainState, about: dict[str, Any], score: float) -> None:
        """Starts to write a checkpoint; returns when its numbers are copied, so that training can continue.

        Raises:
            CheckpointError: this checkpoint or the one before could not be written; earlier ones are intact.
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
        """Waits until everything is on disk.

        Raises:
            CheckpointError: a checkpoint could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_written(None, error) from error

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def restore(self, step: int, state: TrainState) -> RestoredCheckpoint:
        """Returns the checkpoint of `step`; frozen parameters, shapes and shardings come from `state`.

        Raises:
            CheckpointError: the checkpoint is damaged.
        """
        shapes = jax.tree.map(_abstract, _changing(state))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", ResourceWarning
                )  # Orbax leaves files to the garbage collector
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(shapes), about=ocp.args.JsonRestore()
                    ),
                )
            changing, about = restored["state"], restored["about"]
            if int(_checksum(changing)) != about["checksum"]:
                raise UserError("its numbers are not those that were saved")
        except Exception as error:  # the libraries raise many types for a damaged file
            reason = str(error).strip().splitlines()
            raise CheckpointError(
                f"{self.directory / str(step)} cannot be read: {reason[0][:200] if reason else error!r}"
            ) from error
        whole = TrainState(changing["trained"], state.frozen, changing["optimizer"], changing["step"])
        return RestoredCheckpoint(step, whole, about)

    def restore_last(self, state: TrainState) -> RestoredCheckpoint | None:
        """Returns the last checkpoint that can be read, or None without any; deletes damaged ones after it.

        Raises:
            CheckpointError: there are checkpoints, and none can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                restored = self.restore(step, state)
            except CheckpointError as error:
                if step == steps[0]:
                    raise
                logger.warning("%s; resuming from the checkpoint before it", error)
                continue
            for damaged in (later for later in steps if later > step):
                self._manager.delete(damaged)
            return restored
        return None

    def keep(self, best: int | None, last: int) -> None:
        """Deletes all checkpoints but the best and the `last` ones; a killed process may have left more."""
        steps = self.steps()
        for step in steps[: len(steps) - last]:
            if step != best:
                self._manager.delete(step)

    def delete(self, step: int) -> None:
        """Deletes the checkpoint of a step, if there is one."""
        if step in self.steps():
            self._manager.delete(step)

    def close(self) -> None:
        """Waits for unfinished writing, even if it fails, and ends the threads."""
        self._manager.close()

    def _not_written(self, step: int | None, error: Exception) -> CheckpointError:
        causes = list(_chain(error))
        texts = [str(each) for each in causes]
        full = any(
            "No space left" in text or "RESOURCE_EXHAUSTED" in text or "quota" in text for text in texts
        )
        reason = texts[0].strip().splitlines()[0][:200]
        if system := re.search(r": ([^:]+) \[os_error_code=", " ".join(texts)):  # at the end of a long text
            reason = system[1]
        for cause in causes:
            if isinstance(cause, OSError) and cause.strerror:
                reason = cause.strerror
        if full:
            reason = "there is no space left on the disk"
        name = self.directory if step is None else self.directory / str(step)
        return CheckpointError(f"{name} cannot be written: {reason}; the checkpoint before it is intact")


@cache
def _silence_writes_after_a_failed_one() -> None:
    """Drops the tracebacks of writes that end after another one has failed, whose error is raised."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if unraisable.exc_type is not RuntimeError or str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def saved_steps(directory: Path) -> list[int]:
    """Returns the steps that have a complete checkpoint in this folder, ascending, without reading them."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def remove_checkpoints(directory: Path) -> None:
    """Deletes the checkpoints of an earlier run."""
    shutil.rmtree(directory, ignore_errors=True)


def _changing(state: TrainState) -> dict[str, Any]:
    # Plain containers: the files take their names from these, not from the classes of libraries.
    return {"trained": state.trained, "optimizer": state.optimizer, "step": state.step}


def _abstract(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


@jax.jit
def _checksum(tree: Any) -> UInt32[Array, ""]:
    """Returns a number that depends on every bit, and on the order of the numbers."""
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        if leaf.dtype == jnp.int4:
            leaf = leaf.astype(jnp.int8)
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
