"""Outputs of answers in stores: parts that are written whole, so that a run resumes on any machine."""

import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from phi3_jax.batch.answered import Answered, CountsAnswered, Key, key_of_line
from phi3_jax.batch.answers import Answer, result_key, result_line
from phi3_jax.batch.record import OutputRecord
from phi3_jax.batch.requests import BadRequestError
from phi3_jax.errors import UserError
from phi3_jax.storage.outputs import check_store_writable, replacing
from phi3_jax.storage.parts import PART_BYTES, Parts
from phi3_jax.storage.targets import Target, exists, remove
from phi3_jax.storage.urls import list_entries

PART = re.compile(r"part-(\d+-of-\d+-)?\d+\.jsonl|part-\d+-of-\d+\.done")
"""The names of what processes write before the output is finished."""


class AnswerParts(CountsAnswered):
    """The answers of one process in a store, one JSON object a line, in parts.

    Answers wait in memory for a full part, or for `seconds`. A part is created only after all those before
    it were read, so that no request is answered twice, whoever else writes parts of the same process.

    Args:
        parts: the parts, which may exist; the answers in them count.
        check_claim: raises an error if another run took the output over; it is called before each write.
        seconds: how long an answer waits.

    Raises:
        UserError: a part holds something other than answers.
        StorageError: the store cannot be read.
    """

    def __init__(self, parts: Parts, check_claim: Callable[[], None], seconds: float):
        self._parts, self._check_claim, self._seconds = parts, check_claim, seconds
        self._answered = Answered()
        self._waiting: dict[Key, bytes] = {}
        self._bytes, self._since = 0, 0.0
        self._next, self._failed = 0, False
        try:
            for number in parts.numbers():
                self._read(number)
        except BaseException:
            self._answered.close()
            raise

    def add(self, results: Sequence[Answer | BadRequestError]) -> None:
        """Adds answers and errors, and writes a part if it is time.

        Raises:
            UserError: another run took the output over.
            StorageError: the store cannot be written.
        """
        for result in results:
            key, line = result_key(result), result_line(result)
            if not self._waiting:
                self._since = time.monotonic()
            if self._answered.add(key):  # not if another process answered it meanwhile
                self._waiting[key] = line
                self._bytes += len(line)
        if self._bytes >= PART_BYTES or time.monotonic() - self._since >= self._seconds:
            self._write()

    def check_name(self) -> None:
        """Writes what waits, so that others can read all."""
        self._write()

    def close(self) -> None:
        """Writes what waits, unless a write has failed before."""
        try:
            if not self._failed:
                self._write()
        finally:
            self._answered.close()

    def _write(self) -> None:
        try:
            while self._waiting:
                self._check_claim()
                if self._parts.create(self._next, b"".join(self._waiting.values())):
                    self._next += 1
                    self._waiting.clear()
                else:  # by a run that ended, or will end, since this one took the output over
                    self._read(self._next)
        except BaseException:
            self._failed = True
            raise
        self._bytes = 0

    def _read(self, number: int) -> None:
        """Counts the answers of a part; those of them that wait here are dropped."""
        for index, line in enumerate(self._parts.read(number).splitlines(keepends=True), start=1):
            try:
                key = key_of_line(line)
            except UserError as error:
                raise UserError(
                    f"{self._parts.url(number)}, line {index} is not an answer ({error}); choose another "
                    "output, or remove the file"
                ) from error
            if self._waiting.pop(key, None) is None:
                self._answered.add(key)
        self._next = number + 1


class StoreRecord(OutputRecord):
    """An output in a store.

    A URL that ends with / is a folder: the answers stay in its parts, beside run.json. Any other is a file,
    which is made of the parts in OUTPUT.partial/ when all are answered; its record is OUTPUT.run.json.

    Args:
        output: the URL.
        options, processes: as for `OutputRecord`.
        seconds: how long an answer waits before it is written.
    """

    def __init__(self, output: str, options: dict[str, Any], processes: int, seconds: float):
        self._is_folder, self._seconds = output.endswith("/"), seconds
        self._folder = output.rstrip("/") if self._is_folder else f"{output}.partial"
        super().__init__(
            output, f"{output}run.json" if self._is_folder else f"{output}.run.json", options, processes
        )

    def open(self, overwrite: bool) -> dict[str, Any] | None:
        check_store_writable(os.fspath(self._file.path).rpartition("/")[0])
        self._file.lock()
        if overwrite:
            self._file.remove()
            if not self._is_folder:
                remove(self.output)
            self._remove_parts()
        has_file = not self._is_folder and exists(self.output)
        has_parts = bool(self._entries())
        if self._file.exists() and (has_file or has_parts):
            finished = self._resume()
            if finished is not None or has_parts:
                return finished
        if has_file or has_parts:
            raise self._already_exists()
        self._start()
        return None

    def answers(self, index: int) -> AnswerParts:
        return AnswerParts(self._parts(index), self._file.check_claim, self._seconds)

    def _parts(self, index: int) -> Parts:
        prefix = "part-" if self._processes == 1 else f"part-{index}-of-{self._processes}-"
        return Parts(self._folder, prefix=prefix, suffix=".jsonl")

    def _done(self, index: int) -> Target:
        return f"{self._folder}/part-{index}-of-{self._processes}.done"

    def _join(self, lines: int) -> None:
        if self._is_folder:
            return
        self._file.check_claim()
        with replacing(self.output) as work:
            with work.open("wb") as file:
                for index in range(self._processes):
                    parts = self._parts(index)
                    for number in parts.numbers():
                        content = parts.read(number)
                        lines -= content.count(b"\n")
                        file.write(content)
            if lines:  # deleted by hand, or by another run that finished the output
                raise UserError(f"{self._folder} lacks parts that were there; start the command again")

    def _clean(self) -> None:
        if not self._is_folder:
            self._remove_parts()
        for name in self._entries():
            if name.endswith(".done"):
                remove(f"{self._folder}/{name}")

    def _entries(self) -> list[str]:
        return [entry.name for entry in list_entries(self._folder) if PART.fullmatch(entry.name)]

    def _remove_parts(self) -> None:
        for name in self._entries():
            remove(f"{self._folder}/{name}")
