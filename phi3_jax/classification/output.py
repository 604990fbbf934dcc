"""The file that classified rows are written to: its lines, and the state that lets a killed run resume."""

import csv
import errno
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phi3_jax.data.columns import are_words
from phi3_jax.data.rows import BadRowError, Row
from phi3_jax.errors import UserError
from phi3_jax.runs.bucket_mounts import check_no_bucket_mount
from phi3_jax.runs.files import sync
from phi3_jax.runs.text import lone_surrogate
from phi3_jax.storage.resume import ADVICE, RunFile
from phi3_jax.storage.targets import Target, suffix_of

DELIMITERS = {".csv": ",", ".tsv": "\t"}
CONLL = ".conll"
ERROR = "error"
"""The column that says why a row has no prediction."""


class Table:
    """Turns rows and their predictions into lines of the output's format.

    Args:
        path: the output; its suffix is the format.
        first: a row of the input. In CSV and TSV all lines have its columns.
        predicted: the columns that are added.
        errors: whether rows without a prediction are written, too. All rows then have the column `error`.
        separator: joins the items of a list in CSV and TSV.
        items: all items that a list may have; none may contain the separator.

    Raises:
        UserError: the format is not supported, the input already has a predicted column, or the separator
            occurs in an item.
    """

    def __init__(
        self,
        path: Target,
        first: Row,
        predicted: Sequence[str],
        *,
        separator: str,
        items: Sequence[str],
        errors: bool = False,
    ):
        check_format(path)
        if errors:
            predicted = [*predicted, ERROR]
        self._delimiter = DELIMITERS.get(suffix_of(path))
        if self._delimiter is not None:
            self._quote, self._quote_all = (
                csv.writer(_Line(), delimiter=self._delimiter, lineterminator="\n", quoting=quoting)
                for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
            )
        self._predicted = list(predicted)
        if fault := self._name_clash(first):
            raise UserError(f"{first.place.file} {fault}")
        self._columns = [*first.values, *predicted]
        self._separator = separator
        if self._delimiter is not None and (odd := next((item for item in items if separator in item), None)):
            raise UserError(
                f"the label {odd!r} contains {separator!r}, which separates labels in {suffix_of(path)}; "
                "write .jsonl"
            )

    def check(self, row: Row) -> None:
        """Checks that the row can be written.

        Raises:
            BadRowError: it cannot.
        """
        fault = self._name_clash(row)
        if self._delimiter is not None and (odd := row.values.keys() - set(self._columns)):
            fault = (
                f"has a column {min(odd)!r}, which the first row does not have; write .jsonl, where the "
                "columns of rows may differ"
            )
        if _has_lone_surrogate(row.values):
            fault = "contains half of a surrogate pair, which is not a character"
        if fault:
            raise BadRowError(row.place, fault)

    def header(self) -> bytes:
        """Returns the first line, which JSONL does not have."""
        return b"" if self._delimiter is None else self._line(self._columns)

    def lines(self, rows: Iterable[Row], predictions: Iterable[Mapping[str, Any] | BadRowError]) -> bytes:
        """Returns a line for each row: its own values, then those predicted, or what is wrong with it."""
        return b"".join(
            self._bad_row(row, one) if isinstance(one, BadRowError) else self._row(row, one)
            for row, one in zip(rows, predictions, strict=True)
        )

    def _bad_row(self, row: Row, error: BadRowError) -> bytes:
        if _has_lone_surrogate(row.values):
            row = row._replace(values={})
        text = f"{error.place.unit} {error.place.line}: {error.fault}"
        readable = text.encode("utf-8", "backslashreplace").decode()
        return self._row(row, dict.fromkeys(self._predicted) | {ERROR: readable})

    def _row(self, row: Row, prediction: Mapping[str, Any]) -> bytes:
        if self._delimiter is None:
            added = {name: prediction.get(name) for name in self._predicted}
            return (_json({**row.values, **added}) + "\n").encode()
        joined = {
            name: self._separator.join(map(_field, x)) if isinstance(x, list) else x
            for name, x in prediction.items()
        }
        values = {**row.values, **joined}
        return self._line([_field(values.get(name)) for name in self._columns])

    def _line(self, fields: list[str]) -> bytes:
        # csv does not quote a field for a carriage return alone, and readers would end the line there.
        quote_all = "\r" in "".join(fields)
        return (self._quote_all if quote_all else self._quote).writerow(fields).encode()

    def _name_clash(self, row: Row) -> str | None:
        if taken := row.values.keys() & set(self._predicted):
            return f"already has a column {min(taken)!r}, which classify would write; rename or remove it"
        return None


class _Line:
    """A file for `csv.writer`, whose `writerow` then returns the line."""

    def write(self, text: str) -> str:
        return text


