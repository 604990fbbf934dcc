"""Reads rows of text files, one by one: CSV, TSV, JSONL and CoNLL."""

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from phi3_jax.data.rows import BadRowError, Columns, Place, Row, TextFormat, check_columns
from phi3_jax.errors import UserError
from phi3_jax.runs.text import lone_surrogate, parse_json

_LONGEST_FIELD = 2**24
_CONLLU = 10
_DOCUMENT = "-DOCSTART-"


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


def read_delimited(
    path: Path, columns: Columns, text: TextFormat, *, delimiter: str
) -> Iterator[Row | BadRowError]:
    """Yields the rows of a CSV or TSV file, and the errors of bad ones."""
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
    check_columns(path, header, columns.required)
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


def read_jsonl(path: Path, columns: Columns, text: TextFormat) -> Iterator[Row | BadRowError]:
    """Yields the objects of a file that has one a line, and the errors of bad lines."""
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


def read_conll(path: Path, columns: Columns, text: TextFormat) -> Iterator[Row | BadRowError]:
    """Yields the sentences of a file, and the errors of bad ones."""
    check_columns(path, ("words", "labels"), columns.required)
    least = 2 if "labels" in columns.required or not columns.required else 1
    lines: list[tuple[int, str]] = []
    for number, line in chain(_lines(path, text), [(0, "")]):
        if not line.strip():
            if sentence := _without_comments(lines, least):
                yield _sentence(path, sentence, least, text)
            lines = []
        elif _DOCUMENT not in line or _fields(line)[0].split()[:1] != [_DOCUMENT]:
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
    decoded = _encoding_fault("".join(line for _, line in lines), text) is None
    for (number, line), parts in zip(lines, fields, strict=True):
        if fault := (None if decoded else _encoding_fault(line, text)) or (
            None if words_only else _word_fault(line, parts)
        ):
            return BadRowError(Place(str(path), number), fault, {"words": [parts[0] for parts in fields]})
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
