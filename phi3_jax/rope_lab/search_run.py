"""Searches rope factors with a model and a text, and writes a model directory that has them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from phi3_jax.checkpoint import open_checkpoint
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.rope_argument import trained_length
from phi3_jax.config.rope_types import RopeBase
from phi3_jax.errors import UserError
from phi3_jax.evaluation.run_options import STATE, model_options
from phi3_jax.evaluation.scorer import Scorer, frequencies_for
from phi3_jax.evaluation.texts import read_text, text_digest
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.loading import load_abstract
from phi3_jax.pipeline import Pipeline
from phi3_jax.rope_lab.search import (
    BOUND,
    LONGROPE,
    YARN,
    Evolution,
    Individual,
    RopeSearch,
    Scored,
    Space,
    attention_factor,
    known_scalings,
)
from phi3_jax.rope_lab.search_results import write_results
from phi3_jax.runs.progress import FileProgress, time_left
from phi3_jax.storage import targets
from phi3_jax.storage.journal import Journal

ROWS, ROWS_ON_CPU = 16, 4
"""The most individuals at a time; a CPU gains little from more, and a kill loses more work."""

OWN = "model"
"""The name of a model's own rope among the known ones, if it is not plain."""

Measure = Callable[[Sequence[Individual], Callable[[float], None]], Sequence[float]]
"""Returns the perplexities of individuals; calls its second argument with the finished share."""


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
    """Individuals that this call measured; an earlier call measured the others."""
    seconds: float


def search_ropes(
    model: Path,
    text: Path,
    output: targets.Target,
    *,
    length: int,
    evolution: Evolution,
    windows: int = 1,
    skip_tokens: int = 0,
    attention_factors: Sequence[str | float] = (1.0, LONGROPE, YARN),
    initial_tokens: Sequence[int] = (0,),
    bound: float = BOUND,
    batch_size: int | None = None,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    overwrite: bool = False,
    show: bool = True,
) -> SearchResult:
    """Searches factors that stretch a model to `length` tokens; writes them and a model that has them.

    The state is written after each batch of individuals; after a kill the same call resumes and ends with
    the same result.

    Args:
        model: a checkpoint; its factors are relative to plain rope with its theta.
        text: the text of the perplexity; don't use it for later measurements.
        output: the path or URL of a directory.
        windows: parts of `length` tokens, evenly spread over the text.
        skip_tokens: tokens to skip at the start of the text.
        attention_factors: choices; "longrope" and "yarn" stand for the formulas of those methods.
        initial_tokens: choices for the number of tokens that are kept unscaled; 0 must be one.
        bound: the largest factor, relative to the stretch.
        batch_size: individuals at a time; default: by memory, at most 4 on CPU and 16 elsewhere.
        overwrite: start over if the output was started with other options.

    Raises:
        UserError: an option is wrong, or the batch does not fit in memory; it is raised before any work.
    """
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    target = Target(trained_length(config), length)
    known = _known(config, target)
    factors = _attention_factors(attention_factors, config, target)
    space = Space(bound * target.stretch, factors, tuple(sorted(set(initial_tokens))))
    search = RopeSearch(space, evolution, known)
    content = read_text(text)
    parts = _windows(checkpoint.source.tokenizer().encode(content), text, length, windows, skip_tokens)
    options = model_options(model, dtype, mesh) | asdict(space) | asdict(evolution)
    options |= {"text_digest": text_digest(content), "length": length, "windows": windows}
    options |= {"skip_tokens": skip_tokens, "batch_size": batch_size}
    began = monotonic()
    with Journal(targets.target_in(output, STATE), options, overwrite=overwrite) as journal:
        _restore(search, journal)
        before = len(search.scored)
        if search.waiting:
            planned = Scorer(load_abstract(Phi3ForCausalLM, checkpoint, dtype=dtype, mesh=mesh))
            rows = batch_size or journal.decide("batch_size", lambda: _rows(planned, length, evolution))
            planned.check_memory(length, rows)
            scorer = Scorer(Pipeline.load(checkpoint, dtype=dtype, mesh=mesh).compiled)
            run(search, journal, _measure(scorer, parts, config, rows), rows, show=show)
        config = stretched(config, target, search.best(initial_tokens=0).individual)
        write_results(output, search, {"text": str(text), **options}, model, config)
    return SearchResult(search, target, len(search.scored) - before, monotonic() - began)


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


def inverse_frequencies(base: RopeBase, individual: Individual) -> Float[np.ndarray, " P"]:
    """Returns the frequencies of the tokens after the initial ones, computed as longrope does."""
    return 1 / (np.asarray(individual.factors, np.float32) * base.tokens_per_radian())


