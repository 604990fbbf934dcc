"""Reads rows of CSV, TSV, JSONL, Parquet and CoNLL files, or of a data set, one by one."""

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, takewhile
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from phi3_jax.errors import UserError
from phi3_jax.runs.text import lone_surrogate, parse_json, read_json

_LONGEST_FIELD = 2**24
_PARQUET_BATCH = 1024
_CONLLU = 10


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
        except LookupError as error:
            raise UserError(
                f"encoding={self.encoding!r} is unknown; use utf-8 or iso-8859-1, for example"
            ) from error
        if not one_byte:
            raise UserError(
                f"encoding={self.encoding!r} has line breaks of several bytes; save the file as utf-8"
            )


PLAIN_TEXT = TextFormat()


class BadRowError(UserError):
    """A row that cannot be used: "train.csv, line 3: label is empty"."""

    def __init__(self, place: Place, fault: str):
        super().__init__(place, fault)
        self.place, self.fault = place, fault

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
    """Yields the rows of a file, reading as they are needed: memory does not grow with the file.

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
        BadRowError: a row is bad, and `bad` does not skip it.
    """
    path = Path(path)
    text.check()
    wanted = _Columns(columns, optional, only_columns)
    if path.is_dir():
        _check_saved(path)
        return _skip_bad_rows(_read_saved(path, wanted), path, bad)
    if not path.is_file():
        raise FileNotFoundError(f"no data at {path}: no such file")
    return _skip_bad_rows(_READERS[_format_of(path, file_format)](path, wanted, text), path, bad)


class _Columns(NamedTuple):
    """The columns that are to be read."""

    required: Collection[str]
    optional: Collection[str]
    only: bool

    def of(self, existing: Sequence[str]) -> list[str]:
        """Returns the columns to read among those that exist."""
        if not self.required or not self.only:
            return list(existing)
        return [*self.required, *(name for name in self.optional if name in existing)]


