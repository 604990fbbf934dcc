"""A file of requests answered: read, divided among processes, and gone on with after a kill."""

import gzip
import logging
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from phi3_jax.batch.answers import Answer, AnswerFile, Ids, line_of
from phi3_jax.batch.engine import Engine
from phi3_jax.batch.record import Record, part_of, put_together
from phi3_jax.batch.requests import BadRequestError, Request, read_requests
from phi3_jax.batch.summary import Summary
from phi3_jax.batch.watch import Counted, Watch
from phi3_jax.errors import UserError
from phi3_jax.parallel import distributed
from phi3_jax.runs.files import remove_leftovers

logger = logging.getLogger(__name__)

STANDARD = Path("-")
"""Standard input or output."""


class _Output(Counted, Protocol):
    """Where answers go, and which are there already."""

    def has(self, request: Request | BadRequestError) -> bool: ...

    def add(self, answers: list[Answer | BadRequestError]) -> None: ...

    def close(self) -> None: ...


class _StandardOutput:
    """Answers as they come; nothing is known of earlier ones."""

    def __init__(self) -> None:
        self.count = self.errors = 0

    def has(self, request: Request | BadRequestError) -> bool:
        return False

    def add(self, answers: list[Answer | BadRequestError]) -> None:
        sys.stdout.buffer.write(b"".join(map(line_of, answers)))
        sys.stdout.buffer.flush()
        self.count += len(answers)
        self.errors += sum(isinstance(answer, BadRequestError) for answer in answers)

    def close(self) -> None:
        pass


def batch_file(
    make_engine: Callable[[], Engine],
    source: Path,
    output: Path,
    *,
    asked: dict[str, Any],
    overwrite: bool = False,
    stats: Path | None = None,
    show: bool = True,
) -> Summary:
    """Writes an answer or an error for each line of requests, in the order in which they finish.

    After a kill the same call goes on with what is missing. Several processes all call this with the same
    arguments; each takes its share of the lines, and process 0 puts the answers
    together.

    Args:
        make_engine: gives what answers them; not called where nothing is left to do.
        source: lines as `read_requests` takes them, packed if the name ends with .gz; "-": standard input.
        output: one answer a line; "-": standard output, which cannot be gone on with.
        asked: what else the answers follow from, for JSON; an output that follows from something else is
            not gone on with.
        overwrite: begin anew, whatever the output holds.
        stats: a JSON file for what `Summary` tells, kept up to date.
        show: progress on standard error, in process 0.

    Raises:
        ValueError: the output is there and is something else; the input is damaged; standard input or output
            for several processes.
        OSError: files that cannot be read or written.
    """
    processes, index = distributed.process_count(), distributed.process_index()
    if processes > 1 and STANDARD in (source, output):
        raise UserError("several processes need files that all of them can open for input and output")
    asked = {"input": "-" if source == STANDARD else str(source.resolve())} | asked
    if source != STANDARD:
        about = source.stat()
        asked |= {"input_size": about.st_size, "input_modified": about.st_mtime_ns}
    total = _count(source, processes, index)
    record = Record(output, asked, processes)
    if output != STANDARD:
        finished = distributed.from_primary(lambda: record.open(overwrite))
        if finished is not None:
            logger.warning("%s is finished; nothing is left to do", output)
            return Summary(**finished)
    part = output if processes == 1 else part_of(output, index, processes)
    with ExitStack() as stack:
        to: _Output = _StandardOutput() if output == STANDARD else AnswerFile(part)
        stack.callback(to.close)
        if output != STANDARD and index == 0:
            remove_leftovers(output.parent, output.name)
        resumed = to.count
        if resumed:
            logger.warning("going on: %d lines of %s are done", resumed, source)
        requests = _left(read_requests(stack.enter_context(_opened(source))), to, processes, index)
        engine = make_engine()
        work = Watch(engine, to, total, show and distributed.is_primary(), stats if index == 0 else None)
        with work:
            for answer in engine.run(work.watched(requests)):
                to.add([answer])
                work.after(answer)
    summary = work.summary()
    if output != STANDARD:
        summary = put_together(record, part, summary, processes, index)
    work.write(summary)
    return summary


def _left(
    requests: Iterable[Request | BadRequestError], output: _Output, processes: int, index: int
) -> Iterator[Request | BadRequestError]:
    """Those of this process that are not answered yet; an id that was there before is a fault."""
    seen = Ids()
    try:
        for request in requests:
            if isinstance(request, Request) and not seen.add(request.id):
                message = f"line {request.line}: the id {request.id!r} is that of an earlier line"
                request = BadRequestError(
                    request.line, "duplicate_id", message, openai=request.openai is not None
                )
            if request.line % processes == index and not output.has(request):
                yield request
    finally:
        seen.close()


@contextmanager
def _opened(source: Path) -> Iterator[Iterable[bytes]]:
    """The lines of the input, unpacked.

    Raises:
        ValueError: a packed file that is damaged or cut off.
    """
    if source == STANDARD:
        yield sys.stdin.buffer
        return
    with gzip.open(source) if source.suffix == ".gz" else source.open("rb") as file:
        try:
            yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{source} cannot be unpacked: {error}; is it complete?") from error


def _count(source: Path, processes: int, index: int) -> int | None:
    """Lines of this process that are not blank; None: only reading them all tells."""
    if source == STANDARD:
        return None
    with _opened(source) as lines:
        return sum(number % processes == index and not line.isspace() for number, line in enumerate(lines, 1))
