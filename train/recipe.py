"""The parts of a run before its first step: examples, steps, model and trainer."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from phi3_jax.checkpoint.default_model import default_model
from phi3_jax.checkpoint.opening import Checkpoint
from phi3_jax.checkpoint.source import has_quantized_weights
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.rope_argument import as_longrope, parse_rope
from phi3_jax.data.batches import BatchPlan, bucket_widths
from phi3_jax.errors import UserError
from phi3_jax.lora import ModelPaths, add_lora, check_adapters, find_model, load_adapters, open_model
from phi3_jax.lora.peft_config import AdapterConfig
from phi3_jax.model import (
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
    Phi3ForTokenClassification,
    Phi3PreTrainedModel,
)
from phi3_jax.model.abstract import abstract_model, with_shardings
from phi3_jax.model.layer_stack import can_stack
from phi3_jax.model.loading import check_model, load_model
from phi3_jax.model.remat import Remat
from phi3_jax.parallel import distributed
from phi3_jax.parallel.sharding import shards
from phi3_jax.plan.remat import RematChoice
from phi3_jax.quantization import FLOATS
from phi3_jax.tokenizer import Phi3Tokenizer
from phi3_jax.trainer.batches import check_rows, width_multiple
from phi3_jax.trainer.objectives import Objective
from phi3_jax.trainer.optimizers import make_optimizer, make_schedule
from phi3_jax.trainer.step import Trainer

from .adapters import with_adapter_settings
from .labels import base_head
from .metrics import direction
from .remat import find_remat
from .settings import Settings
from .sources import Data, load_data
from .started import started_step_ranges
from .trackers import TrackerName, find_trackers

logger = logging.getLogger(__name__)

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


STEP_BATCHES = 4
"""Batches of a step, where its rows divide: short and long rows learn together, with little padding."""


@dataclass(frozen=True)
class Recipe:
    """The examples of a run and its steps, before there is a model."""

    settings: Settings
    paths: ModelPaths
    """The base model, and the adapter that training starts from, if there is one."""
    adapter: AdapterConfig | None
    tokenizer: Phi3Tokenizer
    config: Phi3Config
    """The base model's config, with the rope of the settings."""
    data: Data
    pad_token_id: int
    plan: BatchPlan
    total_steps: int
    schedule: optax.Schedule
    kind: str
    """The task, or the problem type of sequence classification."""
    metric: str
    """The metric that chooses the best parameters."""
    sign: int
    """1 if a greater value of the metric is better, -1 if a smaller one is."""
    remat: Remat
    remat_choice: RematChoice | None
    """The figures that decided `remat`, if memory did."""
    trackers: tuple[TrackerName, ...]
    """The libraries that the run reports its numbers to."""


