"""Classifies a file chunk by chunk, and makes each chunk safe on disk before the next is written."""

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pyarrow.parquet
from jax.sharding import Mesh

from phi3_jax.checkpoint.fingerprint import fingerprint
from phi3_jax.classification.classifier import (
    Classifier,
    ClassifierTask,
    EncodedRows,
    find_classifier,
    task_of_model,
)
from phi3_jax.classification.head import Head
from phi3_jax.classification.output import (
    CONLL,
    DELIMITERS,
    OutputState,
    PartialOutput,
    Sentences,
    Table,
    check_format,
)
from phi3_jax.classification.store_output import StoreOutput
from phi3_jax.data.reading import read_items
from phi3_jax.data.rows import PLAIN_TEXT, BadRowError, BadRows, Row, TextFormat
from phi3_jax.data.tasks import TokenClassification
from phi3_jax.errors import UserError
from phi3_jax.lora import ModelPaths, open_model
from phi3_jax.runs.progress import FileProgress
from phi3_jax.storage.checks import check_outputs
from phi3_jax.storage.fetch import display_name, input_record
from phi3_jax.storage.targets import Target, local_target, suffix_of

logger = logging.getLogger(__name__)

CHUNK_BATCHES = 32
"""Batches of a chunk. Its rows are sorted by length and written together; a kill loses at most one chunk."""


@dataclass(frozen=True)
class Summary:
    """Counts of a classified file."""

    rows: int
    """Rows of the output."""
    bad_rows: int
    """Rows among them that have no prediction."""
    faults: list[str]
    """What was wrong with the first of the bad rows that this process read."""
    cut: int
    """Rows that were longer than the maximum length."""
    untagged: int
    """Words beyond the maximum length, which have no tag."""
    new_rows: int
    """Rows that this process classified; `seconds` and `tokens` count these only."""
    seconds: float
    tokens: int
    waited: float
    """The seconds among them in which the device waited for rows to be read or written."""


def classify_file(
    model: str | None,
    source: Path,
    output: Target,
    *,
    adapter: str | None = None,
    all_scores: bool = False,
    keep_bad_rows: bool = False,
    overwrite: bool = False,
    batch_size: int = 64,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    text: TextFormat = PLAIN_TEXT,
    threshold: float | None = None,
    quantization: str | None = None,
    show: bool = True,
    **columns: Any,
) -> Summary:
    """Writes the rows of a file with their predictions, in the same order.

    Memory does not grow with the file. After a kill, the same call resumes after the last chunk that was
    written; the output is the same as without the kill.

    Args:
        model: directory or hub name of a checkpoint whose config.json names a classifier; with an adapter,
            of its base model, and None is the one that the adapter names.
        source: CSV, TSV, JSONL, Parquet or CoNLL, by its suffix.
        output: the path or URL of a .csv, .tsv or .jsonl file, or of .conll for tags of words; until it is
            complete, OUTPUT.partial, in a store a folder of parts.
        keep_bad_rows: writes a row that cannot be read or classified without a prediction, and in a column
            `error` what is wrong with it (not in CoNLL). So the output has all rows of the input.
        adapter: directory or hub name of the adapter of a classifier, in PEFT's format.
        overwrite: replace an existing output, or a partial one that cannot be resumed.
        mesh: divides model and batches over the devices of one process.
        text: the encoding of a text file, and the form of CSV and TSV.
        threshold: the probability above which one of several labels is chosen; default: 0.5.
        quantization: as in `from_pretrained`.
        show: shows progress on standard error.
        columns: as `task_of_model` takes them.

    Raises:
        UserError: an argument cannot be used; BadRowError: a row is bad, and bad rows are not kept.
        StorageError: a store cannot be read or written.
        OSError: a file cannot be read or written.
    """
    check_format(output)
    paths = find_classifier(model, adapter)
    read = {"the model": paths.base, "the adapter": paths.adapter}
    check_outputs({"the output": output}, {"the input": source} | read)
    config = open_model(paths).config
    head = Head.from_checkpoint(paths.adapter or paths.base, config)
    head.check_threshold(threshold)
    task = task_of_model(paths.adapter or paths.base, config, head, **columns)
    bad = BadRows(keep_bad_rows)
    table, items = _open_table(source, output, head, task, all_scores, text, bad)
    settings: dict[str, Any] = {"all_scores": all_scores, "batch_size": batch_size, "dtype": dtype}
    if threshold is not None:
        settings["threshold"] = threshold
    if quantization is not None:
        settings["quantization"] = quantization
    if suffix_of(output) in DELIMITERS:  # their header has the column of errors
        settings["keep_bad_rows"] = keep_bad_rows
    options = _options(source, paths, task, mesh, **settings, **text._asdict())
    partial = _open_partial(source, output, options, overwrite)
    try:
        classifier = Classifier.from_pretrained(
            model,
            adapter=adapter,
            dtype=dtype,
            mesh=mesh,
            batch_size=batch_size,
            threshold=threshold,
            quantization=quantization,
            **columns,
        )
        chunks = _Chunks(classifier, table, items, partial.state, bad)
        return _classify_chunks(classifier, chunks, table, partial, _total_lines(source), all_scores, show)
    finally:
        partial.close()


