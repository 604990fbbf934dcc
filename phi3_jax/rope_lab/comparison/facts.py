"""Questions about facts that are hidden in real text, as part of a comparison of ropes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from phi3_jax.errors import UserError
from phi3_jax.evaluation.perplexity import TextLoss
from phi3_jax.evaluation.scorer import Scores
from phi3_jax.rope_lab.objectives.needles import NeedleTexts
from phi3_jax.rope_lab.objectives.objectives import Sample
from phi3_jax.tokenizer import Phi3Tokenizer


class FactText(NamedTuple):
    """A text of `length` tokens with hidden facts, the `number`-th of a comparison."""

    length: int
    facts: int
    number: int


class FactCell(NamedTuple):
    """The answers of one rope to questions about facts in texts of one length."""

    rope: str
    length: int
    loss: TextLoss
    """Of the answers' tokens."""
    found: int
    """Answers of which each token is the most likely one."""
    asked: int


@dataclass(frozen=True)
class FactTexts:
    """The texts of a comparison: `count` of each length, which follow each other in the text.

    Args:
        text: tokens without special ones.
        facts: facts of each text; 0: there are no texts.

    Raises:
        UserError: the text is too short.
    """

    tokenizer: Phi3Tokenizer
    text: Int[np.ndarray, " T"]
    lengths: Sequence[int]
    facts: int
    count: int

    def __post_init__(self) -> None:
        needed = self.count * max(self.lengths)
        if self.facts and len(self.text) < needed:
            raise UserError(
                f"{self.count} texts of {max(self.lengths):,} tokens with hidden facts need {needed:,}, and "
                f"the text has {len(self.text):,}; give a longer text or fewer"
            )
        for length in self.lengths if self.facts else ():
            self.sample(FactText(length, self.facts, 0))

    def at(self, length: int) -> list[FactText]:
        """Returns the texts of a length."""
        return [FactText(length, self.facts, number) for number in range(self.count)] if self.facts else []

    def sample(self, text: FactText) -> Sample:
        """Returns the tokens of a text, of which those of answers are scored."""
        start = text.number * text.length
        make = NeedleTexts(self.tokenizer, text.facts)
        return make(self.text[start : start + text.length], text.length, text.number)


def answers_found(sample: Sample, scores: Scores) -> tuple[float, int]:
    """Returns the loss of the answers' tokens, and how many answers are the most likely ones.

    Args:
        scores: of one row, from the first scored token of the sample on.
    """
    scored = sample.scored[sample.scored_from :]
    answer = np.cumsum(np.diff(scored, prepend=False) & scored)[scored]  # the number of each token's answer
    greedy = scores.greedy[0][scored]
    wrong = len(set(answer[~greedy].tolist()))
    return float(scores.losses[0][scored].sum(dtype=np.float64)), int(answer[-1]) - wrong
