"""Texts as tokens."""

from pathlib import Path

import numpy as np
import pytest
from small_checkpoint import write_checkpoint

from phi3_jax import Phi3Tokenizer
from phi3_jax.evaluation.texts import SAMPLE, first_tokens


class WatchedTokenizer:
    """Keeps the lengths of the texts that it tokenizes, with `characters` characters a token."""

    def __init__(self, characters: int):
        self.characters = characters
        self.lengths: list[int] = []

    def encode(self, text: str) -> list[int]:
        self.lengths.append(len(text))
        return [ord(text[start]) for start in range(0, len(text), self.characters)]


@pytest.mark.parametrize("count", [1, 40, 1000, 10**6, None])
def test_first_tokens_match_those_of_the_whole_text(tmp_path: Path, count: int | None) -> None:
    write_checkpoint(tmp_path)
    tokenizer = Phi3Tokenizer.from_pretrained(tmp_path)
    text = "What is the capital of France? " * 300
    np.testing.assert_array_equal(first_tokens(tokenizer, text, count), tokenizer.encode(text)[:count])


@pytest.mark.parametrize("characters", [1, 5, 30])
def test_tokenizes_a_part_of_a_long_text_once(characters: int) -> None:
    text, tokenizer = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000))) * 5, WatchedTokenizer(characters)
    ids = first_tokens(tokenizer, text, 500)  # type: ignore[arg-type]
    np.testing.assert_array_equal(ids, [ord(text[characters * number]) for number in range(500)])
    sample, part = tokenizer.lengths
    assert sample == SAMPLE
    assert 500 * characters < part < 2.5 * 564 * characters


@pytest.mark.parametrize(("length", "count"), [(SAMPLE, 10), (100_000, None), (100_000, 90_000)])
def test_tokenizes_a_whole_text_once(length: int, count: int | None) -> None:
    tokenizer = WatchedTokenizer(1)
    ids = first_tokens(tokenizer, "x" * length, count)  # type: ignore[arg-type]
    assert len(ids) == (length if count is None else count)
    assert tokenizer.lengths.count(length) == 1
    assert sum(tokenizer.lengths) <= length + SAMPLE
