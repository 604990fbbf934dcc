"""A fine-tuning run from the first file to the report, to be read from top to bottom."""

import json
import logging
import math
import shlex
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from phi3_jax.checkpoint.source import CheckpointError
from phi3_jax.data.loader import Batch, load
from phi3_jax.errors import UserError
from phi3_jax.lora import merge_lora, save_adapters
from phi3_jax.model.saving import save_model
from phi3_jax.parallel import distributed
from phi3_jax.runs.files import remove_leftovers, replacing
from phi3_jax.runs.json_values import RUN
from phi3_jax.runs.resume import differences
from phi3_jax.tokenizer import Phi3Tokenizer
from phi3_jax.trainer.batches import local_rows, to_devices
from phi3_jax.trainer.step import Metrics, TrainState

from .checkpoints import Checkpoints, remove
from .evaluate import Evaluator, scorer
from .interrupts import Interrupts
from .logs import RunLog, read_log
from .predictions import Predictions
from .progress import Progress
from .recipe import make_trainer, new_model, prepare, with_adapters
from .report import Results, write_report
from .settings import FREE, Settings
from .sources import Data
from .speed import Speed

logger = logging.getLogger(__name__)

CHECKPOINTS, LOG, ADAPTER = "checkpoints", "log.jsonl", "adapter"
"""What a run's directory holds beside the model, the report and `RUN`."""


class NotFiniteError(UserError):
    """The loss or the gradients are infinite or no number."""


class InterruptedRunError(Exception):
    """The run was told to end, and has saved itself."""

    def __init__(self, step: int, signal: int):
        super().__init__(
            f"interrupted behind step {step}, which is saved; the same command goes on from there"
        )
        self.signal = signal


@dataclass(frozen=True)
class Standing:
    """How the evaluations went so far."""

    best_step: int | None = None
    best_score: float | None = None
    worse: int = 0
    """Evaluations since the best."""

    def after(self, step: int, score: float, sign: int) -> "Standing":
        better = self.best_score is None or sign * score > sign * self.best_score
        return Standing(step, score) if better else replace(self, worse=self.worse + 1)


