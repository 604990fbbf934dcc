"""The requests that an output has answers for, which may be millions."""

import json
import sqlite3
from typing import NamedTuple

from phi3_jax.batch.requests import BadRequestError, Request
from phi3_jax.errors import UserError
from phi3_jax.runs.text import parse_json


class IdSet:
    """A set of request ids and line numbers that is kept on disk when it is large."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", check_same_thread=False)  # a temporary file
        self._database.execute("create table ids (id text primary key) without rowid")

    def add(self, id: str | int) -> bool:
        """Adds an id and returns whether it is new."""
        cursor = self._database.execute("insert or ignore into ids values (?)", (json.dumps(id),))
        return cursor.rowcount > 0

    def __contains__(self, id: str | int) -> bool:
        rows = self._database.execute("select 1 from ids where id = ?", (json.dumps(id),))
        return rows.fetchone() is not None

    def close(self) -> None:
        self._database.close()


class Key(NamedTuple):
    """Identifies what a line of an output is about."""

    is_error: bool
    value: str | int
    """The id of an answer; the line of an error, whose id may be missing or that of another line."""


def answer_key(id: str | int) -> Key:
    """Returns the key of an answer."""
    return Key(False, id)


def error_key(line: int, file: str | None) -> Key:
    """Returns the key of an error; `file` is the name of the line's file if there are several."""
    return Key(True, line if file is None else f"{line} of {file}")


def key_of_line(line: bytes) -> Key:
    """Returns the key of a line of an output.

    Raises:
        UserError: it is not an answer or an error; the message does not say where it is.
    """
    try:
        values = parse_json(line, "the line")
        id = values["custom_id" if "custom_id" in values else "id"]
        if (number := values.get("line")) is not None:
            return error_key(number, values.get("file"))
        if isinstance(id, str | int):
            return answer_key(id)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(str(error)) from error
    raise UserError("its id is missing")


class Answered:
    """The requests that have an answer or an error, and how many these are."""

    def __init__(self) -> None:
        self.count = self.errors = 0
        self._ids, self._lines = IdSet(), IdSet()

    def has(self, request: Request | BadRequestError) -> bool:
        """Returns whether there is an answer or an error for this line."""
        if isinstance(request, Request) and request.id in self._ids:
            return True
        # Also of valid lines: the engine rejects some requests later.
        file = None if request.file is None else request.file.name
        return error_key(request.line, file).value in self._lines

    def add(self, key: Key) -> bool:
        """Counts an answer or an error and returns True, unless there is one with this key."""
        is_new = (self._lines if key.is_error else self._ids).add(key.value)
        if is_new:
            self.count += 1
            self.errors += key.is_error
        return is_new

    def close(self) -> None:
        """Frees the memory and the disk that the keys take."""
        self._ids.close()
        self._lines.close()


class CountsAnswered:
    """What outputs of answers have in common: they know the requests that have an answer or an error."""

    _answered: Answered

    @property
    def count(self) -> int:
        """The number of answers and errors, including those that are not written yet."""
        return self._answered.count

    @property
    def errors(self) -> int:
        """The number of errors among them."""
        return self._answered.errors

    def has(self, request: Request | BadRequestError) -> bool:
        """Returns whether there is an answer or an error for this line."""
        return self._answered.has(request)
