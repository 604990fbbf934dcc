"""A fine-tuning run from the first file to the report, to be read from top to bottom."""

import json
import logging
import math
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from phi3_jax import distributed
from phi3_jax.checkpoint import resolve, save_adapters, save_model
from phi3_jax.checkpoint.default_model import default_model
from phi3_jax.checkpoint.load import load_model, open_checkpoint
from phi3_jax.checkpoint.source import CheckpointError
from phi3_jax.data.batches import BatchPlan, bucket_widths
from phi3_jax.data.loader import Batch, load
from phi3_jax.evaluation.files import replacing
from phi3_jax.evaluation.metrics import direction
from phi3_jax.evaluation.predictions import Predictions
from phi3_jax.evaluation.report import Results, write_report
from phi3_jax.lora import add_lora, merge_lora
from phi3_jax.model import (
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
    Phi3ForTokenClassification,
    Phi3PreTrainedModel,
)
from phi3_jax.tokenizer import Phi3Tokenizer
from phi3_jax.training.batches import check_rows, local_rows, to_devices, width_multiple
from phi3_jax.training.checkpoints import Checkpoints, remove
from phi3_jax.training.evaluate import Evaluator
from phi3_jax.training.interrupts import Interrupts
from phi3_jax.training.logs import RunLog, read_log
from phi3_jax.training.objectives import Objective
from phi3_jax.training.optimizers import make_optimizer, make_schedule
from phi3_jax.training.progress import Progress
from phi3_jax.training.settings import Settings, differences
from phi3_jax.training.sources import Data, load_data
from phi3_jax.training.speed import Speed
from phi3_jax.training.step import Metrics, Trainer, TrainState

logger = logging.getLogger(__name__)

RUN, CHECKPOINTS, LOG, ADAPTER = "run.json", "checkpoints", "log.jsonl", "adapter"
"""What a run's directory holds beside the model and the report."""

MODELS: dict[str, type[Phi3PreTrainedModel]] = {
    "sequence-classification": Phi3ForSequenceClassification,
    "token-classification": Phi3ForTokenClassification,
    "causal-lm": Phi3ForCausalLM,
}

BEST_BY = {
    "single_label_classification": "accuracy",
    "multi_label_classification": "micro_f1",
    "regression": "pearson",
    "token-classification": "f1",
    "causal-lm": "loss",
}
"""The metric that chooses the best parameters, unless the user names another."""


