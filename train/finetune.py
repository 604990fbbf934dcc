"""A fine-tuning run from the first file to the report, to be read from top to bottom."""

import logging
import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from phi3_jax.checkpoint.source import CheckpointError
from phi3_jax.data.examples import Examples
from phi3_jax.data.loader import Batch, load
from phi3_jax.errors import UserError
from phi3_jax.parallel import distributed
from phi3_jax.parallel.messages import tell
from phi3_jax.trainer.batches import local_rows, to_devices
from phi3_jax.trainer.step import Metrics

from .checkpoints import Checkpoints, remove_checkpoints
from .evaluate import (
    EvaluationState,
    Evaluator,
    NotFiniteError,
    StoppedEvaluationError,
    check_finite,
    scorer,
)
from .interrupts import Interrupts
from .logs import RunLog
from .predictions import Predictions
from .progress import Progress
from .recipe import Recipe, make_recipe, make_trainer, new_model, with_adapters
from .report import Results
from .run_directory import ADVICE, RunDirectory, SplitMetrics
from .saving import SaveClock, SavePlan
from .settings import Settings
from .speed import InputWait, Speed
from .time_left import TimeLeft

logger = logging.getLogger(__name__)


class InterruptedRunError(Exception):
    """A signal ended the run, which has saved its state if `save_strategy` allows."""

    def __init__(self, step: int, signal: int, saved: bool):
        state = "which is saved; the same command resumes the run from there"
        if not saved:
            state = "and save_strategy=no saved nothing; the same command starts the run over"
        super().__init__(f"interrupted after step {step}, {state}")
        self.signal = signal


def finetune(
    settings: Settings, *, mesh: Mesh | None = None, cache_dir: Path | None = None, show: bool = True
) -> SplitMetrics:
    """Trains, evaluates and saves; resumes an interrupted run, or a finished one that is to take more steps.

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
        InterruptedRunError: SIGTERM or Ctrl-C came.
    """
    recipe = make_recipe(settings, mesh, cache_dir)
    directory = RunDirectory(recipe)
    with ExitStack() as stack:
        stack.callback(directory.release)
        finished = distributed.from_primary(directory.open)
        if finished is not None:
            logger.warning("%s is finished; nothing is left to do", directory.path)
            return finished
        if recipe.remat_choice is not None:
            tell(str(recipe.remat_choice))
        run = FinetuneRun(recipe, mesh)
        run.open(directory, stack)
        distributed.from_primary(directory.begin)
        run.train(show and distributed.is_primary())
        run.restore_best()
        results, predictions = run.evaluate()
        directory.export(run.model())
        directory.report(Results(results, recipe.metric, run.kept_step, predictions))
        distributed.from_primary(lambda: directory.finish(results))
        if not settings.keep_checkpoints:
            run.close_checkpoints()
            distributed.from_primary(lambda: remove_checkpoints(directory.checkpoints))
    return results


