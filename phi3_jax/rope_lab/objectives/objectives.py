"""Objectives of experiments with ropes: texts whose chosen tokens are scored, at one or more lengths."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from phi3_jax.config.rope_types import RopeBase
from phi3_jax.errors import UserError
from phi3_jax.evaluation.perplexity import TextLoss
from phi3_jax.evaluation.scorer import OnProgress, Scorer

ROWS, ROWS_ON_CPU = 16, 4
"""The most ropes at a time; a CPU gains little from more, and a kill loses more work."""


@dataclass(frozen=True)
class Sample:
    """A text, and which of its tokens count; its first token never does, since nothing predicts it."""

    tokens: Int[np.ndarray, " T"]
    scored: Bool[np.ndarray, " T"]

    def __post_init__(self) -> None:
        if len(self.scored) != len(self.tokens) or not self.scored.any() or self.scored[0]:
            raise ValueError(f"{len(self.tokens)} tokens: some must be scored, and the first must not be")

    @property
    def scored_from(self) -> int:
        """The first token that counts."""
        return int(self.scored.argmax())


class ScoredRope(NamedTuple):
    """A rope as the programs take it, the same for texts of every length."""

    inv_freq: Float[np.ndarray, " P"]
    attention_factor: float
    initial_tokens: int = 0
    """How many first tokens keep the model's unscaled frequencies."""

    @classmethod
    def from_factors(
        cls,
        base: RopeBase,
        factors: Sequence[float],
        attention_factor: float = 1.0,
        initial_tokens: int = 0,
    ) -> "ScoredRope":
        """Returns the rope with these factors on plain rope's wavelengths, computed as longrope does."""
        inv_freq = 1 / (np.asarray(factors, np.float32) * base.tokens_per_radian())
        return cls(inv_freq, attention_factor, initial_tokens)


Losses = Mapping[int, TextLoss]
"""The loss of the scored tokens by length."""


@dataclass(frozen=True)
class RopeObjective:
    """What an experiment minimises: the loss of the scored tokens of some texts, under a rope.

    Args:
        samples: the texts by their length in tokens. Each start of a list is spread over the whole list, so
            that a search can begin with fewer texts (`between`).
        weights: the weight of each length.

    Raises:
        UserError: a weight is not a positive number.
    """

    samples: Mapping[int, Sequence[Sample]]
    weights: Mapping[int, float]

    def __post_init__(self) -> None:
        if not self.samples or self.samples.keys() != self.weights.keys():
            raise ValueError(f"lengths {[*self.samples]} and those of weights {[*self.weights]} must agree")
        for length, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise UserError(f"the weight {weight!r} of length {length} must be a positive number")

    @property
    def longest(self) -> int:
        """The tokens of the longest text."""
        return max(self.samples)

    @property
    def tokens_to_read(self) -> int:
        """The tokens that a model reads for one rope, in which `measure` reports its progress."""
        return sum(len(each.tokens) - 1 for samples in self.samples.values() for each in samples)

    def between(self, begin: int, end: int) -> "RopeObjective":
        """Returns the objective with only the texts [begin, end) of each length.

        Raises:
            ValueError: a length has no such texts.
        """
        fewer = {length: samples[begin:end] for length, samples in self.samples.items()}
        if not all(len(samples) == end - begin > 0 for samples in fewer.values()):
            raise ValueError(f"there are no texts {begin} to {end} of each length")
        return replace(self, samples=fewer)

    def value(self, losses: Losses) -> float:
        """Returns the perplexity: exp of the mean over lengths, by weight, of the mean loss of a token.

        It is infinite if it is too large for a float, and NaN if a loss is.
        """
        total = sum(self.weights.values())
        means = (self.weights[length] * each.loss / each.tokens for length, each in losses.items())
        mean = sum(means) / total
        return math.inf if mean >= 709 else math.exp(mean)

    def check_memory(self, scorer: Scorer, rows: int = 1) -> None:
        """Checks that the caches for `rows` ropes fit in memory.

        Raises:
            UserError: they do not.
        """
        scorer.check_memory(self.longest, rows)

    def rows(self, scorer: Scorer) -> int:
        """Returns how many ropes are measured at a time: as many as fit in memory, at least one."""
        most = ROWS_ON_CPU if scorer.compiled.on_cpu else ROWS
        return next((rows for rows in range(most, 1, -1) if scorer.fits(self.longest, rows)), 1)


