"""Directories of adapters in PEFT's format: LoRA, and the modules that were trained with it."""

import json
import os
import re
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx

from phi3_jax.checkpoint.layout import TensorLayout, layout_of
from phi3_jax.checkpoint.parts import put_parameter
from phi3_jax.checkpoint.safetensors import SafetensorsSource, some, write_file
from phi3_jax.checkpoint.source import CheckpointError, TensorSource
from phi3_jax.errors import UserError
from phi3_jax.lora.adapters import LoRA, check_floats, own_names, projections
from phi3_jax.lora.peft_config import AdapterConfig, adapter_fields, read_adapter_config
from phi3_jax.model import Phi3PreTrainedModel
from phi3_jax.model.abstract import with_shardings
from phi3_jax.model.layers import Linear
from phi3_jax.model.saving import ParameterSource, write_in_one
from phi3_jax.runs.exchange import restore
from phi3_jax.sources.hub import ADAPTER_CONFIG, ADAPTER_WEIGHTS, resolve_adapter
from phi3_jax.storage.objects import LocalFile, RangedFile
from phi3_jax.storage.outputs import exchanging

Model = TypeVar("Model", bound=Phi3PreTrainedModel)

CONFIG = ADAPTER_CONFIG
WEIGHTS = ADAPTER_WEIGHTS
_WEIGHTS = re.compile(r"adapter_model\..*")
PREFIX = "base_model.model."
"""PEFT adds this to the names of the model that it wraps."""

_UNFUSED = re.compile(r"\.((?:q|k|v|gate|up)_proj)\.")


HEAD = "score"
"""The module of a classifier's head."""


class AdapterSource(SafetensorsSource):
    """The tensors of a directory of adapters."""

    def _files(self) -> list[tuple[RangedFile, set[str] | None]]:
        if not (self.path / WEIGHTS).is_file():
            raise CheckpointError(
                f"{self.path} has no {WEIGHTS}. Pickled adapters (.bin) are not supported; save them as "
                "safetensors with PEFT first"
            )
        return [(LocalFile(self.path / WEIGHTS), None)]


