"""A fine-tuning run from the first file to the report, to be read from top to bottom."""

import logging
import math
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from phi3_jax.checkpoint.source import CheckpointError
from phi3_jax.data.examples import Examples
from phi3_jax.data.loader import Batch, load
from phi3_jax.parallel import distributed
from phi3_jax.trainer.batches import local_rows, to_devices
from phi3_jax.trainer.step import Metrics

from .checkpoints import Checkpoints, remove_checkpoints
from .evaluate import EvaluationState, Evaluator, NotFiniteError, check_finite, scorer
from .interrupts import Interrupts
from .logs import RunLog
from .predictions import Predictions
from .progress import Progress
from .recipe import Recipe, make_recipe, make_trainer, new_model, with_adapters
from .report import Results
from .run_directory import CHECKPOINTS, RunDirectory, SplitMetrics
from .settings import Settings
from .speed import Speed
from .time_left import TimeLeft

logger = logging.getLogger(__name__)


class InterruptedRunError(Exception):
    """A signal ended the run, which has saved its state."""

    def __init__(self, step: int, signal: int):
        super().__init__(
            f"interrupted after step {step}, which is saved; the same command resumes the run from there"
        )
        self.signal = signal


def finetune(
    settings: Settings, *, mesh: Mesh | None = None, cache_dir: Path | None = None, show: bool = True
) -> SplitMetrics:
    """Trains, evaluates and saves; resumes an interrupted run with the same settings.

    Several processes all call this, with the same settings.

    Args:
        settings: of the run.
        mesh: the devices that share the model and the batches.
        cache_dir: the folder of the default model.
        show: whether process 0 shows a progress bar on standard error.

    Returns:
        Metrics of the parameters that are kept, by split.

    Raises:
        UserError: settings or data do not fit, or the loss or a metric is not finite.
        OSError: a file cannot be read or written; `CheckpointError` for models and checkpoints.
        InterruptedRunError: SIGTERM or Ctrl-C came; the state is saved.
    """
    recipe = make_recipe(settings, mesh, cache_dir)
    directory = RunDirectory(recipe)
    with ExitStack() as stack:
        stack.callback(directory.release)
        finished = distributed.from_primary(directory.open)
        if finished is not None:
            logger.warning("%s is finished; nothing is left to do", directory.path)
            return finished
        run = FinetuneRun(recipe, mesh)
        run.open(directory.path, stack)
        run.train(show and distributed.is_primary())
        run.restore_best()
        results, predictions = run.evaluate()
        directory.export(run.model())
        directory.report(Results(results, recipe.metric, run.evaluation.best_step, predictions))
        distributed.from_primary(lambda: directory.finish(results))
        if not settings.keep_checkpoints:
            run.close_checkpoints()
            distributed.from_primary(lambda: remove_checkpoints(directory.path / CHECKPOINTS))
    return results


