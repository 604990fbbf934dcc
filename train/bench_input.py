"""`phi3-jax bench-input`: what the host does for a device, without a model: read, tokenise, batch, write."""

import csv
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table as RichTable

from phi3_jax.bench.turns import Sides, Turn, take_turns
from phi3_jax.classification.classifier import row_widths
from phi3_jax.classification.classify import CHUNK_BATCHES
from phi3_jax.classification.output import Sentences, Table
from phi3_jax.data.batches import BatchPlan
from phi3_jax.data.encoding import BATCH_ROWS
from phi3_jax.data.examples import Examples
from phi3_jax.data.generated import generated_rows
from phi3_jax.data.loader import load
from phi3_jax.data.reading import good_rows, read_items
from phi3_jax.data.rows import BadRows, Row
from phi3_jax.data.tasks import SequenceClassification, TokenClassification, encode_rows
from phi3_jax.errors import UserError
from phi3_jax.tokenizer import Phi3Tokenizer

LIBRARY, ALL = "library alone", "all together"
"""The tokenizer's library without what is around it, and the stages as classify runs them, overlapping."""

STAGES = ("read", "tokenise", LIBRARY, "batch", "write", ALL)
PREDICTED, TAGS = ("predicted_label", "score"), "predicted_labels"
"""The columns that are written."""

SENTENCES = 6
"""Sentences of a generated row, some 60 tokens."""


@dataclass(frozen=True)
class InputBenchOptions:
    """What to read, and how.

    Attributes:
        model: of the tokenizer.
        source: the file; None: generated rows.
        rows: the most rows to read.
        task: how rows are read, without labels if its columns of labels are None.
        batch_size: rows of a batch.
        cores: those that a process uses; None: all.
    """

    model: Path
    source: Path | None
    rows: int
    task: SequenceClassification | TokenClassification
    batch_size: int
    cores: int | None = None


@dataclass(frozen=True)
class InputTimes:
    """The rows and tokens of one turn, and the seconds of each stage."""

    rows: int
    tokens: int
    seconds: dict[str, float]


def run_input_bench(options: InputBenchOptions, rounds: int) -> None:
    """Measures on one core and on all, in turns, and prints a table.

    Raises:
        UserError: the file or the tokenizer cannot be used, or there are not as many cores.
    """
    most = _available_cores()
    cores = options.cores or most
    if cores > most:
        raise UserError(f"--cores {cores}, and this process may use {most}; use {most} or fewer")
    with tempfile.TemporaryDirectory(prefix="phi3-jax-bench-") as scratch:
        if options.source is None:
            options = replace(options, source=_write_rows(Path(scratch), options))
        sides: Sides = (
            {"1 core": (make_turn, replace(options, cores=1))} if hasattr(os, "sched_setaffinity") else {}
        )
        if cores > 1 or not sides:
            sides[f"{cores} cores"] = (make_turn, replace(options, cores=cores))
        results = take_turns(sides, rounds)
    print_table(options, results)


def make_turn(options: InputBenchOptions) -> Turn:
    """Restricts this process to the cores of the options, and returns its turn."""
    if hasattr(os, "sched_setaffinity") and options.cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    bench = _InputBench(options)
    return bench.measure


