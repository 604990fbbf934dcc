"""`phi3-jax bench-finetune`: a recipe of `phi3-jax finetune` in transformers, with PyTorch, side by side.

Both begin with the same parameters, take the same batches at the same learning rates, and are scored by the
same functions; what differs is who computes.
"""

import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from phi3_jax.bench.turns import take_turns
from phi3_jax.data.examples import Examples
from phi3_jax.data.loader import Loader, load
from phi3_jax.errors import UserError
from phi3_jax.runs.allocator import keep_freed_memory
from phi3_jax.runs.files import replacing
from phi3_jax.runs.json_values import json_value

from .evaluate import Evaluator
from .finetune import Standing
from .progress import Progress
from .recipe import Recipe, make_trainer, new_model, prepare, with_adapters
from .settings import Settings

if TYPE_CHECKING:
    from .bench_torch import Theirs

logger = logging.getLogger(__name__)

AGREE = {"float32": 1e-4, "bfloat16": 2e-2}
"""How far losses may lie apart, relative to those above 1, if both sides do the same."""


@dataclass(frozen=True)
class Work:
    """What a turn does: the run's first steps, again and again, without dropout, so that losses compare."""

    settings: Settings
    steps: int
    cache_dir: Path | None


class Turn(NamedTuple):
    """What came of one turn."""

    seconds: float
    losses: list[float]


def run_turns(settings: Settings, *, steps: int, rounds: int, cache_dir: Path | None) -> None:
    """Measures and prints a table; see the command's help for the arguments.

    Raises:
        ValueError: as `finetune`; a setting that has no counterpart in transformers.
    """
    check(settings)
    work = Work(settings.model_copy(update={"dropout": False}), steps, cache_dir)
    sides: Any = {"phi3-jax": (_ours, work), "transformers": (_theirs, work)}
    results: Any = take_turns(sides, rounds)
    _print_turns(results, work)


def check(settings: Settings) -> None:
    """Whether transformers can do what the settings say.

    Raises:
        ValueError: it can not.
    """
    if settings.optim != "adamw":
        raise UserError(f"optim={settings.optim} is not compared with transformers; use adamw")
    if settings.remat == "dots":
        raise UserError("remat=dots has no counterpart in transformers; use full or none")


def _ours(work: Work) -> Callable[[], Turn]:
    """Turns of this package."""
    keep_freed_memory()  # as the command does
    recipe = prepare(work.settings, None, work.cache_dir)
    model = with_adapters(new_model(recipe, None), work.settings)
    trainer = make_trainer(recipe, model, None)
    state = trainer.start(model)
    batches = _first_batches(recipe, work.steps)

    def turn() -> Turn:
        nonlocal state
        began = time.perf_counter()
        losses = []
        for arrays in batches:
            state, metrics = trainer.step(state, arrays)
            losses.append(metrics.loss)
        found = [float(loss) for loss in losses]
        jax.block_until_ready(state)
        return Turn(time.perf_counter() - began, found)

    return turn


def _theirs(work: Work) -> Callable[[], Turn]:
    """Turns of transformers."""
    from .bench_torch import Theirs

    recipe = prepare(work.settings, None, work.cache_dir)
    side = Theirs(recipe)
    batches = _first_batches(recipe, work.steps)
    done = 0

    def turn() -> Turn:
        nonlocal done
        began = time.perf_counter()
        losses = []
        for arrays in batches:
            losses.append(side.step(arrays, float(recipe.schedule(done))))
            done += 1
        return Turn(time.perf_counter() - began, losses)

    return turn


def _first_batches(recipe: Recipe, steps: int) -> list[Any]:
    with _batches(recipe, steps) as batches:
        return [batch.arrays for batch in batches]


def _print_turns(results: Mapping[str, list[Turn]], work: Work) -> None:
    settings, turns = work.settings, list(zip(*results.values(), strict=True))
    title = f"{settings.task}, {settings.trained}, {settings.dtype}, {settings.train_batch_size} rows"
    table = Table("", *results, "ratio", title=f"{title}, {work.steps} steps, median of {len(turns)}")
    each = [statistics.median(turn.seconds for turn in side) / work.steps for side in results.values()]
    ratio = statistics.median(other.seconds / mine.seconds for mine, other in turns)
    table.add_row("seconds a step", *(f"{seconds:.3f}" for seconds in each), f"{ratio:.2f}")
    for label, number in (("first loss", 0), ("last loss", -1)):
        losses = (side[number].losses[number] for side in results.values())
        table.add_row(label, *(f"{loss:.4f}" for loss in losses), "")
    Console().print(table)
    # Of the first turn: rounding is fed back at every step, so that the sides drift apart.
    mine, other = (np.asarray(side[0].losses) for side in results.values())
    most = float(np.max(np.abs(mine - other) / np.maximum(1.0, np.abs(other))))
    print(f"losses of the first {mine.size} steps differ by {most:.1e} at most")
    if not most <= AGREE[settings.dtype]:
        logger.warning(
            "in %s they should differ by at most %g: the two do not train alike",
            *(settings.dtype, AGREE[settings.dtype]),
        )


