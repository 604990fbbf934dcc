"""Searches rope factors with a model and a text, and writes a model directory that has them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from phi3_jax.checkpoint import open_checkpoint
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.rope_argument import trained_length
from phi3_jax.config.rope_types import RopeBase
from phi3_jax.errors import UserError
from phi3_jax.evaluation.perplexity import TextLoss
from phi3_jax.evaluation.run_options import STATE, model_options
from phi3_jax.evaluation.scorer import OnProgress, Scorer, frequencies_for
from phi3_jax.evaluation.texts import read_text, text_digest
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.loading import load_abstract
from phi3_jax.pipeline import Pipeline
from phi3_jax.rope_lab.objectives.objectives import Losses, RopeObjective, ScoredRope, measure
from phi3_jax.rope_lab.objectives.options import ObjectiveOptions
from phi3_jax.rope_lab.search.results import write_results
from phi3_jax.rope_lab.search.search import Method, RopeSearch, Stages
from phi3_jax.rope_lab.search.space import (
    BOUND,
    LONGROPE,
    YARN,
    Individual,
    Space,
    attention_factor,
    known_scalings,
)
from phi3_jax.rope_lab.turns import turns
from phi3_jax.runs.progress import FileProgress, time_left
from phi3_jax.storage import targets
from phi3_jax.storage.journal import Journal

MOST_TURNS, LEAST_TURNS = 128, 1 / 8
"""How often the pairs at the first and the last knot turn; faster ones need no factor."""

OWN = "model"
"""The name of a model's own rope among the known ones, if it is not plain."""

Measure = Callable[[RopeObjective, Sequence[Individual], OnProgress], Sequence[Losses]]
"""Returns the losses of individuals; calls its last argument with the tokens that were read."""


@dataclass(frozen=True)
class Target:
    """The goal of a search: a stretch from `original` tokens to `length`."""

    original: int
    length: int

    @property
    def stretch(self) -> float:
        return self.length / self.original

    def base(self, config: Phi3Config) -> RopeBase:
        """Returns the rope base of a model with this stretch."""
        return replace(
            config.rope_base,
            max_position_embeddings=self.length,
            original_max_position_embeddings=self.original,
        )


@dataclass(frozen=True)
class SearchResult:
    """A finished search."""

    search: RopeSearch
    target: Target
    new: int
    """Measurements of this call; those of an earlier call are in the search, too."""
    seconds: float


class StageObjective(NamedTuple):
    """What individuals are measured on in a stage of a search."""

    objective: RopeObjective
    adds: bool
    """Whether the losses add to those of the stage before, whose texts this stage leaves out."""


def search_ropes(
    model: Path,
    text: Path,
    output: targets.Target,
    *,
    objective: ObjectiveOptions,
    method: Method,
    stages: Stages | None = None,
    stage_samples: Sequence[int] = (),
    attention_factors: Sequence[str | float] = (1.0, LONGROPE, YARN),
    initial_tokens: Sequence[int] = (0,),
    bound: float = BOUND,
    batch_size: int | None = None,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    overwrite: bool = False,
    show: bool = True,
) -> SearchResult:
    """Searches factors that stretch a model to the longest length of the objective; writes the best.

    It also writes a model that has them. The state is written after each batch of individuals; after a kill
    the same call resumes and ends with the same result.

    Args:
        model: a checkpoint; its factors are relative to plain rope with its theta.
        text: the text of the objective; don't use it for later measurements.
        output: the path or URL of a directory.
        objective: what is measured; its `held_out` texts decide between the finalists.
        method: the optimizer and its parameters.
        stages: how many individuals go from one stage to the next; default: one stage.
        stage_samples: the samples of each stage but the last, ascending; the last has all.
        attention_factors: the least and the greatest of them bound the attention factor; "longrope" and
            "yarn" stand for the formulas of those methods.
        initial_tokens: choices for the number of tokens that are kept unscaled; 0 must be one.
        bound: the largest factor, relative to the stretch.
        batch_size: individuals at a time; default: by memory, at most 4 on CPU and 16 elsewhere.
        overwrite: start over if the output was started with other options.

    Raises:
        UserError: an option is wrong, or the batch does not fit in memory; it is raised before any work.
    """
    stages = stages or Stages()
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    target = Target(trained_length(config), max(objective.lengths))
    search = RopeSearch(
        Space(
            bound * target.stretch,
            _attention_range(attention_factors, config, target),
            tuple(sorted(set(initial_tokens))),
            _knot_ends(target.base(config)),
        ),
        method,
        _known(config, target, objective.lengths),
        stages,
    )
    content = read_text(text)
    everything, held_out = objective.make(checkpoint.source.tokenizer(), content, str(text))
    objectives = stage_objectives(everything, held_out, stages, stage_samples)
    options = model_options(model, dtype, mesh) | asdict(objective) | asdict(search.space)
    options |= {"method": type(method).__name__, **asdict(method), **asdict(stages)}
    options |= {"objective_seed": objective.seed, "stage_samples": list(stage_samples)}
    options |= {"text_digest": text_digest(content), "batch_size": batch_size}
    began = monotonic()
    with Journal(targets.target_in(output, STATE), options, overwrite=overwrite) as journal:
        scores = _Scores(objectives)
        _restore(search, scores, journal)
        before = len(search.scored)
        if search.waiting:
            planned = Scorer(load_abstract(Phi3ForCausalLM, checkpoint, dtype=dtype, mesh=mesh))
            rows = batch_size or journal.decide("batch_size", lambda: everything.rows(planned))
            everything.check_memory(planned, rows)
            scorer = Scorer(Pipeline.load(checkpoint, dtype=dtype, mesh=mesh).compiled)
            run(search, scores, journal, _measure(scorer, config.rope_base, rows), rows, show=show)
        config = stretched(config, target, search.best(initial_tokens=0).individual)
        write_results(output, search, {"text": str(text), **options}, model, config)
    return SearchResult(search, target, len(search.scored) - before, monotonic() - began)


