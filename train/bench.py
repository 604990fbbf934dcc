"""`phi3-jax bench-finetune`: a recipe of `phi3-jax finetune` here and in transformers, side by side.

Both sides start with the same parameters, take the same batches at the same learning rates, and are scored by
the same functions.
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
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from phi3_jax.bench.turns import take_turns
from phi3_jax.data.examples import Examples
from phi3_jax.data.loader import load
from phi3_jax.errors import UserError
from phi3_jax.runs.allocator import keep_freed_memory
from phi3_jax.runs.files import write_text
from phi3_jax.runs.json_values import json_value

from .bench_torch import TransformersTraining
from .evaluate import EvaluationState, Evaluator, check_finite
from .progress import Progress
from .recipe import Recipe, make_recipe, make_trainer, new_model, with_adapters
from .settings import Settings

logger = logging.getLogger(__name__)

AGREE = {"float32": 1e-4, "bfloat16": 2e-2}
"""How far the losses of two equal sides may differ: relative for losses above 1, else absolute."""


@dataclass(frozen=True)
class TurnOptions:
    """The options of a turn: it takes the run's first steps, without dropout, so that losses compare."""

    settings: Settings
    steps: int
    cache_dir: Path | None


class TurnResult(NamedTuple):
    """The result of one turn."""

    seconds: float
    losses: list[float]


def run_turns(settings: Settings, *, steps: int, rounds: int, cache_dir: Path | None) -> None:
    """Measures both sides and prints a table; the command's help describes the arguments.

    Raises:
        UserError: as in `finetune`, or a setting has no counterpart in transformers.
    """
    check_comparable(settings)
    options = TurnOptions(settings.model_copy(update={"dropout": False}), steps, cache_dir)
    sides: Any = {"phi3-jax": (_ours, options), "transformers": (_theirs, options)}
    results: Any = take_turns(sides, rounds)
    _print_turns(results, options)


def check_comparable(settings: Settings) -> None:
    """Checks that every setting has a counterpart in transformers.

    Raises:
        UserError: one has none.
    """
    if settings.optim != "adamw":
        raise UserError(f"optim={settings.optim} is not compared with transformers; use adamw")
    if settings.remat not in ("auto", "full", "none"):
        raise UserError(f"remat={settings.remat} has no counterpart in transformers; use full or none")


def _ours(options: TurnOptions) -> Callable[[], TurnResult]:
    """Returns a function that takes a turn of this package."""
    keep_freed_memory()  # as the command does
    recipe = make_recipe(options.settings, None, options.cache_dir)
    model = with_adapters(new_model(recipe, None), recipe)
    trainer = make_trainer(recipe, model, None)
    state = trainer.start(model)
    batches = _first_batches(recipe, options.steps)

    def turn() -> TurnResult:
        nonlocal state
        began = time.perf_counter()
        losses = []
        for arrays in batches:
            state, metrics = trainer.step_in_batches(state, arrays)
            losses.append(metrics.loss)
        numbers = [float(loss) for loss in losses]
        jax.block_until_ready(state)
        return TurnResult(time.perf_counter() - began, numbers)

    return turn


def _theirs(options: TurnOptions) -> Callable[[], TurnResult]:
    """Returns a function that takes a turn of transformers."""
    recipe = make_recipe(options.settings, None, options.cache_dir)
    training = TransformersTraining(recipe)
    batches = _first_batches(recipe, options.steps)
    done = 0

    def turn() -> TurnResult:
        nonlocal done
        began = time.perf_counter()
        losses = []
        for arrays in batches:
            losses.append(training.step(arrays, float(recipe.schedule(done))))
            done += 1
        return TurnResult(time.perf_counter() - began, losses)

    return turn


def _first_batches(recipe: Recipe, steps: int) -> list[list[Any]]:
    with _steps(recipe, steps) as every:
        return list(every)


def _print_turns(results: Mapping[str, list[TurnResult]], options: TurnOptions) -> None:
    settings, turns = options.settings, list(zip(*results.values(), strict=True))
    title = f"{settings.task}, {settings.trained}, {settings.dtype}, {settings.train_batch_size} rows"
    table = Table("", *results, "ratio", title=f"{title}, {options.steps} steps, median of {len(turns)}")
    each = [statistics.median(turn.seconds for turn in side) / options.steps for side in results.values()]
    ratio = statistics.median(other.seconds / mine.seconds for mine, other in turns)
    table.add_row("seconds a step", *(f"{seconds:.3f}" for seconds in each), f"{ratio:.2f}")
    for label, number in (("first loss", 0), ("last loss", -1)):
        losses = (side[number].losses[number] for side in results.values())
        table.add_row(label, *(f"{loss:.4f}" for loss in losses), "")
    Console().print(table)
    # Only the first turn: every step feeds rounding errors back, so that the sides drift apart.
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
    """The result of training in transformers."""

    metrics: dict[str, dict[str, float]]
    """The metrics of the best parameters, by split."""
    best_step: int
    validation: dict[int, dict[str, float]]
    """The metrics of the validation data, by step."""
    seconds_per_step: float
    """The median."""
    training_seconds: float
    evaluation_seconds: float
    total_seconds: float


