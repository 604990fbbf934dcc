"""Loads a model from a checkpoint, tensor by tensor."""

import logging
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, Sharding

from phi3_jax.checkpoint.layout import ignorable, layout_of
from phi3_jax.checkpoint.opening import (
    Checkpoint,
    has_gguf_weights,
    open_checkpoint,
    read_generation_config,
)
from phi3_jax.checkpoint.parts import put_parameter
from phi3_jax.checkpoint.safetensors import parameter_dtype, some
from phi3_jax.checkpoint.source import CheckpointError, CheckpointSource, TensorSource
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.generation.mixin import GenerationMixin
from phi3_jax.model.abstract import abstract_model
from phi3_jax.model.loading_arguments import CONFIG_FIELDS, UNSUPPORTED
from phi3_jax.model.quantizing import quantize_abstract
from phi3_jax.native.targets import available
from phi3_jax.quantization import FLOATS, Quantization
from phi3_jax.runs.arguments import refuse
from phi3_jax.sources.hub import resolve

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=Any)

HEADS = ("lm_head.weight", "score.weight", "score.bias", "classifier.weight", "classifier.bias")
"""Tensors of the heads; a checkpoint may have those of another head than the one that is loaded."""

INITIALISED = ("score.weight", "score.bias")
"""Tensors that are initialised where the checkpoint has none, as for a new classifier."""


def load_model(
    cls: type[Model],
    name_or_path: str | os.PathLike[str] | Checkpoint,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    attn_implementation: str | None = None,
    config: Phi3Config | None = None,
    quantization: Quantization | str | None = None,
    ignore_mismatched_sizes: bool = False,
    new_head: bool = False,
    rngs: nnx.Rngs | int = 0,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    **config_changes: Any,
) -> Model:
    """Loads a model of class `cls`; host memory holds one tensor besides the parameters.

    Names, shapes and dtypes are checked against the files' headers before any tensor is read. On a mesh over
    several processes, all of them call this, and each reads only the parts for its own devices (of a GGUF
    file, whole tensors, one at a time).

    Args:
        cls: the class to build; a causal language model loads into a classifier too, with a new `score`.
        name_or_path: a directory in Hugging Face's layout, a GGUF file, a name on the Hub, or a `Checkpoint`.
        dtype: the parameters' dtype, float32, bfloat16 or float16; None or "auto": the stored embedding's.
        mesh: divides the model, see `phi3_jax.make_mesh`; default: all of it is on one device.
        attn_implementation: as in `set_attn_implementation`; default: by the platform.
        config: in place of the checkpoint's.
        quantization: how the projections are quantized as they are loaded, such as "int8",
            "int4:group_size=32" or a `Quantization`; "none" for floats. Default: as the checkpoint has them.
        ignore_mismatched_sizes: initialise `score` where the number of labels differs.
        new_head: initialise `score`, also where the checkpoint has one that fits.
        rngs: initialise parameters that the checkpoint has not; an int is a seed.
        revision: branch, tag or commit on the Hub.
        token: the Hub's access token.
        cache_dir: the folder of the Hub's files.
        local_files_only: do not connect to the Hub.
        config_changes: fields of the config to change, such as `num_labels=77`.

    Raises:
        CheckpointError: the checkpoint does not fit; the message names the tensors.
        TypeError: there is no such argument.
        UserError: a dtype that parameters cannot have, config changes that contradict each other, sizes that
            the mesh does not divide, a quantization that cannot be read or does not fit, or an argument of
            transformers that is not supported.
    """
    dtype = config_changes.pop("torch_dtype", None) if dtype is None else dtype  # its older name
    others = {name: value for name, value in config_changes.items() if name not in CONFIG_FIELDS}
    refuse("from_pretrained", others, UNSUPPORTED, (*_ARGUMENTS, *CONFIG_FIELDS))
    config_changes = {name: value for name, value in config_changes.items() if name in CONFIG_FIELDS}
    parameters_dtype = _requested_dtype(dtype)
    if not isinstance(name_or_path, Checkpoint):
        hub: Any = {"revision": revision, "token": token, "cache_dir": cache_dir}
        name_or_path = resolve(name_or_path, local_files_only=local_files_only, **hub)
    source, own_config = open_checkpoint(name_or_path)
    path = source.path
    config = (config or own_config).replace(**config_changes)
    rngs = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
    cls = cls.for_config(config)
    build: Callable[..., Model] = cls
    shapes, files, modules = _abstract_with_files(
        cls, source, config, mesh, quantization, attn_implementation, ignore_mismatched_sizes, new_head
    )
    parameters = {name: leaf.get_value() for name, leaf in _parameters(shapes).items()}
    if parameters_dtype is None:
        parameters_dtype = _stored_dtype(source, files.values(), path)
    absent = {name: leaf.sharding for name, leaf in parameters.items() if name not in files}
    values: dict[str, Any] = {}
    if absent:
        values = _initialise(partial(build, config, dtype=parameters_dtype, mesh=mesh), rngs, absent)
        names = " and ".join(absent)
        logger.warning("%s has no %s that fits: initialised, to be trained before use", path, names)
    for name, file_name in files.items():
        leaf, layout = parameters[name], layout_of(name)
        if name in modules:
            values[name] = modules[name].load(source, file_name, layout)
        else:
            values[name] = put_parameter(
                source, file_name, layout, leaf.shape, parameters_dtype, leaf.sharding
            )
    source.check_unchanged()
    graph, abstract = nnx.split(shapes)
    leaves = [
        (keys, leaf.replace(values[".".join(map(str, keys))])) for keys, leaf in nnx.to_flat_state(abstract)
    ]
    model = nnx.merge(graph, nnx.from_flat_state(leaves))
    if isinstance(model, GenerationMixin):
        model.generation_config = read_generation_config(source, config)
    return model