class NotFiniteError(ValueError):
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
    kind = settings.problem_type if settings.task == "sequence-classification" else settings.task
    metric = settings.metric_for_best_model or BEST_BY[kind]
    sign = direction(kind, metric)
    parts = settings.gradient_accumulation_steps
    check_rows(settings.train_batch_size, parts, mesh, "train_batch_size")
    check_rows(settings.eval_batch_size, 1, mesh, "eval_batch_size")
    show = show and distributed.is_primary()

    # What is learned from.
    path = distributed.from_primary(
        lambda: default_model(cache_dir) if settings.model is None else resolve(settings.model)
    )
    tokenizer = Phi3Tokenizer.from_pretrained(path)
    _, config = open_checkpoint(path)
    data = distributed.together(lambda: load_data(settings, tokenizer, config))
    pad = next(
        (i for i in (config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0
    )

    # Which steps there are.
    widths = (
        (settings.max_length,)
        if settings.packing
        else bucket_widths(data.train.lengths, most=settings.max_buckets, multiple=width_multiple(mesh))
    )
    plan = BatchPlan(
        data.train.lengths, rows=settings.train_batch_size, widths=widths, shuffle=True, seed=settings.seed
    )
    epoch = plan.steps_per_epoch
    total = settings.max_steps or math.ceil(settings.num_train_epochs * epoch)
    evaluate_every = settings.eval_steps or epoch
    save_every = settings.save_steps or evaluate_every

    # The run's directory, and whether this goes on with what is there.
    directory = settings.output_dir
    about = {
        "settings": settings.model_dump(mode="json"),
        "data": data.fingerprint(),
        "steps": total,
        "base": config.to_dict(),
    }
    finished = distributed.from_primary(lambda: _open(directory, about, settings.overwrite_output_dir))
    if finished is not None:
        logger.warning("%s is finished; nothing is left to do", directory)
        return finished

    # The model and its step.
    changes: dict[str, Any] = {"pad_token_id": pad}
    if data.labels is not None:
        changes["id2label"] = dict(enumerate(data.labels.names))
    if settings.task == "sequence-classification":
        changes["problem_type"] = settings.problem_type
    model = load_model(
        MODELS[settings.task],
        path,
        dtype="float32" if settings.trained == "full" else settings.dtype,
        mesh=mesh,
        rngs=settings.seed,
        ignore_mismatched_sizes=True,
        **changes,
    )
    wrt: Any = nnx.Param
    head = nnx.PathContains("score")
    if settings.trained == "lora":
        model = add_lora(
            model,
            settings.lora_rank,
            alpha=settings.lora_alpha,
            targets=settings.lora_targets,
            rngs=settings.seed,
        )
        wrt = nnx.LoRAParam if settings.task == "causal-lm" else nnx.Any(nnx.LoRAParam, head)
    elif settings.trained == "head":
        wrt = head
    on_cpu = jax.default_backend() == "cpu"
    schedule = make_schedule(
        settings.lr_scheduler_type,
        settings.learning_rate,
        total_steps=total,
        warmup_steps=int(settings.warmup_ratio * total),
    )
    trainer = Trainer(
        model,
        make_optimizer(
            settings.optim,
            schedule,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            beta1=settings.adam_beta1,
            beta2=settings.adam_beta2,
            epsilon=settings.adam_epsilon,
        ),
        objective=Objective(settings.label_smoothing, data.class_weights),
        accumulate=parts,
        wrt=wrt,
        compute_dtype=jnp.dtype(settings.dtype),
        remat=settings.remat or ("none" if on_cpu else "full"),
        scan_layers=not on_cpu or mesh is not None,
    )
    state = trainer.start(model)
    speed = Speed(model.config, settings, mesh)
    del model

    def evaluator(split: str, examples: Any) -> Evaluator:
        return Evaluator(
            trainer,
            examples,
            kind=kind,
            split=split,
            labels=data.labels,
            pad_token_id=pad,
            rows=settings.eval_batch_size,
            most=settings.max_buckets,
            mesh=mesh,
        )

    # Training.
    validate = evaluator("validation", data.validation)
    checkpoints = Checkpoints(directory / CHECKPOINTS, greater_is_better=sign > 0)
    try:
        resumed = checkpoints.restore_last(state)
        start, standing = 0, Standing()
        if resumed is not None:
            start, state, standing = resumed.step, resumed.state, Standing(**resumed.about["standing"])
            logger.warning("going on from step %d of %d", start, total)
        own = local_rows(settings.train_batch_size, mesh)
        batches = load(data.train, plan, pad_token_id=pad, start=start, stop=total, local_rows=own)
        if resumed is not None:
            batches.set_state(resumed.about["loader"])
        key = jax.random.key(settings.seed) if settings.dropout else None
        log = RunLog(directory, resume_at=start) if distributed.is_primary() else None
        pending: tuple[Batch, Metrics] | None = None
        worst = -sign * sys.float_info.max
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
                settle()
                pending = batch, metrics
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
            batches.close()

        # The best parameters, their scores, and the files for users.
        state = _best(checkpoints, standing, step, state)
        found, predictions = validate(state)
        results = {"validation": found}
        if data.test is not None:
            results["test"], predictions = evaluator("test", data.test)(state)
            if log is not None:
                log.record("test", standing.best_step or step, results["test"])
        if log is not None:
            log.close()
        _export(trainer.model(state), tokenizer, settings, path)
        _report(settings, kind, metric, data, standing, results, predictions)
        distributed.from_primary(lambda: _write(directory, about | {"finished": results}))
        return results
    finally:
        checkpoints.close()


def _patience_is_over(settings: Settings, standing: Standing) -> bool:
    patience = settings.early_stopping_patience
    return patience is not None and standing.worse >= patience


def _open(directory: Path, about: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Makes the run's directory, or finds that it holds this very run; its results, if that is finished.

    Raises:
        ValueError: there is something else; a run with other settings or data is told apart by each.
    """
    if overwrite:
        remove(directory / CHECKPOINTS)
        (directory / RUN).unlink(missing_ok=True)
    if not (directory / RUN).exists():
        if (directory / "config.json").exists() and not overwrite:
            raise ValueError(
                f"{directory} holds a model that is no run of finetune; choose another --output-dir, or give "
                "--overwrite-output-dir"
            )
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory, about)
        return None
    try:
        before = json.loads((directory / RUN).read_text(encoding="utf-8"))
        changed = differences(before["settings"], about["settings"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory / RUN} is broken ({error}); give --overwrite-output-dir") from error
    if not changed and before.get("data") != about["data"]:
        changed = ["the data are not the same"]
    if not changed and before.get("base") != about["base"]:
        changed = ["the base model is not the same"]
    if changed:
        raise ValueError(
            f"{directory} holds a run with other settings, which cannot go on with these: {'; '.join(changed)}. "
            "Choose another --output-dir, or give --overwrite-output-dir to begin anew"
        )
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