def save_adapters(
    model: Phi3PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    base_model: str,
    modules_to_save: Collection[str] | None = None,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, for PEFT and `load_adapters`.

    Both files replace earlier ones together, when they are complete; other files of the directory stay. If
    there are several processes, all call this and process 0 writes.

    Args:
        model: a model with adapters (`add_lora`).
        directory: created if it does not exist.
        base_model: name or directory of the model without adapters, for the config.
        modules_to_save: modules to store as a whole, such as a new head; default: `score`, if it exists.

    Raises:
        UserError: the model has no adapters or has stacked layers, or a module to save does not exist, has
            adapters itself, or is both embedding and head.
        CheckpointError: the disk is full, or the directory cannot be written.
    """
    adapted = {name: linear for name, linear in projections(model) if linear.adapter is not None}
    if not adapted:
        raise UserError("the model has no adapters; add some (add_lora), or save the model itself")
    parameters = _base_parameters(model)
    if modules_to_save is None:
        modules_to_save = ["score"] if "score.weight" in parameters else []
    modules = [name.rpartition(".")[0] for name in parameters]
    if absent := [name for name in modules_to_save if not any(module.endswith(name) for module in modules)]:
        raise UserError(f"modules_to_save names {some(absent)}, but the model has no such module")
    config = AdapterConfig(adapter_fields(model, adapted, base_model, modules_to_save), Path(directory))
    if twice := [name for name in adapted if config.saves(name)]:
        raise UserError(f"{some(twice)} cannot have adapters and be in modules_to_save; remove them there")
    tensors = _tensors(config, {name: linear.adapter for name, linear in adapted.items()}, model)

    def write(source: TensorSource) -> None:
        with exchanging(directory, config=CONFIG, replaced=_WEIGHTS) as work:
            write_file(source, source.names(), work / WEIGHTS)
            text = json.dumps(config.fields, indent=2, sort_keys=True)
            (work / CONFIG).write_text(text + "\n", encoding="utf-8")

    write_in_one(ParameterSource(tensors), write)


def load_adapters(model: Model, directory: str | os.PathLike[str], *, keep_head: bool = False) -> Model:
    """Returns the model with the adapters that PEFT, or `save_adapters`, wrote for its base model.

    Modules stored as a whole, such as `score`, replace the model's own. Everything is checked before anything
    is put on a device. The given model does not change, and both share their weights.

    Args:
        model: the base model, with a list of layers.
        directory: the adapters' directory, or their name on the Hub.
        keep_head: keep the model's own `score`, whatever the adapters have.

    Raises:
        CheckpointError: files are missing or broken, or the adapters are not LoRA, are for another model
            class, or have other sizes, too few or too many tensors.
        UserError: the model's layers are stacked, or already have adapters.
    """
    model = jax.tree.map(lambda leaf: leaf, model)
    path = resolve_adapter(directory)
    _, source, adapters, tensors = _match(model, path, keep_head)
    linears = dict(projections(model))
    for stored, (parameter, layout) in tensors.items():
        leaf = parameter.get_value()
        sharding = None if model.decoder.mesh is None else leaf.sharding
        value = put_parameter(source, stored, layout, leaf.shape, np.dtype(leaf.dtype), sharding)
        parameter.set_value(value)
    for name, adapter in adapters.items():
        linears[name].adapter = adapter
    return model


def check_adapters(
    model: Phi3PreTrainedModel, directory: str | os.PathLike[str], *, keep_head: bool = False
) -> AdapterConfig:
    """Checks that `load_adapters` can load these adapters into this model, and returns their config.

    The model may be abstract. Arguments and errors are those of `load_adapters`.
    """
    return _match(model, resolve_adapter(directory), keep_head)[0]


class _Match(NamedTuple):
    """Adapters on disk that fit a model."""

    config: AdapterConfig
    source: AdapterSource
    adapters: dict[str, LoRA]
    """By the names of their projections; their parameters are `jax.ShapeDtypeStruct`s."""
    tensors: dict[str, tuple[nnx.Param, TensorLayout]]


def _match(model: Phi3PreTrainedModel, path: Path, keep_head: bool) -> _Match:
    """Returns the adapters of a directory, once their config, names and shapes are checked."""
    linears = dict(projections(model))
    if any(linear.adapter is not None for linear in linears.values()):
        raise UserError("the model already has adapters; merge them first (merge_lora)")
    restore(path)
    config = read_adapter_config(path / CONFIG, model)
    source = AdapterSource(path)
    adapters = _abstract_adapters(config, linears)
    tensors = _tensors(config, adapters, model)
    present = set(source.names())
    if keep_head:
        head = f"{PREFIX}{HEAD}."
        tensors = {name: value for name, value in tensors.items() if not name.startswith(head)}
        present = {name for name in present if not name.startswith(head)}
    _check_tensors(source, present, tensors, model, path)
    return _Match(config, source, adapters, tensors)


def _abstract_adapters(config: AdapterConfig, linears: dict[str, Linear]) -> dict[str, LoRA]:
    """Returns the adapters that the config describes, whose parameters are `jax.ShapeDtypeStruct`s."""

    def build(linear: Linear, name: str) -> LoRA:
        rank, alpha = config.rank(name), config.alpha(name)
        options: Any = {"rslora": config.rslora, "dropout": config.dropout, "dora": config.dora}
        return LoRA(linear, rank=rank, alpha=alpha, **options, rngs=nnx.Rngs(0))

    adapted = {name: linear for name, linear in linears.items() if config.targets(name)}
    if config.dora:
        for name, linear in adapted.items():
            check_floats(name, linear)
    adapters = {
        name: with_shardings(jax.eval_shape(partial(build, linear, name)), linear.mesh)
        for name, linear in adapted.items()
    }
    if not adapters:
        targets = config.fields["target_modules"]
        own = dict.fromkeys(name.rpartition(".")[2] for name in linears)
        raise CheckpointError(
            f"{config.path}: target_modules={targets!r} names no projection of this model; expected some of "
            f"{', '.join(own)} (adapters of an unfused model, with q_proj and so on, do not fit)"
        )
    return adapters


def _tensors(
    config: AdapterConfig, adapters: dict[str, LoRA], model: Phi3PreTrainedModel
) -> dict[str, tuple[nnx.Param, TensorLayout]]:
    """Returns the stored parameters and their layouts, under PEFT's names."""
    parameters = _base_parameters(model)
    tensors: dict[str, tuple[nnx.Param, TensorLayout]] = {}
    for name, adapter in adapters.items():
        # The columns of A are those of the projection, and the rows of B are its rows.
        tensors[f"{PREFIX}{name}.lora_A.weight"] = adapter.a, TensorLayout(1)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = adapter.b, layout_of(f"{name}.weight")
        if adapter.magnitude is not None:
            stored = f"{PREFIX}{name}.lora_magnitude_vector"
            tensors[stored] = adapter.magnitude, layout_of(f"{name}.weight")
    saved = [name for name in parameters if config.saves(name.rpartition(".")[0])]
    if model.config.tie_word_embeddings and any(name.endswith("embed_tokens.weight") for name in saved):
        raise CheckpointError(
            f"{config.path}: modules_to_save has embed_tokens, which in this model is the head too "
            "(tie_word_embeddings); PEFT would load it as two that differ"
        )
    return tensors | {PREFIX + name: (parameters[name], layout_of(name)) for name in saved}


def _base_parameters(model: Phi3PreTrainedModel) -> dict[str, nnx.Param]:
    """Returns the model's parameters by name, without adapters."""
    return {
        ".".join(map(str, path)): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Param) and not isinstance(node, nnx.LoRAParam)
    }


def _check_tensors(
    source: SafetensorsSource,
    present: set[str],
    expected: dict[str, tuple[nnx.Param, TensorLayout]],
    model: Phi3PreTrainedModel,
    path: Path,
) -> None:
    """Checks that the file has exactly the expected tensors, in their shapes."""
    problems = []
    if missing := [name for name in expected if name not in present]:
        problems.append(f"missing: {some(missing)}")
    if unexpected := sorted(present.difference(expected)):
        own = own_names(model.config).values()
        found = (match[1] for match in map(_UNFUSED.search, unexpected) if match is not None)
        unfused = any(name not in own for name in found)
        advice = f" (adapters of an unfused model; here they are on {', '.join(own)})" if unfused else ""
        problems.append(f"unexpected: {some(unexpected)}{advice}")
    for name, (parameter, layout) in expected.items():
        shape = layout.checkpoint_shape(parameter.shape)
        if name in present and source.shape(name) != shape:
            problems.append(f"{name} has shape {list(source.shape(name))}, expected {list(shape)}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{path} does not fit this {type(model).__name__}: {'; '.join(problems[:5])}{more}"
        )