def check_model(
    cls: type[Model],
    checkpoint: Checkpoint,
    *,
    dtype: Any,
    mesh: Mesh | AbstractMesh | None = None,
    config: Phi3Config | None = None,
    quantization: Quantization | str | None = None,
    new_head: bool = False,
    **config_changes: Any,
) -> Model:
    """Returns the abstract model that `load_model` would fill, after its checks of names, shapes and mesh.

    Only headers are read. The arguments and the errors are those of `load_model`.
    """
    source, own_config = checkpoint
    config = (config or own_config).replace(**config_changes)
    return _abstract_with_files(
        cls, source, config, mesh, quantization, new_head=new_head, dtype=parameter_dtype(dtype)
    )[0]


def _abstract_with_files(
    cls: type[Model],
    source: CheckpointSource,
    config: Phi3Config,
    mesh: Mesh | AbstractMesh | None,
    quantization: Quantization | str | None,
    attn_implementation: str | None = None,
    ignore_mismatched_sizes: bool = False,
    new_head: bool = False,
    dtype: Any = np.float32,
) -> tuple[Model, dict[str, str], dict[str, Any]]:
    """Returns the abstract model, the tensor of each parameter, and the modules that are quantized.

    Raises:
        CheckpointError, UserError: as `load_model`.
    """
    _check_layers(source, config, source.path)
    cls = cls.for_config(config)
    shapes = abstract_model(cls, config, dtype=dtype, mesh=mesh)
    shapes.set_attn_implementation(attn_implementation)
    expected = {name: leaf.get_value().shape for name, leaf in _parameters(shapes).items()}
    files = _match(cls, source, config, expected, ignore_mismatched_sizes, new_head, source.path)
    modules = quantize_abstract(shapes, source, files, chosen_quantization(source.path, quantization))
    return shapes, files, modules


class ModuleLoader:
    """Loads modules of a model one at a time, for models that are larger than memory.

    Raises:
        CheckpointError: the checkpoint does not fit the class.
    """

    def __init__(self, cls: type[Any], checkpoint: Checkpoint, *, dtype: Any):
        source, config = checkpoint
        _check_layers(source, config, source.path)
        self._source, self._dtype = source, parameter_dtype(dtype)
        self._shapes: Any = abstract_model(cls, config, dtype=self._dtype)
        expected = {name: leaf.get_value().shape for name, leaf in _parameters(self._shapes).items()}
        self._files = _match(cls, source, config, expected, False, False, source.path)

    def load(self, name: str) -> Any:
        """Returns the module of this name, such as "model.layers.3", with its parameters as floats."""
        module = self._shapes
        for part in name.split("."):
            module = module[int(part)] if part.isdecimal() else getattr(module, part)
        graph, abstract = nnx.split(module)
        leaves = []
        for keys, leaf in nnx.to_flat_state(abstract):
            own = ".".join(map(str, (name, *keys)))
            shape, layout = leaf.get_value().shape, layout_of(own)
            value = put_parameter(self._source, self._files[own], layout, shape, self._dtype, None)
            leaves.append((keys, leaf.replace(value)))
        return nnx.merge(graph, nnx.from_flat_state(leaves))


def _parameters(model: Any) -> dict[str, nnx.Variable[Any]]:
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, keys)): leaf for keys, leaf in flat}


_ARGUMENTS = (
    "dtype",
    "mesh",
    "attn_implementation",
    "config",
    "quantization",
    "ignore_mismatched_sizes",
    "rngs",
)


