"""Factors as a line through a few knots, for optimizers that suit a few numbers."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from phi3_jax.errors import UserError
from phi3_jax.rope_lab.search.space import Individual, Space

ATTENTION_UNIT = 0.15
"""The change of the attention factor that counts as much as a whole range of factors."""


@dataclass(frozen=True)
class Curve:
    """Individuals as numbers from 0 to 1: the growth from knot to knot, and the attention factor.

    The line goes through the logarithms of factors by pair: from 0 at pair 0 through knots that are evenly
    apart within `space.knot_ends`; after the last it is constant.

    Args:
        space: without choices of unscaled tokens, which are no numbers to move.
        pairs: pairs of rotary dims.
        knots: how many there are.

    Raises:
        UserError: there are more knots than pairs, or choices of unscaled tokens.
    """

    space: Space
    pairs: int
    knots: int

    def __post_init__(self) -> None:
        if self.knots > self.pairs:
            raise UserError(f"knots={self.knots} must be at most the {self.pairs} pairs of dims")
        if len(self.space.initial_tokens) > 1:
            raise UserError("only the evolution can choose initial_tokens; use it, or no initial tokens")

    @property
    def size(self) -> int:
        """How many numbers an individual has."""
        least, greatest = self.space.attention_factors
        return self.knots + (least < greatest)

    @property
    def bounds(self) -> Float[np.ndarray, "N 2"]:
        """The least and the greatest of each number."""
        least, greatest = (each / ATTENTION_UNIT for each in self.space.attention_factors)
        limits = [(0.0, 1.0)] * self.knots + [(least, greatest)] * (self.size - self.knots)
        return np.array(limits)

    def numbers(self, individual: Individual) -> Float[np.ndarray, " N"]:
        """Returns the numbers of the nearest line."""
        heights = np.interp(self._knots, np.arange(self.pairs), np.log(individual.factors)) / self._range
        growth = np.diff(heights, prepend=0.0)
        attention = [individual.attention_factor / ATTENTION_UNIT] * (self.size - self.knots)
        return np.clip([*growth, *attention], *self.bounds.T)

    def individual(self, numbers: Float[np.ndarray, " N"]) -> Individual:
        """Returns the individual with these numbers; beyond the greatest factor the line is constant."""
        heights = np.cumsum(np.maximum(numbers[: self.knots], 0)) * self._range
        line = np.interp(np.arange(self.pairs), [0.0, *self._knots], [0.0, *heights])
        attention = self.space.attention_factors[0]
        if self.size > self.knots:
            attention = self.space.within(round(float(numbers[-1]) * ATTENTION_UNIT, 4))
        return Individual(self.space.drawn(line), 0, attention)

    @cached_property
    def _knots(self) -> Float[np.ndarray, " knots"]:
        first, last = self.space.knot_ends or (1, self.pairs - 1)
        return np.linspace(max(first, 0.5), min(last, self.pairs - 1), self.knots)

    @property
    def _range(self) -> float:
        return math.log(self.space.bound)