def measure(
    scorer: Scorer,
    objective: RopeObjective,
    ropes: Sequence[ScoredRope],
    rows: int,
    progress: OnProgress | None = None,
) -> list[dict[int, TextLoss]]:
    """Returns the losses of each rope by length.

    One program reads `rows` texts at a time, each under its own rope; the first rows are one text under
    different ropes.

    Args:
        progress: called with the tokens that were read since the last call; together they are
            `objective.tokens_to_read` for each rope.
    """
    losses = [dict.fromkeys(objective.samples, TextLoss(0.0, 0)) for _ in ropes]
    for length, samples in objective.samples.items():
        work = [(number, sample) for sample in samples for number in range(len(ropes))]
        for start in range(0, len(work), rows):
            batch = work[start : start + rows]
            chosen = [ropes[number] for number, _ in batch]
            texts = [sample for _, sample in batch]
            for (number, sample), loss in zip(
                batch, _measure_batch(scorer, chosen, texts, rows, progress), strict=True
            ):
                losses[number][length] += TextLoss(loss, int(sample.scored.sum()))
    return losses


def _measure_batch(
    scorer: Scorer,
    ropes: Sequence[ScoredRope],
    texts: Sequence[Sample],
    rows: int,
    progress: OnProgress | None,
) -> list[float]:
    """Returns the summed loss of each text under its rope; padding rows fill the batch."""
    count = len(texts)
    rope_rows = [*ropes, *[ropes[0]] * (rows - count)]
    text_rows = [*texts, *[texts[0]] * (rows - count)]
    scored_from = min(each.scored_from for each in texts)

    def report(tokens: int) -> None:
        if progress is not None:
            progress(tokens // rows * count)

    losses = scorer.score(
        np.stack([each.tokens for each in text_rows]),
        np.stack([each.inv_freq for each in rope_rows]),
        np.array([each.attention_factor for each in rope_rows], np.float32),
        initial_tokens=np.array([each.initial_tokens for each in rope_rows], np.int32),
        scored_from=scored_from,
        progress=report,
    ).losses
    return [
        float(row[text.scored[scored_from:]].sum(dtype=np.float64))
        for row, text in zip(losses, texts, strict=False)
    ]


def perplexity_objective(
    tokens: Int[np.ndarray, " T"],
    lengths: Sequence[int],
    weights: Sequence[float] | None = None,
    windows: int = 1,
    skip: int = 0,
    source: str = "the text",
) -> RopeObjective:
    """Returns the objective of all tokens of windows of a text, which are spread over it evenly.

    Args:
        weights: the weight of each length; default: equal.
        windows: how many windows of each length.
        skip: tokens to leave out at the start of the text.
        source: the text's name, for errors.

    Raises:
        UserError: the text is too short for the windows, which do not overlap.
    """
    samples = {}
    for length in lengths:
        scored = np.arange(length) > 0
        starts = spread(len(tokens), length, windows, skip=skip, source=source)
        samples[length] = [
            Sample(np.asarray(tokens[start : start + length], np.int32), scored) for start in starts
        ]
    return RopeObjective(samples, by_length(lengths, weights))


def by_length(lengths: Sequence[int], weights: Sequence[float] | None) -> dict[int, float]:
    """Returns the weight of each length; by default they are equal.

    Raises:
        UserError: a length occurs twice or is below 2, or there are not as many weights.
    """
    if len(set(lengths)) != len(lengths) or min(lengths) < 2:
        raise UserError(f"lengths {list(lengths)} must differ, and each must be at least 2")
    if weights is not None and len(weights) != len(lengths):
        raise UserError(f"{len(weights)} weights for {len(lengths)} lengths; give one for each")
    return dict(zip(lengths, weights or [1.0] * len(lengths), strict=True))


def spread(tokens: int, length: int, windows: int, *, skip: int = 0, source: str = "the text") -> list[int]:
    """Returns the starts of windows of a text that are as far apart as possible.

    They are in the order of van der Corput's sequence of base 2, so that the first few are spread, too.

    Raises:
        UserError: the text is too short for windows that do not overlap.
    """
    left = tokens - skip
    if left < windows * length:
        after = f" after the {skip:,} that are skipped" if skip else ""
        raise UserError(
            f"{source} has {max(left, 0):,} tokens{after}; {windows} windows of {length:,} need "
            f"{windows * length:,}: give a longer text, a shorter length or fewer windows"
        )
    bits = max(1, (windows - 1).bit_length())
    order = sorted(range(2**bits), key=lambda number: f"{number:0{bits}b}"[::-1])
    return [skip + number * (left // windows) for number in order if number < windows]
