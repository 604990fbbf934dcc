"""The pass key task (Mohtashami and Jaggi, arXiv:2305.16300): a long text hides a number and asks for it.

Prompts have an exact number of tokens and are the same for every rope.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from phi3_jax.errors import UserError
from phi3_jax.tokenizer import Phi3Tokenizer

TASK = "One line of the text below holds a pass key. Read the text and remember the pass key.\n\n"
KEY = "The pass key is {key}. Remember it: {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key?"
ANSWER_START = "\nThe pass key is"
"""The start of the answer, in prompts without a chat template."""

FILLER = (
    "The kettle was put on the stove before anyone came down.",
    "A grey cat slept on the wall in the sun.",
    "Somebody had left the gate open again.",
    "The road goes along the river and over the bridge.",
    "In the garden the pears were nearly ripe.",
    "Rain fell in the hills, and the valley stayed dry.",
    "The baker closes early when the fair is in town.",
    "A boat lay on the sand with its oars beside it.",
    "They talked about the weather and then about nothing.",
    "The clock in the hall is always a little slow.",
    "Two boys carried a ladder past the window.",
    "Snow stays longest on the north side of the roof.",
    "The letters were tied with a blue ribbon.",
    "At the market they sell apples, rope and candles.",
    "The old dog knew the way home by itself.",
    "Wind moved the curtains, and the lamp went out.",
    "The train was late, so we walked to the next village.",
    "Nobody remembered who had planted the oak.",
    "The soup needs salt, and the bread is still warm.",
    "Behind the mill the path turns towards the wood.",
)
"""Lines without numbers."""

KEYS = (10_000, 100_000)
"""The range of keys, which have five digits."""

_SLOT = "\ue000text\ue000"
"""Marks the place of the text in a rendered conversation; its characters are for private use."""

_NUMBER = re.compile(r"\d+(?:,\d{3})*")


class Case(NamedTuple):
    """A prompt and answer of `length` tokens, with the key at `depth` (0: first line, 1: last line)."""

    length: int
    depth: float
    trial: int


@dataclass(frozen=True)
class PasskeyPrompt:
    """The ids of a prompt, and its key."""

    ids: list[int]
    key: str


@dataclass(frozen=True)
class PasskeyPrompts:
    """Makes prompts for a tokenizer.

    The lines of the filler repeat from a line drawn for each case. The first line is cut from the left so
    that the prompt has its exact length.

    Args:
        answer_tokens: tokens of the answer, which count as part of a case's length.
        template: put the task into a user's message of the chat template; otherwise the prompt ends with the
            start of the answer.
        filler: lines of text.
        seed: seed of the keys and first lines.
    """

    tokenizer: Phi3Tokenizer
    answer_tokens: int
    template: bool
    filler: Sequence[str] = FILLER
    seed: int = 0

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """The ids before the text and after it."""
        encode = self.tokenizer.encode
        if not self.template:
            return encode(TASK), encode(QUESTION + ANSWER_START, add_special_tokens=False)
        conversation = [{"role": "user", "content": TASK + _SLOT + QUESTION}]
        text = self.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        before, slot, after = text.partition(_SLOT)
        if not slot:
            raise UserError("the chat template leaves out the user's message; use --raw")
        return encode(before, add_special_tokens=False), encode(after, add_special_tokens=False)

    @cached_property
    def lines(self) -> list[list[int]]:
        """The ids of each line of the filler."""
        lines = (line.strip() for line in self.filler)
        ids = [self.tokenizer.encode(line + "\n", add_special_tokens=False) for line in lines if line]
        if not ids:
            raise UserError("the text for the filler is empty")
        return ids

    @cached_property
    def shortest(self) -> int:
        """The least length with room for question, key, answer and some filler."""
        before, after = self.frame
        longest_key = max(len(self._key_line(str(key))) for key in (KEYS[0], KEYS[1] - 1, 77_777))
        return len(before) + longest_key + len(after) + 1 + self.answer_tokens

    def check(self, lengths: Sequence[int]) -> None:
        """Checks that prompts of these lengths can be made.

        Raises:
            UserError: a length has no room for question, key and answer.
        """
        for length in lengths:
            if length < self.shortest:
                raise UserError(
                    f"length {length} is too short: question, pass key and {self.answer_tokens} tokens of "
                    f"answer need {self.shortest}"
                )

    def __call__(self, case: Case) -> PasskeyPrompt:
        """Returns the prompt of a case: `case.length` tokens without those of the answer."""
        draws = np.random.default_rng([self.seed, case.length, round(1e6 * case.depth), case.trial])
        key = str(draws.integers(*KEYS))
        first = int(draws.integers(len(self.lines)))
        before, after = self.frame
        needle = self._key_line(key)
        room = case.length - self.answer_tokens - len(before) - len(needle) - len(after)
        text, ends = self._filler(first, room)
        at = min([0, *ends], key=lambda end: abs(end - case.depth * room))
        return PasskeyPrompt([*before, *text[:at], *needle, *text[at:], *after], key)

    def _key_line(self, key: str) -> list[int]:
        return self.tokenizer.encode(KEY.format(key=key), add_special_tokens=False)

    def _filler(self, first: int, room: int) -> tuple[list[int], list[int]]:
        """Returns `room` tokens of lines that start after line `first`, and the end of each line."""
        text: list[int] = []
        ends: list[int] = []
        while len(text) < room:
            text += self.lines[(first + len(ends)) % len(self.lines)]
            ends.append(len(text))
        excess = len(text) - room
        return text[excess:], [end - excess for end in ends if end > excess]


def has_key(answer: str, key: str) -> bool:
    """Returns whether the key is the first number of the answer."""
    number = _NUMBER.search(answer)
    return number is not None and number.group().replace(",", "") == key
