"""Needles in real text: facts are hidden in it, and questions at its end ask for them.

Only the answers are scored. LongRoPE2 (arXiv:2502.20082, section 3.2) chooses rope factors by the perplexity
of such answers, since most tokens of a text are predicted from the few before them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int

from phi3_jax.errors import UserError
from phi3_jax.rope_lab.objectives.objectives import RopeObjective, Sample, by_length, spread
from phi3_jax.tokenizer import Phi3Tokenizer

FACT = "\nThe number of the {key} is {value}.\n"
QUESTION = "\nWhat is the number of the {key}? The number of the {key} is "

COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "grey")
THINGS = (
    *("anchor", "barrel", "basket", "bell", "bicycle", "boat", "bridge", "candle", "carpet", "chair"),
    *("clock", "cupboard", "curtain", "door", "drum", "engine", "feather", "flag", "hammer", "kettle"),
    *("ladder", "lamp", "lantern", "mirror", "needle", "oven", "pencil", "piano", "ribbon", "saddle"),
    *("shovel", "table", "tower", "train", "trumpet", "tunnel", "umbrella", "violin", "wagon", "window"),
)
KEYS = len(COLOURS) * len(THINGS)
"""How many keys there are, each a colour and a thing."""

VALUES = (10_000, 100_000)
"""The range of values, which have five digits."""

NEEDLES = 16
"""The default number of needles in a text."""

SEARCHED = 64
"""Tokens after a needle's depth among which the end of a sentence is looked for."""


@dataclass(frozen=True)
class NeedleTexts:
    """Hides needles in texts, and asks for each of them in another order.

    Args:
        tokenizer: the model's.
        needles: how many facts a text has. Each of as many equal parts of the text has one, at a random
            depth, at the end of a sentence if one is near.
        seed: the seed of keys, values, depths and order.
    """

    tokenizer: Phi3Tokenizer
    needles: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.needles <= KEYS:
            raise UserError(f"needles={self.needles} must be from 1 to {KEYS}")

    def __call__(self, text: Int[np.ndarray, " T"], length: int, number: int) -> Sample:
        """Returns a text of exactly `length` tokens with its questions.

        Args:
            text: tokens without special ones, at least `length`.
            number: texts with different numbers have different needles.

        Raises:
            UserError: the length has no room for facts, questions and at least as much text.
        """
        draws = np.random.default_rng([self.seed, length, number])
        keys = draws.choice(KEYS, self.needles, replace=False)
        values = draws.integers(*VALUES, self.needles)
        facts = [(self._key(key), str(value)) for key, value in zip(keys, values, strict=True)]
        needles = [self._encode(FACT.format(key=key, value=value)) for key, value in facts]
        questions = [self._question(*facts[n]) for n in draws.permutation(self.needles)]
        begin = self.tokenizer.encode("")  # the special tokens that the model expects
        fixed = len(begin) + sum(map(len, needles)) + sum(len(ids) for ids, _ in questions)
        room = length - fixed
        if room < fixed:
            raise UserError(
                f"{length:,} tokens are too few for {self.needles} needles, whose facts and questions take "
                f"{fixed:,}; at most half of a text can be theirs: use a longer text or fewer needles"
            )
        hay = text[:room]
        depths = (np.arange(self.needles) + draws.random(self.needles)) / self.needles
        ids, before = [*begin], 0
        for depth, needle in zip(depths, needles, strict=True):
            at = max(before, self._sentence_end(hay, int(depth * room)))
            ids += [*hay[before:at].tolist(), *needle]
            before = at
        ids += hay[before:].tolist()
        scored = [False] * len(ids)
        for question, marks in questions:
            ids += question
            scored += marks
        return Sample(np.array(ids, np.int32), np.array(scored))

    def _key(self, number: int) -> str:
        return f"{COLOURS[number % len(COLOURS)]} {THINGS[number // len(COLOURS)]}"

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _question(self, key: str, value: str) -> tuple[list[int], list[bool]]:
        """Returns the ids of a question with its answer, and which of them are the answer's."""
        asked = QUESTION.format(key=key)
        question, whole = self._encode(asked), self._encode(asked + value)
        # One token may have the end of the question and the start of the answer.
        same = [a == b for a, b in zip(question, whole, strict=False)]
        begin = same.index(False) if False in same else len(same)
        full_stop = self._encode(f"{asked}{value}.")[len(whole) :]
        marks = [False] * begin + [True] * (len(whole) - begin) + [False] * len(full_stop)
        return whole + full_stop, marks

    @cached_property
    def _ends(self) -> dict[int, bool]:
        """Whether each token that was looked up ends a sentence."""
        return {}

    def _sentence_end(self, hay: Int[np.ndarray, " T"], depth: int) -> int:
        """Returns the first position after the end of a sentence near a depth, or the depth."""
        for position in range(depth, min(depth + SEARCHED, len(hay))):
            token = int(hay[position])
            if token not in self._ends:
                self._ends[token] = self.tokenizer.decode([token]).endswith((".", "!", "?", "\n"))
            if self._ends[token]:
                return position + 1
        return depth


def needle_objective(
    tokenizer: Phi3Tokenizer,
    text: Int[np.ndarray, " T"],
    lengths: Sequence[int],
    weights: Sequence[float] | None = None,
    needles: int = NEEDLES,
    samples: int = 1,
    seed: int = 0,
    skip: int = 0,
    source: str = "the text",
) -> RopeObjective:
    """Returns the objective of the answers to questions about facts in a text.

    Args:
        text: tokens of real text without special ones.
        lengths: the tokens of a sample, with its facts, questions and answers.
        weights: the weight of each length; default: equal.
        needles: facts of each sample.
        samples: how many samples of each length; their text is spread evenly.
        seed: the seed of needles.
        skip: tokens to leave out at the start of the text.
        source: the text's name, for errors.

    Raises:
        UserError: the text is too short for the samples, or a length for the needles.
    """
    make = NeedleTexts(tokenizer, needles, seed)
    chosen = {}
    for length in lengths:
        starts = spread(len(text), length, samples, skip=skip, source=source)
        chosen[length] = [
            make(text[start : start + length], length, number) for number, start in enumerate(starts)
        ]
    return RopeObjective(chosen, by_length(lengths, weights))
