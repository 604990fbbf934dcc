"""A search for rope factors on a model and a text, from the first perplexity to a model directory."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from phi3_jax.checkpoint import open_checkpoint
from phi3_jax.checkpoint.fingerprint import fingerprint
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.rope_argument import trained_length
from phi3_jax.config.rope_scaling import RopeBase
from phi3_jax.errors import UserError
from phi3_jax.evaluation.rope_search import (
    BOUND,
    YARN,
    Evolution,
    Individual,
    RopeSearch,
    Scored,
    Space,
    known_scalings,
    longrope_attention_factor,
)
from phi3_jax.evaluation.rope_search_results import write_results
from phi3_jax.evaluation.scorer import Scorer, frequencies_for
from phi3_jax.evaluation.texts import read_text
from phi3_jax.model import Phi3ForCausalLM
from phi3_jax.model.loading import load_abstract
from phi3_jax.pipeline import Pipeline
from phi3_jax.runs.journal import Journal
from phi3_jax.runs.progress import FileProgress, time_left

ROWS, ROWS_ON_CPU = 16, 4
"""Individuals at a time, at most; a CPU has little to gain from more, and a kill loses as many."""

OWN = "model"
"""What a model's own rope is called among the known ones, if it has another than the plain one."""

Measure = Callable[[Sequence[Individual], Callable[[float], None]], Sequence[float]]
"""Perplexities of individuals; tells which share of the work is done."""


@dataclass(frozen=True)
class Target:
    """What is searched for: a stretch from `original` tokens to `length`."""

    original: int
    length: int

    @property
    def stretch(self) -> float:
        return self.length / self.original


@dataclass(frozen=True)
class SearchResult:
    """What came of a search."""

    search: RopeSearch
    target: Target
    fresh: int
    """Individuals that this call measured; the others were known from before."""
    seconds: float


def search_ropes(
    model: Path,
    text: Path,
    output: Path,
    *,
    length: int,
    evolution: Evolution,
    windows: int = 1,
    skip_tokens: int = 0,
    attention_factors: Sequence[str | float] = (1.0, "longrope", YARN),
    initial_tokens: Sequence[int] = (0,),
    bound: float = BOUND,
    batch_size: int | None = None,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    overwrite: bool = False,
    show: bool = True,
) -> SearchResult:
    """Searches factors that stretch a model to `length` tokens; writes them and a model that has them.

    After each batch of individuals the state is on the disk: after a kill the same call goes on with it, to
    the same result.

    Args:
        model: a checkpoint; its factors are relative to plain rope with its theta.
        text: whose perplexity is to be low; not what is measured on later.
        output: a directory.
        windows: stretches of `length` tokens, evenly spread over the text.
        skip_tokens: of the text, at its beginning.
        attention_factors: to choose from; "longrope" and "yarn" stand for those methods' formulas.
        initial_tokens: numbers of tokens kept unscaled, to choose from; 0 must be one.
        bound: the largest factor, in units of the stretch.
        batch_size: individuals at a time; default: by memory, at most 4 on CPU and 16 elsewhere.
        overwrite: begin anew where the output holds something else.

    Raises:
        ValueError: what was asked cannot be done, before any work.
    """
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    target = Target(trained_length(config), length)
    known = _known(config, target)
    space = Space(
        bound=bound * target.stretch,
        attention_factors=_attention_factors(attention_factors, target, known),
        initial_tokens=tuple(sorted(set(initial_tokens))),
    )
    search = RopeSearch(space, evolution, known)
    content = read_text(text)
    parts = _windows(checkpoint.source.tokenizer().encode(content), text, length, windows, skip_tokens)
    asked = {
        "model": str(model.resolve()),
        "model_files": fingerprint(model),
        "text_digest": hashlib.blake2b(content.encode(), digest_size=16).hexdigest(),
        "length": length,
        "windows": windows,
        "skip_tokens": skip_tokens,
        "batch_size": batch_size,
        "dtype": dtype,
        "mesh": None if mesh is None else dict(mesh.shape),
        **asdict(space),
        **asdict(evolution),
    }
    began = monotonic()
    with Journal(output / "state.json", asked, overwrite=overwrite) as journal:
        _tell_again(search, journal)
        before = len(search.scored)
        if search.waiting:
            planned = Scorer(load_abstract(Phi3ForCausalLM, checkpoint, dtype=dtype, mesh=mesh))
            most = min(evolution.population, ROWS_ON_CPU if planned.compiled.on_cpu else ROWS)
            rows = batch_size or journal.decide("batch_size", lambda: _rows(planned, length, most))
            planned.check_memory(length, rows)
            scorer = Scorer(Pipeline.load(checkpoint, dtype=dtype, mesh=mesh).compiled)
            run(search, journal, _measure(scorer, parts, config, rows), rows, show=show)
        config = stretched(config, target, search.best(initial_tokens=0).individual)
        write_results(output, search, {"text": str(text), **asked}, model, config)
    return SearchResult(search, target, len(search.scored) - before, monotonic() - began)