class _InputBench:
    """The stages, each a function of a chunk of rows."""

    def __init__(self, options: InputBenchOptions):
        assert options.source is not None
        self._options, self._task, self._source = options, options.task, options.source
        self._tokenizer = Phi3Tokenizer.from_pretrained(options.model)
        self._labels = self._task.label_set(self._rows()) if _is_labelled(self._task) else None
        self._encoder = self._task.encoder(self._tokenizer, self._labels)
        first = next(iter(self._rows()))
        suffix = ".jsonl" if self._source.suffix == ".jsonl" else ".csv"
        self._table: Table | Sentences = (
            Sentences(self._task.words, TAGS)
            if isinstance(self._task, TokenClassification)
            else Table(Path(f"out{suffix}"), first, PREDICTED, separator="|", items=())
        )
        self._widths = row_widths(self._task.max_length, 8)

    def measure(self) -> InputTimes:
        """Runs each stage by itself, chunk by chunk, and then all together."""
        seconds = dict.fromkeys(STAGES, 0.0)

        @contextmanager
        def timed(stage: str) -> Iterator[None]:
            start = time.perf_counter()
            yield
            seconds[stage] += time.perf_counter() - start

        rows, tokens = 0, 0
        items = self._items()
        with tempfile.TemporaryFile() as file:
            while True:
                with timed("read"):
                    chunk = self._chunk(items)
                if not chunk:
                    break
                with timed("tokenise"):
                    examples = self._encode(chunk)
                with timed("batch"):
                    self._batch(examples)
                with timed("write"):
                    self._write(chunk, file)
                texts = [text for row in chunk for text in self._encoder.check(row)[0]]
                with timed(LIBRARY):
                    for start in range(0, len(texts), BATCH_ROWS):
                        self._tokenizer.encode_batch(texts[start : start + BATCH_ROWS])
                rows, tokens = rows + len(chunk), tokens + int(examples.lengths.sum())
        with timed(ALL):
            self._all()
        return InputTimes(rows, tokens, seconds)

    def _all(self) -> None:
        """Runs the stages as classify does: a chunk is read while the one before is batched and written."""

        def read() -> tuple[list[Row], Examples]:
            chunk = self._chunk(items)
            return chunk, self._encode(chunk)

        items, written = self._items(), Future[None]()
        written.set_result(None)
        with (
            tempfile.TemporaryFile() as file,
            ThreadPoolExecutor(1) as reader,
            ThreadPoolExecutor(1) as writer,
        ):
            following = reader.submit(read)
            while (chunk := following.result())[0]:
                following = reader.submit(read)
                self._batch(chunk[1])
                written.result()
                written = writer.submit(self._write, chunk[0], file)
            written.result()

    def _items(self) -> Iterator[Row]:
        return islice(self._rows(), self._options.rows)

    def _rows(self) -> Iterator[Row]:
        return good_rows(
            read_items(self._source, columns=self._task.columns, only_columns=False), BadRows(False)
        )

    def _chunk(self, items: Iterator[Row]) -> list[Row]:
        return list(islice(items, CHUNK_BATCHES * self._options.batch_size))

    def _encode(self, rows: list[Row]) -> Examples:
        bad = BadRows(skip=False)
        return Examples.gather(encode_rows(self._task, rows, self._tokenizer, self._labels, bad=bad))

    def _batch(self, examples: Examples) -> None:
        plan = BatchPlan(examples.lengths, rows=self._options.batch_size, widths=self._widths, shuffle=False)
        for _ in load(examples, plan, pad_token_id=0, stop=plan.batches_per_epoch):
            pass

    def _write(self, rows: list[Row], file: Any) -> None:
        predictions: list[Any] = [dict(zip(PREDICTED, ("label", 0.123456), strict=True))] * len(rows)
        if isinstance(self._task, TokenClassification):
            predictions = [{TAGS: ["O"] * len(row.values[self._task.words])} for row in rows]
        for row in rows:
            self._table.check(row)
        file.write(self._table.lines(rows, predictions))
        file.flush()
        os.fsync(file.fileno())


def print_table(options: InputBenchOptions, sides: dict[str, list[InputTimes]]) -> None:
    """Prints the medians of each side's turns."""
    turns, *_ = sides.values()
    rows, tokens = turns[0].rows, turns[0].tokens
    name = "generated rows" if options.source is None else options.source.name
    table = RichTable(
        title=f"{name}, {rows:,} rows of {tokens / rows:.1f} tokens, tokenizer of {options.model.name}, "
        f"median of {len(turns)}"
    )
    table.add_column("")
    for side in sides:
        table.add_column(f"{side}, rows/s", justify="right")
        table.add_column("tokens/s", justify="right")

    for stage in STAGES:
        seconds = [statistics.median(times.seconds[stage] for times in turns) for turns in sides.values()]
        table.add_row(stage, *(f"{count / each:,.0f}" for each in seconds for count in (rows, tokens)))
    Console().print(table)


def _write_rows(folder: Path, options: InputBenchOptions) -> Path:
    """Writes generated rows to a file of texts, or of words and tags."""
    draws = random.Random(0)
    if isinstance(options.task, TokenClassification):
        path = folder / "generated.conll"
        sentences = list(generated_rows("train", "token-classification"))
        with path.open("w", encoding="utf-8") as file:
            for _ in range(options.rows):
                for row in draws.choices(sentences, k=SENTENCES):
                    pairs = zip(row.values["words"], row.values["labels"], strict=True)
                    file.writelines(f"{word}\t{tag}\n" for word, tag in pairs)
                file.write("\n")
        return path
    path = folder / "generated.csv"
    texts = [row.values["text"] for row in generated_rows("train", "sequence-classification")]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(options.task.columns)
        for _ in range(options.rows):
            writer.writerow([". ".join(draws.choices(texts, k=SENTENCES)) for _ in options.task.columns])
    return path


def make_bench_task(
    task: Literal["sequence-classification", "token-classification"],
    *,
    text_column: str,
    text_pair_column: str | None,
    words_column: str,
    label_column: str | None,
    max_length: int,
) -> SequenceClassification | TokenClassification:
    """Returns how rows are read; without a column of labels as by classify, with one as by finetune."""
    if task == "token-classification":
        return TokenClassification(words_column, label_column, max_length=max_length)
    return SequenceClassification(text_column, text_pair_column, label_column, max_length=max_length)


def _is_labelled(task: SequenceClassification | TokenClassification) -> bool:
    return (task.labels if isinstance(task, TokenClassification) else task.label) is not None


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
