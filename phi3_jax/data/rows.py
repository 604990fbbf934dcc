"""Rows of files: their values and places, errors in them, and what of a file is read."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from phi3_jax.errors import UserError


class Place(NamedTuple):
    """The place of a row: "train.csv, line 3"."""

    file: str
    line: int
    """The row's first line, counted from 1."""
    unit: str = "line"
    """What `line` counts: lines, or rows of a file without lines."""

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.line}"


class Row(NamedTuple):
    """The values of a row by column, and its place."""

    values: dict[str, Any]
    place: Place


class TextFormat(NamedTuple):
    """How text files are read.

    Raises:
        UserError: on `check`, if the encoding is unknown.
    """

    encoding: str = "utf-8"
    """One in which a line break is one byte."""
    quoting: bool = True
    """Whether quotes in CSV and TSV may enclose a field; otherwise they are characters of the text."""
    column_names: tuple[str, ...] = ()
    """The columns of a CSV or TSV file whose first line is a row; default: the first line names them."""

    def check(self) -> None:
        try:
            one_byte = "\n".encode(self.encoding) == b"\n"
        except (LookupError, ValueError) as error:  # ValueError: it is no name at all
            raise UserError(
                f"encoding={self.encoding!r} is unknown; use utf-8 or iso-8859-1, for example"
            ) from error
        if not one_byte:
            raise UserError(
                f"encoding={self.encoding!r} has line breaks of several bytes; save the file as utf-8"
            )


PLAIN_TEXT = TextFormat()


class BadRowError(UserError):
    """A row that cannot be used: "train.csv, line 3: label is empty".

    Attributes:
        values: what could be read of it, by column.
    """

    def __init__(self, place: Place, fault: str, values: dict[str, Any] | None = None):
        super().__init__(place, fault, values)
        self.place, self.fault, self.values = place, fault, values or {}

    def __str__(self) -> str:
        return f"{self.place}: {self.fault}"


class BadRows:
    """Raises the error of a bad row, or skips and counts all bad rows.

    Attributes:
        count: number of skipped rows.
        first: messages of the first five.
    """

    def __init__(self, skip: bool):
        self.skip = skip
        self.count = 0
        self.first: list[str] = []

    def __call__(self, error: BadRowError) -> None:
        """Raises `error`, or counts it."""
        if not self.skip:
            raise error
        self.count += 1
        if len(self.first) < 5:
            self.first.append(str(error))

    def summary(self) -> str:
        """Returns how many rows were skipped and what is wrong with the first ones; empty without any."""
        if not self.count:
            return ""
        rows = "1 bad row was" if self.count == 1 else f"{self.count} bad rows were"
        return f"{rows} skipped; the first: {'; '.join(self.first)}"


class Columns(NamedTuple):
    """The columns that are to be read."""

    required: Collection[str]
    optional: Collection[str]
    only: bool

    def of(self, existing: Sequence[str]) -> list[str]:
        """Returns the columns to read among those that exist."""
        if not self.required or not self.only:
            return list(existing)
        return [*self.required, *(name for name in self.optional if name in existing)]


def check_columns(path: Path, existing: Collection[str], required: Collection[str]) -> None:
    for column in required:
        if column not in existing:
            names = ", ".join(map(repr, existing))
            raise UserError(f"{path} has no column {column!r}; its columns are {names}")
