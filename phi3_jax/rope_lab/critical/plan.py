"""The ropes that an experiment on the critical pair measures, in the order in which they are needed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from phi3_jax.config.rope_types import RopeBase
from phi3_jax.errors import UserError
from phi3_jax.rope_lab.critical.candidates import (
    candidate_factors,
    coarse_candidates,
    next_candidates,
    with_factor,
)
from phi3_jax.rope_lab.search.space import YARN, attention_factor, known_scalings

COARSE, FEWEST = 4, 8
"""The distance of the first candidates, which later ones halve; it is less if they would be fewer."""


class PairScaling(NamedTuple):
    """A rope to measure."""

    factors: tuple[float, ...]
    """Divisors of theta^(-2i/d), pair by pair."""
    attention_factor: float = 1.0


class MeasuredScaling(NamedTuple):
    """A rope with its perplexity."""

    scaling: PairScaling
    perplexity: float


class Candidate(NamedTuple):
    """A candidate for the critical pair, with its perplexity."""

    pair: int
    scaling: PairScaling
    perplexity: float


class PairEffect(NamedTuple):
    """The perplexities if one pair alone differs from the best candidate."""

    pair: int
    plain: float
    """With factor 1: its angles are new beyond the trained length, unless it turns often."""
    stretched: float
    """With the stretch as its factor: no angle is new, but near positions differ less."""


Values = Mapping[PairScaling, float]
"""The perplexities of the ropes that are measured."""


@dataclass(frozen=True)
class CriticalPlan:
    """Chooses ropes: the usual methods and candidates, then finer candidates, then single pairs.

    Everything follows from the perplexities so far, so that an experiment resumes with them.

    Args:
        base: its lengths are the trained one and the one to stretch to.
        listed: the candidates; None: every fourth pair, then those halfway between the best and its
            neighbours.
        yarn_attention: also measure each candidate with YaRN's attention factor.
        pairs: pairs that are changed alone in the best candidate.

    Raises:
        UserError: the model has no such pair, or no candidate is listed.
    """

    base: RopeBase
    listed: Sequence[int] | None = None
    yarn_attention: bool = False
    pairs: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.listed is not None and not self.listed:
            raise UserError("candidates: give at least one pair")
        for name, numbers in (("candidates", self.listed or ()), ("pairs", self.pairs)):
            if wrong := [each for each in numbers if not 0 <= each < self.count]:
                raise UserError(
                    f"{name}: {wrong[0]} must be from 0 to {self.count - 1}, the model's last pair of dims"
                )

    @property
    def count(self) -> int:
        """The model's pairs of dims."""
        return self.base.dim // 2

    @property
    def stretch(self) -> float:
        return self.base.extension

    @cached_property
    def known(self) -> dict[str, PairScaling]:
        """The usual methods, each with its own attention factor."""
        return {
            name: PairScaling(each.factors, each.attention_factor)
            for name, each in known_scalings(self.base, self.stretch).items()
        }

    @cached_property
    def _attention_factors(self) -> list[float]:
        yarn = [attention_factor(self.base, YARN, self.stretch)] if self.yarn_attention else []
        return [1.0, *yarn]

    def scalings(self, candidate: int) -> list[PairScaling]:
        """Returns the ropes of a candidate, one for each attention factor."""
        factors = candidate_factors(self.count, candidate, self.stretch)
        return [PairScaling(factors, each) for each in self._attention_factors]

    def candidates(self, values: Values) -> list[int]:
        """Returns the candidates, including those to measure next."""
        if self.listed is not None:
            return sorted(set(self.listed))
        chosen = coarse_candidates(self.count, min(COARSE, max(1, self.count // FEWEST)))
        while not self._missing(chosen, values):
            finer = next_candidates({each.pair: each.perplexity for each in self._best(chosen, values)})
            if not finer:
                break
            chosen = sorted([*chosen, *finer])
        return chosen

    def measured(self, values: Values) -> list[Candidate]:
        """Returns the candidates with all their ropes, once they are measured."""
        return [
            Candidate(pair, each, values[each])
            for pair in self.candidates(values)
            for each in self.scalings(pair)
        ]

    def best(self, values: Values) -> Candidate:
        """Returns the candidate with the least perplexity, of equals the first, once all are measured."""
        return min(self.measured(values), key=lambda each: order(each.perplexity))

    def effects(self, values: Values) -> list[PairEffect]:
        """Returns the effects of single pairs, once they are measured."""
        return [
            PairEffect(pair, values[plain], values[stretched])
            for pair, plain, stretched in self._single_pairs(self.best(values).scaling)
        ]

    def waiting(self, values: Values) -> list[PairScaling]:
        """Returns the ropes to measure next, each once; empty at the end."""
        missing = [*self.known.values(), *self._missing(self.candidates(values), values)]
        missing = [each for each in dict.fromkeys(missing) if each not in values]
        if missing:
            return missing
        single = (each for _, *ropes in self._single_pairs(self.best(values).scaling) for each in ropes)
        return [each for each in dict.fromkeys(single) if each not in values]

    def later(self, values: Values) -> int:
        """Returns the most ropes that will be needed after those of `waiting`."""
        candidates = self.candidates(values)
        if not self._missing(candidates, values):
            return 0 if all(each in values for each in self.known.values()) else 2 * len(self.pairs)
        rounds = 0
        if self.listed is None:
            # The distance to the last pair may be odd, which needs no round of its own.
            distances = (later - one for one, later in pairwise(candidates[:-1]))
            rounds = min(distances, default=1).bit_length() - 1
        return 2 * rounds * len(self._attention_factors) + 2 * len(self.pairs)

    def _missing(self, candidates: Sequence[int], values: Values) -> list[PairScaling]:
        ropes = (each for pair in candidates for each in self.scalings(pair))
        return [each for each in ropes if each not in values]

    def _best(self, candidates: Sequence[int], values: Values) -> Iterator[Candidate]:
        """Yields each candidate with the better of its ropes."""
        for pair in candidates:
            best = min(self.scalings(pair), key=lambda each: order(values[each]))
            yield Candidate(pair, best, values[best])

    def _single_pairs(self, best: PairScaling) -> Iterator[tuple[int, PairScaling, PairScaling]]:
        """Yields each single pair with the ropes in which it is plain, and stretched."""
        for pair in sorted(set(self.pairs)):
            plain, stretched = (with_factor(best.factors, pair, each) for each in (1.0, self.stretch))
            yield pair, best._replace(factors=plain), best._replace(factors=stretched)


def order(perplexity: float) -> float:
    """Returns a number to sort perplexities by, in which NaN counts as infinite."""
    return math.inf if math.isnan(perplexity) else perplexity