def read_dataset(name: str, split: str) -> Iterator[Row]:
    """Streams the rows of a data set of the Hugging Face hub, with class names instead of class numbers.

    Raises:
        ImportError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"the data set {name!r} needs the library datasets; pip install datasets, or give a file"
        ) from error
    data = datasets.load_dataset(name, split=split, streaming=True)
    features = {} if data.features is None else data.features.to_dict()
    named = {column: names for column, each in features.items() if (names := _names_of(each))}
    for number, values in enumerate(data, 1):
        yield Row(_with_names(values, named), Place(f"{name}, {split}", number, "row"))


def _names_of(feature: Any) -> list[str] | None:
    """Returns the class names in a feature of `datasets`, as it writes it; None if it has no classes."""
    if isinstance(feature, list):  # an old spelling of a list
        feature = {"feature": feature[0]} if feature else {}
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "ClassLabel":
        return feature.get("names")
    # The feature of a list, such as token labels, contains the feature of its items.
    return _names_of(feature.get("feature"))


def _with_names(values: dict[str, Any], named: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    for column in named.keys() & values.keys():
        values[column] = _class_names(values[column], named[column])
    return values


def _class_names(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_class_names(one, names) for one in value]
    # -1 means that the label is not published.
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _format_of(path: Path, file_format: str | None) -> str:
    known = ", ".join(map(repr, _READERS))
    if file_format is not None:
        if file_format not in _READERS:
            raise UserError(f"file_format={file_format!r} is not known; use one of {known}")
        return file_format
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    name = {".json": "jsonl"}.get(suffix, suffix.removeprefix("."))
    if name not in _READERS:
        raise UserError(f"the suffix of {path} is not a known format; give file_format= one of {known}")
    return name


def _skip_bad_rows(items: Iterable[Row | BadRowError], path: Path, bad: BadRows) -> Iterator[Row]:
    item = None
    for item in items:
        if isinstance(item, BadRowError):
            bad(item)
        else:
            yield item
    if item is None:
        raise UserError(f"{path} has no rows")


def _lines(path: Path, text: TextFormat) -> Iterator[tuple[int, str]]:
    """Yields numbered lines with their ends; `_encoding_fault` finds the bytes that cannot be decoded."""
    zipped = path.name.lower().endswith(".gz")
    # utf-8-sig removes the byte order mark that some editors write first.
    first = "utf-8-sig" if codecs.lookup(text.encoding).name == "utf-8" else text.encoding
    with gzip.open(path, "rb") if zipped else path.open("rb") as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, line.decode(first if number == 1 else text.encoding, "surrogateescape")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path} is not a gzip file, or is truncated: {error}") from error


def _encoding_fault(line: str, text: TextFormat) -> str | None:
    # "surrogateescape" decodes such a byte to a lone surrogate, which no encoding contains.
    if (position := lone_surrogate(line)) is None:
        return None
    if codecs.lookup(text.encoding).name != "utf-8":
        return (
            f"byte 0x{ord(line[position]) - 0xDC00:02x} is not valid {text.encoding}; give another encoding"
        )
    byte = f"byte 0x{ord(line[position]) - 0xDC00:02x}"
    return f"{byte} is not valid UTF-8; save the file as UTF-8, or give its encoding, such as iso-8859-1"


def _check_columns(path: Path, existing: Collection[str], required: Collection[str]) -> None:
    for column in required:
        if column not in existing:
            names = ", ".join(map(repr, existing))
            raise UserError(f"{path} has no column {column!r}; its columns are {names}")


def _read_delimited(
    path: Path, columns: _Columns, text: TextFormat, *, delimiter: str
) -> Iterator[Row | BadRowError]:
    # The default limit of csv, 131,072 characters, is too short for long documents. Without a limit, an open
    # quote would read the rest of the file into memory.
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
    lines = (line for _, line in _lines(path, text))
    reader = csv.reader(
        lines,
        delimiter=delimiter,
        strict=True,
        quoting=csv.QUOTE_MINIMAL if text.quoting else csv.QUOTE_NONE,
    )
    header = list(text.column_names) or _header(reader, path, text)
    _check_columns(path, header, columns.required)
    while True:
        place = Place(str(path), reader.line_num + 1)
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            advice = "look for a quote that is not closed or not doubled, or turn quoting off"
            yield BadRowError(place, f"{error}; {advice}")
            continue
        if not fields:  # a blank line
            continue
        fault = _encoding_fault("".join(fields), text)
        if len(fields) != len(header):
            where = "there are" if text.column_names else "the header has"
            fault = f"{len(fields)} fields, but {where} {len(header)}{' columns' * bool(text.column_names)}"
        yield BadRowError(place, fault) if fault else Row(dict(zip(header, fields, strict=True)), place)


def _header(reader: Iterator[list[str]], path: Path, text: TextFormat) -> list[str]:
    try:
        header = next(reader, None)
    except csv.Error as error:
        raise UserError(f"{path}, line 1: {error}; expected the names of the columns") from error
    if header is None:
        raise UserError(f"{path} is empty; expected a line with the names of the columns, and rows")
    fault = _encoding_fault("".join(header), text)
    if not all(name.strip() for name in header) or not header:
        fault = f"a column has no name: {header}"
    elif twice := [name for name in header if header.count(name) > 1]:
        fault = f"two columns have the name {twice[0]!r}"
    if fault:
        raise UserError(f"{path}, line 1: {fault}")
    return header


def _read_jsonl(path: Path, columns: _Columns, text: TextFormat) -> Iterator[Row | BadRowError]:
    for number, line in _lines(path, text):
        if not line.strip():
            continue
        place = Place(str(path), number)
        values: Any = None
        fault = _encoding_fault(line, text)
        if fault is None:
            try:
                values = parse_json(line, "the line")
            except UserError as error:
                fault = f"{_json_fault(error)}; expected a JSON object in each line, got {line.strip():.40}"
            else:
                if not isinstance(values, dict):
                    fault = f"expected a JSON object in each line, got {line.strip():.40}"
            if fault and line.lstrip()[:1] == "[":
                fault += ", which starts an array; write each object on a line of its own (jq -c '.[]' does)"
        yield BadRowError(place, fault) if fault else Row(values, place)


def _json_fault(error: UserError) -> str:
    """Returns what is wrong with a line, without the number that it has as a text by itself."""
    cause = error.__cause__
    return (
        f"not valid JSON: {cause.msg} at column {cause.colno}"
        if isinstance(cause, json.JSONDecodeError)
        else str(error)
    )


def _read_parquet(path: Path, columns: _Columns, text: TextFormat) -> Iterator[Row]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            _check_columns(path, schema.names, columns.required)
            batches = file.iter_batches(_PARQUET_BATCH, columns=columns.of(schema.names))
            yield from _read_batches(path, batches, _schema_names(schema))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a Parquet file, or is truncated: {error}") from error


def _read_batches(
    path: Path, batches: Iterable[pyarrow.RecordBatch], named: Mapping[str, Sequence[str]]
) -> Iterator[Row]:
    done = 0
    for batch in batches:
        for number, values in enumerate(batch.to_pylist(), done + 1):
            yield Row(_with_names(values, named), Place(str(path), number, "row"))
        done += len(batch)


def _schema_names(schema: pyarrow.Schema) -> dict[str, list[str]]:
    """Returns the class names by column that `datasets` wrote to a schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {column: names for column, feature in features.items() if (names := _names_of(feature))}