def _open_table(
    source: Path,
    output: Target,
    head: Head,
    task: ClassifierTask,
    all_scores: bool,
    text: TextFormat,
    bad: BadRows,
) -> tuple[Table | Sentences, Iterator[Row | BadRowError]]:
    """Checks the files; returns the table of the output, and the input's rows and errors of bad rows."""
    predicted = head.columns(all_scores)
    if suffix_of(output) == CONLL and not isinstance(task, TokenClassification):
        raise UserError(f"{output} is for tags of words, and this model does {head.kind}; use .csv or .jsonl")
    items = read_items(source, columns=task.columns, only_columns=False, text=text)
    leading: list[Row | BadRowError] = []
    for item in items:
        leading.append(item)
        if isinstance(item, Row):
            break
        if not bad.skip:
            raise item
    first = leading[-1]
    if isinstance(first, BadRowError):
        raise UserError(f"{source} has no row that can be read: {leading[0]}")
    items = chain(leading, items)
    if suffix_of(output) == CONLL and isinstance(task, TokenClassification):
        return Sentences(task.words, predicted[0]), items
    of_words = isinstance(task, TokenClassification)
    separator = " " if isinstance(task, TokenClassification) else task.label_separator
    listed = head.labels if of_words or head.kind == "multi_label_classification" else ()
    table = Table(output, first, predicted, separator=separator, items=listed, errors=bad.skip)
    return table, items


def _options(
    source: Path, paths: ModelPaths, task: ClassifierTask, mesh: Mesh | None, **settings: Any
) -> dict[str, Any]:
    """Returns everything that the output depends on, as JSON values."""
    return {
        **input_record(source),
        "model": display_name(paths.base),
        "model_files": fingerprint(paths.base),
        **paths.adapter_record,
        "mesh": None if mesh is None else dict(mesh.shape),
        **asdict(task),
        **settings,
    }


def _open_partial(
    source: Path, output: Target, options: dict[str, Any], overwrite: bool
) -> PartialOutput | StoreOutput:
    path = local_target(output)
    partial = (
        StoreOutput(os.fspath(output), options, overwrite)
        if path is None
        else PartialOutput(path, options, overwrite)
    )
    if done := partial.state.written:
        logger.warning("resuming after row %d of %s; earlier rows are in %s", done, source, partial.path)
    return partial


def _classify_chunks(
    classifier: Classifier,
    chunks: "_Chunks",
    table: Table | Sentences,
    partial: PartialOutput | StoreOutput,
    total_lines: int | None,
    all_scores: bool,
    show: bool,
) -> Summary:
    """Classifies and writes all chunks, and gives the output its name."""
    resumed, started, tokens, waited, new_rows = partial.state.written, monotonic(), 0, 0.0, 0

    def write(chunk: _Chunk, predictions: list[dict[str, Any]]) -> None:
        header = b"" if partial.state.written else table.header()
        lines = table.lines(*chunk.with_bad_rows(predictions))
        partial.add(header + lines, chunk.state(partial.state))

    # The next chunk is read and tokenised, and the one before is written, while the device has this one.
    with FileProgress(total_lines, show) as progress, ThreadPoolExecutor(1) as reader, _Writer() as writer:
        next_chunk = reader.submit(chunks.next)
        while True:
            waited_from = monotonic()
            chunk = next_chunk.result()
            waited += monotonic() - waited_from
            if chunk is None:
                break
            next_chunk = reader.submit(chunks.next)

            def show_progress(rows: int, chunk: _Chunk = chunk, before: int = new_rows) -> None:
                speed = (before + rows) / max(monotonic() - started, 1e-9)
                progress.update(f"{before + rows:,} rows, {speed:,.1f} rows/s", chunk.line_at(rows))

            predictions = classifier.predict_encoded(
                chunk.encoded, all_scores=all_scores, after_batch=show_progress
            )
            new_rows += chunk.rows
            tokens += int(chunk.encoded.examples.lengths.sum())
            waited += writer.submit(write, chunk, predictions)
        waited += writer.wait()
    done = partial.state
    partial.finish()
    return Summary(
        rows=done.written,
        bad_rows=done.bad,
        faults=chunks.bad.first,
        cut=done.cut,
        untagged=done.untagged,
        new_rows=done.written - resumed,
        seconds=monotonic() - started,
        tokens=tokens,
        waited=waited,
    )