def finetune(
    settings: Settings, *, mesh: Mesh | None = None, cache_dir: Path | None = None, show: bool = True
) -> dict[str, dict[str, float]]:
    """Trains, evaluates, saves; goes on where an earlier run with the same settings was cut off.

    Several processes all call this, with the same settings.

    Args:
        settings: what to do.
        mesh: to divide the model and the batches over.
        cache_dir: of the default model.
        show: a progress bar on standard error, in process 0.

    Returns:
        Metrics of the parameters that were kept, by split.

    Raises:
        ValueError: settings or data that cannot be, a loss that is not finite.
        OSError: files that cannot be read or written; `CheckpointError` for models and checkpoints.
        InterruptedRunError: SIGTERM or Ctrl-C came; the state is saved.
    """
    show = show and distributed.is_primary()
    recipe = prepare(settings, mesh, cache_dir)
    tokenizer, data, plan, schedule = recipe.tokenizer, recipe.data, recipe.plan, recipe.schedule
    metric, sign, total = recipe.metric, recipe.sign, recipe.total_steps
    epoch = plan.steps_per_epoch
    evaluate_every = settings.eval_steps or epoch
    save_every = settings.save_steps or evaluate_every

    # The run's directory, and whether this goes on with what is there.
    directory = settings.output_dir
    about = {
        "settings": settings.model_dump(mode="json"),
        "data": data.fingerprint(),
        "steps": total,
        "base": recipe.config.to_dict(),
    }
    finished = distributed.from_primary(lambda: _open(directory, about, settings.overwrite_output_dir))
    if finished is not None:
        logger.warning("%s is finished; nothing is left to do", directory)
        return finished

    # The model and its step.
    model = with_adapters(new_model(recipe, mesh), settings)
    trainer = make_trainer(recipe, model, mesh)
    state = trainer.start(model)
    speed = Speed(model.config, settings, mesh)
    del model

    score = scorer(trainer, recipe.kind, mesh)

    def evaluator(split: str, examples: Any) -> Evaluator:
        return Evaluator(
            score,
            examples,
            kind=recipe.kind,
            split=split,
            labels=data.labels,
            pad_token_id=recipe.pad_token_id,
            rows=settings.eval_batch_size,
            most=settings.max_buckets,
            mesh=mesh,
        )

    # Training.
    validate = evaluator("validation", data.validation)
    with ExitStack() as stack:
        checkpoints = Checkpoints(directory / CHECKPOINTS, greater_is_better=sign > 0)
        stack.callback(checkpoints.close)
        resumed = checkpoints.restore_last(state)
        start, standing = 0, Standing()
        if resumed is not None:
            start, state, standing = resumed.step, resumed.state, Standing(**resumed.about["standing"])
            logger.warning("going on from step %d of %d", start, total)
        own = local_rows(settings.train_batch_size, mesh)
        batches = load(
            data.train, plan, pad_token_id=recipe.pad_token_id, start=start, stop=total, local_rows=own
        )
        stack.callback(batches.close)
        if resumed is not None:
            batches.set_state(resumed.about["loader"])
        key = jax.random.key(settings.seed) if settings.dropout else None
        log = None
        if distributed.is_primary():
            log = stack.enter_context(RunLog(directory, resume_at=start))
        pending: tuple[Batch, Metrics] | None = None
        worst = -sign * sys.float_info.max
        # On CPU a step is done when it has been sent, so that nothing would run beside the looking.
        ahead = jax.default_backend() != "cpu"
        with Progress(total, start, show) as progress, Interrupts() as interrupts:

            def settle() -> None:
                """Looks at the last step's numbers, while the next one may be running already."""
                nonlocal pending
                if pending is None:
                    return
                batch, metrics = pending
                pending = None
                loss, norm = float(metrics.loss), float(metrics.gradient_norm)
                rate = float(schedule(batch.step))
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise NotFiniteError(_not_finite(loss, norm, rate, batch, data, epoch))
                tokens = int(data.train.lengths[batch.indices[batch.indices >= 0]].sum())
                seen = speed.after(tokens, batch.width * settings.train_batch_size, batch.width)
                values = {"loss": loss, "gradient_norm": norm, "learning_rate": rate} | seen
                step = batch.step + 1
                if log is not None and (step % settings.logging_steps == 0 or step == total):
                    log.record("train", step, {name: x for name, x in values.items() if x is not None})
                progress.update(step, values)

            def save(step: int, score: float) -> None:
                told = {"standing": asdict(standing), "loader": batches.get_state()}
                checkpoints.save(step, state, told, score)

            stopped = _patience_is_over(settings, standing)
            step = start
            while step < total and not stopped:
                batch = next(batches)
                arrays = to_devices(batch.arrays, settings.train_batch_size, mesh, own)
                state, metrics = trainer.step(state, arrays, key)
                if ahead:
                    settle()
                pending = batch, metrics
                if not ahead:
                    settle()
                step = batch.step + 1
                interrupted = interrupts.at(step)
                if step % evaluate_every == 0 or step == total:
                    settle()
                    found, _ = validate(state)
                    if log is not None:
                        log.record("validation", step, found)
                    progress.update(step, {metric: found[metric], "validation_loss": found["loss"]})
                    standing = standing.after(step, found[metric], sign)
                    stopped = _patience_is_over(settings, standing)
                    save(step, found[metric])
                    speed.pause()
                elif interrupted or step % save_every == 0:
                    settle()
                    save(step, worst)
                if interrupted:
                    checkpoints.wait()
                    assert interrupts.received is not None
                    raise InterruptedRunError(step, interrupts.received)
            checkpoints.wait()
            checkpoints.keep(standing.best_step)

        # The best parameters, their scores, and the files for users.
        state = _best(checkpoints, standing, step, state)
        found, predictions = validate(state)
        results = {"validation": found}
        if data.test is not None:
            results["test"], predictions = evaluator("test", data.test)(state)
            if log is not None:
                log.record("test", standing.best_step or step, results["test"])
        _export(trainer.model(state), tokenizer, settings, recipe.base)
        _report(settings, recipe.kind, metric, data, standing, results, predictions)
        distributed.from_primary(lambda: _write(directory, about | {"finished": results}))
    return results