def _check_saved(path: Path) -> None:
    """Checks that a folder is one split that `save_to_disk` wrote.

    Raises:
        FileNotFoundError: it is not; UserError: it has several splits.
    """
    if (path / "dataset_dict.json").is_file():
        splits = " or ".join(str(path / name) for name in read_json(path / "dataset_dict.json")["splits"])
        raise UserError(f"{path} holds several splits; name one of them: {splits}")
    if not (path / "state.json").is_file():
        raise FileNotFoundError(
            f"no data at {path}: it is a folder, and none that save_to_disk of datasets wrote"
        )


def _read_saved(path: Path, columns: _Columns) -> Iterator[Row]:
    """Yields the rows of a folder that `save_to_disk` wrote."""
    state = read_json(path / "state.json")
    if state.get("_indices_data_files"):
        raise UserError(f"{path} was saved with indices; call flatten_indices() and save it again")

    def batches() -> Iterator[pyarrow.RecordBatch]:
        for each in state["_data_files"]:
            with pyarrow.OSFile(str(path / each["filename"])) as file:
                for batch in pyarrow.ipc.open_stream(file):
                    names = columns.of(batch.schema.names)
                    for start in range(0, len(batch), _PARQUET_BATCH):
                        yield batch.select(names).slice(start, _PARQUET_BATCH)

    try:
        first = path / state["_data_files"][0]["filename"]
        with pyarrow.OSFile(str(first)) as file:
            schema = pyarrow.ipc.open_stream(file).schema
        _check_columns(path, schema.names, columns.required)
        yield from _read_batches(path, batches(), _schema_names(schema))
    except (pyarrow.ArrowException, OSError, LookupError) as error:
        raise UserError(f"{path} is not a data set that save_to_disk wrote, or is broken: {error}") from error


def _read_conll(path: Path, columns: _Columns, text: TextFormat) -> Iterator[Row | BadRowError]:
    _check_columns(path, ("words", "labels"), columns.required)
    least = 2 if "labels" in columns.required or not columns.required else 1
    lines: list[tuple[int, str]] = []
    for number, line in chain(_lines(path, text), [(0, "")]):
        if not line.strip():
            if sentence := _without_comments(lines, least):
                yield _sentence(path, sentence, least, text)
            lines = []
        elif _fields(line)[0].split()[:1] != ["-DOCSTART-"]:
            lines.append((number, line))


def _fields(line: str) -> list[str]:
    return line.rstrip("\r\n").split("\t") if "\t" in line else line.split()


def _without_comments(lines: list[tuple[int, str]], least: int) -> list[tuple[int, str]]:
    """Returns the lines of a sentence's words.

    Lines in front of them that start with # are comments, unless they have as many fields as the words: then
    # is a word.
    """
    comments = list(takewhile(lambda item: item[1].startswith("#"), lines))
    words = lines[len(comments) :]
    form = _form(words[0][1]) if words else (any("\t" in line for _, line in lines), least)
    return [item for item in comments if form == _form(item[1]) and form[1] >= least] + words


def _form(line: str) -> tuple[bool, int]:
    """Returns whether tabs separate the fields, and how many there are."""
    return "\t" in line, len(_fields(line))


def _sentence(
    path: Path, lines: Sequence[tuple[int, str]], least: int, text: TextFormat
) -> Row | BadRowError:
    fields = [_fields(line) for _, line in lines]
    words_only = least == 1 and all(len(parts) == 1 for parts in fields)
    for (number, line), parts in zip(lines, fields, strict=True):
        if fault := _encoding_fault(line, text) or (None if words_only else _word_fault(line, parts)):
            return BadRowError(Place(str(path), number), fault)
    place = Place(str(path), lines[0][0])
    if all(len(parts) == _CONLLU and parts[0][:1].isdigit() for parts in fields):
        return BadRowError(
            place,
            f"the lines have the {_CONLLU} columns of CoNLL-U, which count the words first; expected the "
            "word first and its tag last",
        )
    values = {"words": [parts[0] for parts in fields]}
    return Row(values if words_only else values | {"labels": [parts[-1] for parts in fields]}, place)


def _word_fault(line: str, parts: Sequence[str]) -> str | None:
    if len(parts) < 2 or not parts[0].strip() or not parts[-1].strip():
        return f"expected a word and its tag, separated by a tab or by spaces, got {line.rstrip()!r:.60}"
    return None


_READERS: dict[str, Callable[[Path, _Columns, TextFormat], Iterator[Row | BadRowError]]] = {
    "csv": partial(_read_delimited, delimiter=","),
    "tsv": partial(_read_delimited, delimiter="\t"),
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "conll": _read_conll,
}