class _Writer:
    """A thread that writes one chunk at a time; used in `with`, which ends when the chunk is written."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def submit(self, write: Callable[..., None], *arguments: Any) -> float:
        """Starts to write a chunk after the one before; returns the seconds that it waited for that one.

        Raises:
            OSError: the one before could not be written.
        """
        waited = self.wait()
        self._pending = self._pool.submit(write, *arguments)
        return waited

    def wait(self) -> float:
        """Waits for the last chunk; returns the seconds.

        Raises:
            OSError: it could not be written.
        """
        started = monotonic()
        if self._pending is not None:
            self._pending.result()
        return monotonic() - started

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


@dataclass(frozen=True)
class _Chunk:
    """Rows that are read together."""

    encoded: EncodedRows
    """Those that can be classified."""
    bad: dict[int, tuple[Row, BadRowError]]
    """The others by their index, with what could be read of them."""
    words: int
    """Words of the rows that can be classified; 0 for texts."""
    lines: tuple[int, int]
    """Lines of the first and the last row."""

    @property
    def rows(self) -> int:
        return len(self.encoded.rows) + len(self.bad)

    def line_at(self, rows: int) -> float:
        """Estimates the line of the input at which this many rows of the chunk are done."""
        first, last = self.lines
        return first + (last - first) * rows / max(len(self.encoded.rows), 1)

    def with_bad_rows(
        self, predictions: list[dict[str, Any]]
    ) -> tuple[list[Row], list[dict[str, Any] | BadRowError]]:
        """Returns all rows in order, and the prediction or the error of each."""
        good = iter(zip(self.encoded.rows, predictions, strict=True))
        pairs = [self.bad[index] if index in self.bad else next(good) for index in range(self.rows)]
        return [row for row, _ in pairs], [result for _, result in pairs]

    def state(self, before: OutputState) -> OutputState:
        """Returns the state of the output after this chunk is written."""
        examples = self.encoded.examples
        tagged = 0 if examples.flat_firsts is None else int(examples.flat_firsts.sum())
        return OutputState(
            written=before.written + self.rows,
            bad=before.bad + len(self.bad),
            cut=before.cut + int(np.count_nonzero(examples.truncated)),
            untagged=before.untagged + self.words - tagged,
        )


class _Chunks:
    """The rows of the input in chunks, without the rows that an earlier process wrote."""

    def __init__(
        self,
        classifier: Classifier,
        table: Table | Sentences,
        items: Iterator[Row | BadRowError],
        before: OutputState,
        bad: BadRows,
    ):
        self._classifier, self._table, self.bad = classifier, table, bad
        self._items = islice(items, before.written, None)

    def next(self) -> _Chunk | None:
        """Returns the next chunk, or None after the last.

        Raises:
            BadRowError: a row is bad, and bad rows are not kept.
        """
        items: list[Row | BadRowError] = []
        bad: dict[int, tuple[Row, BadRowError]] = {}

        def add(index: int, error: BadRowError) -> None:
            self.bad(error)
            bad[index] = Row(items[index].values, items[index].place), error

        def checked() -> Iterator[Row | BadRowError]:
            for item in islice(self._items, CHUNK_BATCHES * self._classifier.batch_size):
                items.append(item)
                yield self._checked(item)

        encoded = self._classifier.encode(checked(), add)
        if not items:
            return None
        task = self._classifier.task
        words = 0
        if isinstance(task, TokenClassification):
            words = sum(len(row.values[task.words]) for row in encoded.rows)
        return _Chunk(encoded, bad, words, (items[0].place.line, items[-1].place.line))

    def _checked(self, item: Row | BadRowError) -> Row | BadRowError:
        """Returns the item, or the error of a row that cannot be written."""
        if isinstance(item, Row):
            try:
                self._table.check(item)
            except BadRowError as error:
                return error
        return item


def _total_lines(source: Path) -> int | None:
    """Counts the lines or rows of the input, for the progress; None where that would mean decompressing."""
    if source.suffix == ".gz":
        return None
    if source.suffix == ".parquet":
        return pyarrow.parquet.read_metadata(source).num_rows
    with source.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
