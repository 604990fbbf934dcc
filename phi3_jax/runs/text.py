"""Text that comes from outside: JSON without a key twice, the position of its errors, and valid Unicode."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from phi3_jax.errors import UserError

MOST_NESTED = 100
"""The levels of lists and objects in a JSON text; no file of ours has more than ten."""


def parse_json(content: str | bytes, name: object) -> Any:
    """Returns the value of a JSON text; `name` says in errors where the text is from.

    Raises:
        UserError: the text is not valid JSON or not valid UTF-8, or an object has a key twice. The message
            has the position or the key.
    """
    try:
        text = content.removeprefix("\ufeff") if isinstance(content, str) else content
        value = json.loads(text, object_pairs_hook=_without_repetition)
        brackets = ("[", "{") if isinstance(text, str) else (b"[", b"{")
        if sum(map(text.count, brackets)) > MOST_NESTED:  # type: ignore[arg-type]
            _check_depth(value)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise UserError(f"{name} is not valid JSON: {error.msg} at {where}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not valid UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise UserError(
            f"{name} is not valid JSON: it is nested too deeply, in more than {MOST_NESTED} levels"
        ) from error
    except ValueError as error:  # a key twice, or a number with too many digits
        raise UserError(f"{name} is not valid JSON: {error}") from error
    return value


def _check_depth(value: Any) -> None:
    """Raises RecursionError for a value that is nested too deeply to be copied or compared."""
    level = [value]
    for _ in range(MOST_NESTED):
        inner = [list(each.values()) if isinstance(each, dict) else each for each in level]
        level = [one for each in inner for one in each if isinstance(one, dict | list)]
        if not level:
            return
    raise RecursionError


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise UserError(f"it has the key {twice!r} twice, and one of the values would be ignored")
    return values


def read_json(path: Path) -> Any:
    """Returns the value of a JSON file.

    Raises:
        UserError: as `parse_json`.
        OSError: the file cannot be read.
    """
    return parse_json(path.read_bytes(), path)


def lone_surrogate(text: str) -> int | None:
    """Returns the position of a half of a surrogate pair, which no encoding can write, or None."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return error.start
    return None