def _patience_is_over(settings: Settings, standing: Standing) -> bool:
    patience = settings.early_stopping_patience
    return patience is not None and standing.worse >= patience


def _open(directory: Path, about: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Makes the run's directory, or finds that it holds this very run; its results, if that is finished.

    Raises:
        ValueError: there is something else; a run with other settings or data is told apart by each.
    """
    if overwrite:
        (directory / RUN).unlink(missing_ok=True)
    if not (directory / RUN).exists():
        if (directory / "config.json").exists() and not overwrite:
            raise UserError(
                f"{directory} holds a model that is no run of finetune; choose another --output-dir, or give "
                "--overwrite-output-dir"
            )
        remove(directory / CHECKPOINTS)  # of a run that is forgotten
        directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(directory)
        _write(directory, about)
        return None
    try:
        before = json.loads((directory / RUN).read_text(encoding="utf-8"))
        changed = differences(before["settings"], about["settings"], free=FREE)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory / RUN} is broken ({error}); give --overwrite-output-dir") from error
    if not changed and before.get("data") != about["data"]:
        changed = ["the data are not the same"]
    if not changed and before.get("base") != about["base"]:
        changed = ["the base model is not the same"]
    if changed:
        raise UserError(
            f"{directory} holds a run with other settings, which cannot go on with these: "
            f"{'; '.join(changed)}. Choose another --output-dir, or give --overwrite-output-dir to begin anew"
        )
    remove_leftovers(directory)
    return before.get("finished")


def _write(directory: Path, about: dict[str, Any]) -> None:
    with replacing(directory / RUN) as work:
        work.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _not_finite(loss: float, norm: float, rate: float, batch: Batch, data: Data, epoch: int) -> str:
    rows = [data.train.place(int(index)) for index in batch.indices if index >= 0]
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    return (
        f"step {batch.step + 1} (epoch {batch.step // epoch + 1}) has the loss {loss} and the gradient norm "
        f"{norm} at learning rate {rate:.3g}; its batch is {', '.join(rows[:3])}{more}. Nothing was saved "
        "since; try a smaller learning_rate, a longer warm-up, a smaller max_grad_norm or dtype float32"
    )


def _best(checkpoints: Checkpoints, standing: Standing, step: int, state: TrainState) -> TrainState:
    best = standing.best_step
    if best is None or best == step:
        return state
    try:
        return checkpoints.restore(best, state).state
    except CheckpointError as error:
        logger.warning("%s; the last parameters are kept instead of the best", error)
        return state


def _export(model: Any, tokenizer: Phi3Tokenizer, settings: Settings, base: Path) -> None:
    """The model as transformers reads it, tokenizer included; adapters also by themselves."""
    directory = settings.output_dir
    if settings.trained == "lora":
        save_adapters(model, directory / ADAPTER, base_model=settings.model or str(base))
        model = merge_lora(model)
    dtype = jnp.dtype(settings.dtype)
    save_model(jax.tree.map(lambda x: x.astype(dtype), model), directory)
    if distributed.is_primary():
        tokenizer.save_pretrained(directory)


def _report(
    settings: Settings,
    kind: str,
    metric: str,
    data: Data,
    standing: Standing,
    results: dict[str, dict[str, float]],
    predictions: Predictions | None,
) -> None:
    if not distributed.is_primary():
        return
    write_report(
        settings.output_dir,
        task=kind,
        settings={"command": shlex.join(["phi3-jax", *sys.argv[1:]])} | settings.model_dump(mode="json"),
        data=data.counts,
        log=read_log(settings.output_dir / LOG),
        results=Results(results, metric, standing.best_step, predictions),
        names=() if data.labels is None else data.labels.names,
    )
