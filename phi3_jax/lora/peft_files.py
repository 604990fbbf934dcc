"""Adapters alone, in the directory that PEFT writes and reads: LoRA and the modules trained beside it."""

import json
import logging
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from flax import nnx

from phi3_jax.checkpoint.atomic import atomic_directory
from phi3_jax.checkpoint.layout import TensorLayout, layout_of
from phi3_jax.checkpoint.parts import put_parameter
from phi3_jax.checkpoint.safetensors import SafetensorsSource, some, write_file
from phi3_jax.checkpoint.source import CheckpointError, TensorSource
from phi3_jax.errors import UserError
from phi3_jax.lora.adapters import TARGETS, LoRA, projections
from phi3_jax.lora.peft_config import AdapterConfig, adapter_fields, read_adapter_config
from phi3_jax.model import Phi3PreTrainedModel
from phi3_jax.model.abstract import placed
from phi3_jax.model.layers import Linear
from phi3_jax.model.saving import ParameterSource, write_in_one

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=Phi3PreTrainedModel)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the names of the model that it wraps."""

_UNFUSED = re.compile(r"\.(q|k|v|gate|up)_proj\.")


class _AdapterSource(SafetensorsSource):
    """The tensors of a directory of adapters."""

    def _files(self) -> list[tuple[Path, set[str] | None]]:
        if not (self.path / WEIGHTS).is_file():
            raise CheckpointError(
                f"{self.path} has no {WEIGHTS}. Pickled adapters (.bin) are not read; save them as "
                "safetensors with PEFT first"
            )
        return [(self.path / WEIGHTS, None)]


def save_adapters(
    model: Phi3PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    base_model: str,
    modules_to_save: Collection[str] | None = None,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, for PEFT and `load_adapters`.

    Both files take their names only when all is written; whatever else the directory holds stays. Of several
    processes all call this and process 0 writes.

    Args:
        model: with adapters (`add_lora`).
        directory: to write; made if it is not there.
        base_model: the name or directory of the model without adapters, for the config.
        modules_to_save: modules to store as a whole, such as a new head; default: `score`, if there is one.

    Raises:
        ValueError: a model without adapters or with stacked layers, a module to save that there is not, that
            has adapters itself, or that is the embedding and the head at once.
        CheckpointError: the disk is full, or the directory cannot be written.
    """
    adapted = {name: linear for name, linear in projections(model) if linear.adapter is not None}
    if not adapted:
        raise UserError("the model has no adapters; add some (add_lora), or save the model itself")
    parameters = _parameters(model)
    if modules_to_save is None:
        modules_to_save = ["score"] if "score.weight" in parameters else []
    modules = [name.rpartition(".")[0] for name in parameters]
    if absent := [name for name in modules_to_save if not any(module.endswith(name) for module in modules)]:
        raise UserError(f"modules_to_save names {some(absent)}, and the model has no such module")
    fields = adapter_fields(model, adapted, base_model, modules_to_save)
    settings = AdapterConfig(fields, Path(directory))
    if twice := [name for name in adapted if settings.saves(name)]:
        raise UserError(f"{some(twice)} cannot have adapters and be in modules_to_save; leave them out there")
    stored: dict[str, tuple[nnx.Param, TensorLayout]] = {}
    for name, linear in adapted.items():
        for letter, parameter in (("A", linear.adapter.a), ("B", linear.adapter.b)):
            stored[_stored_name(name, letter)] = parameter, _layout(name, letter)
    for name in _saved(settings, parameters, model):
        stored[PREFIX + name] = parameters[name], layout_of(name)

    def write(source: TensorSource) -> None:
        with atomic_directory(settings.path, config=CONFIG, weights=re.compile(r"adapter_model\..*")) as work:
            write_file(source, source.names(), work / WEIGHTS)
            text = json.dumps(settings.fields, indent=2, sort_keys=True)
            (work / CONFIG).write_text(text + "\n", encoding="utf-8")

    write_in_one(ParameterSource(stored), write)


