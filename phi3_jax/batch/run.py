"""Answers a file of requests; several processes can divide it, and a killed run can be resumed."""

import gzip
import logging
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from phi3_jax.batch.answers import Answer, AnswerFile, IdSet, result_line
from phi3_jax.batch.engine import Engine
from phi3_jax.batch.progress import BatchProgress, ResultCounts
from phi3_jax.batch.record import Record, combine_parts, part_path
from phi3_jax.batch.requests import BadRequestError, Request, read_requests
from phi3_jax.batch.summary import BatchSummary
from phi3_jax.errors import UserError
from phi3_jax.parallel import distributed
from phi3_jax.runs.files import remove_leftovers
from phi3_jax.storage.fetch import input_record

logger = logging.getLogger(__name__)

STANDARD = Path("-")
"""Standard input or output."""


class _Output(ResultCounts, Protocol):
    """Takes answers and errors, and knows which lines have one."""

    def has(self, request: Request | BadRequestError) -> bool: ...

    def add(self, results: list[Answer | BadRequestError]) -> None: ...


class _StandardOutput:
    """Prints answers and errors; it knows nothing of earlier runs."""

    def __init__(self) -> None:
        self.count = self.errors = 0

    def has(self, request: Request | BadRequestError) -> bool:
        return False

    def add(self, results: list[Answer | BadRequestError]) -> None:
        sys.stdout.buffer.write(b"".join(map(result_line, results)))
        sys.stdout.buffer.flush()
        self.count += len(results)
        self.errors += sum(isinstance(result, BadRequestError) for result in results)


@dataclass(frozen=True)
class _Input:
    """The lines of an input file that one of several processes answers."""

    path: Path
    processes: int
    index: int

    def fingerprint(self) -> dict[str, Any]:
        """Returns values that change when the file does."""
        if self.path == STANDARD:
            return {"input": "-"}
        return input_record(self.path)

    def count(self) -> int | None:
        """Returns the number of lines that are not blank; None: not known before all are read."""
        if self.path == STANDARD:
            return None
        with self._open() as lines:
            return sum(self._has(number) and not line.isspace() for number, line in enumerate(lines, 1))

    def unanswered(self, output: _Output) -> Iterator[Request | BadRequestError]:
        """Yields the requests that `output` does not have; a repeated id is an error."""
        with self._open() as lines, closing(IdSet()) as ids:
            for request in read_requests(lines):
                if isinstance(request, Request) and not ids.add(request.id):
                    request = BadRequestError(
                        request.line,
                        "duplicate_id",
                        f"line {request.line}: an earlier line has the same id {request.id!r}",
                        openai=request.openai is not None,
                    )
                if self._has(request.line) and not output.has(request):
                    yield request

    def _has(self, line: int) -> bool:
        return line % self.processes == self.index

    @contextmanager
    def _open(self) -> Iterator[Iterable[bytes]]:
        if self.path == STANDARD:
            yield sys.stdin.buffer
            return
        with gzip.open(self.path) if self.path.suffix == ".gz" else self.path.open("rb") as file:
            try:
                yield file
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{self.path} cannot be unpacked: {error}; is it complete?") from error


def batch_file(
    make_engine: Callable[[], Engine],
    source: Path,
    output: Path,
    *,
    options: dict[str, Any],
    overwrite: bool = False,
    stats: Path | None = None,
    show: bool = True,
) -> BatchSummary:
    """Writes an answer or an error for each line of requests, in the order in which they finish.

    After a kill, the same call answers the remaining lines. In a run of several processes, all of them make
    the same call. Each answers its share of the lines, and process 0 combines the answers.

    Args:
        make_engine: returns the engine; not called if the output is finished.
        source: lines for `read_requests`; compressed if the name ends with .gz; "-": standard input.
        output: receives one answer a line; "-": standard output, which cannot be resumed.
        options: JSON values that the answers depend on; an output with other options cannot be resumed.
        overwrite: start over, whatever the output holds.
        stats: a JSON file that receives the `BatchSummary`, also during the run.
        show: show the progress on standard error, in process 0.

    Raises:
        UserError: the output exists and has other options or other content; the input is damaged; several
            processes use standard input or output.
        OSError: a file cannot be read or written.
    """
    processes, index = distributed.process_count(), distributed.process_index()
    if processes > 1 and STANDARD in (source, output):
        raise UserError("several processes need files that all of them can open for input and output")
    lines = _Input(source, processes, index)
    options, total = lines.fingerprint() | options, lines.count()
    show, stats = show and index == 0, stats if index == 0 else None

    def answer_lines(answers: _Output) -> BatchSummary:
        requests = lines.unanswered(answers)
        engine = make_engine()
        with BatchProgress(engine, answers, total, show=show, stats=stats) as progress:
            for result in engine.run(progress.start_with(requests)):
                answers.add([result])
                progress.update(result)
        return progress.summary()

    if output == STANDARD:
        summary = answer_lines(_StandardOutput())
    else:
        record = Record(output, options, processes)
        with ExitStack() as stack:
            stack.callback(record.release)
            finished = distributed.from_primary(lambda: record.open(overwrite))
            if finished is not None:
                logger.warning("%s is finished; nothing is left to do", output)
                return BatchSummary(**finished)
            part = output if processes == 1 else part_path(output, index, processes)
            with closing(AnswerFile(part)) as answers:
                if index == 0:
                    remove_leftovers(output.parent, output.name)
                if answers.count:
                    logger.warning("resuming: %d lines of %s are done", answers.count, source)
                summary = answer_lines(answers)
                answers.check_name()
            summary = combine_parts(record, part, summary, processes, index)
    if stats is not None:
        summary.write(stats)
    return summary
