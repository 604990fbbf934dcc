"""Reads the rows of a file or folder by its format."""

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from os import PathLike
from pathlib import Path

from phi3_jax.data.arrow_rows import check_saved, read_parquet, read_saved
from phi3_jax.data.rows import PLAIN_TEXT, BadRowError, BadRows, Columns, Row, TextFormat
from phi3_jax.data.text_rows import read_conll, read_delimited, read_jsonl
from phi3_jax.errors import UserError


def read_rows(
    path: str | PathLike[str],
    *,
    file_format: str | None = None,
    columns: Collection[str] = (),
    optional: Collection[str] = (),
    only_columns: bool = True,
    text: TextFormat = PLAIN_TEXT,
    bad: BadRows,
) -> Iterator[Row]:
    """Yields the rows of a file as `read_items` does; `bad` raises the errors of bad ones, or counts them.

    Raises:
        UserError, FileNotFoundError: as in `read_items`.
        BadRowError: a row is bad, and `bad` does not skip it.
    """
    items = read_items(
        path,
        file_format=file_format,
        columns=columns,
        optional=optional,
        only_columns=only_columns,
        text=text,
    )
    return good_rows(items, bad)


def good_rows(items: Iterable[Row | BadRowError], bad: BadRows) -> Iterator[Row]:
    """Yields the rows among the items; `bad` raises the errors, or counts them."""
    for item in items:
        if isinstance(item, BadRowError):
            bad(item)
        else:
            yield item


def read_items(
    path: str | PathLike[str],
    *,
    file_format: str | None = None,
    columns: Collection[str] = (),
    optional: Collection[str] = (),
    only_columns: bool = True,
    text: TextFormat = PLAIN_TEXT,
) -> Iterator[Row | BadRowError]:
    """Yields the rows of a file and the errors of bad ones, in order.

    Rows are read as they are needed: memory does not grow with the file.

    CSV and TSV have a header line. CoNLL has one word and its tags per line, of which the last counts, and
    blank lines between sentences; its columns are `words` and `labels`. If `columns` has no `labels`, a line
    may be a word alone. Lines in front of a sentence that
    start with # and have other fields than its words are comments. Text is UTF-8, and may be compressed
    (.gz). A folder is one that `save_to_disk` of `datasets` wrote. Parquet files and such folders give class
    names in place of class numbers, if their schema has names.

    Args:
        file_format: "csv", "tsv", "jsonl", "parquet" or "conll"; default: by the file's suffix.
        columns: columns that must exist; not checked in JSONL, where rows may have different ones.
        optional: columns that are read, too, where they exist.
        only_columns: reads no other columns of Parquet and of folders, if `columns` names any.
        text: the encoding of text files, and the form of CSV and TSV.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: the format is unknown, the file is broken or has no rows, or its header is wrong.
    """
    path = Path(path)
    text.check()
    wanted = Columns(columns, optional, only_columns)
    if path.is_dir():
        check_saved(path)
        return _some(read_saved(path, wanted), path)
    if not path.is_file():
        raise FileNotFoundError(f"no data at {path}: no such file")
    return _some(_READERS[_known_format(path, file_format)](path, wanted, text), path)


def _known_format(path: Path, file_format: str | None) -> str:
    known = ", ".join(map(repr, _READERS))
    if file_format is not None:
        if file_format not in _READERS:
            raise UserError(f"file_format={file_format!r} is not known; use one of {known}")
        return file_format
    name = format_of(path)
    if name is None:
        raise UserError(f"the suffix of {path} is not a known format; give file_format= one of {known}")
    return name


def format_of(path: Path) -> str | None:
    """Returns the format that the suffix of a file names; None if it names none."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    name = {".json": "jsonl"}.get(suffix, suffix.removeprefix("."))
    return name if name in _READERS else None


def _some(items: Iterable[Row | BadRowError], path: Path) -> Iterator[Row | BadRowError]:
    """Yields the items, of which there must be one."""
    item = None
    for item in items:
        yield item
    if item is None:
        raise UserError(f"{path} has no rows")


_READERS: dict[str, Callable[[Path, Columns, TextFormat], Iterator[Row | BadRowError]]] = {
    "csv": partial(read_delimited, delimiter=","),
    "tsv": partial(read_delimited, delimiter="\t"),
    "jsonl": read_jsonl,
    "parquet": lambda path, columns, text: read_parquet(path, columns),
    "conll": read_conll,
}