def stretched(config: Phi3Config, target: Target, individual: Individual) -> Phi3Config:
    """The config as an ordinary longrope one: plain up to the original length, beyond it the factors.

    The attention factor belongs to both lists: transformers knows one.
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
    """Of the tokens behind the initial ones, as longrope computes them."""
    return 1 / (np.asarray(individual.factors, np.float32) * base.tokens_per_radian())


def run(search: RopeSearch, journal: Journal, measure: Measure, rows: int, *, show: bool) -> None:
    """Measures what waits, `rows` at a time, until the search is over; each batch is safe before the next."""
    began, before = monotonic(), len(search.scored)
    with FileProgress(search.total, show) as progress:

        def tell(share: float) -> None:
            done = len(search.scored) + share * min(rows, len(search.waiting))
            iteration = f"iteration {search.iteration} of {search.evolution.iterations}"
            best = ""
            if any(each.individual in search.space for each in search.scored):
                best = f", best perplexity {search.best().perplexity:.4f}"
            seconds = (monotonic() - began) / max(done - before, 1e-9) * (search.total - done)
            progress.update(iteration + best, done, time_left(seconds) if done > before else "")

        while search.waiting:
            batch = search.waiting[:rows]
            search.tell(measure(batch, tell))
            journal.add(_entry(each) for each in search.scored[-len(batch) :])
            tell(0.0)


def _entry(scored: Scored) -> dict[str, Any]:
    return scored.individual._asdict() | {"perplexity": scored.perplexity}


def _tell_again(search: RopeSearch, journal: Journal) -> None:
    """What was measured before."""
    for entry in journal.entries:
        genes = tuple(entry["factors"]), entry["initial_tokens"], entry["attention_factor"]
        if not search.waiting or search.waiting[0] != Individual(*genes):
            raise UserError(
                f"{journal.path} was written by another version of NumPy or of this program, whose search "
                "went another way; choose another output, or remove it to begin anew"
            )
        search.tell([float(entry["perplexity"])])


def _measure(
    scorer: Scorer, parts: Sequence[Int[np.ndarray, " T"]], config: Phi3Config, rows: int
) -> Measure:
    """Perplexity over all windows, `rows` individuals at a time through one program."""
    base = config.rope_base

    def measure(batch: Sequence[Individual], tell: Callable[[float], None]) -> list[float]:
        filled = [*batch, *[batch[0]] * (rows - len(batch))]
        inv_freq = np.stack([inverse_frequencies(base, each) for each in filled])
        attention = np.array([each.attention_factor for each in filled], np.float32)
        initial = np.array([each.initial_tokens for each in filled], np.int32)
        losses, done = np.zeros(rows), 0
        predicted = sum(len(part) - 1 for part in parts)

        def progress(tokens: int) -> None:
            nonlocal done
            done += tokens
            tell(done / (rows * predicted))

        for part in parts:
            scores = scorer.score(part, inv_freq, attention, initial_tokens=initial, progress=progress)
            losses += scores.total
        with np.errstate(over="ignore"):
            return np.exp(losses[: len(batch)] / predicted).tolist()

    return measure


def _known(config: Phi3Config, target: Target) -> dict[str, Individual]:
    """The usual methods, and the model's own rope where it has another."""
    if target.length <= target.original:
        raise UserError(
            f"length={target.length} must be beyond the {target.original} tokens that the model was trained "
            "on: there is nothing to stretch"
        )
    base = replace(
        config.rope_base,
        max_position_embeddings=target.length,
        original_max_position_embeddings=target.original,
    )
    known = known_scalings(base, target.stretch)
    if config.rope_scaling.rope_type != "default":
        inv_freq, attention = frequencies_for(config, target.length)
        factors = (base.inv_freq().astype(np.float64) / inv_freq).tolist()
        known[OWN] = Individual(tuple(factors), 0, attention)
    return known


def _attention_factors(
    asked: Sequence[str | float], target: Target, known: Mapping[str, Individual]
) -> tuple[float, ...]:
    formulas = {
        "longrope": longrope_attention_factor(target.stretch, target.original),
        YARN: known[YARN].attention_factor,
    }
    return tuple(sorted({formulas[each] if isinstance(each, str) else float(each) for each in asked}))


def _windows(
    tokens: Sequence[int], text: Path, length: int, windows: int, skip: int
) -> list[Int[np.ndarray, " T"]]:
    """Windows of the text behind what is skipped, as far apart as they can be."""
    left = len(tokens) - skip
    if left < windows * length:
        behind = f" behind the {skip:,} that are skipped" if skip else ""
        raise UserError(
            f"{text} has {max(left, 0):,} tokens{behind}; {windows} windows of {length:,} need "
            f"{windows * length:,}: give a longer text, a shorter length or fewer windows"
        )
    starts = range(skip, skip + windows * (left // windows), left // windows)
    return [np.asarray(tokens[start : start + length], np.int32) for start in starts]


def _rows(scorer: Scorer, length: int, most: int) -> int:
    """As many individuals as memory holds at a time."""
    for rows in range(most, 1, -1):
        try:
            scorer.check_memory(length, rows)
        except ValueError:
            continue
        return rows
    return 1
