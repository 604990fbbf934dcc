"""Reads the columns of a row; errors name the row and the column."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from phi3_jax.data.labels import Labels, label_name
from phi3_jax.data.rows import BadRowError, BadRows, Row
from phi3_jax.errors import UserError
from phi3_jax.runs.text import lone_surrogate

_FLOAT32_MAX = float(np.finfo(np.float32).max)


@contextmanager
def errors_of(row: Row) -> Iterator[None]:
    """Makes an error of the block a `BadRowError` of this row."""
    try:
        yield
    except ValueError as error:
        raise BadRowError(row.place, str(error)) from error


def read_value(row: Row, column: str) -> Any:
    if column not in row.values:
        names = ", ".join(map(repr, row.values)) or "none"
        raise BadRowError(row.place, f"there is no column {column!r}; the columns are {names}")
    return row.values[column]


def read_text(row: Row, column: str, *, may_be_empty: bool = False) -> str:
    value = read_value(row, column)
    if not isinstance(value, str):
        raise BadRowError(row.place, f"{column!r} is {value!r:.40}; expected text")
    if not (may_be_empty or value.strip()):
        raise BadRowError(row.place, f"{column!r} is empty")
    check_characters(row, column, value)
    return value


def check_characters(row: Row, column: str, text: str) -> None:
    """Raises the row's error if a text has half of a surrogate pair, which no tokenizer can read."""
    if (at := lone_surrogate(text)) is not None:
        raise BadRowError(
            row.place, f"{column!r} has half of a surrogate pair at character {at + 1}, which is not text"
        )


def are_words(values: list[Any]) -> bool:
    """Returns whether all values are texts with a visible character and without half of a surrogate pair."""
    try:
        return all(map(str.strip, values)) and lone_surrogate("".join(values)) is None
    except TypeError:  # a value is no text
        return False


def read_list(row: Row, column: str) -> list[Any]:
    value = read_value(row, column)
    if not isinstance(value, list):
        raise BadRowError(row.place, f"{column!r} is {value!r:.40}; expected a list")
    return value


def read_number(row: Row, column: str) -> float:
    value = read_value(row, column)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _FLOAT32_MAX:
        raise BadRowError(row.place, f"{column!r} is {value!r:.40}; expected a finite float32 number")
    return number


def read_zero_or_one(row: Row, column: str) -> float:
    value = row.values.get(column)
    number = float(value) if isinstance(value, bool) else read_number(row, column)
    if number not in (0, 1):
        raise BadRowError(row.place, f"{column!r} is {value!r}; expected 0 or 1")
    return number


def label_names(row: Row, column: str, values: Any) -> list[str]:
    """Returns the names of the labels that a column has."""
    if not isinstance(values, list):
        raise BadRowError(row.place, f"{column!r} is {values!r:.40}; expected a list of labels")
    try:
        return list(map(label_name, values))
    except ValueError as error:
        raise BadRowError(row.place, f"{column!r}: {error}") from error


def label_ids(row: Row, labels: Labels, names: Iterable[str]) -> list[int]:
    try:
        return labels.ids(names)
    except ValueError as error:
        raise BadRowError(row.place, str(error)) from error


def collect_labels(rows: Iterable[Row], names_of: Callable[[Row], list[str]], bad: BadRows) -> Labels:
    """Collects the labels of all good rows.

    Raises:
        BadRowError: a row is bad, and `bad` does not skip it.
        UserError: no row has a label.
    """
    names: set[str] = set()
    for row in rows:
        try:
            names.update(names_of(row))
        except BadRowError as error:
            bad(error)
    if not names:
        raise UserError(f"the rows have no labels; expected at least one{_also(bad)}")
    return Labels.from_names(names)


def check_two_classes(labels: Labels, bad: BadRows) -> None:
    """Checks that there are two classes to tell apart.

    Raises:
        UserError: there is only one.
    """
    if len(labels) == 1:
        raise UserError(
            f"all rows have the label {labels.names[0]!r}; expected at least two classes{_also(bad)}"
        )


def _also(bad: BadRows) -> str:
    return f". {bad.summary()}" if bad.count else ""
