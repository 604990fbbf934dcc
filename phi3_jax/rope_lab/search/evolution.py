"""LongRoPE's evolutionary search for rope factors (arXiv:2402.13753, section 3.3 and algorithm 1).

It differs from the paper in two ways. A dimension that mutates moves its neighbours too, since the shape of
the curve matters; and a list that is no longer monotone is repaired instead of discarded. The attention
factor is a gene too, so that the space contains every method that the search starts from.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from phi3_jax.errors import UserError
from phi3_jax.rope_lab.search.optimizers import Scored
from phi3_jax.rope_lab.search.space import Individual, Space

TRIES = 100
"""Tries to draw a new child before a generation gets fewer."""


@dataclass(frozen=True)
class Evolution:
    """The parameters of the search, named as in the paper's algorithm 1.

    Each iteration after the first population keeps the best `parents` of all individuals and measures
    population - parents children: half of them (rounded up) are mutants, the others crossings of two.
    """

    population: int = 64
    iterations: int = 40
    parents: int = 32
    mutation_probability: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.parents < self.population:
            raise UserError(
                f"parents={self.parents} must be from 2 to population - 1 = {self.population - 1}, "
                "since two are crossed and the others are their children"
            )
        if self.iterations < 0 or self.seed < 0:
            raise UserError(f"iterations={self.iterations} and seed={self.seed} must not be negative")
        if not 0 < self.mutation_probability <= 1:
            raise UserError(f"mutation_probability={self.mutation_probability!r} must be above 0, at most 1")

    def optimizer(self, space: Space, starts: Sequence[Individual]) -> "EvolutionSearch":
        """Returns the search in a space; the first population has mutants of `starts`."""
        return EvolutionSearch(space, self, starts)


class EvolutionSearch:
    """The optimizer of an evolution.

    Args:
        starts: individuals in the space, which the search measures first and tells the optimizer about.

    Raises:
        UserError: the population is too small for them.
    """

    def __init__(self, space: Space, evolution: Evolution, starts: Sequence[Individual]):
        self._space, self._evolution = space, evolution
        self._starts = list(starts)
        self._scored: list[Scored] = []
        self._seen = set(starts)
        self._iteration = -1
        if evolution.population < len(starts):
            raise UserError(
                f"population={evolution.population} is too small for the {len(starts)} that the search "
                "starts from"
            )

    @property
    def total(self) -> int:
        evolution = self._evolution
        first = evolution.population - len(self._starts)
        return first + evolution.iterations * (evolution.population - evolution.parents)

    def ask(self) -> list[Individual]:
        while self._iteration < self._evolution.iterations:
            self._iteration += 1
            generation = self._children() if self._iteration else self._mutants_of_starts()
            if generation:
                return generation
        return []

    def tell(self, generation: Sequence[Scored]) -> None:
        self._scored += generation

    def _mutants_of_starts(self) -> list[Individual]:
        starts, draws = self._starts, self._draws()
        missing = self._evolution.population - len(starts)
        return self._new_ones([partial(self._mutant, starts[n % len(starts)], draws) for n in range(missing)])

    def _children(self) -> list[Individual]:
        evolution = self._evolution
        ranked = sorted(self._scored, key=lambda each: each.rank)
        parents = [each.individual for each in ranked[: evolution.parents]]
        draws = self._draws()
        count = evolution.population - evolution.parents

        def mutant() -> Individual:
            return self._mutant(parents[draws.integers(len(parents))], draws)

        def crossing() -> Individual:
            one, other = draws.choice(len(parents), 2, replace=False)
            return self._crossing(parents[one], parents[other], draws)

        return self._new_ones([mutant if n < (count + 1) // 2 else crossing for n in range(count)])

    def _draws(self) -> np.random.Generator:
        """Returns the generator of this iteration, which does not depend on earlier draws."""
        return np.random.default_rng([self._evolution.seed, self._iteration])

    def _new_ones(self, makers: Sequence[Callable[[], Individual]]) -> list[Individual]:
        """Returns the first new individual of each, if it makes one within many tries."""
        found = []
        for make in makers:
            for _ in range(TRIES):
                if (child := make()) not in self._seen:
                    self._seen.add(child)
                    found.append(child)
                    break
        return found

    def _mutant(self, parent: Individual, draws: np.random.Generator) -> Individual:
        """Moves each dimension with the mutation probability, and its neighbours with it.

        The distance and the number of neighbours are drawn over orders of magnitude, so that the search can
        both explore and settle.
        """
        probability = self._evolution.mutation_probability
        pairs = len(parent.factors)
        chosen = np.flatnonzero(draws.random(pairs) < probability)
        if not len(chosen):
            chosen = draws.integers(pairs, size=1)
        widths = 2 ** draws.uniform(0, 4, len(chosen))  # dimensions
        bumps = np.exp(-(((np.arange(pairs)[:, None] - chosen) / widths) ** 2) / 2)
        moves = bumps @ draws.standard_normal(len(chosen)) / math.sqrt(len(chosen))
        size = 10 ** draws.uniform(-2, -0.3)
        return Individual(
            self._space.drawn(np.log(parent.factors) + size * math.log(self._space.bound) * moves),
            self._other_tokens(parent.initial_tokens, draws),
            self._other_attention(parent.attention_factor, size, draws),
        )

    def _other_tokens(self, value: int, draws: np.random.Generator) -> int:
        """Returns another choice with the mutation probability."""
        others = [each for each in self._space.initial_tokens if each != value]
        if others and draws.random() < self._evolution.mutation_probability:
            return int(others[draws.integers(len(others))])
        return value

    def _other_attention(self, value: float, size: float, draws: np.random.Generator) -> float:
        """Moves the attention factor with the mutation probability, by this share of its range."""
        least, greatest = self._space.attention_factors
        if least == greatest or draws.random() >= self._evolution.mutation_probability:
            return value
        return self._space.within(round(value + 2 * size * (greatest - least) * draws.standard_normal(), 4))

    def _crossing(self, one: Individual, other: Individual, draws: np.random.Generator) -> Individual:
        """Takes each gene from one of the two."""
        chosen = draws.random(len(one.factors)) < 0.5
        return Individual(
            self._space.drawn(np.log(np.where(chosen, one.factors, other.factors))),
            (one, other)[draws.integers(2)].initial_tokens,
            (one, other)[draws.integers(2)].attention_factor,
        )
