"""The input files of a batch, and the lines of them that one of several processes answers."""

import gzip
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from phi3_jax.batch.answered import IdSet
from phi3_jax.batch.requests import BadRequestError, Request, RequestFile, read_requests
from phi3_jax.errors import UserError
from phi3_jax.storage.fetch import display_name, input_record

STANDARD = Path("-")
"""Standard input or output."""


class AnsweredRequests(Protocol):
    """Knows which requests have an answer or an error."""

    def has(self, request: Request | BadRequestError) -> bool: ...


@dataclass(frozen=True)
class BatchInput:
    """The lines of input files that one of several processes answers: every n-th of all lines.

    Args:
        paths: one file or more, in this order; of several, no two may be the same.
        processes: the number of processes.
        index: the number of this process, from 0.

    Raises:
        UserError: a file is given twice, or standard input is not the only one.
    """

    paths: Sequence[Path]
    processes: int = 1
    index: int = 0

    def __post_init__(self) -> None:
        if len(self.paths) > 1 and STANDARD in self.paths:
            raise UserError("--input -: standard input cannot be read beside files; give one or the other")
        name, times = Counter(map(display_name, self.paths)).most_common(1)[0]
        if times > 1:
            raise UserError(f"--input {name} is given twice; its ids would occur twice")

    def __str__(self) -> str:
        return str(self.paths[0]) if len(self.paths) == 1 else f"{len(self.paths)} files"

    def fingerprint(self) -> dict[str, Any]:
        """Returns values that change when a file does."""
        if STANDARD in self.paths:
            return {"input": "-"}
        records = [input_record(path) for path in self.paths]
        if len(records) == 1:
            return records[0]
        return {"inputs": {each.pop("input"): list(each.values()) for each in records}}

    def count(self) -> int | None:
        """Returns the number of lines that are not blank; None: not known before all are read."""
        if STANDARD in self.paths:
            return None
        count, before = 0, 0
        for path in self.paths:
            with _open(path) as lines:
                for line in lines:
                    before += 1
                    count += self._has(before) and not line.isspace()
        return count

    def unanswered(self, output: AnsweredRequests) -> Iterator[Request | BadRequestError]:
        """Yields the requests that `output` does not have; an id that an earlier line has is an error."""
        several, before = len(self.paths) > 1, 0
        with closing(IdSet()) as ids:
            for number, path in enumerate(self.paths, start=1):
                file = RequestFile(display_name(path), number) if several else None
                with _open(path) as lines:
                    counted = _CountedLines(lines)
                    for request in read_requests(counted, file):
                        if isinstance(request, Request) and not ids.add(request.id):
                            request = _duplicate(request)
                        if self._has(before + request.line) and not output.has(request):
                            yield request
                before += counted.count

    def _has(self, line: int) -> bool:
        """Whether this process answers a line, counted over all files."""
        return line % self.processes == self.index


class _CountedLines:
    """Lines, and how many were read."""

    def __init__(self, lines: Iterable[bytes]):
        self._lines, self.count = lines, 0

    def __iter__(self) -> Iterator[bytes]:
        for line in self._lines:
            self.count += 1
            yield line


def _duplicate(request: Request) -> BadRequestError:
    return BadRequestError(
        request.line,
        "duplicate_id",
        f"{request.place}: an earlier line has the same id {request.id!r}",
        openai=request.openai is not None,
        file=request.file,
    )


@contextmanager
def _open(path: Path) -> Iterator[Iterable[bytes]]:
    if path == STANDARD:
        yield sys.stdin.buffer
        return
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} cannot be unpacked: {error}; is it complete?") from error
