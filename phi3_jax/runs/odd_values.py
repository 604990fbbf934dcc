"""Reads odd values of files: those with one evident meaning, and those that have none and are left out.

One odd value must not make a whole checkpoint useless. But only fields on which no number of the model
depends are read so; sizes, ropes and the like stay errors.
"""

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


def read_odd(
    name: str, value: Any, holds: Callable[[Any], bool], assumed: Any, where: object, words: str = ""
) -> Any:
    """Returns a value that holds: the value itself, what its text or number means, or `assumed`.

    A warning names the file, the value and what it becomes; `words` says what it must be.
    """
    if holds(value):
        return value
    meaning = evident_meaning(value)
    found = meaning if meaning is not None and holds(meaning) else assumed
    expected = f" must be {words}" if words else " has no meaning"
    logger.warning("%s: %s=%.80r%s; assumed: %r", where, name, value, expected, found)
    return found


def evident_meaning(value: Any) -> Any:
    """Returns 2 for "2", 0.5 for "0.5", True for "true", 20 for 20.0; None for others."""
    if isinstance(value, str):
        text = value.strip().lower()
        if text in ("true", "false"):
            return text == "true"
        try:
            value = float(text)
        except ValueError:
            return None
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    return None
