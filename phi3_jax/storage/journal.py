"""The results of a long measurement, in a file that a kill leaves whole."""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

from phi3_jax.errors import UserError
from phi3_jax.runs.files import remove_leftovers
from phi3_jax.runs.json_values import json_value
from phi3_jax.storage.outputs import check_store_writable
from phi3_jax.storage.resume import RunFile
from phi3_jax.storage.targets import Target, local_target


class Journal:
    """Entries in the order in which they were added, and the options they depend on; a context manager.

    The entries are on the disk, or in the store, when `add` returns; a journal with the same options has them
    when it is entered. One process at a time has the file.

    Args:
        path: a JSON file, or its URL. A local directory is created, and removed again if it stays empty; what
            killed processes left in it is deleted.
        options: everything that the entries depend on, for JSON.
        overwrite: start over if the file is broken or was started with other options.

    Raises:
        UserError: the file is broken or was started with other options; another process has it.
        StorageError, OSError: it cannot be read or written.
    """

    def __init__(self, path: Target, options: Mapping[str, Any], *, overwrite: bool = False):
        self.path, self.entries = path, list[Any]()
        local = local_target(path)
        self._directory = None if local is None else local.parent
        self._folder = os.fspath(path).rpartition("/")[0]
        self._file = RunFile(path, self._directory or self._folder, options, overwrite=overwrite)
        self._decisions: dict[str, Any] = {}
        self._created = False

    def __enter__(self) -> "Journal":
        if self._directory is None:
            check_store_writable(self._folder)
        else:
            if self._directory.exists() and not self._directory.is_dir():
                raise UserError(f"{self._directory} is a file; name a directory for the output")
            self._created = not self._directory.exists()
            self._directory.mkdir(parents=True, exist_ok=True)
        try:
            self._file.lock()
            if self._directory is not None:
                remove_leftovers(self._directory)  # of figures and reports, too
            if self._file.exists() and (state := self._file.read(_state)):
                self._decisions, self.entries = state
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        self._file.release()
        if self._directory is not None and self._created:
            with suppress(OSError):  # it is not empty
                self._directory.rmdir()

    def decide(self, name: str, choose: Callable[[], Any]) -> Any:
        """Returns what `choose` returned when the work started; for what depends on the machine."""
        if name not in self._decisions:
            self._decisions[name] = choose()
        return self._decisions[name]

    def add(self, entries: Iterable[Any]) -> None:
        """Appends entries, for JSON, and writes the file."""
        self.entries.extend(entries)
        # Without line breaks, since the file may be long.
        self._file.write(indent=None, chosen=json_value(self._decisions), entries=json_value(self.entries))


def _state(values: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    return values["chosen"], values["entries"]