@dataclass(frozen=True)
class WholeRun:
    """What came of training in transformers."""

    metrics: dict[str, dict[str, float]]
    """Of the best parameters, by split."""
    best_step: int
    validation: dict[int, dict[str, float]]
    """By step."""
    seconds_per_step: float
    """The median."""
    training_seconds: float
    evaluation_seconds: float
    total_seconds: float


def run_whole(settings: Settings, *, output: Path | None, cache_dir: Path | None) -> WholeRun:
    """Trains the whole recipe in transformers, prints what came of it, and writes that to `output` as JSON.

    Raises:
        ValueError: as `finetune`; a setting that has no counterpart in transformers.
        OSError: a file that cannot be read or written.
    """
    check(settings)
    if output is not None and not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no directory {output.parent}; make it first")
    from .bench_torch import Theirs

    began = time.perf_counter()
    recipe = prepare(settings, None, cache_dir)
    side = Theirs(recipe)
    print(f"{settings.task} in transformers, {settings.dtype}, {recipe.total_steps} steps", flush=True)
    training: list[float] = []
    evaluation: list[float] = []
    best_step, validation = _train(recipe, side, training, evaluation)
    metrics = {"validation": validation[best_step]}
    if recipe.data.test is not None:
        score = _evaluator(recipe, "test", recipe.data.test)
        with _timed(evaluation):
            metrics["test"], _ = score(side)
    result = WholeRun(
        metrics=metrics,
        best_step=best_step,
        validation=validation,
        seconds_per_step=statistics.median(training),
        training_seconds=sum(training),
        evaluation_seconds=sum(evaluation),
        total_seconds=time.perf_counter() - began,
    )
    _print_whole(result, recipe)
    if output is not None:
        told = {"settings": settings.model_dump(mode="json")} | vars(result)
        with replacing(output) as work:
            work.write_text(json.dumps(json_value(told), indent=2) + "\n", encoding="utf-8")
    return result


def _train(
    recipe: Recipe, side: "Theirs", training: list[float], evaluation: list[float]
) -> tuple[int, dict[int, dict[str, float]]]:
    """All steps, after which `side` has the best parameters: the step of these, and validations by step.

    Appends the seconds of each step and of each evaluation.
    """
    settings, total = recipe.settings, recipe.total_steps
    validate = _evaluator(recipe, "validation", recipe.data.validation)
    evaluate_every = settings.eval_steps or recipe.plan.steps_per_epoch
    patience = settings.early_stopping_patience
    standing, best = Standing(), side.trained()
    validation: dict[int, dict[str, float]] = {}
    with Progress(total, 0, show=True) as progress, _batches(recipe, total) as batches:
        for batch in batches:
            step, rate = batch.step + 1, float(recipe.schedule(batch.step))
            with _timed(training):
                loss = side.step(batch.arrays, rate)
            if not math.isfinite(loss):
                raise UserError(f"step {step} has the loss {loss}; try a smaller learning_rate")
            seen = {"loss": loss, "learning_rate": rate, "seconds_per_step": statistics.median(training)}
            progress.update(step, seen)
            if step % evaluate_every and step != total:
                continue
            with _timed(evaluation):
                validation[step], _ = validate(side)
            progress.say(f"step {step}, validation: {_listed(validation[step])}")
            standing = standing.after(step, validation[step][recipe.metric], recipe.sign)
            if standing.best_step == step:
                best = side.trained()
            if patience is not None and standing.worse >= patience:
                break
    side.restore(best)
    assert standing.best_step is not None
    return standing.best_step, validation


def _evaluator(recipe: Recipe, split: str, examples: Examples) -> Evaluator:
    """Scores `Theirs` as `finetune` scores a state of ours."""
    from .bench_torch import Theirs

    return Evaluator(
        Theirs.score,
        examples,
        kind=recipe.kind,
        split=split,
        labels=recipe.data.labels,
        pad_token_id=recipe.pad_token_id,
        rows=recipe.settings.eval_batch_size,
        most=recipe.settings.max_buckets,
        mesh=None,
    )


@contextmanager
def _batches(recipe: Recipe, stop: int) -> Iterator[Loader]:
    """The run's batches up to step `stop`, in order."""
    batches = load(recipe.data.train, recipe.plan, pad_token_id=recipe.pad_token_id, stop=stop)
    try:
        yield batches
    finally:
        batches.close()


@contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    """Appends how long the block takes."""
    began = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - began)


def _print_whole(result: WholeRun, recipe: Recipe) -> None:
    for split, metrics in result.metrics.items():
        print(f"{split}: {_listed(metrics)}")
    print(f"best at step {result.best_step} of {recipe.total_steps}, by {recipe.metric}")
    parts = {
        "training": result.training_seconds,
        "evaluation": result.evaluation_seconds,
        "all": result.total_seconds,
    }
    times = ", ".join(f"{name} {timedelta(seconds=round(seconds))}" for name, seconds in parts.items())
    print(f"{result.seconds_per_step:.3f} s a step (median); {times}", flush=True)


def _listed(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
