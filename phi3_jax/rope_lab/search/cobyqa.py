"""A search for rope factors by COBYQA (Ragonneau and Zhang), a trust-region method, with SciPy.

It fits a quadratic model to the loss, whose values it uses, and proposes the individuals one by one. So it
needs the fewest measurements, of a loss that is smooth, and is for machines that gain nothing from measuring
many together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize

from phi3_jax.errors import UserError
from phi3_jax.rope_lab.search.curves import Curve
from phi3_jax.rope_lab.search.optimizers import Scored
from phi3_jax.rope_lab.search.space import Individual, Space

FIRST_RADIUS, LAST_RADIUS = 0.1, 2e-3
"""The radius of the first trust region, and the one at which the search ends, in numbers of a curve."""

WORST = 50.0
"""The loss in nats that stands for greater and infinite ones."""


@dataclass(frozen=True)
class Cobyqa:
    """The parameters of the search.

    Args:
        iterations: individuals that are measured after the methods that the search starts from.
        knots: points of the line through the logarithms of factors. The first 2 * knots + 3 measurements
            explore each number of the line alone.
    """

    iterations: int = 80
    knots: int = 6

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise UserError(f"iterations={self.iterations} must not be negative")
        if self.knots < 2:
            raise UserError(f"knots={self.knots} must be at least 2")

    def optimizer(self, space: Space, starts: Sequence[Individual]) -> "CobyqaSearch":
        """Returns the search in a space, which begins at the best of `starts`."""
        return CobyqaSearch(space, self, starts)


class _NotMeasuredError(Exception):
    """The loss of an individual is not known yet."""

    def __init__(self, individual: Individual):
        super().__init__()
        self.individual = individual


class CobyqaSearch:
    """The optimizer of a COBYQA.

    SciPy calls the function to minimise. It is run from the start for each individual, with the losses that
    are known, up to the first that is not.

    Args:
        starts: individuals in the space, which the search measures first and tells the optimizer about.

    Raises:
        UserError: as `Curve`.
    """

    def __init__(self, space: Space, settings: Cobyqa, starts: Sequence[Individual]):
        self._settings = settings
        self._curve = Curve(space, len(starts[0].factors), settings.knots)
        self._losses: dict[Individual, float] = {}
        self._start: Float[np.ndarray, " N"] | None = None
        self._asked = 0

    @property
    def total(self) -> int:
        return self._settings.iterations

    def ask(self) -> list[Individual]:
        if self._start is None or self._asked == self._settings.iterations:
            return []
        try:
            minimize(
                self._loss,
                self._start,
                method="COBYQA",
                bounds=self._curve.bounds,
                options={
                    "initial_tr_radius": FIRST_RADIUS,
                    "final_tr_radius": LAST_RADIUS,
                    "maxfev": 10 * self._settings.iterations,
                },
            )
        except _NotMeasuredError as waiting:
            self._asked += 1
            return [waiting.individual]
        return []

    def tell(self, generation: Sequence[Scored]) -> None:
        for each in generation:
            loss = math.log(each.perplexity) if each.perplexity < math.inf else WORST
            self._losses[each.individual] = min(loss, WORST)
        if self._start is None:
            best = min(generation, key=lambda each: each.rank)
            self._start = self._curve.numbers(best.individual)

    def _loss(self, numbers: Float[np.ndarray, " N"]) -> float:
        individual = self._curve.individual(numbers)
        if individual not in self._losses:
            raise _NotMeasuredError(individual)
        return self._losses[individual]
