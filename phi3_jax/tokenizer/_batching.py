"""Makes one array of rows of ids: cuts them, puts special tokens around them, pads them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int32

from phi3_jax.errors import UserError
from phi3_jax.sizes import round_up

from ._backends import Pieces, SpecialTokenLayout

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


@dataclass
class Row:
    """The tokens of a row with the special tokens around its texts, before padding."""

    ids: list[int] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)
    """The characters of its text, or of its word, that each token stands for; (0, 0) for those around."""
    words: list[int | None] = field(default_factory=list)
    sequences: list[int | None] = field(default_factory=list)
    """0 for tokens of the text, 1 for those of its pair, None for those around."""

    def add(self, pieces: Pieces, sequence: int) -> None:
        self.ids += pieces.ids
        self.offsets += pieces.offsets
        self.words += pieces.words
        self.sequences += [sequence] * len(pieces.ids)

    def add_special(self, token_id: int) -> None:
        self.ids.append(token_id)
        self.offsets.append((0, 0))
        self.words.append(None)
        self.sequences.append(None)


class BatchEncoding(dict[str, np.ndarray]):
    """`input_ids` and `attention_mask`, int32 [B, T], as items and attributes; `model(**batch)` takes it.

    Other items are there if the call asks for them: `offset_mapping` [B, T, 2], `special_tokens_mask`
    [B, T], `assistant_masks` [B, T] and `length` [B]. `word_ids` and the methods beside it speak of a row's
    tokens, padding included.
    """

    def __init__(self, *items: Any, **named: Any) -> None:
        super().__init__(*items, **named)
        self._rows: list[Row] = []
        self._side = "right"
        self._token: Callable[[int], str | None] | None = None
        self._as_tensor: Callable[[np.ndarray], Any] | None = None

    @classmethod
    def of(
        cls,
        arrays: Mapping[str, np.ndarray],
        rows: list[Row],
        side: str,
        token: Callable[[int], str | None],
        as_tensor: Callable[[np.ndarray], Any] | None,
    ) -> "BatchEncoding":
        """Returns the arrays of these rows, padded on this side; `as_tensor` makes another kind of them."""
        batch = cls({name: as_tensor(array) if as_tensor else array for name, array in arrays.items()})
        batch._rows, batch._side, batch._token, batch._as_tensor = rows, side, token, as_tensor
        return batch

    def mark(self, name: str, spans: Sequence[Sequence[tuple[int, int]]]) -> None:
        """Adds a mask [B, T] with 1 for each token that stands for characters of these spans of its text."""
        mask = np.zeros(self["input_ids"].shape, np.int32)
        for index, of_row in enumerate(spans):
            offsets = self._row(index).offsets
            for start, stop in of_row:
                inside = [n for n, (first, end) in enumerate(offsets) if first < stop and end > start]
                mask[index, [self._start(index) + n for n in inside]] = 1
        self[name] = self._as_tensor(mask) if self._as_tensor else mask

    @property
    def input_ids(self) -> Int32[np.ndarray, "B T"]:
        return self["input_ids"]

    @property
    def attention_mask(self) -> Int32[np.ndarray, "B T"]:
        """1 for tokens, 0 for padding."""
        return self["attention_mask"]

    def tokens(self, batch_index: int = 0) -> list[str | None]:
        """Returns the token of each id of a row."""
        if self._token is None:
            raise UserError("these ids were not made by a tokenizer, so that their tokens are unknown")
        return [self._token(int(i)) for i in self["input_ids"][batch_index]]

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """Returns the number of each token's word, None for padding and special tokens around the texts."""
        return self._spread(batch_index, self._row(batch_index).words)

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """Returns 0 for tokens of the text, 1 for those of its pair, None for all others."""
        return self._spread(batch_index, self._row(batch_index).sequences)

    def token_to_chars(self, batch_index: int, token_index: int) -> tuple[int, int] | None:
        """Returns the start and the stop of a token in its text (or word), None for special tokens."""
        if self.sequence_ids(batch_index)[token_index] is None:
            return None
        return self._row(batch_index).offsets[token_index - self._start(batch_index)]

    def char_to_token(self, batch_index: int, char_index: int, sequence_index: int = 0) -> int | None:
        """Returns the index of the token that stands for a character of the text, or None."""
        row, start = self._row(batch_index), self._start(batch_index)
        for index, ((first, stop), sequence) in enumerate(zip(row.offsets, row.sequences, strict=True)):
            if sequence == sequence_index and first <= char_index < stop:
                return start + index
        return None

    def _row(self, batch_index: int) -> Row:
        if not self._rows:
            raise UserError(
                "these ids were not made from texts, so that their words and characters are unknown"
            )
        return self._rows[batch_index]

    def _start(self, batch_index: int) -> int:
        """Returns the index of the row's first token, after padding on the left."""
        padding = self["input_ids"].shape[1] - len(self._row(batch_index).ids)
        return padding if self._side == "left" else 0

    def _spread(self, batch_index: int, values: list[int | None]) -> list[int | None]:
        """Returns the values with None for padding."""
        spread: list[int | None] = [None] * self["input_ids"].shape[1]
        start = self._start(batch_index)
        spread[start : start + len(values)] = values
        return spread


