"""What a search needs of an optimizer, and what it tells it."""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from phi3_jax.rope_lab.search.space import Individual


class Scored(NamedTuple):
    """An individual with its perplexity, which may be infinite, on one stage of a search."""

    individual: Individual
    perplexity: float
    stage: int = 0

    @property
    def rank(self) -> tuple[int, float]:
        """A key to sort by: those that reached later stages come first."""
        return -self.stage, self.perplexity


class Optimizer(Protocol):
    """Proposes generations of individuals, and learns their order.

    It depends only on its arguments and on what it is told, so that telling it again resumes a search.
    """

    @property
    def total(self) -> int:
        """The most individuals that it proposes."""
        ...

    def ask(self) -> list[Individual]:
        """Returns the next generation of individuals that it has not proposed; empty at the end."""
        ...

    def tell(self, generation: Sequence[Scored]) -> None:
        """Takes the results of the last generation: for each individual that of its last stage."""
        ...


def number(perplexity: float) -> float:
    """Returns a perplexity that can be compared; NaN counts as infinite."""
    return math.inf if math.isnan(perplexity) else float(perplexity)
