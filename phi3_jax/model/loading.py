"""From a checkpoint to a model, tensor by tensor."""

import logging
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding

from phi3_jax.checkpoint.hub import resolve
from phi3_jax.checkpoint.layout import ignorable, layout_of
from phi3_jax.checkpoint.opening import Checkpoint, open_checkpoint, read_generation_config
from phi3_jax.checkpoint.parts import put_parameter
from phi3_jax.checkpoint.safetensors import parameter_dtype, some
from phi3_jax.checkpoint.source import CheckpointError, TensorSource
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.generation.mixin import GenerationMixin
from phi3_jax.model.abstract import abstract_model

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=Any)

HEADS = ("lm_head.weight", "score.weight", "score.bias", "classifier.weight", "classifier.bias")
"""Tensors of the heads; a checkpoint may hold those of another head than the one being loaded."""
FRESH = ("score.weight", "score.bias")
"""Tensors that are initialised where the checkpoint has none, as for a classifier before its fine-tuning."""


def load_model(
    cls: type[Model],
    name_or_path: str | os.PathLike[str] | Checkpoint,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    attn_implementation: str | None = None,
    config: Phi3Config | None = None,
    ignore_mismatched_sizes: bool = False,
    rngs: nnx.Rngs | int = 0,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    **config_changes: Any,
) -> Model:
    """Loads a model of class `cls`, holding one tensor besides the parameters in host memory.

    Names, shapes and dtypes are checked against the files' headers before anything is put on a device. On a
    mesh over several processes, all of them call this, and each reads and holds what its own devices hold (of
    a GGUF file each dequantises whole tensors, one at a time).

    Args:
        cls: the class to build; a causal language model loads into a classifier too, with a new `score`.
        name_or_path: a directory in Hugging Face's layout, a GGUF file, a name on the Hub; or a `Checkpoint`.
        dtype: of the parameters: float32, bfloat16 or float16; None or "auto": as the embedding is stored.
        mesh: to divide the model over, of `phi3_jax.make_mesh`; default: the whole of it on one device.
        attn_implementation: as in `set_attn_implementation`; default: by the platform.
        config: used in place of the checkpoint's.
        ignore_mismatched_sizes: initialise `score` anew where the number of labels differs.
        rngs: for parameters that are initialised; an int is a seed.
        revision: branch, tag or commit on the Hub.
        token: for the Hub.
        cache_dir: of the Hub's files.
        local_files_only: never ask the Hub.
        config_changes: fields of the config to change, such as `num_labels=77`.

    Raises:
        CheckpointError: what is wrong with the checkpoint, the tensors concerned named.
        ValueError: a dtype that parameters cannot have, config changes that do not fit together, sizes that
            the mesh does not divide.
    """
    kind = _wanted_dtype(dtype)
    if not isinstance(name_or_path, Checkpoint):
        name_or_path = resolve(
            name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    source, own_config = open_checkpoint(name_or_path)
    path = source.path
    config = (config or own_config).replace(**config_changes)
    rngs = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
    build: Callable[..., Model] = cls
    shapes = abstract_model(cls, config, mesh=mesh)
    shapes.set_attn_implementation(attn_implementation)
    graph, abstract = nnx.split(shapes)
    parameters = {".".join(map(str, keys)): leaf.get_value() for keys, leaf in nnx.to_flat_state(abstract)}
    wanted = {name: leaf.shape for name, leaf in parameters.items()}
    files = _match(cls, source, config, wanted, ignore_mismatched_sizes, path)
    if kind is None:
        kind = _stored_dtype(source, files.values())
    fresh = {name: leaf.sharding for name, leaf in parameters.items() if name not in files}
    values = _initialise(partial(build, config, dtype=kind, mesh=mesh), rngs, fresh) if fresh else {}
    for name, file_name in files.items():
        leaf = parameters[name]
        values[name] = put_parameter(source, file_name, layout_of(name), leaf.shape, kind, leaf.sharding)
    if fresh:
        names = " and ".join(fresh)
        logger.warning("%s has no %s that fits: initialised anew, to be trained before use", path, names)
    leaves = [
        (keys, leaf.replace(values[".".join(map(str, keys))])) for keys, leaf in nnx.to_flat_state(abstract)
    ]
    model = nnx.merge(graph, nnx.from_flat_state(leaves))
    if isinstance(model, GenerationMixin):
        model.generation_config = read_generation_config(source, config)
    return model


def load_abstract(
    cls: type[Model],
    path: Path | Checkpoint,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    config: Phi3Config | None = None,
) -> Model:
    """What `load_model` would load from a directory or a GGUF file, without its numbers.

    Raises:
        CheckpointError, ValueError: as `load_model`; tensors are not looked at.
    """
    source, own_config = open_checkpoint(path)
    kind = _wanted_dtype(dtype)
    if kind is None:
        kind = _stored_dtype(source, source.names())
    return abstract_model(cls, config or own_config, dtype=kind, mesh=mesh)


def _wanted_dtype(dtype: Any) -> np.dtype | None:
    return None if dtype in (None, "auto") else parameter_dtype(dtype)


def _stored_dtype(source: TensorSource, names: Iterable[str]) -> np.dtype:
    """Of the embedding."""
    stored = source.dtype(next(name for name in names if name.endswith("embed_tokens.weight")))
    return np.dtype(np.float32) if stored == np.float64 else stored  # JAX has no float64 unless told so


def _match(
    cls: type,
    source: TensorSource,
    config: Phi3Config,
    wanted: dict[str, tuple[int, ...]],
    ignore_mismatched_sizes: bool,
    path: Path,
) -> dict[str, str]:
    """The name in the checkpoint of every parameter that is loaded; what does not fit is an error."""
    present = set(source.names())
    headed = any(name.startswith("model.") for name in wanted)
    stored_headed = any(name.startswith("model.") for name in present)
    files, problems, missing = {}, [], []
    for name, shape in wanted.items():
        stored = name
        if headed and not stored_headed:
            stored = name.removeprefix("model.")
        elif stored_headed and not headed:
            stored = f"model.{name}"
        if stored not in present and name.startswith("score."):
            stored = name.replace("score.", "classifier.")
        if stored not in present:
            if name not in FRESH:
                missing.append(stored)
            continue
        expected = layout_of(name).checkpoint_shape(shape)
        if source.shape(stored) == expected:
            files[name] = stored
        elif name in FRESH and ignore_mismatched_sizes:
            present.discard(stored)
        else:
            advice = " (ignore_mismatched_sizes=True initialises it anew)" if name in FRESH else ""
            found = list(source.shape(stored))
            problems.append(f"{stored} has shape {found}, expected {list(expected)}{advice}")
    left = present - set(files.values())
    other_heads = sorted(left & set(HEADS))
    unexpected = sorted(name for name in left - set(HEADS) if not ignorable(name))
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
    build: Callable[..., nnx.Module], rngs: nnx.Rngs, wanted: dict[str, Sharding | None]
) -> dict[str, jax.Array]:
    """Initial values of a few parameters, where they belong; those of all others are never computed."""

    def initialise(key: jax.Array) -> dict[str, jax.Array]:
        state = nnx.state(build(rngs=nnx.Rngs(key)))
        flat = {".".join(map(str, keys)): leaf[...] for keys, leaf in nnx.to_flat_state(state)}
        return {name: flat[name] for name in wanted}

    return jax.jit(initialise, out_shardings=wanted)(rngs.params())
