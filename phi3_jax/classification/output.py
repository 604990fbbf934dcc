"""The file that classified rows are written to: its lines, and how it is gone on with after a kill."""

import csv
import errno
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phi3_jax.data.rows import BadRowError, Row
from phi3_jax.errors import UserError
from phi3_jax.runs.resume import ADVICE, RunFile

DELIMITERS = {".csv": ",", ".tsv": "\t"}


class Table:
    """Rows with what is said of them, as lines of the output's format.

    Args:
        path: the output; its suffix is the format.
        first: a row of the input; its columns are the output's, where all lines have the same.
        predicted: the columns that are added.
        separator: between the parts of a list in CSV and TSV.
        parts: what the lists may hold, to see that the separator is not in them.

    Raises:
        ValueError: a format that is not written, a column that the input has already, a separator that will
            not do.
    """

    def __init__(
        self, path: Path, first: Row, predicted: Sequence[str], *, separator: str, parts: Sequence[str]
    ):
        check_format(path)
        self._delimiter = DELIMITERS.get(path.suffix.lower())
        self._predicted = set(predicted)
        if taken := self._taken(first):
            raise UserError(f"{first.place.file} {taken}")
        self._columns = [*first.values, *predicted]
        self._separator = separator
        if self._delimiter is not None and (odd := next((part for part in parts if separator in part), None)):
            raise UserError(
                f"the label {odd!r} has the {separator!r} in it that separates labels in {path.suffix}; "
                "write .jsonl"
            )

    def check(self, row: Row) -> None:
        """Whether the row can be written.

        Raises:
            BadRowError: it can not.
        """
        fault = self._taken(row)
        if self._delimiter is not None and (odd := row.values.keys() - set(self._columns)):
            fault = (
                f"has a column {min(odd)!r}, which the first row has not; write .jsonl, where rows may differ"
            )
        try:
            json.dumps(row.values, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            fault = "has half of a surrogate pair in it, which is no character"
        if fault:
            raise BadRowError(row.place, fault)

    def header(self) -> bytes:
        """What the file begins with."""
        return b"" if self._delimiter is None else self._line(self._columns)

    def lines(self, rows: Iterable[Row], answers: Iterable[Mapping[str, Any]]) -> bytes:
        """A line for each row: its own values, then what is said of it."""
        return b"".join(self._row(row, answer) for row, answer in zip(rows, answers, strict=True))

    def _row(self, row: Row, answer: Mapping[str, Any]) -> bytes:
        if self._delimiter is None:
            return (json.dumps({**row.values, **answer}, ensure_ascii=False, default=str) + "\n").encode()
        joined = {
            name: self._separator.join(map(_field, x)) if isinstance(x, list) else x
            for name, x in answer.items()
        }
        values = {**row.values, **joined}
        return self._line([_field(values.get(name)) for name in self._columns])

    def _line(self, fields: list[str]) -> bytes:
        text = io.StringIO()
        # The library leaves a lone carriage return bare, and no reader takes it for part of a field then.
        bare = any("\r" in field for field in fields)
        assert self._delimiter is not None
        csv.writer(
            text,
            delimiter=self._delimiter,
            lineterminator="\n",
            quoting=csv.QUOTE_ALL if bare else csv.QUOTE_MINIMAL,
        ).writerow(fields)
        return text.getvalue().encode()

    def _taken(self, row: Row) -> str | None:
        if taken := row.values.keys() & self._predicted:
            return f"has a column {min(taken)!r} already, which classify would write; rename or remove it"
        return None


def check_format(path: Path) -> None:
    """Whether the suffix names a format that is written.

    Raises:
        ValueError: it does not.
    """
    if path.suffix.lower() not in (*DELIMITERS, ".jsonl"):
        raise UserError(
            f"{path} cannot be written: {path.suffix or 'no suffix'!r} is no format that rows can be "
            "added to one by one; use .csv, .tsv or .jsonl"
        )


def _field(value: Any) -> str:
    """Text as it is, nothing for None, other values as JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)


@dataclass(frozen=True)
class Standing:
    """What is done of a file, counted from its beginning."""

    read: int = 0
    """Rows of the input, without those that no reader could make out."""
    written: int = 0
    unusable: int = 0
    """Rows that were read and left out."""
    cut: int = 0
    """Rows that are longer than the longest length."""
    untagged: int = 0
    """Words behind the longest length."""
    bytes: int = 0
    """Of the output: what lies behind them was torn off."""


class PartialOutput:
    """OUTPUT.partial, which becomes the output, and OUTPUT.partial.json, which says how much of it counts.

    The second is replaced when a chunk is safely in the first. So rows are whole and none is there twice,
    whenever the process is killed.

    Args:
        output: the final file.
        asked: everything that the output depends on, for JSON.
        overwrite: replace an output, and a part that cannot be resumed. A part that can be resumed is.

    Raises:
        UserError: the output already exists; the part is broken or was started with other options; another
            process is writing it.
        OSError: it cannot be written.
    """

    def __init__(self, output: Path, asked: Mapping[str, Any], overwrite: bool):
        if not output.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {output.parent} to write {output.name} to")
        self.output = output
        self.path = output.with_name(f"{output.name}.partial")
        self._state_file = RunFile(
            output.with_name(f"{output.name}.partial.json"), self.path, asked, overwrite=overwrite
        )
        self._state_file.lock()
        try:
            if output.exists() and not overwrite:
                raise UserError(f"{output} already exists; {ADVICE}")
            standing = self._state_file.read(self._counted) if self.path.exists() else None
            if standing is None:
                self.path.unlink(missing_ok=True)
                standing = Standing()
                self._write_state(standing)
            self.standing = standing
            self._file = self.path.open("ab", buffering=0)
            self._file.truncate(self.standing.bytes)
        except BaseException:
            self._state_file.release()
            raise

    def _counted(self, values: dict[str, Any]) -> Standing:
        standing = Standing(**values["done"])
        if (size := self.path.stat().st_size) < standing.bytes:
            raise UserError(
                f"{self.path} has {size} bytes, and {self._state_file.path.name} counts {standing.bytes}; "
                f"{ADVICE}"
            )
        return standing

    def add(self, data: bytes, standing: Standing) -> None:
        """Writes a chunk; `standing` is how far that is, without the bytes.

        Raises:
            OSError: there is no space; what was there stays good.
        """
        done = Standing(**asdict(standing) | {"bytes": self.standing.bytes + len(data)})
        try:
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
            self._write_state(done)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(
                f"{self.path}: {error.strerror}. {self.standing.written} rows are there and stay; make room, "
                "and the same command goes on"
            ) from error
        self.standing = done

    def _write_state(self, standing: Standing) -> None:
        self._state_file.write(done=asdict(standing))

    def finish(self) -> None:
        """Makes the part the output, once everything is in it."""
        self._file.close()
        os.replace(self.path, self.output)
        self._state_file.path.unlink()
        self.close()

    def close(self) -> None:
        """Closes the file as it is."""
        self._file.close()
        self._state_file.release()