def load_abstract(
    cls: type[Model],
    path: Path | Checkpoint,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    config: Phi3Config | None = None,
    quantization: Quantization | str | None = None,
) -> Model:
    """Returns the abstract model of a directory or a GGUF file: shapes and dtypes without numbers.

    Raises:
        CheckpointError, UserError: as `load_model`; tensors are not checked.
    """
    source, own_config = open_checkpoint(path)
    _check_layers(source, config or own_config, source.path)
    parameters_dtype = _requested_dtype(dtype) or _stored_dtype(source, source.names(), source.path)
    model = abstract_model(cls, config or own_config, dtype=parameters_dtype, mesh=mesh)
    quantize_abstract(
        model, source, {name: name for name in source.names()}, chosen_quantization(source.path, quantization)
    )
    return model


def chosen_quantization(path: Path, quantization: Quantization | str | None) -> Quantization | str | None:
    """Returns the quantization that is asked for; None: as the checkpoint at `path` has it.

    On CPUs XLA multiplies groups of small integers six times as slowly as floats. So without the C++ library,
    GGUF files, which are made for CPUs, become floats.
    """
    if quantization is None and jax.default_backend() == "cpu" and has_gguf_weights(path):
        return None if available() else FLOATS
    return quantization


def _check_layers(source: TensorSource, config: Phi3Config, path: Path) -> None:
    """Checks the number of layers before they are built, one by one.

    Raises:
        CheckpointError: there are fewer tensors than layers.
    """
    tensors = len(source.names())
    if config.num_hidden_layers > tensors:
        raise CheckpointError(
            f"{path} does not fit its config: num_hidden_layers={config.num_hidden_layers}, and the files "
            f"have {tensors} tensors"
        )


def _requested_dtype(dtype: Any) -> np.dtype | None:
    return None if dtype in (None, "auto") else parameter_dtype(dtype)


def _stored_dtype(source: TensorSource, names: Iterable[str], path: Path) -> np.dtype:
    """Returns the dtype of the stored embedding."""
    name = next((name for name in names if name.endswith("embed_tokens.weight")), None)
    if name is None:
        raise CheckpointError(f"{path}: missing: model.embed_tokens.weight, among {some(source.names())}")
    stored = source.dtype(name)
    return np.dtype(np.float32) if stored == np.float64 else stored  # JAX has no float64 by default


def _match(
    cls: type,
    source: TensorSource,
    config: Phi3Config,
    expected: dict[str, tuple[int, ...]],
    ignore_mismatched_sizes: bool,
    new_head: bool,
    path: Path,
) -> dict[str, str]:
    """Returns the name in the checkpoint of every parameter that is loaded.

    Raises:
        CheckpointError: tensors are missing, unexpected or of the wrong shape.
    """
    present = set(source.names())
    has_head = any(name.startswith("model.") for name in expected)
    stored_with_head = any(name.startswith("model.") for name in present)
    files, problems, missing = {}, [], []
    for name, shape in expected.items():
        stored = name
        if has_head and not stored_with_head:
            stored = name.removeprefix("model.")
        elif stored_with_head and not has_head:
            stored = f"model.{name}"
        if stored not in present and name.startswith("score."):
            stored = name.replace("score.", "classifier.")
        if stored not in present or (new_head and name in INITIALISED):
            if name not in INITIALISED:
                missing.append(stored)
            continue
        stored_shape = layout_of(name).checkpoint_shape(shape)
        if source.shape(stored) == stored_shape:
            files[name] = stored
        elif name in INITIALISED and ignore_mismatched_sizes:
            present.discard(stored)
        else:
            advice = " (ignore_mismatched_sizes=True initialises it)" if name in INITIALISED else ""
            actual = list(source.shape(stored))
            problems.append(f"{stored} has shape {actual}, expected {list(stored_shape)}{advice}")
    unused = present - set(files.values())
    other_heads = sorted(unused & set(HEADS))
    unexpected = sorted(name for name in unused - set(HEADS) if not ignorable(name))
    if unexpected:
        problems.insert(0, f"unexpected: {some(unexpected)}")
    if missing:
        problems.insert(0, f"missing: {some(missing)}")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(
            f"{path} does not fit {cls.__name__} of its config ({config.num_hidden_layers} layers): {shown}"
        )
    if other_heads and not (config.tie_word_embeddings and other_heads == ["lm_head.weight"]):
        logger.info("%s: not used by %s: %s", path, cls.__name__, ", ".join(other_heads))
    return files


def _initialise(
    build: Callable[..., nnx.Module], rngs: nnx.Rngs, shardings: dict[str, Sharding | None]
) -> dict[str, jax.Array]:
    """Returns initial values of the parameters in `shardings`; those of all others are never computed."""

    def initialise(key: jax.Array) -> dict[str, jax.Array]:
        state = nnx.state(build(rngs=nnx.Rngs(key)))
        flat = {".".join(map(str, keys)): leaf[...] for keys, leaf in nnx.to_flat_state(state)}
        return {name: flat[name] for name in shardings}

    return jax.jit(initialise, out_shardings=shardings)(rngs.params())
