"""LongRoPE's evolutionary search for rope factors (arXiv:2402.13753, section 3.3 and algorithm 1).

In NumPy and without a model: it says what to measure next, and is told the perplexities. All that it does
follows from its arguments and from what it was told, so that a search is gone on with by telling it again.

Two things are ours. A dim that mutates takes its neighbours along, more or less far, since what matters is
the shape of the curve; and a list that is no longer monotone is mended instead of being thrown away. The
attention factor is a gene too, so that every method that the search starts from is in its space.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from phi3_jax.config.rope_scaling import RopeBase, RopeScaling
from phi3_jax.errors import UserError

INITIAL_TOKENS = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)
"""Numbers of tokens kept unscaled that the paper tries (table 1)."""

BOUND = 1.25
"""The largest factor, in units of the stretch (table 1)."""

DECIMALS = 4
"""Of a factor that the search makes up."""

TRIES = 100
"""For a child that is new, before a generation does with fewer."""

PLAIN, LINEAR, NTK, YARN = "none", "linear", "ntk", "yarn"

T = TypeVar("T")


class Individual(NamedTuple):
    """A rope scaling."""

    factors: tuple[float, ...]
    """That divide theta^(-2i/d), pair by pair."""
    initial_tokens: int
    """So many first tokens do without."""
    attention_factor: float


class Scored(NamedTuple):
    """What was measured; `perplexity` may be infinite."""

    individual: Individual
    perplexity: float


def longrope_attention_factor(stretch: float, original: int) -> float:
    """What transformers gives longrope unless it is told; `original` tokens before the stretch."""
    return math.sqrt(1 + math.log(stretch) / math.log(original))


def known_scalings(base: RopeBase, stretch: float) -> dict[str, Individual]:
    """The methods to start from and to compare with, each with its own attention factor.

    Plain rope, position interpolation, NTK-aware scaling (theta times stretch^(d/(d-2))) and YaRN (whose
    ramp starts from `base.original_max_position_embeddings`).
    """
    pairs = base.dim // 2
    numbers = np.arange(pairs)
    yarn, yarn_attention = RopeScaling("yarn", (("factor", stretch),)).frequencies(base, jnp.zeros(1, int))
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
    """What there is to choose from: factors from 1 to `bound` that do not fall, and the two other genes."""

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
                f"initial_tokens={self.initial_tokens!r} must be numbers from 0, and 0 among them: a config "
                "can express no other"
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
        """One inside: itself, or with what does not fit brought to what does."""
        attention = min(self.attention_factors, key=lambda x: (abs(x - individual.attention_factor), x))
        factors = tuple(min(max(x, 1.0), self.bound) for x in _monotone(np.array(individual.factors)))
        return Individual(factors, 0, attention)


@dataclass(frozen=True)
class Evolution:
    """How the search goes; names as in the paper's algorithm 1.

    Each iteration after the first population keeps the best `parents` of all so far, and measures
    population - parents children: half of them (rounded up) mutants, the others crossings of two.
    """

    population: int = 64
    iterations: int = 40
    parents: int = 32
    mutation_probability: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.parents < self.population:
            raise UserError(
                f"parents={self.parents} must be from 2 to population - 1 = {self.population - 1}: two are "
                "crossed, and the others are their children"
            )
        if self.iterations < 0 or self.seed < 0:
            raise UserError(f"iterations={self.iterations} and seed={self.seed} must not be negative")
        if not 0 < self.mutation_probability <= 1:
            raise UserError(f"mutation_probability={self.mutation_probability!r} must be above 0, at most 1")


class RopeSearch:
    """The search. `waiting` has what to measure, `tell` takes the perplexities, until nothing waits.

    The first population begins with `known`, as they are: those that lie in the space can become parents,
    so that what is found is no worse than they are; those that do not are measured for comparison, and their
    nearest in the space takes part. No individual is measured twice.

    Args:
        known: as of `known_scalings`, by name.

    Raises:
        ValueError: a population that has no room for them.
    """

    def __init__(self, space: Space, evolution: Evolution, known: Mapping[str, Individual]):
        self.space, self.evolution, self.known = space, evolution, dict(known)
        self.scored: list[Scored] = []
        self.iterations: list[int] = []
        """In which each of them was measured."""
        self.iteration = 0
        """0: the first population."""
        self._seen: set[Individual] = set()
        self._starts = [space.nearest(each) for name, each in known.items() if name != PLAIN]
        first = [*dict.fromkeys([*known.values(), *self._starts])]
        least = sum(each in space for each in first)
        if evolution.population < least:
            raise UserError(
                f"population={evolution.population} has no room for the {least} that the search starts from"
            )
        self._generation = self._first_population(first)

    @property
    def waiting(self) -> list[Individual]:
        """Of this iteration, what is not measured yet; empty when the search is over."""
        return self._generation

    @property
    def total(self) -> int:
        """How many are measured in all, unless the space has too few."""
        evolution = self.evolution
        outside = sum(each not in self.space for each in self.known.values())
        return (
            outside + evolution.population + evolution.iterations * (evolution.population - evolution.parents)
        )

    def tell(self, perplexities: Sequence[float]) -> None:
        """The perplexities of the first that are waiting; what is no number is as bad as can be."""
        if len(perplexities) > len(self._generation):
            raise UserError(f"{len(perplexities)} perplexities for {len(self._generation)} that are waiting")
        for individual, perplexity in zip(self._generation, perplexities, strict=False):
            self.scored.append(Scored(individual, math.inf if math.isnan(perplexity) else float(perplexity)))
            self.iterations.append(self.iteration)
        self._generation = self._generation[len(perplexities) :]
        while not self._generation and self.iteration < self.evolution.iterations:
            self.iteration += 1
            self._generation = self._children()

    def best(self, initial_tokens: int | None = None) -> Scored:
        """The best in the space so far, or the best with so many unscaled tokens; of equals the first."""
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
        """Of this iteration: what comes before it needs not be drawn again."""
        return np.random.default_rng([self.evolution.seed, self.iteration])

    def _new(self, make: Callable[[], Individual]) -> Individual | None:
        """What `make` gives, once it is something that was not there before."""
        for _ in range(TRIES):
            if (child := make()) not in self._seen:
                self._seen.add(child)
                return child
        return None

    def _mutant(self, parent: Individual, draws: np.random.Generator) -> Individual:
        """Each dim moves with the mutation probability, and the dims around it along with it.

        How far all of them move, and how many dims each takes along, is drawn over orders of magnitude: the
        search is to find its way and to settle, too.
        """
        probability = self.evolution.mutation_probability
        pairs = len(parent.factors)
        chosen = np.flatnonzero(draws.random(pairs) < probability)
        if not len(chosen):
            chosen = draws.integers(pairs, size=1)
        widths = 2 ** draws.uniform(0, 4, len(chosen))  # dims
        bumps = np.exp(-(((np.arange(pairs)[:, None] - chosen) / widths) ** 2) / 2)
        moves = bumps @ draws.standard_normal(len(chosen)) / math.sqrt(len(chosen))
        size = 10 ** draws.uniform(-2, -0.3) * math.log(self.space.bound)
        return Individual(
            self._mended(np.log(parent.factors) + size * moves),
            self._other(parent.initial_tokens, self.space.initial_tokens, draws),
            self._other(parent.attention_factor, self.space.attention_factors, draws),
        )

    def _other(self, value: T, choices: Sequence[T], draws: np.random.Generator) -> T:
        """With the mutation probability another of the choices."""
        others = [each for each in choices if each != value]
        if others and draws.random() < self.evolution.mutation_probability:
            return others[draws.integers(len(others))]
        return value

    def _crossing(self, one: Individual, other: Individual, draws: np.random.Generator) -> Individual:
        """Each gene from either of the two."""
        chosen = draws.random(len(one.factors)) < 0.5
        return Individual(
            self._mended(np.log(np.where(chosen, one.factors, other.factors))),
            (one, other)[draws.integers(2)].initial_tokens,
            (one, other)[draws.integers(2)].attention_factor,
        )

    def _mended(self, logarithms: Float[np.ndarray, "P"]) -> tuple[float, ...]:
        """Factors that do not fall and lie within the bounds."""
        factors = np.exp(np.array(_monotone(logarithms)))
        return tuple(min(float(x), self.space.bound) for x in np.round(np.maximum(factors, 1), DECIMALS))


def _monotone(values: Float[np.ndarray, "P"]) -> tuple[float, ...]:
    """Midway between the lowest list above that does not fall and the highest below."""
    above = np.maximum.accumulate(values)
    below = np.minimum.accumulate(values[::-1])[::-1]
    return tuple(float(x) for x in (above + below) / 2)
