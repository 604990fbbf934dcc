"""Makes one array of rows of ids: cuts them, puts special tokens around them, pads them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from phi3_jax.errors import UserError
from phi3_jax.sizes import round_up

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
    """Returns one text or several as a list, which is not empty."""
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)):
        raise TypeError(f"{name} must be a str or a list of str, got {type(text).__name__}")
    if not texts:
        raise UserError(f"{name} is an empty list; expected at least one text")
    return list(texts)


def choice(name: str, value: Any, table: Mapping[Any, Any]) -> Any:
    """Returns the meaning of an argument's value.

    Raises:
        UserError: the value is not in the table; the message lists those that are.
    """
    try:
        return table[value]
    except (KeyError, TypeError):
        options = ", ".join(repr(option) for option in table)
        raise UserError(f"{name}={value!r}; use one of {options}") from None


def check_side(name: str, value: str) -> None:
    if value not in ("left", "right"):
        raise UserError(f"{name}={value!r}; use 'left' or 'right'")


def arrange(layout: SpecialTokenLayout, first: list[int], second: list[int]) -> list[int]:
    """Returns the ids of a text and its pair with the special tokens around them."""
    ids: list[int] = []
    for part in layout:
        ids += first if part == "A" else second if part == "B" else [part]
    return ids


def overhead(layout: SpecialTokenLayout) -> int:
    """Returns the number of special tokens in a layout."""
    return sum(isinstance(part, int) for part in layout)


def truncate(
    first: list[int], second: list[int], cut: str, room: int, side: str
) -> tuple[list[int], list[int]]:
    """Cuts a text and its pair at their left or right ends to `room` ids together."""
    check_side("truncation_side", side)
    if room < 0:
        raise UserError(f"max_length is {-room} too short for the special tokens alone")

    def keep(ids: list[int], length: int) -> list[int]:
        return ids[:length] if side == "right" else ids[len(ids) - length :]

    keep_first, keep_second = _lengths(len(first), len(second), cut, room)
    return keep(first, keep_first), keep(second, keep_second)


def _lengths(first: int, second: int, cut: str, room: int) -> tuple[int, int]:
    """Returns the lengths to keep, by the rules of the `tokenizers` library."""
    excess = first + second - room
    if excess <= 0:
        return first, second
    if cut == "longest_first":
        # The shorter one stays whole unless it is longer than half of the room; then each gets half.
        short = min(first, second, room // 2)
        return (short, room - short) if first <= second else (room - short, short)
    name, length = ("text", first) if cut == "only_first" else ("text_pair", second)
    if excess > length:
        raise UserError(f"truncation={cut!r}: {excess} ids too many, and {name} has only {length}")
    return (first - excess, second) if cut == "only_first" else (first, second - excess)


def width(
    rows: Sequence[Sequence[int]], padding: str, max_length: int | None, multiple_of: int | None
) -> int:
    """Returns the length of the padded rows, at least the longest row's."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    if padding == "do_not_pad":
        if min(lengths) < longest:
            raise UserError(f"rows of {min(lengths)} to {longest} ids cannot form an array; use padding=True")
        return longest
    if padding == "max_length" and max_length is not None:
        longest = max(longest, max_length)
    return round_up(longest, multiple_of) if multiple_of else longest


def pad_rows(rows: Sequence[Sequence[int]], width: int, fill: int, side: str) -> BatchEncoding:
    """Makes one array of the rows, padded with `fill` on the left or right."""
    check_side("padding_side", side)
    ids = np.full((len(rows), width), fill, np.int32)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, columns] = row
        mask[index, columns] = 1
    return BatchEncoding(input_ids=ids, attention_mask=mask)
