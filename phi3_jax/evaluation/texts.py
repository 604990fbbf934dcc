"""Texts for measurements: files as tokens."""

import hashlib
import math
from pathlib import Path

import numpy as np
from jaxtyping import Int

from phi3_jax.errors import UserError
from phi3_jax.tokenizer import Phi3Tokenizer

SAMPLE = 2048
"""Characters that are tokenized first, to estimate how many characters a token has."""

MARGIN = 64
"""Tokens before a cut in the text that may differ from those of the whole text."""


def read_text(path: Path) -> str:
    """Reads a UTF-8 file.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is not UTF-8 text, or empty.
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


def text_digest(text: str) -> str:
    """Returns a digest that identifies a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def first_tokens(tokenizer: Phi3Tokenizer, text: str, count: int | None) -> Int[np.ndarray, " T"]:
    """Returns the first `count` tokens of a text, or all if there are fewer or `count` is None.

    Only a part of a long text is tokenized. Its size follows from a sample, with a factor of two in reserve;
    the whole text is tokenized only if the part has too few tokens.
    """
    if count is None or len(text) <= SAMPLE:
        return np.asarray(tokenizer.encode(text)[:count], np.int32)
    sampled = max(1, len(tokenizer.encode(text[:SAMPLE])))
    part = text[: math.ceil(2 * SAMPLE / sampled * (count + MARGIN))]
    ids = tokenizer.encode(part)
    if len(ids) < count + MARGIN and len(part) < len(text):
        ids = tokenizer.encode(text)
    return np.asarray(ids[:count], np.int32)
