"""The state of an output of answers, and how the answers of several processes are combined."""

import glob
import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from phi3_jax.batch.answers import Answer, AnswerFile
from phi3_jax.batch.requests import BadRequestError, Request
from phi3_jax.batch.summary import BatchSummary
from phi3_jax.errors import UserError
from phi3_jax.runs.bucket_mounts import check_no_bucket_mount
from phi3_jax.runs.files import remove_leftovers, replacing
from phi3_jax.runs.text import parse_json
from phi3_jax.storage.outputs import write_text
from phi3_jax.storage.resume import ADVICE, RunFile
from phi3_jax.storage.targets import Target, exists, read_bytes

POLL_SECONDS = 0.5
"""Time between two looks at the state of other processes."""


class AnswerOutput(Protocol):
    """Takes the answers and errors of one process, and knows which lines have one."""

    @property
    def count(self) -> int:
        """The number of answers and errors."""
        ...

    @property
    def errors(self) -> int:
        """The number of errors."""
        ...

    def has(self, request: Request | BadRequestError) -> bool:
        """Returns whether there is an answer or an error for this line."""
        ...

    def add(self, results: Sequence[Answer | BadRequestError]) -> None:
        """Adds answers and errors."""
        ...

    def check_name(self) -> None:
        """Checks that others can read what was added."""
        ...

    def close(self) -> None:
        """Writes what is left, and frees what belongs to the output."""
        ...


class OutputRecord(ABC):
    """The file run.json: the options that an output depends on, and the summary once it is finished.

    Args:
        output: the path or URL of the answers.
        file: that of run.json.
        options: everything that the answers depend on, for JSON.
        processes: how many write the output.
    """

    def __init__(self, output: Target, file: Target, options: dict[str, Any], processes: int):
        self.output, self._processes = output, processes
        self._file = RunFile(file, output, options)

    @abstractmethod
    def open(self, overwrite: bool) -> dict[str, Any] | None:
        """Starts or resumes the output; returns the summary if it is finished.

        Until `release`, no other run can open it.

        Raises:
            UserError: the output is something else, was started with other options, or another run has it.
            StorageError, OSError: it cannot be read or written.
        """

    @abstractmethod
    def answers(self, index: int) -> AnswerOutput:
        """Opens the answers of a process, which count."""

    @abstractmethod
    def _done(self, index: int) -> Target:
        """Returns the file that has the summary of one of several processes once it is done."""

    @abstractmethod
    def _join(self, lines: int) -> None:
        """Makes the output of the answers of all processes, which have this many lines."""

    @abstractmethod
    def _clean(self) -> None:
        """Deletes what a finished output does not need."""

    @property
    def claim_id(self) -> str | None:
        """Identifies the run that writes an output in a store; None of a local one."""
        return self._file.claim_id

    def join_claim(self, id: str | None) -> None:
        """Makes this process one of those of the run."""
        self._file.join(id)

    def release(self) -> None:
        """Lets other runs open the output."""
        self._file.release()

    def combine(self, summary: BatchSummary, index: int) -> BatchSummary:
        """Finishes the output once all processes are done, and returns the summary of all.

        The processes wait for each other by files: a collective operation would time out where one has much
        more to do than another.
        """
        if self._processes > 1:
            write_text(self._done(index), json.dumps(asdict(summary)))
            if index > 0:
                while (finished := self._summary()) is None:
                    time.sleep(POLL_SECONDS)
                return BatchSummary(**finished)
            files = [self._done(other) for other in range(self._processes)]
            while not all(map(exists, files)):
                time.sleep(POLL_SECONDS)
            summary = BatchSummary.combine([BatchSummary(**json.loads(read_bytes(each))) for each in files])
        self._join(summary.done)
        self._file.write(processes=self._processes, finished=asdict(summary))
        self._clean()
        return summary

    def _start(self) -> None:
        self._file.write(processes=self._processes)

    def _resume(self) -> dict[str, Any] | None:
        """Checks the options of the output; returns the summary if it is finished."""
        finished = self._file.read(self._finished)
        if finished is not None:
            self._clean()  # after a process that was killed when everything was done
        return finished

    def _finished(self, values: dict[str, Any]) -> dict[str, Any] | None:
        finished: dict[str, Any] | None = values.get("finished")
        if finished is None and values["processes"] != self._processes:
            raise self._file.mismatch(f"processes: {values['processes']} -> {self._processes}")
        return finished

    def _summary(self) -> dict[str, Any] | None:
        """Returns the summary once process 0 has finished the output."""
        values = parse_json(read_bytes(self._file.path), self._file.path)
        finished: dict[str, Any] | None = values.get("finished")
        return finished

    def _already_exists(self) -> UserError:
        return UserError(
            f"{self.output} already exists, and there is no {self._file.name} with its options; {ADVICE}"
        )


class Record(OutputRecord):
    """A local output; several processes write OUTPUT.part-INDEX-of-PROCESSES, which process 0 joins.

    Args:
        output: the file of answers.
        options, processes: as for `OutputRecord`.
    """

    def __init__(self, output: Path, options: dict[str, Any], processes: int):
        super().__init__(output, output.with_name(f"{output.name}.run.json"), options, processes)
        self._path = output

    def open(self, overwrite: bool) -> dict[str, Any] | None:
        path = self._path
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")
        check_no_bucket_mount(path)
        self._file.lock()
        remove_leftovers(path.parent, path.name)
        if overwrite:
            self._file.remove()
            for old in (path, *self._parts()):
                old.unlink(missing_ok=True)
        if self._file.exists() and (path.exists() or self._parts()):
            return self._resume()
        if path.exists() and path.stat().st_size:
            raise self._already_exists()
        self._start()
        return None

    def answers(self, index: int) -> AnswerFile:
        return AnswerFile(self._path if self._processes == 1 else self._part(index))

    def _part(self, index: int) -> Path:
        return self._path.with_name(f"{self._path.name}.part-{index}-of-{self._processes}")

    def _done(self, index: int) -> Path:
        return self._path.with_name(f"{self._part(index).name}.done")

    def _parts(self) -> list[Path]:
        return list(self._path.parent.glob(f"{glob.escape(self._path.name)}.part-*"))

    def _join(self, lines: int) -> None:
        if self._processes == 1:
            return
        with replacing(self._path) as work, work.open("wb") as file:
            for index in range(self._processes):
                with self._part(index).open("rb") as part:
                    shutil.copyfileobj(part, file, 1 << 20)

    def _clean(self) -> None:
        for old in self._parts():
            old.unlink(missing_ok=True)