def run_whole(settings: Settings, *, output: Path | None, cache_dir: Path | None) -> WholeRun:
    """Trains the whole recipe in transformers, prints the result, and writes it to `output` as JSON.

    Raises:
        UserError: as in `finetune`, or a setting has no counterpart in transformers.
        OSError: a file cannot be read or written.
    """
    check_comparable(settings)
    if output is not None and not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no directory {output.parent}; make it first")
    began = time.perf_counter()
    recipe = make_recipe(settings, None, cache_dir)
    training = TransformersTraining(recipe)
    print(f"{settings.task} in transformers, {settings.dtype}, {recipe.total_steps} steps", flush=True)
    step_seconds: list[float] = []
    evaluation_seconds: list[float] = []
    best_step, validation = _train(recipe, training, step_seconds, evaluation_seconds)
    metrics = {"validation": validation[best_step]}
    if recipe.data.test is not None:
        evaluate = _evaluator(recipe, "test", recipe.data.test)
        with _timed(evaluation_seconds):
            metrics["test"], _ = evaluate(training)
    result = WholeRun(
        metrics=metrics,
        best_step=best_step,
        validation=validation,
        seconds_per_step=statistics.median(step_seconds),
        training_seconds=sum(step_seconds),
        evaluation_seconds=sum(evaluation_seconds),
        total_seconds=time.perf_counter() - began,
    )
    _print_whole(result, recipe)
    if output is not None:
        summary = {"settings": settings.model_dump(mode="json")} | vars(result)
        write_text(output, json.dumps(json_value(summary), indent=2) + "\n")
    return result


def _train(
    recipe: Recipe,
    training: TransformersTraining,
    step_seconds: list[float],
    evaluation_seconds: list[float],
) -> tuple[int, dict[int, dict[str, float]]]:
    """Takes all steps and restores the best parameters; returns their step, and validation metrics by step.

    Appends the seconds of each step and of each evaluation.
    """
    settings, total = recipe.settings, recipe.total_steps
    validate = _evaluator(recipe, "validation", recipe.data.validation)
    evaluate_every = settings.eval_steps or recipe.plan.steps_per_epoch
    state, best = EvaluationState(), training.trained()
    validation: dict[int, dict[str, float]] = {}
    with Progress(total, 0, show=True) as progress, _steps(recipe, total) as every:
        for step, batches in enumerate(every, 1):
            rate = float(recipe.schedule(step - 1))
            with _timed(step_seconds):
                loss = training.step(batches, rate)
            if not math.isfinite(loss):
                raise UserError(f"step {step} has the loss {loss}; try a smaller learning_rate")
            median = statistics.median(step_seconds)
            left = median * (total - step)
            progress.update(step, {"loss": loss, "learning_rate": rate, "seconds_per_step": median}, left)
            if step % evaluate_every and step != total:
                continue
            with _timed(evaluation_seconds):
                validation[step], _ = validate(training)
            check_finite(validation[step], recipe.metric, f"the evaluation after step {step}")
            progress.say(f"step {step}, validation: {_listed(validation[step])}")
            state = state.with_score(step, validation[step][recipe.metric], recipe.sign)
            if state.best_step == step:
                best = training.trained()
            if state.patience_is_over(settings.early_stopping_patience):
                break
    training.restore(best)
    assert state.best_step is not None
    return state.best_step, validation


def _evaluator(recipe: Recipe, split: str, examples: Examples) -> Evaluator:
    """Returns what scores a `TransformersTraining` as `finetune` scores a state of this package."""
    return Evaluator(TransformersTraining.score, examples, recipe, split=split, mesh=None)


@contextmanager
def _steps(recipe: Recipe, stop: int) -> Iterator[Iterator[list[Any]]]:
    """Yields the batches of each of the run's steps before step `stop`."""
    number = recipe.plan.step_batches
    batches = load(recipe.data.train, recipe.plan, pad_token_id=recipe.pad_token_id, stop=stop * number)
    try:
        yield ([next(batches).arrays for _ in range(number)] for _ in range(stop))
    finally:
        batches.close()


@contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    """Appends the seconds that the block takes."""
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
