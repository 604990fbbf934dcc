"""Limits what a tokenizer's files may ask for: the ids, and how much longer a text may become."""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from typing import Any

from phi3_jax.errors import UserError
from phi3_jax.runs.text import parse_json

MOST = 64
"""Characters for one; Unicode's own normal forms make up to 18 of one."""


MOST_IDS = 10**7
"""The ids that a vocabulary may have; the largest ones have 262,144."""

_LARGE_NUMBER = re.compile(rb":\s*[0-9]{8}")


def check_ids(name: str, content: bytes) -> None:
    """Checks the ids of a tokenizer.json, since the library makes room for all up to the largest.

    Raises:
        UserError: an id is too large.
    """
    if _LARGE_NUMBER.search(content) is None:  # as in nearly all files, which need not be parsed twice
        return
    values = parse_json(content, name)
    model = values.get("model") if isinstance(values, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    added = values.get("added_tokens") if isinstance(values, dict) else None
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict):
            ids[str(token.get("content"))] = token.get("id")
    for token, number in ids.items():
        if isinstance(number, int) and number >= MOST_IDS:
            raise UserError(
                f"{name}: the token {token!r:.60} has the id {number}; ids below {MOST_IDS:,} are read"
            )


def check_growth(name: str, sections: Mapping[str, Any]) -> None:
    """Checks the sections `normalizer`, `pre_tokenizer` and `decoder` of a tokenizer.json.

    A few steps that replace a letter by a long text, or by two of it many times, would fill the memory.

    Raises:
        UserError: they may make more than `MOST` characters of one.
    """
    for section, content in sections.items():
        growth = 1.0
        for step in _steps(content):
            growth *= _growth(step)
            if growth > MOST:
                raise UserError(
                    f"{name}: its {section} may make {growth:,.0f} characters of one (step "
                    f"{step.get('type')!r:.40}); at most {MOST} are accepted"
                )


def check_model_growth(name: str, content: bytes) -> None:
    """Checks the map of texts in a SentencePiece model, `normalizer_spec.precompiled_charsmap`.

    Raises:
        UserError: it may make more than `MOST` characters of one.
    """
    for field, spec in _fields(content):
        if field == _NORMALIZER:
            maps = [charsmap for inner, charsmap in _fields(spec) if inner == _CHARSMAP]
            if maps and (growth := _longest_replacement(maps[-1])) > MOST:
                raise UserError(
                    f"{name}: its map of characters may make {growth:,.0f} characters of one; at most {MOST} "
                    "are accepted"
                )


_NORMALIZER, _CHARSMAP = 3, 2  # numbers of fields in sentencepiece_model.proto


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the number and the bytes of each field of a Protocol Buffers message that has a length."""
    at = 0
    while at < len(message):
        key, at = _number(message, at)
        kind = key & 7
        if kind == 2:
            length, at = _number(message, at)
            yield key >> 3, message[at : at + length]
            at += length
        elif kind == 0:
            _, at = _number(message, at)
        else:
            at += {1: 8, 5: 4}.get(kind, len(message))


def _number(message: bytes, at: int) -> tuple[int, int]:
    """Returns the number of seven bits a byte at an offset, and the offset after it."""
    value = shift = 0
    while at < len(message):
        byte, at = message[at], at + 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    return value, at


def _steps(section: Any) -> Iterator[Mapping[str, Any]]:
    """Yields the steps of a section, those of sequences one by one."""
    pending = [section]
    while pending:
        step = pending.pop()
        if not isinstance(step, Mapping):
            continue
        inner = [step.get(key) for key in ("normalizers", "pretokenizers", "decoders")]
        pending += [each for steps in inner if isinstance(steps, list) for each in reversed(steps)]
        yield step


def _growth(step: Mapping[str, Any]) -> float:
    """Returns the most characters that a step makes of one, at the least 1."""
    kind, content = step.get("type"), step.get("content")
    if kind == "Replace" and isinstance(content, str):
        pattern = step.get("pattern")
        pattern = pattern if isinstance(pattern, Mapping) else {}
        if text := pattern.get("String"):
            return max(1.0, len(content) / len(text))
        nothing = _may_match_nothing(str(pattern.get("Regex", "")))
        return 1.0 + len(content) if nothing else max(1.0, len(content))
    if kind == "Prepend":
        return 1.0 + len(str(step.get("prepend", "")))
    if kind == "Precompiled":
        try:
            charsmap = base64.b64decode(str(step.get("precompiled_charsmap", "")))
        except (binascii.Error, ValueError):
            return 1.0  # the library refuses it
        return _longest_replacement(charsmap)
    return 1.0


def _may_match_nothing(expression: str) -> bool:
    """Whether a regular expression may match between two characters, and so add to each."""
    if any(part in expression for part in ("(?=", "(?!", "(?<", "^", "$", "\\b", "\\B", "\\A", "\\G", "\\z")):
        return True
    try:
        return re.match(expression, "") is not None
    except re.error:  # the library's expressions know more than Python's
        return True


def _longest_replacement(charsmap: bytes) -> float:
    """Returns the length of the longest text in SentencePiece's map: a table, and texts that end with 0."""
    texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
    return max(1.0, *(len(text.decode("utf-8", "replace")) for text in texts.split(b"\0")))
