"""Limits how much a tokenizer.json may lengthen a text before it splits it, or decoded text afterwards."""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from typing import Any

from phi3_jax.errors import UserError

MOST = 64
"""Characters for one; Unicode's own normal forms make up to 18 of one."""


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
        return _longest_replacement(str(step.get("precompiled_charsmap", "")))
    return 1.0


def _may_match_nothing(expression: str) -> bool:
    """Whether a regular expression may match between two characters, and so add to each."""
    if any(part in expression for part in ("(?=", "(?!", "(?<", "^", "$", "\\b", "\\B", "\\A", "\\G", "\\z")):
        return True
    try:
        return re.match(expression, "") is not None
    except re.error:  # the library's expressions know more than Python's
        return True


def _longest_replacement(charsmap: str) -> float:
    """Returns the length of the longest text in SentencePiece's map: a table, and texts that end with 0."""
    try:
        content = base64.b64decode(charsmap)
    except (binascii.Error, ValueError):
        return 1.0  # the library refuses it
    texts = content[4 + int.from_bytes(content[:4], "little") :]
    return max(1.0, *(len(text.decode("utf-8", "replace")) for text in texts.split(b"\0")))
