"""Options from which a command makes its objective, and another one of held-out text."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from phi3_jax.errors import UserError
from phi3_jax.rope_lab.objectives.needles import NEEDLES, needle_objective
from phi3_jax.rope_lab.objectives.objectives import RopeObjective, perplexity_objective
from phi3_jax.tokenizer import Phi3Tokenizer

Kind = Literal["needle", "perplexity"]


@dataclass(frozen=True)
class ObjectiveOptions:
    """What an objective is made of, with a text and a tokenizer.

    Args:
        kind: "needle" scores the answers to questions about hidden facts, "perplexity" every token.
        lengths: the tokens of the samples.
        weights: the weight of each length; None: equal.
        samples: how many samples of each length.
        needles: how many facts a sample has; perplexity has none.
        seed: the seed of the facts.
        skip_tokens: tokens to leave out at the start of the text.
        held_out: how many samples of each length are held out, at the end of the text.

    Raises:
        UserError: there is no such kind, or a number is too small.
    """

    kind: Kind
    lengths: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    samples: int = 1
    needles: int = NEEDLES
    seed: int = 0
    skip_tokens: int = 0
    held_out: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("needle", "perplexity"):
            raise UserError(f"objective {self.kind!r} must be needle or perplexity")
        for name, value, least in (
            ("samples", self.samples, 1),
            ("skip_tokens", self.skip_tokens, 0),
            ("held_out", self.held_out, 0),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise UserError(f"{name}={value} must be at least {least}")

    def make(
        self, tokenizer: Phi3Tokenizer, text: str, source: str
    ) -> tuple[RopeObjective, RopeObjective | None]:
        """Returns the objective of a text, and that of the held-out text at its end, if any is asked for.

        The two share no token of the text, and their needles differ.

        Args:
            source: the text's name, for errors.

        Raises:
            UserError: the text is too short.
        """
        # Needles stand between pieces of text, where special tokens of a whole text would be wrong.
        special = self.kind == "perplexity"
        tokens = np.asarray(tokenizer.encode(text, add_special_tokens=special), np.int32)
        kept = self.held_out * max(self.lengths)
        needed = self.skip_tokens + self.samples * max(self.lengths) + kept
        if self.held_out and len(tokens) < needed:
            raise UserError(
                f"{source} has {len(tokens):,} tokens; {self.skip_tokens:,} that are skipped, {self.samples} "
                f"samples and {self.held_out} held out, of {max(self.lengths):,} each, need {needed:,}: give "
                "a longer text, a shorter length or fewer samples"
            )
        end = max(len(tokens) - kept, 0)
        objective = self._make(tokenizer, tokens[:end], self.samples, self.seed, self.skip_tokens, source)
        if not self.held_out:
            return objective, None
        return objective, self._make(tokenizer, tokens[end:], self.held_out, self.seed + 1, 0, source)

    def _make(
        self,
        tokenizer: Phi3Tokenizer,
        tokens: Int[np.ndarray, " T"],
        samples: int,
        seed: int,
        skip: int,
        source: str,
    ) -> RopeObjective:
        if self.kind == "perplexity":
            return perplexity_objective(tokens, self.lengths, self.weights, samples, skip, source)
        return needle_objective(
            tokenizer, tokens, self.lengths, self.weights, self.needles, samples, seed, skip, source
        )
