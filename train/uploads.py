"""Copies the files that a run appends to, such as its log, from a local folder to a store."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from phi3_jax.storage.claims import TakenOverError
from phi3_jax.storage.outputs import write_bytes
from phi3_jax.storage.urls import StorageError

logger = logging.getLogger(__name__)

SECONDS = 30.0
"""The time between two copies; what a killed run wrote since then is in its checkpoints."""

ATTEMPTS = 5
"""How often `flush` tries; the pauses between take 1, 2, 4 and 8 seconds."""


class Uploads:
    """Copies files to a store in a thread, each whole, whenever they have changed; a context manager.

    Args:
        folder: the local folder, with the folders in it.
        url: the store's folder.
        check: called before files are written; it raises `TakenOverError` if another process writes there.
    """

    def __init__(self, folder: Path, url: str, check: Callable[[], None]):
        self._folder, self._url, self._check = folder, url, check
        self._done: dict[Path, tuple[int, int]] = {}
        self._lock, self._end = threading.Lock(), threading.Event()
        self._warned = ""
        self._thread = threading.Thread(target=self._copy_at_times, daemon=True, name="uploads")

    def __enter__(self) -> "Uploads":
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._end.set()
        self._thread.join()
        if kind is None:
            self.flush()
        else:  # whose error counts
            self._copy_or_warn()

    def flush(self) -> None:
        """Copies what has changed.

        Raises:
            StorageError: several attempts failed.
            TakenOverError: another process writes there.
        """
        for attempt in range(ATTEMPTS):
            try:
                self._copy()
                return
            except StorageError:
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(2**attempt)

    def _copy_at_times(self) -> None:
        while not self._end.wait(SECONDS):
            if not self._copy_or_warn():
                return

    def _copy_or_warn(self) -> bool:
        """Copies what has changed; returns False if that makes no more sense."""
        try:
            self._copy()
        except TakenOverError:  # which the checkpoints raise
            return False
        except StorageError as error:
            if str(error) != self._warned:
                self._warned = str(error)
                logger.warning("the log is not written: %s; trying again", error)
        return True

    def _copy(self) -> None:
        with self._lock:
            paths = [path for path in sorted(self._folder.rglob("[!.]*")) if path.is_file()]
            states = {path: _state(path) for path in paths}
            changed = [path for path, state in states.items() if self._done.get(path) != state]
            if changed:
                self._check()
            for path in changed:
                write_bytes(f"{self._url}/{path.relative_to(self._folder).as_posix()}", path.read_bytes())
                self._done[path] = states[path]


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