def stage_objectives(
    everything: RopeObjective, held_out: RopeObjective | None, stages: Stages, samples: Sequence[int]
) -> dict[int, StageObjective]:
    """Returns the objective of each stage: further samples of `everything`, and at last the held-out ones.

    Raises:
        UserError: the samples do not fit the stages.
    """
    most = min(len(each) for each in everything.samples.values())
    ends = [*samples, most]
    if len(ends) != stages.last + 1:
        raise UserError(f"{len(stages.kept)} shares need as many numbers of samples, not {len(samples)}")
    if ends[0] < 1 or any(one >= other for one, other in pairwise(ends)):
        raise UserError(f"samples of stages must ascend from 1 to below the {most} of all: {list(samples)}")
    if bool(stages.finalists) != (held_out is not None):
        raise UserError("finalists need held-out samples, and held-out samples need finalists")
    begins = [0, *samples]
    chosen = {
        stage: StageObjective(everything.between(begin, end), stage > 0)
        for stage, (begin, end) in enumerate(zip(begins, ends, strict=True))
    }
    if held_out is not None:
        chosen[stages.held_out] = StageObjective(held_out, False)
    return chosen


def stretched(config: Phi3Config, target: Target, individual: Individual) -> Phi3Config:
    """Returns the config with longrope: plain up to the original length, the factors beyond it.

    Both lists have the attention factor, since transformers has only one.
    """
    entry = {
        "type": "longrope",
        "short_factor": [1.0] * len(individual.factors),
        "long_factor": list(individual.factors),
        "attention_factor": individual.attention_factor,
    }
    return config.replace(
        rope_scaling=entry,
        max_position_embeddings=target.length,
        original_max_position_embeddings=target.original,
    )


class _Scores:
    """The losses of each individual on the stages that it passed, and the perplexities that follow."""

    def __init__(self, objectives: Mapping[int, StageObjective]):
        self.objectives = objectives
        self._losses: dict[tuple[Individual, int], Losses] = {}

    def add(self, individual: Individual, stage: int, losses: Losses) -> float:
        """Adds the losses on a stage; returns the perplexity, with the stages that it adds to."""
        objective, adds = self.objectives[stage]
        if adds:
            earlier = self._losses[individual, stage - 1]
            losses = {length: loss + earlier[length] for length, loss in losses.items()}
        self._losses[individual, stage] = losses
        return objective.value(losses)


def run(
    search: RopeSearch, scores: _Scores, journal: Journal, measure_stage: Measure, rows: int, *, show: bool
) -> None:
    """Measures `rows` individuals at a time until the search is over; writes each batch."""
    costs = {stage: each.objective.tokens_to_read for stage, each in scores.objectives.items()}
    work = Work(search, costs)
    with FileProgress(100, show) as bar:
        while search.waiting:
            batch, stage = search.waiting[:rows], search.stage

            def progress(tokens: int) -> None:
                work.read(tokens)
                bar.update(work.text(), 100 * work.share, time_left(work.seconds_left))

            results = measure_stage(scores.objectives[stage].objective, batch, progress)
            search.add([scores.add(each, stage, losses) for each, losses in zip(batch, results, strict=True)])
            journal.add(_entries(batch, stage, results))


