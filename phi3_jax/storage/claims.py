"""Claims: which process writes an output in a store, where nothing can be locked."""

import json
import logging
import os
import platform
import uuid
from datetime import UTC, datetime
from typing import Any

from phi3_jax.errors import UserError
from phi3_jax.storage.outputs import write_text
from phi3_jax.storage.targets import read_bytes, remove

logger = logging.getLogger(__name__)


class TakenOverError(UserError):
    """Another process writes what this one wrote."""


class Claim:
    """A file in a store that names the process which writes an output: the last one that claimed it.

    A machine that was taken away cannot give its claim back, and nobody can tell it from one that is slow. So
    a claim never waits: it takes the output over, and the process before ends at its next `check`. Between a
    check and the write that follows, both may write; what must not be written twice needs more than this.

    Args:
        url: of the file.
        output: the name of the output in messages.
    """

    def __init__(self, url: str, output: object):
        self._url, self._output = url, output
        self._own = False
        self.id: str | None = None
        """Identifies the run that has the output, in all of its processes; None: it is not this one."""

    def join(self, id: str) -> None:
        """Writes the output together with the process that claimed it, which alone gives it back."""
        self.id = id

    def take(self) -> None:
        """Claims the output, and warns if another process has not given it back.

        Raises:
            StorageError: the store cannot be read or written.
        """
        before = self._read()
        if before is not None:
            logger.warning(
                "%s was being written by %s; it ends at its next write if it still runs",
                *(self._output, _writer(before)),
            )
        self._own, self.id = True, uuid.uuid4().hex
        since = datetime.now(UTC).isoformat(timespec="seconds")
        values = {"id": self.id, "machine": platform.node(), "process": os.getpid(), "since": since}
        write_text(self._url, json.dumps(values) + "\n")

    def check(self) -> None:
        """Checks that this process still has the output; call it before each write.

        Raises:
            TakenOverError: another one took it over, or the claim is gone.
            StorageError: the store cannot be read.
        """
        now = self._read()
        if now is None:
            raise TakenOverError(
                f"{self._output}: {self._url} is gone, and other processes may write there, too"
            )
        if now.get("id") != self.id:
            raise TakenOverError(f"{self._output} was taken over by {_writer(now)}")

    def release(self) -> None:
        """Gives the output back, unless another process has it."""
        if self._own:
            now = self._read()
            if now is not None and now.get("id") == self.id:
                remove(self._url)
        self._own, self.id = False, None

    def _read(self) -> dict[str, Any] | None:
        try:
            content = read_bytes(self._url)
        except FileNotFoundError:
            return None
        try:
            values = json.loads(content)
        except ValueError:  # somebody else's file, or one cut off
            return {}
        return values if isinstance(values, dict) else {}


def _writer(values: dict[str, Any]) -> str:
    """Returns a process in words."""
    machine, process, since = (values.get(name, "?") for name in ("machine", "process", "since"))
    return f"process {process} on {machine}, since {since}"
