"""Texts to measure on: files as tokens."""

from pathlib import Path

import numpy as np
from jaxtyping import Int

from phi3_jax.errors import UserError
from phi3_jax.tokenizer import Phi3Tokenizer

CHARACTERS = 8
"""A token, that are read at first where only the beginning of a text is wanted."""

MARGIN = 64
"""Tokens before a cut through the text that may be others than those of the whole text."""


def read_text(path: Path) -> str:
    """A UTF-8 file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else, or empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise UserError(f"{path} has no text")
    return text


def first_tokens(tokenizer: Phi3Tokenizer, text: str, count: int | None) -> Int[np.ndarray, " T"]:
    """The first `count` tokens of a text, or all where it has fewer; the rest of it is not looked at.

    None: all of them.
    """
    if count is None:
        return np.asarray(tokenizer.encode(text), np.int32)
    part = text[: CHARACTERS * (count + MARGIN)]
    ids = tokenizer.encode(part)
    if len(ids) < count + MARGIN and len(part) < len(text):
        ids = tokenizer.encode(text)
    return np.asarray(ids[:count], np.int32)
