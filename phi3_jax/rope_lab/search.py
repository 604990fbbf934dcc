"""LongRoPE's evolutionary search for rope factors (arXiv:2402.13753, section 3.3 and algorithm 1).

The search uses NumPy and no model: it has the individuals to measure next, and takes their perplexities. It
depends only on its arguments and those perplexities, so that adding them again resumes a search.

It differs from the paper in two ways. A dimension that mutates moves its neighbours too, since the shape of
the curve matters; and a list that is no longer monotone is repaired instead of discarded. The attention
factor is a gene too, so that the space contains every method that the search starts from.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from phi3_jax.config.rope_scaling import RopeScaling
from phi3_jax.config.rope_types import RopeBase
from phi3_jax.errors import UserError

INITIAL_TOKENS = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)
"""Numbers of unscaled tokens that the paper tries (table 1)."""

BOUND = 1.25
"""The largest factor, relative to the stretch (table 1)."""

DECIMALS = 4
"""Decimals of a factor that the search draws."""

TRIES = 100
"""Tries to draw a new child before a generation gets fewer."""

PLAIN, LINEAR, NTK, YARN, LONGROPE = "none", "linear", "ntk", "yarn", "longrope"

T = TypeVar("T")


class Individual(NamedTuple):
    """A rope scaling."""

    factors: tuple[float, ...]
    """Divisors of theta^(-2i/d), pair by pair."""
    initial_tokens: int
    """How many first tokens stay unscaled."""
    attention_factor: float


class Scored(NamedTuple):
    """An individual with its perplexity, which may be infinite."""

    individual: Individual
    perplexity: float


def attention_factor(base: RopeBase, method: str, stretch: float) -> float:
    """Returns the default attention factor of YaRN or longrope."""
    parameters: dict[str, Any] = {"factor": stretch}
    if method == LONGROPE:
        parameters |= dict.fromkeys(("short_factor", "long_factor"), (1.0,) * (base.dim // 2))
    scaling = RopeScaling(method, tuple(sorted(parameters.items())))
    return float(scaling.frequencies(base, jnp.zeros(1, jnp.int32))[1])


def known_scalings(base: RopeBase, stretch: float) -> dict[str, Individual]:
    """Returns the methods that the search starts from, each with its own attention factor.

    They are plain rope, position interpolation, NTK-aware scaling (theta times stretch^(d/(d-2))) and YaRN
    (its ramp depends on `base.original_max_position_embeddings`).
    """
    pairs = base.dim // 2
    numbers = np.arange(pairs)
    yarn, yarn_attention = RopeScaling("yarn", (("factor", stretch),)).frequencies(
        base, jnp.zeros(1, jnp.int32)
    )
    curves = {
        PLAIN: (np.ones(pairs), 1.0),
        LINEAR: (np.full(pairs, stretch), 1.0),
        NTK: (stretch ** (2 * numbers / max(base.dim - 2, 1)), 1.0),
        YARN: (base.inv_freq().astype(np.float64) / np.asarray(yarn), yarn_attention),
    }
    return {
        name: Individual(_monotone(np.clip(factors, 1, stretch)), 0, float(attention))
        for name, (factors, attention) in curves.items()
    }


@dataclass(frozen=True)
class Space:
    """The space of individuals: ascending factors from 1 to `bound`, and choices for the other genes."""

    bound: float
    attention_factors: tuple[float, ...]
    initial_tokens: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.bound) and self.bound >= 1):
            raise UserError(f"bound={self.bound!r} must be a number, 1 or more")
        if not self.attention_factors or not all(0 < x < math.inf for x in self.attention_factors):
            raise UserError(f"attention_factors={self.attention_factors!r} must be positive numbers")
        if 0 not in self.initial_tokens or min(self.initial_tokens) < 0:
            raise UserError(
                f"initial_tokens={self.initial_tokens!r} must be numbers from 0, and 0 among them, since a "
                "config cannot express others"
            )

    def __contains__(self, individual: Individual) -> bool:
        factors = individual.factors
        return (
            factors[0] >= 1
            and factors[-1] <= self.bound
            and all(a <= b for a, b in pairwise(factors))
            and individual.initial_tokens in self.initial_tokens
            and individual.attention_factor in self.attention_factors
        )

    def nearest(self, individual: Individual) -> Individual:
        """Returns the nearest individual in the space."""
        attention = min(self.attention_factors, key=lambda x: (abs(x - individual.attention_factor), x))
        factors = tuple(min(max(x, 1.0), self.bound) for x in _monotone(np.array(individual.factors)))
        return Individual(factors, 0, attention)


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


class RopeSearch:
    """The search: `waiting` has the individuals to measure, and `add` takes their perplexities.

    The first population starts with `known`. Those in the space can become parents, so that the result is no
    worse; the others are measured for comparison, and their nearest individuals in the space take part. No
    individual is measured twice.

    Args:
        known: individuals by name, as those of `known_scalings`.

    Raises:
        UserError: the population is too small for them.
    """

    def __init__(self, space: Space, evolution: Evolution, known: Mapping[str, Individual]):
        self.space, self.evolution, self.known = space, evolution, dict(known)
        self.scored: list[Scored] = []
        self.iterations: list[int] = []
        """The iteration of each."""
        self.iteration = 0
        """The current iteration; 0 is the first population."""
        self._seen: set[Individual] = set()
        self._starts = [space.nearest(each) for name, each in known.items() if name != PLAIN]
        first = [*dict.fromkeys([*known.values(), *self._starts])]
        least = sum(each in space for each in first)
        if evolution.population < least:
            raise UserError(
                f"population={evolution.population} is too small for the {least} that the search starts from"
            )
        self._generation = self._first_population(first)

    @property
    def waiting(self) -> list[Individual]:
        """The individuals of this iteration that are not measured yet; empty after the search."""
        return self._generation

    @property
    def total(self) -> int:
        """The number of individuals to measure, unless the space has fewer."""
        evolution = self.evolution
        outside = sum(each not in self.space for each in self.known.values())
        return (
            outside + evolution.population + evolution.iterations * (evolution.population - evolution.parents)
        )

    def add(self, perplexities: Sequence[float]) -> None:
        """Adds the perplexities of the first waiting individuals; NaN counts as infinite."""
        if len(perplexities) > len(self._generation):
            raise UserError(
                f"{len(perplexities)} perplexities for {len(self._generation)} waiting individuals"
            )
        for individual, perplexity in zip(self._generation, perplexities, strict=False):
            self.scored.append(Scored(individual, math.inf if math.isnan(perplexity) else float(perplexity)))
            self.iterations.append(self.iteration)
        self._generation = self._generation[len(perplexities) :]
        while not self._generation and self.iteration < self.evolution.iterations:
            self.iteration += 1
            self._generation = self._children()

    def best(self, initial_tokens: int | None = None) -> Scored:
        """Returns the best in the space, or the best with this many unscaled tokens; the first of equals."""
        fitting = (
            each
            for each in self.scored
            if each.individual in self.space and initial_tokens in (None, each.individual.initial_tokens)
        )
        return min(fitting, key=lambda each: each.perplexity)

    def _first_population(self, first: list[Individual]) -> list[Individual]:
        self._seen.update(first)
        starts, draws = self._starts, self._draws()
        missing = self.evolution.population - sum(each in self.space for each in first)
        mutants = [self._new(partial(self._mutant, starts[n % len(starts)], draws)) for n in range(missing)]
        return first + [each for each in mutants if each is not None]

    def _children(self) -> list[Individual]:
        evolution = self.evolution
        ranked = sorted(
            (each for each in self.scored if each.individual in self.space), key=lambda each: each.perplexity
        )
        parents = [each.individual for each in ranked[: evolution.parents]]
        draws = self._draws()
        count = evolution.population - evolution.parents

        def mutant() -> Individual:
            return self._mutant(parents[draws.integers(len(parents))], draws)

        def crossing() -> Individual:
            one, other = draws.choice(len(parents), 2, replace=False)
            return self._crossing(parents[one], parents[other], draws)

        children = [self._new(mutant if n < (count + 1) // 2 else crossing) for n in range(count)]
        return [each for each in children if each is not None]

    def _draws(self) -> np.random.Generator:
        """Returns the generator of this iteration, which does not depend on earlier draws."""
        return np.random.default_rng([self.evolution.seed, self.iteration])

    def _new(self, make: Callable[[], Individual]) -> Individual | None:
        """Returns the first new individual of `make`, or None after many tries."""
        for _ in range(TRIES):
            if (child := make()) not in self._seen:
                self._seen.add(child)
                return child
        return None

    def _mutant(self, parent: Individual, draws: np.random.Generator) -> Individual:
        """Moves each dimension with the mutation probability, and its neighbours with it.

        The distance and the number of neighbours are drawn over orders of magnitude, so that the search can
        both explore and settle.
        """
        probability = self.evolution.mutation_probability
        pairs = len(parent.factors)
        chosen = np.flatnonzero(draws.random(pairs) < probability)
        if not len(chosen):
            chosen = draws.integers(pairs, size=1)
        widths = 2 ** draws.uniform(0, 4, len(chosen))  # dimensions
        bumps = np.exp(-(((np.arange(pairs)[:, None] - chosen) / widths) ** 2) / 2)
        moves = bumps @ draws.standard_normal(len(chosen)) / math.sqrt(len(chosen))
        size = 10 ** draws.uniform(-2, -0.3) * math.log(self.space.bound)
        return Individual(
            self._repair(np.log(parent.factors) + size * moves),
            self._other(parent.initial_tokens, self.space.initial_tokens, draws),
            self._other(parent.attention_factor, self.space.attention_factors, draws),
        )

    def _other(self, value: T, choices: Sequence[T], draws: np.random.Generator) -> T:
        """Returns another of the choices with the mutation probability."""
        others = [each for each in choices if each != value]
        if others and draws.random() < self.evolution.mutation_probability:
            return others[draws.integers(len(others))]
        return value

    def _crossing(self, one: Individual, other: Individual, draws: np.random.Generator) -> Individual:
        """Takes each gene from one of the two."""
        chosen = draws.random(len(one.factors)) < 0.5
        return Individual(
            self._repair(np.log(np.where(chosen, one.factors, other.factors))),
            (one, other)[draws.integers(2)].initial_tokens,
            (one, other)[draws.integers(2)].attention_factor,
        )

    def _repair(self, logarithms: Float[np.ndarray, "P"]) -> tuple[float, ...]:
        """Returns ascending factors within the bounds."""
        factors = np.exp(np.array(_monotone(logarithms)))
        return tuple(min(float(x), self.space.bound) for x in np.round(np.maximum(factors, 1), DECIMALS))


def _monotone(values: Float[np.ndarray, "P"]) -> tuple[float, ...]:
    """Returns the mean of the lowest ascending list above and the highest one below."""
    above = np.maximum.accumulate(values)
    below = np.minimum.accumulate(values[::-1])[::-1]
    return tuple(float(x) for x in (above + below) / 2)
