"""The classified rows of a file on their way to a store, where any machine can resume them."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from phi3_jax.classification.output import OutputState
from phi3_jax.errors import UserError
from phi3_jax.runs.text import parse_json
from phi3_jax.storage.outputs import check_store_writable, replacing
from phi3_jax.storage.parts import PART_BYTES, PART_SECONDS, Parts
from phi3_jax.storage.resume import ADVICE, RunFile
from phi3_jax.storage.targets import read_bytes, remove
from phi3_jax.storage.urls import find_entry


class StoreOutput:
    """An output in a store that is not complete yet: parts in OUTPUT.partial/, its options beside them.

    Chunks wait in memory for a full part. A part begins with a line that has the state after it, so that rows
    and state appear at once; every row is complete and occurs once, whenever the process is killed. When all
    rows are there, OUTPUT is made of the parts, and they are deleted.

    Args:
        output, options, overwrite: as for `PartialOutput`.

    Raises:
        UserError: the output already exists, or what there is of it cannot be resumed.
        StorageError: the store cannot be read or written.
    """

    def __init__(self, output: str, options: Mapping[str, Any], overwrite: bool):
        self.output, self.path = output, f"{output}.partial"
        self._parts = Parts(self.path)
        self._state_file = RunFile(f"{output}.partial.json", self.path, options, overwrite=overwrite)
        self._waiting, self._since, self._failed = bytearray(), 0.0, False
        check_store_writable(output.rpartition("/")[0])
        self._state_file.lock()
        try:
            if self._is_finished():
                self._remove()
            if find_entry(output) is not None and not overwrite:
                raise UserError(f"{output} already exists; {ADVICE}")
            self._next, self.state = self._resume() or self._start()
        except BaseException:
            self._state_file.release()
            raise

    def add(self, data: bytes, state: OutputState) -> None:
        """Adds a chunk, and writes a part if it is time; `state` is the state after it, except for `bytes`.

        Raises:
            UserError: another process took the output over.
            StorageError: the store cannot be written.
        """
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting += data
        self.state = OutputState(**asdict(state) | {"bytes": self.state.bytes + len(data)})
        if len(self._waiting) >= PART_BYTES or time.monotonic() - self._since >= PART_SECONDS:
            self._write()

    def finish(self) -> None:
        """Makes the output of the parts, and deletes them.

        Raises:
            UserError: parts are missing, or another process took the output over.
            StorageError: the store cannot be read or written.
        """
        self._write()
        before = find_entry(self.output)
        self._state_file.write(replaces=None if before is None else before.version)
        with replacing(self.output) as work:
            with work.open("wb") as file:
                for number in range(self._next):
                    _, data = self._parts.read(number).split(b"\n", 1)
                    file.write(data)
            if work.stat().st_size != self.state.bytes:
                raise UserError(f"{self.path} has other parts than were written; {ADVICE}")
        self._state_file.check_claim()
        self._remove()
        self.close()

    def close(self) -> None:
        """Writes what waits, unless a write has failed before, and lets other processes in."""
        try:
            if not self._failed:
                self._write()
        finally:
            self._state_file.release()

    def _write(self) -> None:
        if not self._waiting:
            return
        try:
            self._state_file.check_claim()
            content = json.dumps(asdict(self.state)).encode() + b"\n" + self._waiting
            if not self._parts.create(self._next, content):
                url = self._parts.url(self._next)
                raise UserError(f"{url} is of another process; start the command again once that has ended")
        except BaseException:
            self._failed = True
            raise
        self._next += 1
        self._waiting.clear()

    def _resume(self) -> tuple[int, OutputState] | None:
        """Returns the number of parts and their state; None if there are none, or the work starts over."""
        numbers = self._parts.numbers()
        if not numbers or self._state_file.read(dict) is None:
            return None
        if numbers != list(range(len(numbers))):
            raise UserError(f"{self.path} lacks one of its parts; {ADVICE}")
        line, _ = self._parts.read(numbers[-1]).split(b"\n", 1)
        return len(numbers), OutputState(**json.loads(line))

    def _start(self) -> tuple[int, OutputState]:
        self._remove()
        self._state_file.write()
        return 0, OutputState()

    def _is_finished(self) -> bool:
        """Whether a process was killed after the output was there."""
        try:
            values = parse_json(read_bytes(self._state_file.path), self._state_file.path)
        except FileNotFoundError:
            return False
        if not isinstance(values, dict) or "replaces" not in values:
            return False
        entry = find_entry(self.output)
        return entry is not None and entry.version != values["replaces"]

    def _remove(self) -> None:
        """Deletes parts and state; parts without state are those of nobody."""
        for number in self._parts.numbers():
            remove(self._parts.url(number))
        self._state_file.remove()
