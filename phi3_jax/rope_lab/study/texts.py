"""The text of a study: its parts, and the examples that are cut from them."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from phi3_jax.errors import UserError
from phi3_jax.evaluation.texts import read_text, text_digest
from phi3_jax.rope_lab.study.retrieval import TrainingPrompts
from phi3_jax.storage.outputs import replacing, write_text
from phi3_jax.storage.targets import Target, target_in

SHORTEST_PERIOD = 4
"""The least tokens of a random sequence that is repeated; to copy from so near is learnt first."""

NAMES = ("train.txt", "validation.txt", "test.txt")


@dataclass(frozen=True)
class TextParts:
    """The parts of a text, one after the other."""

    train: str
    validation: str
    test: str
    digest: str
    """Identifies the text and its parts."""

    def write(self, folder: Target) -> None:
        """Writes a file for each part."""
        for name, part in zip(NAMES, (self.train, self.validation, self.test), strict=True):
            write_text(target_in(folder, name), part)


def divide(path: Path, validation_share: float, test_share: float) -> TextParts:
    """Divides a text into training, validation and test, at starts of lines.

    Raises:
        FileNotFoundError: there is no such file. UserError: it is no text, or a part would be empty.
    """
    text = read_text(path)
    ends = [1 - validation_share - test_share, 1 - test_share]
    first, second = (text.rfind("\n", 0, math.ceil(len(text) * end)) + 1 for end in ends)
    parts = text[:first], text[first:second], text[second:]
    if not all(part.strip() for part in parts):
        raise UserError(
            f"{path} has too few lines for its parts; give a longer text, or larger shares for validation "
            "and test"
        )
    return TextParts(*parts, text_digest(f"{text_digest(text)} {first} {second}"))


def windows(ids: Sequence[int], length: int, draws: np.random.Generator) -> Iterator[list[int]]:
    """Yields windows of `length` tokens without end: one pass over the text after the other.

    Each pass starts at another place within the first window, so that the windows of passes differ.
    """
    last = len(ids) - length  # the start of the last window
    while True:
        first = int(draws.integers(min(length, last + 1)))
        for start in range(first, last + 1, length):
            yield list(ids[start : start + length])


@dataclass(frozen=True)
class Mixture:
    """The examples of a training run: windows of a text, retrieval tasks and repetitions."""

    tokens: int
    """Tokens of all examples together."""
    length: int
    """Tokens of a window."""
    short_length: int = 0
    short_share: float = 0.0
    """Share of the tokens that are in windows of `short_length`."""
    retrieval_share: float = 0.0
    retrieval_lengths: tuple[int, int] = (0, 0)
    """The shortest and the longest retrieval task, in tokens."""
    repetition_share: float = 0.0
    """Share of the tokens that are random sequences, repeated to windows of `length` tokens."""
    vocab_size: int = 0
    """Random sequences have ids from 1 to below this."""

    def examples(
        self, ids: Sequence[int], prompts: TrainingPrompts, draws: np.random.Generator
    ) -> Iterator[list[int]]:
        """Yields the ids of all examples."""
        long_share = 1 - self.short_share - self.retrieval_share - self.repetition_share
        for share, length in ((long_share, self.length), (self.short_share, self.short_length)):
            if count := round(self.tokens * share / length) if share else 0:
                yield from islice(windows(ids, length, draws), count)
        shortest, longest = self.retrieval_lengths
        left, number = self.tokens * self.retrieval_share, 0
        while left > 0:
            example = prompts(int(draws.integers(shortest, longest + 1)), float(draws.random()), number)
            yield example
            left, number = left - len(example), number + 1
        for _ in range(round(self.tokens * self.repetition_share / self.length)):
            period = round(SHORTEST_PERIOD * (self.length / 2 / SHORTEST_PERIOD) ** draws.random())
            yield np.resize(draws.integers(1, self.vocab_size, period), self.length).tolist()


def check_tokens(name: str, tokens: int, length: int, count: int = 1) -> None:
    """Checks that a part of the text has enough tokens.

    Raises:
        UserError: it has not.
    """
    if tokens < count * length:
        raise UserError(
            f"the {name} part of the text has {tokens:,} tokens, and {count} window{'s' * (count > 1)} of "
            f"{length:,} need {count * length:,}; give a longer text, a larger share or shorter lengths"
        )


def write_examples(target: Target, examples: Iterable[Sequence[int]]) -> None:
    """Writes a JSONL file of token ids."""
    with replacing(target) as work, work.open("w", encoding="utf-8") as file:
        for ids in examples:
            file.write(json.dumps({"input_ids": list(ids)}, separators=(",", ":")) + "\n")