class Work:
    """The work of a search in tokens, of which some was done by earlier calls."""

    def __init__(self, search: RopeSearch, costs: Mapping[int, int]):
        self._search, self._costs = search, costs
        self._total = sum(costs[stage] * count for stage, count in search.total.items())
        self._before = sum(costs[each.stage] for each in search.scored)
        self._read, self._began = 0, monotonic()

    def read(self, tokens: int) -> None:
        """Counts tokens that the model has read."""
        self._read += tokens

    @property
    def share(self) -> float:
        """The finished share of the whole search."""
        return min((self._before + self._read) / self._total, 1.0)

    @property
    def seconds_left(self) -> float:
        seconds = monotonic() - self._began
        return max(self._total - self._before - self._read, 0) * seconds / max(self._read, 1)

    def text(self) -> str:
        """Returns the iteration and the best perplexity so far."""
        search = self._search
        if search.stage == search.stages.held_out:
            return "finalists on held-out text"
        done = search.results(search.stages.last)
        fitting = [perplexity for each, perplexity in done.items() if each in search.space]
        best = f", best perplexity {min(fitting):.4f}" if fitting else ""
        return f"iteration {search.iteration}{best}"


def _entries(batch: Sequence[Individual], stage: int, results: Sequence[Losses]) -> Iterator[dict[str, Any]]:
    for individual, losses in zip(batch, results, strict=True):
        sums = {str(length): [loss.loss, loss.tokens] for length, loss in losses.items()}
        yield individual._asdict() | {"stage": stage, "losses": sums}


def _restore(search: RopeSearch, scores: _Scores, journal: Journal) -> None:
    """Adds the losses of the journal to the search."""
    for entry in journal.entries:
        individual = Individual(tuple(entry["factors"]), entry["initial_tokens"], entry["attention_factor"])
        stage = entry["stage"]
        if not search.waiting or (search.waiting[0], search.stage) != (individual, stage):
            raise UserError(
                f"{journal.path} is from another version of NumPy, SciPy, cmaes or this program, which "
                "searches in another way; choose another output, or remove it to start over"
            )
        losses = {
            int(length): TextLoss(float(loss), tokens) for length, (loss, tokens) in entry["losses"].items()
        }
        search.add([scores.add(individual, stage, losses)])


def _measure(scorer: Scorer, base: RopeBase, rows: int) -> Measure:
    """Returns a function for the losses of individuals, `rows` at a time in one program."""

    def measure_stage(
        objective: RopeObjective, batch: Sequence[Individual], progress: OnProgress
    ) -> Sequence[Losses]:
        ropes = [
            ScoredRope.from_factors(base, each.factors, each.attention_factor, each.initial_tokens)
            for each in batch
        ]
        return measure(scorer, objective, ropes, rows, progress)

    return measure_stage


def _known(config: Phi3Config, target: Target, lengths: Sequence[int]) -> dict[str, Individual]:
    """Returns the usual methods, and the model's own rope if it is not plain."""
    if (least := min(lengths)) <= target.original:
        raise UserError(
            f"length={least} must be more than the {target.original} tokens that the model was "
            "trained on: otherwise nothing is stretched"
        )
    base = target.base(config)
    known = known_scalings(base, target.stretch)
    inv_freq, attention = frequencies_for(config, target.length)
    factors = base.inv_freq().astype(np.float64) / inv_freq
    if attention != 1 or np.any(factors != 1):
        known[OWN] = Individual(tuple(factors.tolist()), 0, attention)
    return known


def _knot_ends(base: RopeBase) -> tuple[float, float]:
    """Returns the pairs that turn MOST_TURNS and LEAST_TURNS times within the original length."""
    each = turns(base.inv_freq(), base.original_max_position_embeddings)
    first, last = np.interp(-np.log([MOST_TURNS, LEAST_TURNS]), -np.log(each), np.arange(len(each)))
    return float(first), float(last)


def _attention_range(
    choices: Sequence[str | float], config: Phi3Config, target: Target
) -> tuple[float, float]:
    value = partial(attention_factor, target.base(config), stretch=target.stretch)
    factors = [value(each) if isinstance(each, str) else float(each) for each in choices]
    return min(factors), max(factors)
