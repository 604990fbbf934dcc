"""Answers files of requests; several processes can divide them, and a killed run can be resumed."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from phi3_jax.batch.answers import Answer, result_line
from phi3_jax.batch.engine import Engine
from phi3_jax.batch.inputs import STANDARD, BatchInput
from phi3_jax.batch.progress import BatchProgress
from phi3_jax.batch.record import AnswerOutput, OutputRecord, Record
from phi3_jax.batch.requests import BadRequestError, Request
from phi3_jax.batch.store_record import StoreRecord
from phi3_jax.batch.summary import BatchSummary
from phi3_jax.errors import UserError
from phi3_jax.parallel import distributed
from phi3_jax.storage.parts import PART_SECONDS
from phi3_jax.storage.targets import Target, local_target

logger = logging.getLogger(__name__)


class _StandardOutput:
    """Prints answers and errors; it knows nothing of earlier runs."""

    def __init__(self) -> None:
        self.count = self.errors = 0

    def has(self, request: Request | BadRequestError) -> bool:
        return False

    def add(self, results: Sequence[Answer | BadRequestError]) -> None:
        sys.stdout.buffer.write(b"".join(map(result_line, results)))
        sys.stdout.buffer.flush()
        self.count += len(results)
        self.errors += sum(isinstance(result, BadRequestError) for result in results)

    def check_name(self) -> None:
        pass

    def close(self) -> None:
        pass


def batch_file(
    make_engine: Callable[[], Engine],
    source: Path | Sequence[Path],
    output: Target,
    *,
    options: dict[str, Any],
    overwrite: bool = False,
    stats: Target | None = None,
    part_seconds: float = PART_SECONDS,
    show: bool = True,
) -> BatchSummary:
    """Writes an answer or an error for each line of requests, in the order in which they finish.

    After a kill, the same call answers the remaining lines. In a run of several processes, all of them make
    the same call. Each answers its share of the lines, and process 0 combines the answers.

    Args:
        make_engine: returns the engine; not called if the output is finished.
        source: a file, or several whose ids all differ: lines for `read_requests`; compressed if the name
            ends with .gz; "-": standard input.
        output: receives one answer a line; "-": standard output, which cannot be resumed. The URL of a file
            or, with / at its end, of a folder, is as `StoreRecord` takes it.
        options: JSON values that the answers depend on; an output with other options cannot be resumed.
        overwrite: start over, whatever the output holds.
        stats: a JSON file that receives the `BatchSummary`, also during the run.
        part_seconds: how long an answer waits before it is written to a store.
        show: show the progress on standard error, in process 0.

    Raises:
        UserError: the output exists and has other options or other content; the input is damaged; several
            processes use standard input or output.
        StorageError: a store cannot be read or written.
        OSError: a file cannot be read or written.
    """
    processes, index = distributed.process_count(), distributed.process_index()
    paths = [source] if isinstance(source, Path) else source
    if processes > 1 and STANDARD in (*paths, output):
        raise UserError("several processes need files that all of them can open for input and output")
    lines = BatchInput(paths, processes, index)
    options, total = lines.fingerprint() | options, lines.count()
    show, stats = show and index == 0, stats if index == 0 else None

    def answer_lines(answers: AnswerOutput) -> BatchSummary:
        requests = lines.unanswered(answers)
        engine = make_engine()
        with BatchProgress(engine, answers, total, show=show, stats=stats) as progress:
            for result in engine.run(progress.start_with(requests)):
                answers.add([result])
                progress.update(result)
        answers.check_name()
        return progress.summary()

    if output == STANDARD:
        summary = answer_lines(_StandardOutput())
    else:
        record = _record(output, options, processes, part_seconds)
        with ExitStack() as stack:
            stack.callback(record.release)
            finished, claim = distributed.from_primary(lambda: (record.open(overwrite), record.claim_id))
            if finished is not None:
                logger.warning("%s is finished; nothing is left to do", output)
                return BatchSummary(**finished)
            record.join_claim(claim)
            with closing(record.answers(index)) as answers:
                if answers.count:
                    logger.warning("resuming: %d lines of %s are done", answers.count, lines)
                summary = answer_lines(answers)
            summary = record.combine(summary, index)
    if stats is not None:
        summary.write(stats)
    return summary


def _record(output: Target, options: dict[str, Any], processes: int, seconds: float) -> OutputRecord:
    path = local_target(output)
    if path is None:
        return StoreRecord(os.fspath(output), options, processes, seconds)
    return Record(path, options, processes)
