"""Resuming: the file that says with which options an output was started, and its state."""

import json
import os
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from phi3_jax.errors import UserError
from phi3_jax.runs.files import remove_leftovers
from phi3_jax.runs.json_values import json_value
from phi3_jax.storage.claims import Claim
from phi3_jax.storage.outputs import write_text
from phi3_jax.storage.targets import Target, exists, local_target, read_bytes, remove
from phi3_jax.storage.urls import StorageError

ADVICE = "choose another output, or give --overwrite to start over"

T = TypeVar("T")


class RunFile:
    """A JSON file with the options that an output was started with, and the state of the work.

    Work is resumed only with the options that it was started with. One process at a time has the file: a
    local one is locked, and one in a store is claimed (see `Claim`).

    Args:
        path: the file, or its URL.
        output: the name of the work in messages.
        options: everything that the output depends on, for JSON.
        key: the name of the options in the file.
        free: options that may change.
        overwrite: start over what cannot be resumed; what can be resumed is.
        advice: what messages tell the user to do.
    """

    def __init__(
        self,
        path: Target,
        output: object,
        options: Mapping[str, Any],
        *,
        key: str = "asked",
        free: Set[str] = frozenset(),
        overwrite: bool = False,
        advice: str = ADVICE,
    ):
        self.path = path
        self._output, self._key, self._free = output, key, free
        self._options = json_value(options)
        self._overwrite, self._advice = overwrite, advice
        local = local_target(path)
        folder, _, self.name = os.fspath(path).rpartition("/")
        self._claim = Claim(f"{folder}/.{self.name}.lock", output) if local is None else None
        self._lock = None if local is None else FileLock(local.with_name(f".{self.name}.lock"))

    def read(self, parse: Callable[[dict[str, Any]], T]) -> T | None:
        """Returns what `parse` makes of the file's values; None if the work starts over.

        Raises:
            UserError: the file is missing, broken or of other options, or `parse` refuses it.
        """
        try:
            values = json.loads(read_bytes(self.path))
            before = json_value(values[self._key])
            if changed := differences(before, self._options, free=self._free):
                raise self.mismatch(*changed)
            return parse(values)
        except StorageError:
            raise
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
            if self._overwrite:
                return None
            if isinstance(error, UserError):
                raise
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"is broken ({error!r})"
            raise UserError(f"{self.path} {reason}; {self._advice}") from error

    def write(self, *, indent: int | None = 2, **state: Any) -> None:
        """Writes the options and the state; they are on the disk, or in the store, when this returns.

        Raises:
            TakenOverError: another process took the file over.
            StorageError: the store cannot be written.
        """
        self.check_claim()
        text = json.dumps({self._key: self._options} | state, indent=indent)
        write_text(self.path, text + "\n")

    def mismatch(self, *changed: str) -> UserError:
        """Returns the error for work that was started with other options."""
        advice = self._advice[0].upper() + self._advice[1:]
        return UserError(
            f"{self._output} was started with other options and cannot be resumed: {'; '.join(changed)}. "
            f"{advice}"
        )

    def exists(self) -> bool:
        """Whether there is a file."""
        return exists(self.path)

    def remove(self) -> None:
        """Deletes the file, if there is one."""
        remove(self.path)

    def lock(self) -> None:
        """Keeps other processes out until `release`, and deletes what killed ones left.

        Raises:
            UserError: another process has the lock.
            StorageError: the store cannot be read or written.
        """
        if self._claim is not None:
            self._claim.take()
            return
        self._acquire()
        path = Path(self.path)
        remove_leftovers(path.parent, path.name)

    def check_lock(self) -> None:
        """Checks that no other process has the lock; of a store nothing can be said.

        Raises:
            UserError: another process has it.
        """
        if self._claim is None:
            self._acquire()
            self.release()

    def check_claim(self) -> None:
        """Checks that no other process took a file in a store over, once this one has it.

        Raises:
            TakenOverError: one did.
            StorageError: the store cannot be read.
        """
        if self._claim is not None and self._claim.id is not None:
            self._claim.check()

    @property
    def claim_id(self) -> str | None:
        """Identifies the run that has a file in a store; None: none has, or the file is local."""
        return None if self._claim is None else self._claim.id

    def join(self, claim_id: str | None) -> None:
        """Joins the process of the same run that has the file, so that `check_claim` is of use here too."""
        if self._claim is not None and claim_id is not None:
            self._claim.join(claim_id)

    def _acquire(self) -> None:
        assert self._lock is not None
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another process is writing {self._output}") from None

    def release(self) -> None:
        """Lets other processes in."""
        if self._claim is not None:
            self._claim.release()
        elif self._lock is not None and self._lock.is_locked:
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, free: Set[str] = frozenset()
) -> list[str]:
    """Returns the options that changed, as "name: before -> now", except those that are `free` to.

    Of options by name within an option, only those that changed are returned, as "outer.name".
    """
    changed = []
    for name in sorted((before.keys() | now.keys()) - free):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed += [f"{name}.{inner}" for inner in differences(old, new)]
        elif old != new:
            changed.append(f"{name}: {old!r} -> {new!r}")
    return changed
