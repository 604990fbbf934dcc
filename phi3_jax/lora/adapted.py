"""Models with adapters: finds an adapter and its base model, opens both as one checkpoint, loads them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from phi3_jax.checkpoint.fingerprint import digests
from phi3_jax.checkpoint.opening import Checkpoint, open_checkpoint
from phi3_jax.checkpoint.source import CheckpointError, CheckpointSource
from phi3_jax.config.generation_config import GenerationConfig
from phi3_jax.config.model_config import CONFIG_NAME, Phi3Config
from phi3_jax.lora.adapters import merge_lora
from phi3_jax.lora.peft_config import TASK_TYPES, AdapterConfig, read_adapter_fields
from phi3_jax.lora.peft_files import (
    CONFIG,
    HEAD,
    PREFIX,
    WEIGHTS,
    AdapterSource,
    check_adapters,
    load_adapters,
)
from phi3_jax.model import Phi3PreTrainedModel
from phi3_jax.model.abstract import abstract_model
from phi3_jax.model.loading import load_model
from phi3_jax.model.quantizing import has_quantized_weights
from phi3_jax.quantization import FLOATS, Quantization, StoredWeight, WeightForm
from phi3_jax.runs.exchange import restore
from phi3_jax.sources.hub import resolve, resolve_adapter
from phi3_jax.storage.fetch import display_name
from phi3_jax.tokenizer import Phi3Tokenizer

Model = TypeVar("Model", bound=Phi3PreTrainedModel)

_SHARED = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
"""What the configs of an adapter and its base model have in common."""


class ModelPaths(NamedTuple):
    """Where a model is, and the adapter that changes it, if there is one."""

    base: Path
    adapter: Path | None = None

    @property
    def inputs(self) -> dict[str, Path | None]:
        """What a command reads, by the names of the options."""
        return {"--model": self.base, "--adapter": self.adapter}

    @property
    def adapter_record(self) -> dict[str, Any]:
        """What a result says about the adapter, by which a resumed run recognises it; nothing without one."""
        if self.adapter is None:
            return {}
        files = [self.adapter / name for name in (CONFIG, WEIGHTS, CONFIG_NAME)]
        found = [file for file in files if file.is_file()]
        return {"adapter": display_name(self.adapter), "adapter_files": digests(found)}


def find_model(
    model: str | PathLike[str] | None, adapter: str | PathLike[str] | None, default: Callable[[], Path]
) -> ModelPaths:
    """Returns the paths of a model and its adapter, after fetching them if necessary.

    Args:
        model: a directory, a GGUF file or a name on the Hub; None: the adapter's base model.
        adapter: a directory or a name on the Hub.
        default: returns the model if neither is given.

    Raises:
        CheckpointError: there is no such model or adapter, or the adapter does not name its base model.
    """
    if adapter is None:
        return ModelPaths(default() if model is None else resolve(model))
    path = resolve_adapter(adapter)
    restore(path)
    fields = read_adapter_fields(path / CONFIG)
    if model is not None:
        return ModelPaths(resolve(model), path)
    name, revision = base_name(fields), fields.get("revision")
    if name is None:
        named = fields.get("base_model_name_or_path")
        raise CheckpointError(
            f"{path / CONFIG}: base_model_name_or_path={named!r} names no model; give the base model "
            "(--model)"
        )
    try:
        return ModelPaths(resolve(name, revision=revision), path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path / CONFIG} has base_model_name_or_path={name!r}: {error}; or give another base model "
            "(--model)"
        ) from error


def base_name(fields: dict[str, Any]) -> str | None:
    """Returns the name of the base model in the fields of `adapter_config.json`, if it has one."""
    name = fields.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def saved_modules(config: AdapterConfig, model: Phi3PreTrainedModel) -> list[str]:
    """Returns the modules to store as a whole when adapters of this config are saved again.

    PEFT names several heads, of which the model has one.
    """
    names = {*(config.fields.get("modules_to_save") or ()), *([HEAD] if hasattr(model, HEAD) else [])}
    modules = [".".join(map(str, path)) for path, _ in nnx.iter_modules(model)]
    return sorted(name for name in names if any(module.endswith(name) for module in modules))


def open_model(paths: ModelPaths) -> Checkpoint:
    """Opens a base model, as it is with its adapter if there is one.

    The config is that of the adapter's `config.json`, which `finetune` writes, else the base model's. The
    adapter decides the class and the number of labels. A classifier's head comes from the adapter.

    Raises:
        CheckpointError: files are missing or broken, or the adapter's config.json is of another model.
    """
    checkpoint = open_checkpoint(paths.base)
    if paths.adapter is None:
        return checkpoint
    source = AdapterSource(paths.adapter)
    config = _config(checkpoint, paths.adapter, source)
    return Checkpoint(_AdaptedSource(checkpoint.source, source), config)


def _config(checkpoint: Checkpoint, adapter: Path, source: AdapterSource) -> Phi3Config:
    """Returns the config of a model with its adapter."""
    base = config = checkpoint.config
    if (adapter / CONFIG_NAME).is_file():
        try:
            config = Phi3Config.from_pretrained(adapter)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        for name in _SHARED:
            if (own := getattr(config, name)) != (other := getattr(base, name)):
                raise CheckpointError(
                    f"{adapter / CONFIG_NAME} has {name}={own}, and the base model {checkpoint.source.path} "
                    f"has {other}; give the base model that the adapter was trained on"
                )
    task = read_adapter_fields(adapter / CONFIG).get("task_type")
    classes = [cls.for_config(config).__name__ for cls, kind in TASK_TYPES.items() if kind == task]
    if classes:
        config = config.replace(extra=config.extra | {"architectures": classes})
    head = f"{PREFIX}{HEAD}.weight"
    if head in source.names() and (labels := source.shape(head)[0]) != config.num_labels:
        return config.replace(num_labels=labels, id2label=None)
    return config


@dataclass(frozen=True)
class _AdaptedSource:
    """A checkpoint whose head is that of an adapter, if the adapter has one."""

    base: CheckpointSource
    adapter: AdapterSource

    @property
    def path(self) -> Path:
        return self.base.path

    def names(self) -> Sequence[str]:
        return list(dict.fromkeys([*self.base.names(), *self._heads()]))

    def _heads(self) -> list[str]:
        names = (name.removeprefix(PREFIX) for name in self.adapter.names())
        return [name for name in names if name.startswith(f"{HEAD}.")]

    def _stored(self, name: str) -> tuple[CheckpointSource, str]:
        return (self.adapter, PREFIX + name) if name in self._heads() else (self.base, name)

    def shape(self, name: str) -> tuple[int, ...]:
        source, stored = self._stored(name)
        return source.shape(stored)

    def dtype(self, name: str) -> np.dtype:
        source, stored = self._stored(name)
        return source.dtype(stored)

    def read(self, name: str) -> np.ndarray:
        source, stored = self._stored(name)
        return source.read(stored)

    def read_part(self, name: str, rows: Sequence[slice], columns: slice) -> np.ndarray:
        source, stored = self._stored(name)
        return source.read_part(stored, rows, columns)

    def form(self, name: str) -> WeightForm | None:
        source, stored = self._stored(name)
        return source.form(stored)

    def read_quantized(self, name: str) -> StoredWeight:
        source, stored = self._stored(name)
        return source.read_quantized(stored)

    def check_unchanged(self) -> None:
        self.base.check_unchanged()

    def generation_config(self) -> GenerationConfig | None:
        return self.base.generation_config()

    def tokenizer(self) -> Phi3Tokenizer:
        return self.base.tokenizer()

    def write_companions(self, directory: Path) -> None:
        self.base.write_companions(directory)


def load_merged(
    cls: type[Model],
    checkpoint: Checkpoint,
    adapter: Path | None,
    *,
    dtype: Any,
    mesh: Mesh | None = None,
    config: Phi3Config | None = None,
    quantization: Quantization | str | None = None,
    **config_changes: Any,
) -> Model:
    """Loads a model of class `cls` with its adapter, if there is one, merged into its floats.

    An adapter of quantized weights is not merged but computed beside them, as in the training of such ones.
    If it is DoRA, they become floats, unless a quantization is asked for.

    Args:
        checkpoint: of `open_model`.
        adapter: the directory of the adapter. It is checked before the model is loaded.
        dtype, mesh, config, quantization, config_changes: as `load_model` takes them.

    Raises:
        CheckpointError: the checkpoint or the adapter does not fit.
    """
    if adapter is not None:
        check_adapters(abstract_model(cls, config or checkpoint.config, mesh=mesh), adapter)
        if quantization is None and read_adapter_fields(adapter / CONFIG).get("use_dora"):
            quantization = FLOATS
    options: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "config": config, "quantization": quantization}
    model = load_model(cls, checkpoint, **options, **config_changes)
    if adapter is None:
        return model
    model = load_adapters(model, adapter)
    return model if has_quantized_weights(model) else merge_lora(model)
