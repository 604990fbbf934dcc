"""Writes checkpoints to a store in a thread, again if that fails, so that steps never wait for the store."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from phi3_jax.storage.claims import TakenOverError

logger = logging.getLogger(__name__)

ATTEMPTS = 5
"""How often a run that ends tries to write its last checkpoint."""

LONGEST_PAUSE = 60.0
"""The most seconds between two attempts; the first pause takes one, and each takes twice the one before."""


@dataclass(frozen=True)
class Snapshot:
    """A state in host memory, which training does not change any more."""

    step: int
    state: Any
    about: dict[str, Any]
    score: float
    best: bool
    """Whether its score is the best so far, so that the run may keep its parameters."""


class CheckpointWriter:
    """Writes one snapshot at a time; at most one more waits.

    A snapshot that comes while another is being written waits if it is the best so far, and is dropped with a
    warning otherwise. One that could not be written waits for the next attempt, and makes room for a later
    one, unless it is the best and the later one is not.

    Args:
        write: writes a snapshot, in a thread; its second argument tells whether an attempt failed before.
        explain: returns the error of a failed attempt in plain words.
        pause: seconds before the second attempt.
    """

    def __init__(
        self,
        write: Callable[[Snapshot, bool], None],
        explain: Callable[[int, Exception], Exception],
        *,
        pause: float = 1.0,
    ):
        self._write, self._explain, self._pause = write, explain, pause
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._future: Future[None] | None = None
        self._current: Snapshot | None = None
        self._waiting: Snapshot | None = None
        self._failures = 0
        self._resume_at = 0.0
        self._error: Exception | None = None

    def accepts(self, step: int, *, best: bool) -> bool:
        """Returns whether `add` has room for a snapshot; warns if not.

        Raises:
            TakenOverError: another process writes the checkpoints.
        """
        self.poll()
        if best or (self._future is None and (self._waiting is None or not self._waiting.best)):
            return True
        before = self._current or self._waiting
        assert before is not None
        logger.warning(
            "step %d gets no checkpoint: that of step %d is still being written", step, before.step
        )
        return False

    def add(self, snapshot: Snapshot) -> None:
        """Takes a snapshot for which there is room, and begins to write it if that is possible."""
        self._waiting = snapshot
        self.poll()

    def poll(self) -> None:
        """Begins the next attempt if one is due; costs nothing otherwise, so call it after each step.

        Raises:
            TakenOverError: another process writes the checkpoints.
        """
        if self._future is not None and self._future.done():
            self._finish()
        if self._future is None and self._waiting is not None and time.monotonic() >= self._resume_at:
            self._current, self._waiting = self._waiting, None
            self._future = self._pool.submit(self._write, self._current, self._failures > 0)

    def drain(self) -> None:
        """Waits until all snapshots are written.

        Raises:
            TakenOverError: another process writes the checkpoints.
            Exception: what `explain` returned for the last of several attempts that failed.
        """
        before = self._failures
        while self._future is not None or self._waiting is not None:
            if self._future is not None:
                wait([self._future])
            else:
                time.sleep(max(0.0, self._resume_at - time.monotonic()))
            self.poll()
            # A success sets the number back to 0.
            before = min(before, self._failures)
            if self._failures - before >= ATTEMPTS:
                assert self._error is not None
                raise self._error

    def close(self) -> None:
        """Waits for the snapshot that is being written, even if that fails, and ends the thread."""
        self._pool.shutdown()

    def _finish(self) -> None:
        assert self._future is not None
        assert self._current is not None
        error, snapshot = self._future.exception(), self._current
        self._future = self._current = None
        if error is None:
            self._failures = 0
            return
        if isinstance(error, TakenOverError) or not isinstance(error, Exception):
            raise error
        self._resume_at = time.monotonic() + min(LONGEST_PAUSE, self._pause * 2**self._failures)
        self._failures += 1
        self._error = self._explain(snapshot.step, error)
        self._waiting = self._waiting or snapshot
        logger.warning(
            "the checkpoint of step %d is not written: %s; trying again", snapshot.step, self._error
        )