def make_recipe(settings: Settings, mesh: Mesh | AbstractMesh | None, cache_dir: Path | None) -> Recipe:
    """Reads the examples and plans the steps; arguments and errors are those of `finetune`."""
    kind = settings.problem_type if settings.task == "sequence-classification" else settings.task
    metric = settings.metric_for_best_model or BEST_BY[kind]
    sign = direction(kind, metric)
    trackers = find_trackers(settings.report_to)
    check_rows(settings.train_batch_size, settings.gradient_accumulation_steps, mesh, "train_batch_size")
    check_rows(settings.eval_batch_size, 1, mesh, "eval_batch_size")

    paths = distributed.from_primary(
        lambda: find_model(settings.model, settings.adapter, lambda: default_model(cache_dir))
    )
    tokenizer = Phi3Tokenizer.from_pretrained(paths.base)
    checkpoint = open_model(paths)
    config = checkpoint.config
    adapter = None
    if paths.adapter is not None:
        model = abstract_model(MODELS[settings.task], config)
        adapter = check_adapters(model, paths.adapter)
        settings = with_adapter_settings(settings, adapter, model)
    if settings.rope is not None:
        config = as_longrope(parse_rope(settings.rope).config_to_save(config))
        saved = config.rope_scaling.to_dict(config.rope_base)
        if saved is not None and saved.get("type") != "longrope":
            logger.warning(
                "transformers has no %s rope for Phi-3, and will not load the trained model",
                config.rope_scaling.rope_type,
            )
    data = distributed.run_everywhere(lambda: load_data(settings, tokenizer, config, base_head(checkpoint)))
    pad = next(
        (i for i in (config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0
    )

    widths = (
        (settings.max_length,)
        if settings.packing
        else bucket_widths(data.train.lengths, most=settings.max_buckets, multiple=width_multiple(mesh))
    )
    before = distributed.from_primary(lambda: _started_ranges(settings))
    devices = 1 if mesh is None else shards(mesh, "batch")
    batches, ranges = _step_batches(settings, len(widths), devices, before)
    plan = BatchPlan(
        data.train.lengths,
        rows=settings.train_batch_size // batches,
        widths=widths,
        shuffle=True,
        step_batches=batches,
        step_ranges=ranges,
        seed=settings.seed,
    )
    total = settings.max_steps or math.ceil(settings.num_train_epochs * plan.steps_per_epoch)
    if total >= 2**31:
        raise UserError(
            f"num_train_epochs={settings.num_train_epochs} are {total:.3g} steps, more than 2**31; give fewer"
        )
    schedule = make_schedule(
        settings.lr_scheduler_type,
        settings.learning_rate,
        total_steps=total,
        warmup_steps=int(settings.warmup_ratio * total)
        if settings.warmup_steps is None
        else settings.warmup_steps,
    )
    model_parts = paths, adapter, tokenizer, config
    steps = plan, total, schedule
    remat = find_remat(settings, config, plan, mesh)
    return Recipe(settings, *model_parts, data, pad, *steps, kind, metric, sign, *remat, trackers)


def _started_ranges(settings: Settings) -> int | None:
    """Returns the ranges of the run that this one resumes."""
    return None if settings.overwrite_output_dir else started_step_ranges(settings.output_dir)


def _step_batches(settings: Settings, widths: int, devices: int, before: int | None) -> tuple[int, int]:
    """Returns how many batches a step takes, each with a width of its own, and how many ranges of widths.

    Steps of the same ranges have the same examples on any devices, so those of a run that is resumed
    (`before`) stay. Batches are a multiple of the micro-batches that the settings ask for, and of several
    ranges where the devices need more rows. With one width, or if the devices leave one batch, the trainer
    divides it.
    """
    least, rows = settings.gradient_accumulation_steps, settings.train_batch_size
    sizes = [
        size for size in range(1, max(STEP_BATCHES, least) + 1) if rows % size == 0 and size % least == 0
    ]
    ranges = max((size for size in sizes if rows > size or size == least), default=1)
    if before is not None and rows % before == 0:
        ranges = before
    if widths == 1 or ranges == 1:
        return 1, 1
    fitting = [size for size in sizes if ranges % size == 0 and rows // size % devices == 0]
    batches = max(fitting, default=1)
    return (batches, ranges) if batches > 1 or before is not None else (1, 1)


def new_model(recipe: Recipe, mesh: Mesh | None) -> Phi3PreTrainedModel:
    """Returns the base model with the task's head, as it is before the first step.

    `with_adapters` adds a given adapter, whose head then gets its order.
    """
    cls, checkpoint, arguments = _model_arguments(recipe)
    model = load_model(cls, checkpoint, mesh=mesh, rngs=recipe.settings.seed, **arguments)
    return model if recipe.adapter is not None else _with_head_rows(model, recipe.data.base_rows)


def new_shapes(recipe: Recipe, mesh: Mesh | AbstractMesh | None) -> Phi3PreTrainedModel:
    """Returns the model that is trained with shapes in place of numbers, after all checks of `new_model`."""
    cls, checkpoint, arguments = _model_arguments(recipe)
    model = check_model(cls, checkpoint, mesh=mesh, **arguments)
    if recipe.settings.trained != "lora":
        return model
    # The numbers of given adapters are also their settings, so that new ones have the same shapes.
    return with_shardings(nnx.eval_shape(partial(_with_new_adapters, recipe.settings), model), mesh)


def _model_arguments(recipe: Recipe) -> tuple[type[Phi3PreTrainedModel], Checkpoint, dict[str, Any]]:
    """Returns the class, the checkpoint and the other arguments of `load_model`."""
    settings, labels = recipe.settings, recipe.data.labels
    checkpoint, quantization = open_model(recipe.paths), settings.quantize
    needs_floats = settings.trained == "full" or settings.use_dora
    if quantization is None and needs_floats and has_quantized_weights(checkpoint.source):
        logger.info("%s has quantized weights, which are trained as floats", recipe.paths.base)
        quantization = FLOATS
    arguments: dict[str, Any] = {
        "dtype": "float32" if settings.trained == "full" else settings.dtype,
        "config": recipe.config,
        "new_head": recipe.data.base_rows is None,
        "quantization": quantization,
        "pad_token_id": recipe.pad_token_id,
    }
    if labels is not None:
        arguments["id2label"] = dict(enumerate(labels.names))
    if settings.task == "sequence-classification":
        arguments["problem_type"] = settings.problem_type
    return MODELS[settings.task], checkpoint, arguments


def _with_head_rows(model: Phi3PreTrainedModel, rows: tuple[int, ...] | None) -> Phi3PreTrainedModel:
    """Returns the model with these rows of its head, in this order; None: all of a new head."""
    if isinstance(model, Phi3ForSequenceClassification | Phi3ForTokenClassification) and rows is not None:
        score = nnx.state(model.score)
        shardings = jax.tree.map(lambda x: x.sharding, score)
        take = jax.jit(partial(jax.tree.map, lambda x: x[np.array(rows)]), out_shardings=shardings)
        nnx.update(model.score, take(score))
    return model


def with_adapters(model: Phi3PreTrainedModel, recipe: Recipe) -> Phi3PreTrainedModel:
    """Returns the model of `new_model` with the adapters that are trained: none, given ones, or new ones."""
    settings = recipe.settings
    if recipe.paths.adapter is not None and recipe.adapter is not None:
        rows = recipe.data.base_rows
        model = jax.tree.map(lambda leaf: leaf, model)
        for path, node in nnx.iter_graph(model):
            if isinstance(node, nnx.Param) and _is_saved(recipe.adapter, path, node):
                node.set_value(node[...].astype(jnp.float32))  # it is trained from all bits that are stored
        model = load_adapters(model, recipe.paths.adapter, keep_head=rows is None)
        return _with_head_rows(model, rows)
    return _with_new_adapters(settings, model) if settings.trained == "lora" else model


def _with_new_adapters(settings: Settings, model: Phi3PreTrainedModel) -> Phi3PreTrainedModel:
    return add_lora(
        model,
        settings.lora_rank,
        alpha=settings.lora_alpha,
        targets=settings.lora_targets,
        rslora=settings.use_rslora,
        lora_dropout=settings.lora_dropout,
        dora=settings.use_dora,
        rngs=settings.seed,
    )


def _is_saved(adapter: AdapterConfig | None, path: Sequence[Any], value: Any) -> bool:
    """Whether this parameter is of a module that the adapter has as a whole."""
    return adapter is not None and adapter.saves(".".join(map(str, path[:-1])))


def make_trainer(recipe: Recipe, model: Phi3PreTrainedModel, mesh: Mesh | None) -> Trainer:
    """Returns the trainer that the settings describe."""
    settings = recipe.settings
    head = nnx.PathContains("score")
    wrt: Any = nnx.Param
    if settings.trained == "lora":
        wrt = nnx.Any(nnx.LoRAParam, head, partial(_is_saved, recipe.adapter))
    elif settings.trained == "head":
        wrt = head
    # A mesh may have devices that are absent, for which a step is only compiled.
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    on_cpu = platform == "cpu"
    return Trainer(
        model,
        make_optimizer(
            settings.optim,
            recipe.schedule,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            beta1=settings.adam_beta1,
            beta2=settings.adam_beta2,
            epsilon=settings.adam_epsilon,
        ),
        objective=Objective(settings.label_smoothing, recipe.data.class_weights),
        accumulate=settings.gradient_accumulation_steps if recipe.plan.step_batches == 1 else 1,
        wrt=wrt,
        compute_dtype=jnp.dtype(settings.dtype),
        remat=recipe.remat,
        scan_layers=(not on_cpu or mesh is not None) and can_stack(model.decoder.layers),
    )