class FinetuneRun:
    """A run's parameters, its step, and its best evaluation."""

    def __init__(self, recipe: Recipe, mesh: Mesh | None):
        self._recipe, self._settings, self._mesh = recipe, recipe.settings, mesh
        model = with_adapters(new_model(recipe, mesh), recipe)
        self._trainer = make_trainer(recipe, model, mesh)
        self._state = self._trainer.start(model)
        self._speed, self._input_wait = Speed(model.config, self._settings, mesh), InputWait()
        self._score = scorer(self._trainer, recipe.kind, mesh)
        self._validate = self._evaluator("validation", recipe.data.validation)
        test = recipe.data.test
        self._test = None if test is None else self._evaluator("test", test)
        self._evaluate_every = self._settings.eval_steps or recipe.plan.steps_per_epoch
        self._save_plan = SavePlan.from_settings(
            self._settings, epoch=recipe.plan.steps_per_epoch, total=recipe.total_steps
        )
        self._save_clock = SaveClock(self._settings.save_minutes)
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
        self.kept_step: int | None = None
        """The step with the best score, if its parameters are kept; None: those of the last step are."""
        self._checkpoints: Checkpoints | None = None
        self._restored_step: int | None = None
        self._log: RunLog | None = None
        self._saves_log = False
        # Whether the state was evaluated. A signal may have come before, or the run now ends earlier.
        self._evaluated = True

    def open(self, directory: RunDirectory, stack: ExitStack) -> None:
        """Opens checkpoints, batches and the log, which `stack` closes; restores the last checkpoint.

        Raises:
            UserError: the run was finished early by `early_stopping_patience`, and is to take more steps.
        """
        recipe, restored = self._recipe, None
        if self._save_plan.strategy != "no":
            self._checkpoints = Checkpoints(
                directory.checkpoints,
                greater_is_better=recipe.sign > 0,
                last=self._save_plan.last,
                check=directory.check_claim,
            )
            stack.callback(self._checkpoints.close)
            restored = self._checkpoints.restore_last(self._trainer.to_save(self._state))
        if restored is not None:
            self.step, self._state = restored.step, self._trainer.from_saved(restored.state)
            self._restored_step = restored.step
            self.evaluation = EvaluationState(**restored.about["standing"])
            self._evaluated = restored.about.get("evaluated", True)
            logger.warning("resuming after step %d of %d", self.step, recipe.total_steps)
        elif directory.started:
            logger.warning("no step of the run before was saved: starting over")
        was_finished = distributed.from_primary(lambda: directory.finished_steps is not None)
        if was_finished and self._patience_is_over():
            raise UserError(
                f"{directory.path} stopped early after step {self.step}, and would again with more steps: "
                f"early_stopping_patience={self._settings.early_stopping_patience} is over; {ADVICE}"
            )
        if restored is not None and restored.about.get("step_ranges", 1) != recipe.plan.step_ranges:
            logger.warning(
                "the steps before had other batches, of another version: the rest of this epoch has other "
                "examples than it would have had"
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
        if distributed.is_primary():
            self._saves_log = not directory.is_local  # where the file is not up to date after a kill
            work = directory.open_work(stack, None if restored is None else restored.about.get("log"))
            self._log = stack.enter_context(
                RunLog(
                    work,
                    resume_at=self.step,
                    trackers=recipe.trackers,
                    settings=recipe.settings.model_dump(mode="json"),
                )
            )

    def train(self, show: bool) -> None:
        """Takes all steps, or fewer if evaluations stop getting better; evaluates and saves in between.

        Raises:
            NotFiniteError: the loss, the gradient norm or the metric of an evaluation is not finite.
            InterruptedRunError: a signal came.
        """
        total = self._recipe.total_steps
        self._recorded_at = perf_counter()
        with Progress(total, self.step, show) as self._progress, Interrupts() as interrupts:
            if self._is_evaluated_at(self.step) and not self._evaluated:
                self._evaluate_and_save(interrupts)
            while self.step < total and not self._patience_is_over():
                self._take_step()
                self._evaluate_and_save(interrupts)
                if self._checkpoints is not None:
                    self._checkpoints.poll()
            if self._checkpoints is not None:
                self._checkpoints.wait()
                last = 0 if self._save_plan.strategy == "best" else self._save_plan.last
                self._checkpoints.keep(self.evaluation.best_step, last)

    def _patience_is_over(self) -> bool:
        return self.evaluation.patience_is_over(self._settings.early_stopping_patience)

    def _take_step(self) -> None:
        plan = self._recipe.plan
        with self._input_wait.batch():
            batches = [next(self._batches) for _ in range(plan.step_batches)]
            arrays = [to_devices(each.arrays, plan.rows, self._mesh, self._own_rows) for each in batches]
        self._state, metrics = self._trainer.step_in_batches(self._state, arrays, self._dropout_key)
        self._input_wait.after_step(metrics.loss)
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
            values["input_wait"] = self._input_wait.share()
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

    def _is_evaluated_at(self, step: int) -> bool:
        """Whether the run evaluates after this step."""
        return step > 0 and (step % self._evaluate_every == 0 or step == self._recipe.total_steps)

    def _evaluate_and_save(self, interrupts: Interrupts) -> None:
        """Evaluates and writes a checkpoint, each if the settings ask for it after this step.

        A signal ends an evaluation, which may take longer than the machine is left; it is made up for when
        the run is resumed.

        Raises:
            InterruptedRunError: a signal came.
        """
        step, score = self.step, -self._recipe.sign * sys.float_info.max
        interrupted, self._evaluated = interrupts.came(), False
        if self._is_evaluated_at(step) and not interrupted:
            self._record_step()
            try:
                metrics, _ = self._validate(self._state, interrupts.came)
                self._evaluated = True
            except StoppedEvaluationError:
                interrupted = True
        if self._evaluated:
            score = metrics[self._recipe.metric]
            check_finite(
                metrics, self._recipe.metric, f"the evaluation of the validation data after step {step}"
            )
            if step == self._restored_step and self._checkpoints is not None:
                self._checkpoints.delete(step)  # it has no score; until now, a kill would have lost its steps
            self._record("validation", step, metrics)
            self.evaluation = self.evaluation.with_score(step, score, self._recipe.sign)
        best = self.evaluation.best_step == step
        due = self._save_clock.is_over(step) or step == self._restored_step
        is_saved = step == self._restored_step and not self._evaluated
        if not is_saved and self._save_plan.saves(
            step, evaluated=self._evaluated, best=best, interrupted=interrupted, due=due
        ):
            self._record_step()
            self._save(score, best, last=interrupted or step == self._recipe.total_steps)
        if self._evaluated:
            self._after_evaluation({self._recipe.metric: score, "validation_loss": metrics["loss"]})
        if interrupted:
            self._end_by(interrupts, step)

    def _end_by(self, interrupts: Interrupts, step: int) -> NoReturn:
        """Waits until the last checkpoint is written; raises `InterruptedRunError` with the saved step."""
        assert interrupts.received is not None
        if self._checkpoints is not None:
            self._checkpoints.wait()
        raise InterruptedRunError(step, interrupts.received, saved=self._checkpoints is not None)

    def _after_evaluation(self, shown: dict[str, float]) -> None:
        """Takes the time of an evaluation with its checkpoint, and shows its numbers."""
        self._speed.pause()
        self._input_wait.pause()
        new_widths = len(self._validate.widths) if self._first_evaluation else 0
        self._first_evaluation = False
        self._time_left.add_evaluation(self._seconds_since_record(), new_widths)
        self._progress.update(self.step, shown, self._seconds_left(self.step))

    def _save(self, score: float, best: bool, last: bool) -> None:
        assert self._checkpoints is not None
        if last:  # which must not be skipped for one that is still being written
            self._checkpoints.wait()
        about: dict[str, Any] = {
            "standing": asdict(self.evaluation),
            "evaluated": self._evaluated,
            "step_ranges": self._recipe.plan.step_ranges,
        }
        if self._saves_log and self._log is not None:
            about["log"] = self._log.text()
        self._checkpoints.save(self.step, self._trainer.to_save(self._state), about, score, best)
        self._save_clock.restart()

    def close_checkpoints(self) -> None:
        """Ends the threads that write checkpoints, so that their folder can be removed."""
        if self._checkpoints is not None:
            self._checkpoints.close()

    def restore_best(self) -> None:
        """Restores the parameters with the best score; keeps the last ones if they are not there."""
        best = self.evaluation.best_step
        if best is not None and best != self.step:
            if self._checkpoints is None:
                logger.warning(
                    "save_strategy=no: the model is that of the last step, %d; step %d was better (%s %.4f "
                    "on the validation data)",
                    *(self.step, best, self._recipe.metric, self.evaluation.best_score),
                )
                return
            try:
                saved = self._checkpoints.restore(best, self._trainer.to_save(self._state)).state
                self._state = self._trainer.from_saved(saved)
            except CheckpointError as error:
                logger.warning("%s; the last parameters are kept instead of the best", error)
                return
        self.kept_step = best

    def evaluate(self) -> tuple[SplitMetrics, Predictions | None]:
        """Returns the metrics of every split, and the predictions of the last one.

        Raises:
            NotFiniteError: the loss or the metric is not finite.
            InterruptedRunError: a signal came.
        """
        with Interrupts() as interrupts:
            try:
                return self._evaluate(interrupts.came)
            except StoppedEvaluationError:
                self._end_by(interrupts, self.kept_step or self.step)

    def _evaluate(self, stops: Callable[[], bool]) -> tuple[SplitMetrics, Predictions | None]:
        metric, kept = self._recipe.metric, self.kept_step or self.step
        metrics, predictions = self._validate(self._state, stops)
        check_finite(
            metrics, metric, f"the evaluation of the validation data with the parameters of step {kept}"
        )
        results = {"validation": metrics}
        if self._test is not None:
            results["test"], predictions = self._test(self._state, stops)
            check_finite(
                results["test"], metric, f"the evaluation of the test data with the parameters of step {kept}"
            )
            self._record("test", kept, results["test"])
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