class FinetuneRun:
    """A run's parameters, its step, and its best evaluation."""

    def __init__(self, recipe: Recipe, mesh: Mesh | None):
        self._recipe, self._settings, self._mesh = recipe, recipe.settings, mesh
        model = with_adapters(new_model(recipe, mesh), self._settings)
        self._trainer = make_trainer(recipe, model, mesh)
        self._state = self._trainer.start(model)
        self._speed = Speed(model.config, self._settings, mesh)
        self._score = scorer(self._trainer, recipe.kind, mesh)
        self._validate = self._evaluator("validation", recipe.data.validation)
        test = recipe.data.test
        self._test = None if test is None else self._evaluator("test", test)
        self._evaluate_every = self._settings.eval_steps or recipe.plan.steps_per_epoch
        self._save_every = self._settings.save_steps or self._evaluate_every
        self._dropout_key = jax.random.key(self._settings.seed) if self._settings.dropout else None
        self._own_rows = local_rows(recipe.plan.rows, mesh)
        # On CPU a step is done when it has been sent: nothing would run while its numbers are recorded.
        self._records_later = jax.default_backend() != "cpu"
        self._unrecorded: tuple[list[Batch], Metrics] | None = None
        self._first_evaluation = True
        self._pending_widths = set(recipe.plan.widths)
        self._time_left = TimeLeft(self._evaluation_steps())
        self.step = 0
        """How many steps are done."""
        self.evaluation = EvaluationState()

    def open(self, directory: Path, stack: ExitStack) -> None:
        """Opens checkpoints, batches and the log, which `stack` closes; restores the last checkpoint."""
        recipe = self._recipe
        self._checkpoints = Checkpoints(directory / CHECKPOINTS, greater_is_better=recipe.sign > 0)
        stack.callback(self._checkpoints.close)
        restored = self._checkpoints.restore_last(self._state)
        if restored is not None:
            self.step, self._state = restored.step, restored.state
            self.evaluation = EvaluationState(**restored.about["standing"])
            logger.warning("resuming after step %d of %d", self.step, recipe.total_steps)
        if restored is not None and restored.about.get("step_ranges", 1) != recipe.plan.step_ranges:
            logger.warning(
                "the steps before had other batches (other devices, or another version): the rest of this "
                "epoch has other examples than it would have had"
            )
        self._batches = load(
            recipe.data.train,
            recipe.plan,
            pad_token_id=recipe.pad_token_id,
            start=self.step * recipe.plan.step_batches,
            stop=recipe.total_steps * recipe.plan.step_batches,
            local_rows=self._own_rows,
        )
        stack.callback(self._batches.close)
        self._log = None
        if distributed.is_primary():
            self._log = stack.enter_context(RunLog(directory, resume_at=self.step))

    def train(self, show: bool) -> None:
        """Takes all steps, or fewer if evaluations stop getting better; evaluates and saves in between.

        Raises:
            NotFiniteError: the loss, the gradient norm or the metric of an evaluation is not finite.
            InterruptedRunError: a signal came; the state is saved.
        """
        total = self._recipe.total_steps
        self._recorded_at = perf_counter()
        with Progress(total, self.step, show) as self._progress, Interrupts() as interrupts:
            while self.step < total and not self._patience_is_over():
                self._take_step()
                interrupted = interrupts.at(self.step)
                if self.step % self._evaluate_every == 0 or self.step == total:
                    self._record_step()
                    self._validate_and_save()
                elif interrupted or self.step % self._save_every == 0:
                    self._record_step()
                    self._save(-self._recipe.sign * sys.float_info.max)
                if interrupted:
                    self._checkpoints.wait()
                    assert interrupts.received is not None
                    raise InterruptedRunError(self.step, interrupts.received)
            self._checkpoints.wait()
            self._checkpoints.keep(self.evaluation.best_step)

    def _patience_is_over(self) -> bool:
        return self.evaluation.patience_is_over(self._settings.early_stopping_patience)

    def _take_step(self) -> None:
        plan = self._recipe.plan
        batches = [next(self._batches) for _ in range(plan.step_batches)]
        arrays = [to_devices(each.arrays, plan.rows, self._mesh, self._own_rows) for each in batches]
        self._state, metrics = self._trainer.step_in_batches(self._state, arrays, self._dropout_key)
        if self._records_later:
            self._record_step()  # the one before, while this one runs
        self._unrecorded = batches, metrics
        if not self._records_later:
            self._record_step()
        self.step += 1

    def _record_step(self) -> None:
        """Checks, logs and shows the numbers of the last step, unless that is done."""
        if self._unrecorded is None:
            return
        (batches, metrics), self._unrecorded = self._unrecorded, None
        recipe, settings = self._recipe, self._settings
        loss, norm = float(metrics.loss), float(metrics.gradient_norm)
        done = batches[0].number // recipe.plan.step_batches
        rate = float(recipe.schedule(done))
        indices = np.concatenate([batch.indices for batch in batches])
        indices = indices[indices >= 0]
        step = done + 1
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NotFiniteError(_not_finite_message(loss, norm, rate, step, indices, recipe))
        tokens = int(recipe.data.train.lengths[indices].sum())
        shapes = [(recipe.plan.rows, batch.width) for batch in batches]
        speed = self._speed.after_step(tokens, shapes)
        values = {"loss": loss, "gradient_norm": norm, "learning_rate": rate} | speed
        if step % settings.logging_steps == 0 or step == recipe.total_steps:
            self._record("train", step, {name: x for name, x in values.items() if x is not None})
        new = self._pending_widths & {batch.width for batch in batches}
        self._pending_widths -= new
        self._time_left.add_step(self._seconds_since_record(), len(new))
        self._progress.update(step, values, self._seconds_left(step))

    def _seconds_since_record(self) -> float:
        now, before = perf_counter(), self._recorded_at
        self._recorded_at = now
        return now - before

    def _seconds_left(self, step: int) -> float | None:
        """Returns the seconds until the end of the run, with the evaluations at its end."""
        total, every = self._recipe.total_steps, self._evaluate_every
        evaluations: float = total // every - step // every + (total % every > 0 and step < total) + 1
        widths = set(self._validate.widths) if self._first_evaluation else set()
        if self._test is not None:
            evaluations += self._test.padded_tokens / self._validate.padded_tokens
            widths |= set(self._test.widths) - set(self._validate.widths)
        return self._time_left.seconds(total - step, evaluations, len(self._pending_widths), len(widths))

    def _evaluation_steps(self) -> float:
        """Returns the time of an evaluation in steps, as it follows from its tokens."""
        plan = self._recipe.plan
        tokens = self._validate.padded_tokens / (plan.padded_tokens / plan.steps_per_epoch)
        # A step's forward pass has this share of its operations.
        return tokens * {"full": 1 / 3, "lora": 1 / 2, "head": 1}[self._settings.trained]

    def _record(
        self, kind: Literal["train", "validation", "test"], step: int, values: dict[str, float]
    ) -> None:
        if self._log is not None:
            self._log.record(kind, step, values)

    def _validate_and_save(self) -> None:
        metrics, _ = self._validate(self._state)
        metric = self._recipe.metric
        score = metrics[metric]
        check_finite(metrics, metric, f"the evaluation of the validation data after step {self.step}")
        self._record("validation", self.step, metrics)
        self.evaluation = self.evaluation.with_score(self.step, score, self._recipe.sign)
        self._save(score)
        self._speed.pause()
        first = self._first_evaluation
        self._first_evaluation = False
        new_widths = len(self._validate.widths) if first else 0
        self._time_left.add_evaluation(self._seconds_since_record(), new_widths)
        shown = {metric: score, "validation_loss": metrics["loss"]}
        self._progress.update(self.step, shown, self._seconds_left(self.step))

    def _save(self, score: float) -> None:
        about = {"standing": asdict(self.evaluation), "step_ranges": self._recipe.plan.step_ranges}
        self._checkpoints.save(self.step, self._state, about, score)

    def close_checkpoints(self) -> None:
        """Ends the threads that write checkpoints, so that their folder can be removed."""
        self._checkpoints.close()

    def restore_best(self) -> None:
        """Restores the parameters with the best score; keeps the last ones if they cannot be read."""
        best = self.evaluation.best_step
        if best is None or best == self.step:
            return
        try:
            self._state = self._checkpoints.restore(best, self._state).state
        except CheckpointError as error:
            logger.warning("%s; the last parameters are kept instead of the best", error)

    def evaluate(self) -> tuple[SplitMetrics, Predictions | None]:
        """Returns the metrics of every split, and the predictions of the last one.

        Raises:
            NotFiniteError: the loss or the metric is not finite.
        """
        metric, kept = self._recipe.metric, self.evaluation.best_step or self.step
        metrics, predictions = self._validate(self._state)
        check_finite(
            metrics, metric, f"the evaluation of the validation data with the parameters of step {kept}"
        )
        results = {"validation": metrics}
        if self._test is not None:
            results["test"], predictions = self._test(self._state)
            check_finite(
                results["test"], metric, f"the evaluation of the test data with the parameters of step {kept}"
            )
            self._record("test", self.evaluation.best_step or self.step, results["test"])
        return results, predictions

    def model(self) -> Any:
        """Returns the trained model."""
        return self._trainer.model(self._state)

    def _evaluator(self, split: str, examples: Examples) -> Evaluator:
        return Evaluator(self._score, examples, self._recipe, split=split, mesh=self._mesh)


def _not_finite_message(
    loss: float, norm: float, rate: float, step: int, indices: np.ndarray, recipe: Recipe
) -> str:
    rows = [recipe.data.train.place(int(index)) for index in indices]
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    epoch = (step - 1) // recipe.plan.steps_per_epoch + 1
    return (
        f"step {step} (epoch {epoch}) has the loss {loss} and the gradient norm "
        f"{norm} at learning rate {rate:.3g}; its rows are {', '.join(rows[:3])}{more}. Nothing was saved "
        "since; try a smaller learning_rate, a longer warm-up, a smaller max_grad_norm or dtype float32"
    )
