"""Rows of ids made one array: cut, surrounded by special tokens, padded."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from phi3_jax.errors import UserError

from ._backends import SpecialTokenLayout

PADDINGS = {
    True: "longest",
    "longest": "longest",
    "max_length": "max_length",
    False: "do_not_pad",
    "do_not_pad": "do_not_pad",
}
TRUNCATIONS = {
    True: "longest_first",
    "longest_first": "longest_first",
    "only_first": "only_first",
    "only_second": "only_second",
    False: None,
    None: None,
    "do_not_truncate": None,
}


class BatchEncoding(dict[str, np.ndarray]):
    """`input_ids` and `attention_mask`, int32 [B, T], as items and attributes; `model(**batch)` takes it."""

    @property
    def input_ids(self) -> Int32[np.ndarray, "B T"]:
        return self["input_ids"]

    @property
    def attention_mask(self) -> Int32[np.ndarray, "B T"]:
        """1 for tokens, 0 for padding."""
        return self["attention_mask"]


def as_texts(text: Any, name: str) -> list[str]:
    """One text or several as a list, which is not empty."""
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)):
        raise TypeError(f"{name} must be a str or a list of str, got {type(text).__name__}")
    if not texts:
        raise UserError(f"{name} is an empty list; expected at least one text")
    return list(texts)


def choice(name: str, value: Any, table: Mapping[Any, Any]) -> Any:
    """What an argument's value stands for, or a ValueError with the values there are."""
    try:
        return table[value]
    except (KeyError, TypeError):
        options = ", ".join(repr(option) for option in table)
        raise UserError(f"{name}={value!r}; use one of {options}") from None


def check_side(name: str, value: str) -> None:
    if value not in ("left", "right"):
        raise UserError(f"{name}={value!r}; use 'left' or 'right'")


def arrange(layout: SpecialTokenLayout, first: list[int], second: list[int]) -> list[int]:
    """The ids of a text and its pair with the special tokens around them."""
    ids: list[int] = []
    for part in layout:
        ids += first if part == "A" else second if part == "B" else [part]
    return ids


def overhead(layout: SpecialTokenLayout) -> int:
    """Number of special tokens in a layout."""
    return sum(isinstance(part, int) for part in layout)


def truncated(
    first: list[int], second: list[int], cut: str, room: int, side: str
) -> tuple[list[int], list[int]]:
    """A text and its pair, cut to `room` ids together at their left or right ends."""
    check_side("truncation_side", side)
    if room < 0:
        raise UserError(f"max_length is {-room} too short for the special tokens alone")

    def keep(ids: list[int], length: int) -> list[int]:
        return ids[:length] if side == "right" else ids[len(ids) - length :]

    keep_first, keep_second = _lengths(len(first), len(second), cut, room)
    return keep(first, keep_first), keep(second, keep_second)


def _lengths(first: int, second: int, cut: str, room: int) -> tuple[int, int]:
    """How much of each stays, as the `tokenizers` library has it."""
    excess = first + second - room
    if excess <= 0:
        return first, second
    if cut == "longest_first":
        # The shorter one stays whole unless it fills more than half of the room; then each gets half.
        short = min(first, second, room // 2)
        return (short, room - short) if first <= second else (room - short, short)
    name, length = ("text", first) if cut == "only_first" else ("text_pair", second)
    if excess > length:
        raise UserError(f"truncation={cut!r}: {excess} ids too many, and {name} has only {length}")
    return (first - excess, second) if cut == "only_first" else (first, second - excess)


def width(
    rows: Sequence[Sequence[int]], padding: str, max_length: int | None, multiple_of: int | None
) -> int:
    """The length that all rows get: at least the longest row's."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    if padding == "do_not_pad":
        if min(lengths) < longest:
            raise UserError(f"rows of {min(lengths)} to {longest} ids make no array; use padding=True")
        return longest
    if padding == "max_length" and max_length is not None:
        longest = max(longest, max_length)
    return longest + (-longest % multiple_of if multiple_of else 0)


def stacked(rows: Sequence[Sequence[int]], width: int, fill: int, side: str) -> BatchEncoding:
    """Rows as one array, padded with `fill` on the left or right."""
    check_side("padding_side", side)
    ids = np.full((len(rows), width), fill, np.int32)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place] = row
        mask[index, place] = 1
    return BatchEncoding(input_ids=ids, attention_mask=mask)
