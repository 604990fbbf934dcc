"""Tokenises rows in batches, on all cores, while Python reads the rows after and gathers those before."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeAlias

from phi3_jax.data.columns import errors_of
from phi3_jax.data.rows import BadRowError, Place, Row
from phi3_jax.tokenizer import Phi3Tokenizer

BATCH_ROWS, MOST_CHARACTERS = 128, 2**18
"""Limits of the rows whose texts are tokenised by one call. More rows give the garbage collector more
to do, and more text takes memory, a hundred bytes a token."""

MOST_WORDS, LONGEST_WORD = 2**16, 24
"""How many words keep their ids, and how many characters they may have: some 20 MB."""


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenised row, or a part of one."""

    input_ids: list[int]
    labels: int | list[float] | list[int] | None
    """A class; a number for each class or output; a class or id for each token (-100: ignored)."""
    place: Place
    firsts: list[bool] | None = None
    """Whether each token is the first of a word."""
    truncated: bool = False
    """Whether the maximum length cut tokens off."""


Checked: TypeAlias = tuple[Sequence[str], Any]
"""What the tokenizer is to encode of a row, without special tokens around it, and what else is read of it."""

Result: TypeAlias = Sequence[Example] | BadRowError
"""The examples of a row, or what is wrong with it."""


class RowEncoder(Protocol):
    """Makes examples of rows in two steps, between which the tokenizer encodes the texts of many rows."""

    def check(self, row: Row) -> Checked:
        """Reads and checks the columns of a row.

        Raises:
            BadRowError: the row is bad.
        """
        ...

    def examples(self, row: Row, values: Any, ids: Sequence[list[int]]) -> Sequence[Example]:
        """Returns the examples of a row.

        Args:
            values: the second part of what `check` returned.
            ids: of each text. The lists are shared with other rows, and stay as they are.

        Raises:
            BadRowError: the row is bad.
        """
        ...


def encode_row(row: Row, encoder: RowEncoder, tokenizer: Phi3Tokenizer) -> list[Example]:
    """Returns the examples of one row.

    Raises:
        BadRowError: the row is bad.
    """
    texts, values = encoder.check(row)
    return list(encoder.examples(row, values, _ids_of_row(row, texts, tokenizer)))


def encode_items(
    items: Iterable[Row | BadRowError], encoder: RowEncoder, tokenizer: Phi3Tokenizer
) -> Iterator[tuple[Row | BadRowError, Result]]:
    """Yields each row and its result, in order; the error of a row that could not be read stays as it is.

    Rows are read up to two batches ahead. An error of the reading, or of the tokenizer, is raised after the
    results of the rows before.
    """
    cache = _WordCache(tokenizer)
    with ThreadPoolExecutor(1) as pool:
        last: tuple[_Batch, Future[_Ids]] | None = None
        for batch in _batches(items, encoder):
            # The library leaves the interpreter to other threads while it encodes.
            started = batch, pool.submit(cache.encode, batch.checked)
            if last is not None:
                yield from _results(*last, encoder, tokenizer)
            last = started
        if last is not None:
            yield from _results(*last, encoder, tokenizer)


_Ids: TypeAlias = dict[str, list[int]] | None
"""The ids of each text; None if the tokenizer failed."""


class _Batch(NamedTuple):
    items: list[Row | BadRowError]
    checked: list[Checked | BadRowError]
    failure: Exception | None
    """The error that ended the reading after these rows."""


class _WordCache:
    """Encodes each text of a batch once, and remembers the ids of short ones, such as words."""

    def __init__(self, tokenizer: Phi3Tokenizer):
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def encode(self, rows: Iterable[Checked | BadRowError]) -> _Ids:
        known = self._known
        texts = {text for row in rows if not isinstance(row, BadRowError) for text in row[0]}
        ids = {text: known[text] for text in texts if text in known}
        texts.difference_update(ids)
        new = list(texts)
        try:
            encoded = dict(zip(new, self._tokenizer.encode_batch(new), strict=True))
        except Exception:  # of one row, which gets it when the rows are encoded one by one
            return None
        if len(known) > MOST_WORDS:
            known.clear()
        known.update((text, own) for text, own in encoded.items() if len(text) <= LONGEST_WORD)
        ids.update(encoded)
        return ids


def _batches(items: Iterable[Row | BadRowError], encoder: RowEncoder) -> Iterator[_Batch]:
    iterator = iter(items)
    more, failure = True, None
    while more and failure is None:
        batch = _Batch([], [], None)
        try:
            more = _fill(batch, iterator, encoder)
        except Exception as error:
            failure = error
        yield batch._replace(failure=failure)


def _fill(batch: _Batch, items: Iterator[Row | BadRowError], encoder: RowEncoder) -> bool:
    """Adds items until there are enough; returns whether there may be more."""
    characters = 0
    for item in islice(items, BATCH_ROWS):
        checked = _checked(item, encoder)
        batch.items.append(item)
        batch.checked.append(checked)
        if not isinstance(checked, BadRowError):
            characters += sum(map(len, checked[0]))
            # A row without texts is encoded by itself, so that to read others ahead would only take memory.
            if characters > MOST_CHARACTERS or not checked[0]:
                return True
    return len(batch.items) == BATCH_ROWS


def _checked(item: Row | BadRowError, encoder: RowEncoder) -> Checked | BadRowError:
    if isinstance(item, BadRowError):
        return item
    try:
        return encoder.check(item)
    except BadRowError as error:
        return error


def _results(
    batch: _Batch, future: "Future[_Ids]", encoder: RowEncoder, tokenizer: Phi3Tokenizer
) -> Iterator[tuple[Row | BadRowError, Result]]:
    ids = future.result()
    for row, checked in zip(batch.items, batch.checked, strict=True):
        if isinstance(checked, BadRowError):
            yield row, checked
            continue
        assert isinstance(row, Row)
        texts, values = checked
        try:
            own = _ids_of_row(row, texts, tokenizer) if ids is None else [ids[text] for text in texts]
            result: Result = encoder.examples(row, values, own)
        except BadRowError as error:
            result = error
        yield row, result
    if batch.failure is not None:
        raise batch.failure


def _ids_of_row(row: Row, texts: Sequence[str], tokenizer: Phi3Tokenizer) -> list[list[int]]:
    with errors_of(row):
        return tokenizer.encode_batch(texts)