def as_texts(text: Any, name: str, words: bool) -> list[Any]:
    """Returns one text or several as a list, which is not empty; with `words` a text is a list of str."""
    single = isinstance(text, str) if not words else _is_words(text)
    texts = [text] if single else text
    if not isinstance(texts, list | tuple):
        raise TypeError(f"{name} must be a str or a list of str, got {type(text).__name__}")
    if not texts:
        raise UserError(f"{name} is an empty list; expected at least one text")
    for each in texts:
        if words and not _is_words(each):
            raise TypeError(
                f"is_split_into_words=True: {name} must be a list of words or a list of such lists, got "
                f"{each!r:.40}"
            )
    return list(texts)


def _is_words(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(word, str) for word in value)


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


def arrange(layout: SpecialTokenLayout, first: Pieces, second: Pieces) -> Row:
    """Returns the tokens of a text and its pair with the special tokens around them."""
    row = Row()
    for part in layout:
        if part == "A":
            row.add(first, 0)
        elif part == "B":
            row.add(second, 1)
        else:
            row.add_special(part)
    return row


def overhead(layout: SpecialTokenLayout) -> int:
    """Returns the number of special tokens in a layout."""
    return sum(isinstance(part, int) for part in layout)


def truncate(first: Pieces, second: Pieces, cut: str, room: int, side: str) -> tuple[Pieces, Pieces]:
    """Cuts a text and its pair at their left or right ends to `room` ids together."""
    check_side("truncation_side", side)
    if room < 0:
        raise UserError(f"max_length is {-room} too short for the special tokens alone")

    def keep(pieces: Pieces, length: int) -> Pieces:
        kept = slice(length) if side == "right" else slice(len(pieces.ids) - length, None)
        return Pieces(pieces.ids[kept], pieces.offsets[kept], pieces.words[kept])

    keep_first, keep_second = _lengths(len(first.ids), len(second.ids), cut, room)
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


def width(lengths: Sequence[int], padding: str, max_length: int | None, multiple_of: int | None) -> int:
    """Returns the length of the padded rows, at least the longest row's."""
    longest = max(lengths)
    if padding == "do_not_pad":
        if min(lengths) < longest:
            raise UserError(f"rows of {min(lengths)} to {longest} ids cannot form an array; use padding=True")
        return longest
    if padding == "max_length" and max_length is not None:
        longest = max(longest, max_length)
    return round_up(longest, multiple_of) if multiple_of else longest


def pad_rows(rows: Sequence[Sequence[Any]], width: int, fill: Any, side: str) -> Int32[np.ndarray, "B T ..."]:
    """Makes one array of the rows, padded with `fill` on the left or right."""
    check_side("padding_side", side)
    array = np.empty((len(rows), width, *np.shape(fill)), np.int32)
    array[:] = fill
    for index, row in enumerate(rows):
        if len(row):
            array[index, slice(width - len(row), width) if side == "left" else slice(0, len(row))] = row
    return array


def from_examples(examples: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns the entries of a list of dicts as a dict of lists."""
    if not isinstance(examples, list | tuple) or not all(isinstance(each, Mapping) for each in examples):
        raise TypeError(f"pad takes a dict of rows or a list of dicts, got {type(examples).__name__}")
    if not examples:
        raise UserError("pad got an empty list; expected at least one row")
    for index, each in enumerate(examples):
        if each.keys() != examples[0].keys():
            raise UserError(f"row {index} has the entries {list(each)}, row 0 {list(examples[0])}")
    return {name: [each[name] for each in examples] for name in examples[0]}


def rows_of(encoded: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Returns each entry as a list of rows; a single row is a batch of one."""
    if "input_ids" not in encoded:
        raise UserError(f"pad needs input_ids, got {', '.join(encoded) or 'nothing'}")
    lists = {
        name: value.tolist() if hasattr(value, "tolist") else list(value) for name, value in encoded.items()
    }
    lists = {
        name: [row.tolist() if hasattr(row, "tolist") else row for row in rows]
        for name, rows in lists.items()
    }
    ids = lists["input_ids"]
    if not ids:
        raise UserError("input_ids is empty; expected at least one row")
    return lists if isinstance(ids[0], list | tuple) else {name: [row] for name, row in lists.items()}


def equal_rows(name: str, rows: Sequence[Any]) -> np.ndarray:
    """Returns rows that are equally long as an array."""
    if len({np.shape(row) for row in rows}) > 1:
        raise UserError(f"the rows of {name} are not equally long; pad them before (labels with -100)")
    array = np.asarray(rows)
    return array.astype(np.int32) if array.dtype.kind == "i" else array
