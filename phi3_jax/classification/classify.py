"""A file of rows classified chunk by chunk: read ahead, predicted, written, each safe before the next."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pyarrow.parquet
from jax.sharding import Mesh

from phi3_jax.checkpoint import open_checkpoint, resolve
from phi3_jax.checkpoint.fingerprint import fingerprint
from phi3_jax.classification.classifier import Classifier, Encoded, task_of
from phi3_jax.classification.head import Head
from phi3_jax.classification.output import PartialOutput, Standing, Table, check_format
from phi3_jax.data.rows import BadRowError, BadRows, Row, read_rows
from phi3_jax.data.tasks import TokenClassification
from phi3_jax.errors import UserError
from phi3_jax.runs.progress import FileProgress

logger = logging.getLogger(__name__)

CHUNK_BATCHES = 32
"""Batches whose rows are sorted by length together, written together, and lost together by a kill."""


@dataclass(frozen=True)
class Summary:
    """What came of a file."""

    rows: int
    """In the output."""
    bad_rows: int
    """Left out; `faults` has what was wrong with the first of them that this process saw."""
    faults: list[str]
    cut: int
    """Rows that are longer than the longest length."""
    untagged: int
    """Words behind the longest length, which have no tag."""
    fresh: int
    """Rows that this process did, which `seconds` and `tokens` are of; the others were there."""
    seconds: float
    tokens: int


def classify_file(
    model: str,
    source: Path,
    output: Path,
    *,
    all_scores: bool = False,
    skip_bad_rows: bool = False,
    overwrite: bool = False,
    batch_size: int = 64,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    show: bool = True,
    **columns: Any,
) -> Summary:
    """Writes the rows of a file with what a classifier says of each, in their order.

    Memory does not grow with the file. After a kill the same call goes on behind the last chunk that was
    written, and makes the file that it would have made.

    Args:
        model: a directory or hub name, of a checkpoint whose config.json names a classifier.
        source: CSV, TSV, JSONL, Parquet or CoNLL, by its suffix.
        output: .csv, .tsv or .jsonl. Until all is done, OUTPUT.partial.
        all_scores: add every class's probability.
        skip_bad_rows: leave rows out that cannot be classified.
        overwrite: replace an output, or a part of one that was begun with something else.
        mesh: to divide model and batches over; of one process.
        show: progress on standard error.
        columns: `text_column`, `text_pair_column`, `words_column` and `max_length`; default: those of
            training, where run.json lies with the model.

    Raises:
        ValueError: what was asked cannot be done; the first bad row, unless they are skipped.
        OSError: files that cannot be read or written.
    """
    # What can be refused before anything is loaded.
    check_format(output)
    path = resolve(model)
    _, config = open_checkpoint(path)
    head = Head.of_checkpoint(path, config)
    task = task_of(path, config, head, **columns)
    predicted = head.columns(all_scores)
    first = _first_row(source, task.columns)
    if output.exists() and output.samefile(source):
        raise UserError(f"{source} is the input and the output; choose another output")
    of_words = isinstance(task, TokenClassification)
    listed = head.names if of_words or head.kind == "multi_label_classification" else ()
    separator = " " if isinstance(task, TokenClassification) else task.label_separator
    table = Table(output, first, predicted, separator=separator, parts=listed)
    about = source.stat()
    asked = {
        "input": str(source.resolve()),
        "input_size": about.st_size,
        "input_modified": about.st_mtime_ns,
        "model": str(path.resolve()),
        "model_files": fingerprint(path),
        **asdict(task),
        "all_scores": all_scores,
        "batch_size": batch_size,
        "dtype": dtype,
        "mesh": None if mesh is None else dict(mesh.shape),
    }
    partial = PartialOutput(output, asked, overwrite)
    try:
        before = partial.standing
        if before.read:
            logger.warning("going on behind row %d of %s, which is in %s", before.read, source, partial.path)
        classifier = Classifier.from_pretrained(
            path, dtype=dtype, mesh=mesh, batch_size=batch_size, **columns
        )
        began, tokens = monotonic(), 0
        chunks = _Chunks(classifier, table, source, before, skip_bad_rows)
        with FileProgress(_total_lines(source), show) as progress, ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(chunks.next)
            while (chunk := ahead.result()) is not None:
                # The next rows are read and tokenised while these are predicted.
                ahead = pool.submit(chunks.next)
                told = partial.standing.written - before.written

                def classified(rows: int, chunk: _Chunk = chunk, told: int = told) -> None:
                    count = told + rows
                    speed = count / max(monotonic() - began, 1e-9)
                    progress.update(f"{count:,} rows, {speed:,.1f} rows/s", chunk.line_at(rows))

                answers = classifier.answers(chunk.encoded, all_scores=all_scores, classified=classified)
                header = b"" if partial.standing.read else table.header()
                partial.add(header + table.lines(chunk.encoded.rows, answers), chunk.after(partial.standing))
                tokens += int(chunk.encoded.examples.lengths.sum())
        done = partial.standing
        partial.finish()
    finally:
        partial.close()
    return Summary(
        rows=done.written,
        bad_rows=done.unusable + chunks.unreadable.count,
        faults=[*chunks.unreadable.first, *chunks.unusable.first][:5],
        cut=done.cut,
        untagged=done.untagged,
        fresh=done.written - before.written,
        seconds=monotonic() - began,
        tokens=tokens,
    )


@dataclass(frozen=True)
class _Chunk:
    """Rows read together, and how far the reading is behind them."""

    encoded: Encoded
    words: int
    """In all rows; 0 for texts."""
    read: int
    unusable: int
    lines: tuple[int, int]
    """Of the first and the last row."""

    def line_at(self, rows: int) -> float:
        """Where in the input the reading would be behind so many of the rows, were they in order."""
        first, last = self.lines
        return first + (last - first) * rows / max(len(self.encoded.rows), 1)

    def after(self, before: Standing) -> Standing:
        """How far the output is when this chunk is in it."""
        examples = self.encoded.examples
        tagged = 0 if examples.flat_firsts is None else int(examples.flat_firsts.sum())
        return Standing(
            read=self.read,
            written=before.written + len(examples),
            unusable=self.unusable,
            cut=before.cut + int(np.count_nonzero(examples.truncated)),
            untagged=before.untagged + self.words - tagged,
        )


class _Chunks:
    """The rows of a file in chunks, from where an earlier process stood."""

    def __init__(self, classifier: Classifier, table: Table, source: Path, before: Standing, skip: bool):
        self._classifier, self._table = classifier, table
        self.unreadable, self.unusable = BadRows(skip), BadRows(skip)
        self.unusable.count = before.unusable
        self._read = before.read
        # Rows that no reader can make out are counted anew as these are passed over.
        self._rows = islice(read_rows(source, bad=self.unreadable), before.read, None)

    def next(self) -> _Chunk | None:
        """The next chunk; None behind the last."""
        rows = list(islice(self._rows, CHUNK_BATCHES * self._classifier.batch_size))
        if not rows:
            return None
        encoded = self._classifier.encode(self._writable(rows), self.unusable)
        self._read += len(rows)
        task = self._classifier.task
        words = 0
        if isinstance(task, TokenClassification):
            words = sum(len(row.values[task.words]) for row in encoded.rows)
        return _Chunk(
            encoded, words, self._read, self.unusable.count, (rows[0].place.line, rows[-1].place.line)
        )

    def _writable(self, rows: list[Row]) -> Iterator[Row]:
        for row in rows:
            try:
                self._table.check(row)
            except BadRowError as error:
                self.unusable(error)
            else:
                yield row


def _first_row(source: Path, columns: tuple[str, ...]) -> Row:
    """A row that can be read, of a file that has these columns."""
    bad = BadRows(skip=True)
    # Of Parquet only the columns named would be read: the second time is for all of them.
    for wanted in (columns, ()):
        first = next(iter(read_rows(source, columns=wanted, bad=bad)), None)
        if first is None:
            raise UserError(f"{source} has no row that can be read: {bad.first[0]}")
    assert first is not None
    return first


def _total_lines(source: Path) -> int | None:
    """What the places of rows count up to; None where counting would mean unpacking."""
    if source.suffix == ".gz":
        return None
    if source.suffix == ".parquet":
        return pyarrow.parquet.read_metadata(source).num_rows
    with source.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
