"""A run's state on a disk or in a store: Orbax checkpoints, written while training continues."""

import logging
import os
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import Array
from orbax.checkpoint import checkpoint_managers as policies

from phi3_jax.checkpoint.source import CheckpointError
from phi3_jax.errors import UserError
from phi3_jax.parallel import distributed
from phi3_jax.storage.outputs import temporary_folder
from phi3_jax.storage.targets import Target, local_target, names_in, remove_folder, target_in
from phi3_jax.storage.urls import StorageError, clear_errors, find_entry, split_url
from phi3_jax.trainer.step import TrainState

from .checkpoint_errors import is_of_store, reason_of, silence_writes_after_a_failed_one
from .checkpoint_writer import CheckpointWriter, Snapshot
from .checksum import checksum
from .mirror import COMMITTED, Mirror, committed_steps

logger = logging.getLogger(__name__)

_OF_ORBAX = ("gs",)
"""Protocols of the stores that Orbax writes to by itself."""

READ_ATTEMPTS = 3
"""How often a checkpoint in a store is read before it is taken for damaged: an answer may have been cut."""


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

    Orbax writes to disks and to gs://, and for other stores to a temporary folder, whose files are copied.
    A checkpoint in a store counts when its last file, a mark, is there. Stores may be slow and fail for a
    while: what one process writes to them is written by a `CheckpointWriter`.

    Args:
        directory: a path or a URL, made if it does not exist. Leftovers in it are removed.
        greater_is_better: whether a greater score is better.
        last: how many checkpoints are kept beside the best.
        check: called before a checkpoint is written to a store; it raises `TakenOverError` if another
            process writes there.

    Raises:
        UserError: several processes cannot write to this store.
        StorageError: the store cannot be read or written.
        CheckpointError: the directory cannot be written.
    """

    def __init__(
        self,
        directory: Target,
        *,
        greater_is_better: bool,
        last: int = 2,
        check: Callable[[], None] = lambda: None,
    ):
        local = local_target(directory)
        self.directory = local.absolute() if local is not None else os.fspath(directory).rstrip("/")
        self._greater_is_better, self._last, self._check = greater_is_better, last, check
        self._stack = ExitStack()
        self._place = str(self.directory)
        """Where Orbax writes."""
        self._mirror: Mirror | None = None
        self._writer: CheckpointWriter | None = None
        silence_writes_after_a_failed_one()
        with ExitStack() as stack:
            if local is None:
                self._open_store(stack)
            try:
                with self._clear_errors():
                    self._manager = self._open()
            except OSError as error:
                raise CheckpointError(f"{directory} cannot be written: {error.strerror or error}") from error
            self._stack = stack.pop_all()

    def _open_store(self, stack: ExitStack) -> None:
        """Prepares what checkpoints of a store need beside Orbax."""
        url = self._place
        if split_url(url)[0] in _OF_ORBAX:
            # The server of gcsfs, which TensorStore has another variable for.
            if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
                os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
        elif distributed.process_count() > 1:
            raise UserError(
                f"{url}: several processes write checkpoints to gs:// or to a folder that all of them see; "
                "choose such an --output-dir"
            )
        else:
            self._mirror = Mirror(url, stack.enter_context(temporary_folder()))
            self._mirror.pull()
            self._place = str(self._mirror.folder)
        if distributed.process_count() == 1:
            self._writer = CheckpointWriter(self._write_snapshot, self._not_written)

    def _open(self) -> ocp.CheckpointManager:
        greater_is_better = self._greater_is_better

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
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(self._last), best]),
        )
        return ocp.CheckpointManager(self._place, options=options)

    def save(
        self, step: int, state: TrainState, about: dict[str, Any], score: float, best: bool = False
    ) -> None:
        """Starts to write a checkpoint; returns when its numbers are copied, so that training can continue.

        A local directory waits until the checkpoint before is written. A store does not: see
        `CheckpointWriter` for what is skipped and what is tried again. Several processes skip what comes too
        early, but wait with the best, and do not try again.

        Args:
            step: how many steps are done.
            state: the state after them.
            about: more to keep, for JSON.
            score: of the last evaluation.
            best: whether this score is the best so far.

        Raises:
            CheckpointError: this checkpoint or the one before could not be written; earlier ones are intact.
            TakenOverError: another process writes the checkpoints.
        """
        if self._writer is not None and not self._writer.accepts(step, best=best):
            return
        if self._writer is None and isinstance(self.directory, str) and not self._accepts(step, best):
            return
        changing = _changing(state)
        about = {**about, "checksum": int(checksum(changing))}
        if self._writer is not None:
            self._writer.add(Snapshot(step, _in_host_memory(changing), about, score, best))
            return
        try:
            self._start(Snapshot(step, changing, about, score, best))
        except Exception as error:
            raise self._not_written(step, error) from error

    def _accepts(self, step: int, best: bool) -> bool:
        """Returns whether several processes write a checkpoint now; all call this."""

        def is_busy() -> bool:
            self._check()
            return self._manager.is_saving_in_progress()

        if not distributed.from_primary(is_busy) or best:
            return True
        logger.warning("step %d gets no checkpoint: the one before is still being written", step)
        return False

    def _start(self, snapshot: Snapshot) -> None:
        self._manager.save(
            snapshot.step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(snapshot.state), about=ocp.args.JsonSave(snapshot.about)
            ),
            metrics={"score": snapshot.score, "step": snapshot.step},
        )

    def _write_snapshot(self, snapshot: Snapshot, again: bool) -> None:
        """Writes a snapshot to a store, in the thread of the writer."""
        self._check()
        if again:  # what Orbax knows may be wrong after an error
            with suppress(Exception):
                self._manager.close()
            self._manager = self._open()
        if snapshot.step not in self._manager.all_steps():
            self._start(snapshot)
            self._manager.wait_until_finished()
        if self._mirror is not None:
            self._mirror.push(self._manager.all_steps())

    def poll(self) -> None:
        """Tries again to write what could not be written, if it is time; call it after each step.

        Raises:
            TakenOverError: another process writes the checkpoints.
        """
        if self._writer is not None:
            self._writer.poll()

    def wait(self) -> None:
        """Waits until everything is on the disk or in the store.

        Raises:
            CheckpointError: a checkpoint could not be written.
            TakenOverError: another process writes the checkpoints.
        """
        if self._writer is not None:
            self._writer.drain()
            return
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
            StorageError: the store gives no answer, which says nothing about the checkpoint.
        """
        shapes = jax.tree.map(_abstract, _changing(state))
        attempts = READ_ATTEMPTS if self._is_direct() and distributed.process_count() == 1 else 1
        for attempt in range(1, attempts + 1):
            try:
                changing, about = self._read(step, shapes)
                break
            except Exception as error:  # the libraries raise many types for a damaged file
                if attempt < attempts:
                    time.sleep(attempt)
                    continue
                self._check_answers(step, error)
                reason = str(error).strip().splitlines()
                raise CheckpointError(
                    f"{target_in(self.directory, str(step))} cannot be read: "
                    f"{reason[0][:200] if reason else error!r}"
                ) from error
        whole = TrainState(changing["trained"], state.frozen, changing["optimizer"], changing["step"])
        return RestoredCheckpoint(step, whole, about)

    def _read(self, step: int, shapes: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the numbers of a checkpoint, and what is kept with them."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # Orbax leaves files to the garbage collector
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes), about=ocp.args.JsonRestore()),
            )
        changing, about = restored["state"], restored["about"]
        if int(checksum(changing)) != about["checksum"]:
            raise UserError("its numbers are not those that were saved")
        return changing, about

    def _is_direct(self) -> bool:
        """Returns whether Orbax itself reads from a store."""
        return isinstance(self.directory, str) and self._place == self.directory

    def _clear_errors(self) -> AbstractContextManager[None]:
        """Turns errors of a store into `StorageError`; those of disks stay."""
        return clear_errors(self.directory) if isinstance(self.directory, str) else nullcontext()

    def _check_answers(self, step: int, error: Exception) -> None:
        """Checks that a store is not what failed, for then the checkpoint may be intact.

        Raises:
            StorageError: it is.
        """
        if not self._is_direct():
            return
        url = f"{self.directory}/{step}/{COMMITTED}"
        if is_of_store(error):
            with clear_errors(url):
                raise error
        find_entry(url)

    def restore_last(self, state: TrainState) -> RestoredCheckpoint | None:
        """Returns the last checkpoint that can be read, or None without any; deletes damaged ones after it.

        Raises:
            CheckpointError: there are checkpoints, and none can be read.
            StorageError: the store gives no answer.
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
            self._delete([later for later in steps if later > step])
            return restored
        return None

    def keep(self, best: int | None, last: int) -> None:
        """Deletes all checkpoints but the best and the `last` ones; a killed process may have left more."""
        steps = self.steps()
        self._delete([step for step in steps[: len(steps) - last] if step != best])

    def _delete(self, steps: list[int]) -> None:
        with self._clear_errors():
            for step in steps:
                self._manager.delete(step)
            if steps and self._mirror is not None:
                self._mirror.push(self._manager.all_steps())

    def delete(self, step: int) -> None:
        """Deletes the checkpoint of a step, if there is one."""
        self._delete([step] if step in self.steps() else [])

    def close(self) -> None:
        """Waits for unfinished writing, even if it fails, and ends the threads."""
        if self._writer is not None:
            self._writer.close()
        self._manager.close()
        self._stack.close()

    def _not_written(self, step: int | None, error: Exception) -> CheckpointError:
        name = self.directory if step is None else target_in(self.directory, str(step))
        if isinstance(self.directory, str) and (self._mirror is None or isinstance(error, StorageError)):
            try:
                with clear_errors(str(name)):
                    raise error
            except Exception as clear:
                return CheckpointError(f"{clear}; the checkpoint before it is intact")
        return CheckpointError(
            f"{name} cannot be written: {reason_of(error)}; the checkpoint before it is intact"
        )


def saved_steps(directory: Target) -> list[int]:
    """Returns the steps that have a complete checkpoint in this folder, ascending, without reading them.

    Raises:
        StorageError: the store cannot be asked.
    """
    if local_target(directory) is None:
        return committed_steps(os.fspath(directory))
    return sorted(int(name) for name in names_in(directory) if name.isdecimal())


def remove_checkpoints(directory: Target) -> None:
    """Deletes the checkpoints of an earlier run.

    Raises:
        StorageError: the store does not delete them.
    """
    if local_target(directory) is None:
        for step in saved_steps(directory):  # so that none looks complete after a kill in between
            remove_folder(target_in(directory, str(step)), first=COMMITTED)
    remove_folder(directory)


def _in_host_memory(tree: Any) -> Any:
    """Starts to copy arrays, whose devices change and delete their own copies in the next step."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind("pinned_host")), tree)


def _changing(state: TrainState) -> dict[str, Any]:
    # Plain containers: the files take their names from these, not from the classes of libraries.
    return {"trained": state.trained, "optimizer": state.optimizer, "step": state.step}


def _abstract(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