def load_adapters(model: Model, directory: str | os.PathLike[str]) -> Model:
    """The model with the adapters that PEFT, or `save_adapters`, wrote for its base model.

    Modules stored as a whole, such as `score`, take the place of the model's own. Everything is checked
    before anything is put on a device. The given model stays as it is and shares its weights. Dropout on
    adapters, which matters to training only, is not done here.

    Raises:
        CheckpointError: files that are missing or broken, another kind of adapter than LoRA, adapters of
            another model class or other sizes, tensors too few or too many.
        ValueError: stacked layers, adapters there already.
    """
    path = Path(directory)
    model = jax.tree.map(lambda leaf: leaf, model)
    linears = dict(projections(model))
    if any(linear.adapter is not None for linear in linears.values()):
        raise UserError("the model has adapters already; merge them first (merge_lora)")
    settings = read_adapter_config(path / CONFIG, model)
    source = _AdapterSource(path)
    parameters, mesh = _parameters(model), model.decoder.mesh

    adapters: dict[str, LoRA] = {}
    for name, linear in linears.items():
        if settings.targets(name):
            adapters[name] = _abstract(linear, settings.rank(name), settings.alpha(name), settings.rslora)
    if not adapters:
        targets = settings.fields["target_modules"]
        raise CheckpointError(
            f"{settings.path}: target_modules={targets!r} names no projection of this model; expected some "
            f"of {', '.join(TARGETS)} (adapters of an unfused model, with q_proj and so on, do not fit)"
        )
    wanted: dict[str, tuple[nnx.Param, TensorLayout]] = {}
    for name, adapter in adapters.items():
        wanted[_stored_name(name, "A")] = adapter.a, _layout(name, "A")
        wanted[_stored_name(name, "B")] = adapter.b, _layout(name, "B")
    for name in _saved(settings, parameters, model):
        wanted[PREFIX + name] = parameters[name], layout_of(name)
    _check_tensors(source, wanted, model, path)

    if rate := settings.fields.get("lora_dropout"):
        logger.info("%s: lora_dropout=%s is not applied, should these adapters be trained on", path, rate)
    for stored, (parameter, layout) in wanted.items():
        leaf = parameter.get_value()
        kind = np.dtype(leaf.dtype)
        value = put_parameter(
            source, stored, layout, leaf.shape, kind, None if mesh is None else leaf.sharding
        )
        parameter.set_value(value)
    for name, adapter in adapters.items():
        linears[name].adapter = adapter
    return model


def _abstract(linear: Linear, rank: int, alpha: float, rslora: bool) -> LoRA:
    """An adapter whose parameters are `jax.ShapeDtypeStruct`s."""

    def build() -> LoRA:
        return LoRA(linear, rank=rank, alpha=alpha, rslora=rslora, rngs=nnx.Rngs(0))

    return placed(jax.eval_shape(build), linear.mesh)


def _parameters(model: Phi3PreTrainedModel) -> dict[str, nnx.Param]:
    """The model's own parameters by name, adapters left out."""
    return {
        ".".join(map(str, path)): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Param) and not isinstance(node, nnx.LoRAParam)
    }


def _stored_name(name: str, letter: str) -> str:
    return f"{PREFIX}{name}.lora_{letter}.weight"


def _layout(name: str, letter: str) -> TensorLayout:
    """A's columns are the projection's, B's rows are."""
    return TensorLayout(1) if letter == "A" else layout_of(f"{name}.weight")


def _saved(
    settings: AdapterConfig, parameters: dict[str, nnx.Param], model: Phi3PreTrainedModel
) -> list[str]:
    """Parameters that are stored as a whole."""
    names = [name for name in parameters if settings.saves(name.rpartition(".")[0])]
    if model.config.tie_word_embeddings and any(name.endswith("embed_tokens.weight") for name in names):
        raise CheckpointError(
            f"{settings.path}: modules_to_save has embed_tokens, which in this model is the head too "
            "(tie_word_embeddings); PEFT would load it as two that differ"
        )
    return names


def _check_tensors(
    source: SafetensorsSource,
    wanted: dict[str, tuple[nnx.Param, TensorLayout]],
    model: Phi3PreTrainedModel,
    path: Path,
) -> None:
    """That the file has the tensors of these adapters, in their shapes, and no others."""
    present = set(source.names())
    problems = []
    if missing := [name for name in wanted if name not in present]:
        problems.append(f"missing: {some(missing)}")
    if unexpected := sorted(present.difference(wanted)):
        unfused = any(map(_UNFUSED.search, unexpected))
        advice = f" (adapters of an unfused model; here they are on {', '.join(TARGETS)})" if unfused else ""
        problems.append(f"unexpected: {some(unexpected)}{advice}")
    for name, (parameter, layout) in wanted.items():
        expected = layout.checkpoint_shape(parameter.shape)
        if name in present and source.shape(name) != expected:
            problems.append(f"{name} has shape {list(source.shape(name))}, expected {list(expected)}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{path} does not fit this {type(model).__name__}: {'; '.join(problems[:5])}{more}"
        )
