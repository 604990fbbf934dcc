"""A search for rope factors by CMA-ES (Hansen, arXiv:1604.00772), with the library `cmaes`.

CMA-ES learns only the order of the individuals of a generation, which may be measured together, or on stages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cmaes
import numpy as np
from jaxtyping import Float

from phi3_jax.errors import UserError
from phi3_jax.rope_lab.search.curves import Curve
from phi3_jax.rope_lab.search.optimizers import Scored
from phi3_jax.rope_lab.search.space import Individual, Space

STEP = 0.1
"""The first standard deviation of each number of a curve."""

TRIES = 1000
"""Draws for a generation of new individuals before the search ends."""


@dataclass(frozen=True)
class CmaEs:
    """The parameters of the search.

    Args:
        population: individuals of each iteration; None: 4 + 3 ln(numbers), the method's default.
        iterations: iterations after the methods that the search starts from.
        knots: points of the line through the logarithms of factors.
        seed: the seed of the draws.
    """

    population: int | None = None
    iterations: int = 20
    knots: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.population is not None and self.population < 3:
            raise UserError(f"population={self.population} must be at least 3")
        if self.iterations < 0 or self.seed < 0:
            raise UserError(f"iterations={self.iterations} and seed={self.seed} must not be negative")
        if self.knots < 2:
            raise UserError(f"knots={self.knots} must be at least 2")

    def optimizer(self, space: Space, starts: Sequence[Individual]) -> "CmaEsSearch":
        """Returns the search in a space, which begins around the best of `starts`."""
        return CmaEsSearch(space, self, starts)


class CmaEsSearch:
    """The optimizer of a CMA-ES.

    Args:
        starts: individuals in the space, which the search measures first and tells the optimizer about.

    Raises:
        UserError: as `Curve`.
    """

    def __init__(self, space: Space, settings: CmaEs, starts: Sequence[Individual]):
        self._settings = settings
        self._curve = Curve(space, len(starts[0].factors), settings.knots)
        self._population = settings.population or 4 + math.floor(3 * math.log(self._curve.size))
        self._seen = set(starts)
        self._iteration = 0
        self._asked: dict[Individual, Float[np.ndarray, " N"]] = {}
        self._cma: cmaes.CMA | None = None

    @property
    def total(self) -> int:
        return self._settings.iterations * self._population

    def ask(self) -> list[Individual]:
        if self._cma is None or self._iteration == self._settings.iterations or self._cma.should_stop():
            return []
        self._iteration += 1
        self._asked = {}
        for _ in range(TRIES):
            numbers = self._cma.ask()
            individual = self._curve.individual(numbers)
            if individual not in self._seen:
                self._seen.add(individual)
                self._asked[individual] = numbers
            if len(self._asked) == self._population:
                return [*self._asked]
        return []  # the search has converged: rounded factors repeat

    def tell(self, generation: Sequence[Scored]) -> None:
        ranked = sorted(generation, key=lambda each: each.rank)
        if self._cma is None:
            self._cma = self._start(ranked[0].individual)
            return
        self._cma.tell([(self._asked[each.individual], rank) for rank, each in enumerate(ranked)])

    def _start(self, best: Individual) -> cmaes.CMA:
        return cmaes.CMA(
            self._curve.numbers(best),
            sigma=STEP,
            bounds=self._curve.bounds,
            seed=int(np.random.default_rng(self._settings.seed).integers(2**31)),
            population_size=self._population,
        )
