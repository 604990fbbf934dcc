"""The search for rope factors: an optimizer proposes individuals, which pass through stages.

The search uses NumPy and no model: it has the individuals to measure next, and takes their perplexities. It
depends only on its arguments and those perplexities, so that adding them again resumes a search.

The stages are successive halving (Jamieson and Talwalkar, arXiv:1502.07943): all individuals of a generation
are measured on the first, least expensive stage, and only the best of them on the next. The finalists, the
best of all generations, are measured once more on held-out text, which decides.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phi3_jax.errors import UserError
from phi3_jax.rope_lab.search.cma_es import CmaEs
from phi3_jax.rope_lab.search.cobyqa import Cobyqa
from phi3_jax.rope_lab.search.evolution import Evolution
from phi3_jax.rope_lab.search.optimizers import Scored, number
from phi3_jax.rope_lab.search.space import PLAIN, Individual, Space

Method = Evolution | CmaEs | Cobyqa


@dataclass(frozen=True)
class Stages:
    """How individuals pass through the stages of a search.

    Args:
        kept: for each stage but the last, the share of a generation that goes on to the next.
        finalists: how many of the best individuals are measured on held-out text, beside the known methods;
            0: there is none, and the last stage decides.
    """

    kept: tuple[float, ...] = ()
    finalists: int = 0

    def __post_init__(self) -> None:
        if not all(0 < share <= 1 for share in self.kept):
            raise UserError(f"kept={self.kept!r} must be shares above 0, at most 1")
        if self.finalists < 0:
            raise UserError(f"finalists={self.finalists} must not be negative")

    @property
    def last(self) -> int:
        """The last stage of a generation."""
        return len(self.kept)

    @property
    def held_out(self) -> int:
        """The stage of the finalists."""
        return self.last + 1

    def going_on(self, stage: int, count: int) -> int:
        """Returns how many of `count` individuals go on from a stage."""
        return math.ceil(round(self.kept[stage] * count, 9))


class RopeSearch:
    """The search: `waiting` has the individuals to measure on `stage`, and `add` takes their perplexities.

    The first generation has the individuals of `known`, which all go through all stages. Those in the space
    can be the result; the others are measured for comparison, and their nearest individuals in the space
    take part. No individual is measured twice on a stage.

    Args:
        known: individuals by name, as those of `known_scalings`.

    Raises:
        UserError: the method cannot search this space.
    """

    def __init__(
        self, space: Space, method: Method, known: Mapping[str, Individual], stages: Stages | None = None
    ):
        self.space, self.known = space, dict(known)
        self.stages = stages or Stages()
        if isinstance(method, Cobyqa) and self.stages.last:
            raise UserError("COBYQA needs the perplexity of each individual on all samples; use one stage")
        self.scored: list[Scored] = []
        self.iterations: list[int] = []
        """The iteration of each."""
        self.iteration = 0
        """The current iteration; 0 has the known individuals."""
        self.stage = 0
        """The stage on which the waiting individuals are measured."""
        starts = [space.nearest(each) for name, each in known.items() if name != PLAIN]
        first = [*dict.fromkeys([*known.values(), *starts])]
        self._always = frozenset(first)
        self._optimizer = method.optimizer(space, [each for each in first if each in space])
        self._generation: list[Scored] = []
        """The individuals of this iteration, each with its result on the last stage that it reached."""
        self._waiting = first

    @property
    def waiting(self) -> Sequence[Individual]:
        """The individuals that are not measured yet on this stage; empty after the search."""
        return self._waiting

    @property
    def total(self) -> dict[int, int]:
        """The most individuals to measure, by stage."""
        first, others = len(self._always), self._optimizer.total
        counts = {0: first + others}
        for stage in range(self.stages.last):
            others = self.stages.going_on(stage, others)
            counts[stage + 1] = first + others
        if self.stages.finalists:
            counts[self.stages.held_out] = first + self.stages.finalists
        return counts

    def add(self, perplexities: Sequence[float]) -> None:
        """Adds the perplexities of the first waiting individuals; NaN counts as infinite."""
        if len(perplexities) > len(self._waiting):
            raise UserError(f"{len(perplexities)} perplexities for {len(self._waiting)} waiting individuals")
        measured = self._waiting[: len(perplexities)]
        self._waiting = self._waiting[len(perplexities) :]
        for individual, perplexity in zip(measured, perplexities, strict=True):
            result = Scored(individual, number(perplexity), self.stage)
            self.scored.append(result)
            self.iterations.append(self.iteration)
            self._generation.append(result)
        if not self._waiting and self.stage != self.stages.held_out:
            self._go_on()

    def best(self, initial_tokens: int | None = None) -> Scored:
        """Returns the best in the space, or the best with this many unscaled tokens; the first of equals.

        It is the best on held-out text among the finalists, if there are any.
        """
        return min(self._fitting(self._deciding_stage, initial_tokens), key=lambda each: each.perplexity)

    def results(self, stage: int) -> dict[Individual, float]:
        """Returns the perplexities that were measured on a stage."""
        return {each.individual: each.perplexity for each in self.scored if each.stage == stage}

    @property
    def _deciding_stage(self) -> int:
        finished = self.stage == self.stages.held_out and not self._waiting
        return self.stages.held_out if finished and self.stages.finalists else self.stages.last

    def _fitting(self, stage: int, initial_tokens: int | None = None) -> list[Scored]:
        return [
            each
            for each in self.scored
            if each.stage == stage
            and each.individual in self.space
            and initial_tokens in (None, each.individual.initial_tokens)
        ]

    def _go_on(self) -> None:
        """Chooses the individuals to measure next, on the next stage or of the next iteration."""
        if self.stage < self.stages.last:
            others = [each for each in self._on_stage() if each.individual not in self._always]
            count = self.stages.going_on(self.stage, len(others))
            chosen = {each.individual for each in sorted(others, key=lambda each: each.rank)[:count]}
            self.stage += 1
            self._waiting = [
                each.individual
                for each in self._generation
                if each.stage == self.stage - 1 and each.individual in chosen | self._always
            ]
            if self._waiting:
                return
        last = {each.individual: each for each in self._generation}  # the latest result of each
        self._optimizer.tell([each for each in last.values() if each.individual in self.space])
        self.iteration += 1
        self.stage, self._generation, self._waiting = 0, [], self._optimizer.ask()
        if not self._waiting:
            self.iteration -= 1
            self._choose_finalists()

    def _on_stage(self) -> list[Scored]:
        return [each for each in self._generation if each.stage == self.stage]

    def _choose_finalists(self) -> None:
        """Lets the best individuals and the known ones wait for the held-out text."""
        self.stage = self.stages.held_out
        if not self.stages.finalists:
            return
        ranked = sorted(self._fitting(self.stages.last), key=lambda each: each.perplexity)
        # A config can express only individuals without unscaled tokens, so one of them must be there.
        plain = [each for each in ranked if not each.individual.initial_tokens][:1]
        best = [each for each in ranked if each.individual not in self._always][: self.stages.finalists]
        chosen = [each.individual for each in [*best, *plain]]
        self._waiting = [*dict.fromkeys([*self._always_in_order, *chosen])]

    @property
    def _always_in_order(self) -> list[Individual]:
        return [each.individual for each in self.scored if each.individual in self._always and not each.stage]