class Sentences:
    """Turns sentences and the predicted tags of their words into CoNLL.

    A line has a word, the tag that the input has for it, if any, and the predicted tag; a blank line ends
    the sentence. A word that has no predicted tag gets `_`, as do all words of a row without a prediction.

    Args:
        words: the column of words.
        labels: the column of predicted tags.
    """

    def __init__(self, words: str, labels: str):
        self._words, self._labels = words, labels

    def check(self, row: Row) -> None:
        """Checks that the row can be written.

        Raises:
            BadRowError: a word has a tab or a line break.
        """
        words = row.values.get(self._words) or ()
        # All words at once, and one by one only to name the one that does not fit.
        if isinstance(words, list) and are_words(words) and _fits_a_line("".join(words)):
            return
        for word in words:
            if isinstance(word, str) and not _fits_a_line(word):
                raise BadRowError(
                    row.place, f"the word {word!r:.40} cannot be written to a line; write .jsonl"
                )

    def header(self) -> bytes:
        """Returns nothing: CoNLL has no header."""
        return b""

    def lines(self, rows: Iterable[Row], predictions: Iterable[Mapping[str, Any] | BadRowError]) -> bytes:
        """Returns the lines of each sentence; words that cannot be read or written are `_`."""
        return b"".join(
            self._bad_sentence(row) if isinstance(one, BadRowError) else self._sentence(row, one)
            for row, one in zip(rows, predictions, strict=True)
        )

    def _bad_sentence(self, row: Row) -> bytes:
        words = row.values.get(self._words)
        words = [
            word if isinstance(word, str) and word.strip() and _fits_a_line(word) else "_"
            for word in (words if isinstance(words, list) and words else [None])
        ]
        return self._sentence(
            row._replace(values={**row.values, self._words: words}), {self._labels: [None] * len(words)}
        )

    def _sentence(self, row: Row, prediction: Mapping[str, Any]) -> bytes:
        words, own = row.values[self._words], row.values.get("labels")
        tags = [tag or "_" for tag in prediction[self._labels]]
        columns = [words, tags]
        if isinstance(own, list) and len(own) == len(words):
            columns.insert(1, own)
        return ("\n".join("\t".join(map(str, line)) for line in zip(*columns, strict=True)) + "\n\n").encode()


def _fits_a_line(word: str) -> bool:
    return lone_surrogate(word) is None and not set(word) & set("\t\n\r")


def check_format(path: Target) -> None:
    """Checks that the suffix names a format that can be written.

    Raises:
        UserError: it does not.
    """
    suffix = suffix_of(path)
    if suffix not in (*DELIMITERS, ".jsonl", CONLL):
        raise UserError(
            f"{path} cannot be written: {suffix or 'no suffix'!r} is not a format to which rows can be "
            "appended; use .csv, .tsv or .jsonl, or .conll for tags of words"
        )


def _field(value: Any) -> str:
    """Returns text unchanged, nothing for None, and other values as JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    return _json(value)


def _has_lone_surrogate(values: Mapping[str, Any]) -> bool:
    texts = [value if isinstance(value, str) else _json(value) for value in values.values()]
    return lone_surrogate("".join([*values, *texts])) is not None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


@dataclass(frozen=True)
class OutputState:
    """How much of a file is done, counted from its start."""

    written: int = 0
    """Rows of the input, each of which has its place in the output."""
    bad: int = 0
    """Rows among them that have no prediction."""
    cut: int = 0
    """Rows that were longer than the maximum length."""
    untagged: int = 0
    """Words beyond the maximum length."""
    bytes: int = 0
    """Size of the output; any bytes after these are an incomplete chunk."""


class PartialOutput:
    """An output that is not complete yet: OUTPUT.partial, and its options and state in OUTPUT.partial.json.

    The state is replaced as a whole after each chunk is safely on disk. So every row is complete and occurs
    once, whenever the process is killed.

    Args:
        output: the file to write.
        options: everything that the output depends on, as JSON values. A partial output made with other
            options is not resumed.
        overwrite: replace an existing output, and a partial output that cannot be resumed.

    Raises:
        UserError: the output already exists, a partial output cannot be resumed, or another process is
            writing it.
        OSError: the file cannot be written.
    """

    def __init__(self, output: Path, options: Mapping[str, Any], overwrite: bool):
        if not output.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {output.parent} to write {output.name} to")
        check_no_bucket_mount(output)
        self.output = output
        self.path = output.with_name(f"{output.name}.partial")
        self._state_file = RunFile(
            output.with_name(f"{output.name}.partial.json"), self.path, options, overwrite=overwrite
        )
        self._state_file.lock()
        try:
            if output.exists() and not overwrite:
                if not self.path.exists():  # of a process that was killed when everything was done
                    self._state_file.remove()
                raise UserError(f"{output} already exists; {ADVICE}")
            state = self._state_file.read(self._parse_state) if self.path.exists() else None
            if state is None:
                self.path.unlink(missing_ok=True)
                state = OutputState()
                self._write_state(state)
            self.state = state
            self._file = self.path.open("ab", buffering=0)
            self._file.truncate(self.state.bytes)
            sync(self.path.parent)
        except BaseException:
            self._state_file.release()
            raise

    def _parse_state(self, values: dict[str, Any]) -> OutputState:
        if "unusable" in values["done"]:
            raise UserError(f"{self.path} is of an earlier version, which left bad rows out; {ADVICE}")
        state = OutputState(**values["done"])
        if (size := self.path.stat().st_size) < state.bytes:
            raise UserError(
                f"{self.path} has {size} bytes, and {self._state_file.name} counts {state.bytes}; {ADVICE}"
            )
        return state

    def add(self, data: bytes, state: OutputState) -> None:
        """Appends a chunk; `state` is the state after it, except for `bytes`.

        Raises:
            OSError: there is no space left. The state stays as it was.
        """
        done = OutputState(**asdict(state) | {"bytes": self.state.bytes + len(data)})
        try:
            remaining = memoryview(data)
            while remaining:
                remaining = remaining[self._file.write(remaining) :]
            os.fsync(self._file.fileno())
            self._write_state(done)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(
                f"{self.path}: {error.strerror}. {self.state.written} rows are complete and kept; free some "
                "space, and run the same command to resume"
            ) from error
        self.state = done

    def _write_state(self, state: OutputState) -> None:
        self._state_file.write(done=asdict(state))

    def finish(self) -> None:
        """Renames the complete file to the output and removes the state."""
        self._file.close()
        os.replace(self.path, self.output)
        sync(self.output.parent)
        self._state_file.remove()
        self.close()

    def close(self) -> None:
        """Closes the file, complete or not, and releases its lock."""
        self._file.close()
        self._state_file.release()