def run(search: RopeSearch, journal: Journal, measure: Measure, rows: int, *, show: bool) -> None:
    """Measures `rows` individuals at a time until the search is over; writes each batch."""
    began, before = monotonic(), len(search.scored)
    with FileProgress(search.total, show) as progress:

        def update(share: float) -> None:
            done = len(search.scored) + share * min(rows, len(search.waiting))
            iteration = f"iteration {search.iteration} of {search.evolution.iterations}"
            best = ""
            if any(each.individual in search.space for each in search.scored):
                best = f", best perplexity {search.best().perplexity:.4f}"
            seconds = (monotonic() - began) / max(done - before, 1e-9) * (search.total - done)
            progress.update(iteration + best, done, time_left(seconds) if done > before else "")

        while search.waiting:
            batch = search.waiting[:rows]
            search.add(measure(batch, update))
            journal.add(_entry(each) for each in search.scored[-len(batch) :])
            update(0.0)


def _entry(scored: Scored) -> dict[str, Any]:
    return scored.individual._asdict() | {"perplexity": scored.perplexity}


def _restore(search: RopeSearch, journal: Journal) -> None:
    """Adds the perplexities of the journal to the search."""
    for entry in journal.entries:
        genes = tuple(entry["factors"]), entry["initial_tokens"], entry["attention_factor"]
        if not search.waiting or search.waiting[0] != Individual(*genes):
            raise UserError(
                f"{journal.path} is from another version of NumPy or this program, which searches in another "
                "way; choose another output, or remove it to start over"
            )
        search.add([float(entry["perplexity"])])


def _measure(
    scorer: Scorer, parts: Sequence[Int[np.ndarray, " T"]], config: Phi3Config, rows: int
) -> Measure:
    """Returns a function for the perplexity over all windows, `rows` individuals at a time in one program."""
    base = config.rope_base

    def measure(batch: Sequence[Individual], update: Callable[[float], None]) -> list[float]:
        padded = [*batch, *[batch[0]] * (rows - len(batch))]
        inv_freq = np.stack([inverse_frequencies(base, each) for each in padded])
        attention = np.array([each.attention_factor for each in padded], np.float32)
        initial = np.array([each.initial_tokens for each in padded], np.int32)
        losses, done = np.zeros(rows), 0
        predicted = sum(len(part) - 1 for part in parts)

        def progress(tokens: int) -> None:
            nonlocal done
            done += tokens
            update(done / (rows * predicted))

        for part in parts:
            scores = scorer.score(part, inv_freq, attention, initial_tokens=initial, progress=progress)
            losses += scores.total
        with np.errstate(over="ignore"):
            return np.exp(losses[: len(batch)] / predicted).tolist()

    return measure


def _known(config: Phi3Config, target: Target) -> dict[str, Individual]:
    """Returns the usual methods, and the model's own rope if it is not plain."""
    if target.length <= target.original:
        raise UserError(
            f"length={target.length} must be more than the {target.original} tokens that the model was "
            "trained on: otherwise nothing is stretched"
        )
    base = target.base(config)
    known = known_scalings(base, target.stretch)
    inv_freq, attention = frequencies_for(config, target.length)
    factors = base.inv_freq().astype(np.float64) / inv_freq
    if attention != 1 or np.any(factors != 1):
        known[OWN] = Individual(tuple(factors.tolist()), 0, attention)
    return known


def _attention_factors(
    choices: Sequence[str | float], config: Phi3Config, target: Target
) -> tuple[float, ...]:
    base = target.base(config)
    return tuple(
        sorted(
            {
                attention_factor(base, each, target.stretch) if isinstance(each, str) else float(each)
                for each in choices
            }
        )
    )


def _windows(
    tokens: Sequence[int], text: Path, length: int, windows: int, skip: int
) -> list[Int[np.ndarray, " T"]]:
    """Returns windows of the text after the skipped tokens, as far apart as possible."""
    left = len(tokens) - skip
    if left < windows * length:
        after = f" after the {skip:,} that are skipped" if skip else ""
        raise UserError(
            f"{text} has {max(left, 0):,} tokens{after}; {windows} windows of {length:,} need "
            f"{windows * length:,}: give a longer text, a shorter length or fewer windows"
        )
    starts = range(skip, skip + windows * (left // windows), left // windows)
    return [np.asarray(tokens[start : start + length], np.int32) for start in starts]


def _rows(scorer: Scorer, length: int, evolution: Evolution) -> int:
    """Returns how many individuals fit in memory at a time, at least one."""
    most = min(evolution.population, ROWS_ON_CPU if scorer.compiled.on_cpu else ROWS)
    return next((rows for rows in range(most, 1, -1) if scorer.fits(length, rows)), 1)
