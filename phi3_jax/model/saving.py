"""Writes a model as a directory that transformers loads."""

import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from phi3_jax.checkpoint.companions import MODEL_FILES
from phi3_jax.checkpoint.compressed_tensors import CompressedSource, compressed_config, exact_dtype
from phi3_jax.checkpoint.layout import TensorLayout, layout_of
from phi3_jax.checkpoint.quantization_config import KEYS
from phi3_jax.checkpoint.safetensors import write_tensors
from phi3_jax.checkpoint.source import TensorSource
from phi3_jax.config.model_config import CONFIG_NAME
from phi3_jax.errors import UserError
from phi3_jax.generation.mixin import GenerationMixin
from phi3_jax.model.layers import QuantizedParam
from phi3_jax.model.quantizing import form_of, has_quantized_weights, stored_weight
from phi3_jax.parallel import distributed
from phi3_jax.parallel.sharding import readable
from phi3_jax.quantization import StoredWeight, WeightForm
from phi3_jax.storage.outputs import exchanging
from phi3_jax.storage.targets import Target

_DROPPED = ("torch_dtype", *KEYS)
"""Fields of the checkpoint that a model was loaded from, which do not hold for the one that is written."""


class ParameterSource:
    """Parameters as a `TensorSource`, with the checkpoint's names and layouts.

    All processes of a model over several must `read` the same tensors in the same order.
    """

    def __init__(self, parameters: Mapping[str, tuple[nnx.Param, TensorLayout]]):
        self._parameters = parameters

    def names(self) -> Sequence[str]:
        return list(self._parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        parameter, layout = self._parameters[name]
        return layout.checkpoint_shape(parameter.shape)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._parameters[name][0].dtype)

    def read(self, name: str) -> np.ndarray:
        parameter, layout = self._parameters[name]
        return layout.to_checkpoint(np.asarray(readable(parameter[...])))


class ModelSource(ParameterSource):
    """The parameters of a model as a `TensorSource`."""

    def __init__(self, model: Any):
        flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
        names = {".".join(map(str, keys)): leaf for keys, leaf in flat}
        super().__init__({name: (leaf, layout_of(name)) for name, leaf in names.items()})


class QuantizedModelSource(ModelSource):
    """The parameters of a model with quantized weights as `QuantizedTensors`."""

    def __init__(self, model: Any):
        super().__init__(model)
        flat = nnx.to_flat_state(nnx.state(model, QuantizedParam))
        self._weights = {".".join(map(str, keys)): leaf.get_value() for keys, leaf in flat}

    def names(self) -> Sequence[str]:
        return [*super().names(), *self._weights]

    def shape(self, name: str) -> tuple[int, ...]:
        weight = self._weights.get(name)
        return super().shape(name) if weight is None else layout_of(name).checkpoint_shape(weight.shape)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32) if name in self._weights else super().dtype(name)

    def read(self, name: str) -> np.ndarray:
        return self.read_quantized(name).dequantize() if name in self._weights else super().read(name)

    def form(self, name: str) -> WeightForm | None:
        weight = self._weights.get(name)
        return None if weight is None else form_of(weight)

    def read_quantized(self, name: str) -> StoredWeight:
        return stored_weight(self._weights[name], layout_of(name))

    def scale_dtype(self, name: str) -> np.dtype:
        """Returns the narrowest dtype that holds a weight's scales exactly."""
        return exact_dtype(np.asarray(readable(self._weights[name].scale)))


class _BroadcastSource:
    """The tensors of `source` in process 0; it announces each read to the other processes."""

    def __init__(self, source: TensorSource):
        self._source = source
        self.names, self.shape, self.dtype = source.names, source.shape, source.dtype

    def read(self, name: str) -> np.ndarray:
        distributed.broadcast((name, None))
        return self._source.read(name)


def _follow(source: TensorSource) -> None:
    """Takes part, in the other processes, in the reads of process 0 until its end or its error."""
    while True:
        name, error = distributed.broadcast(None)
        if error is not None:
            error.of_process = 0
            raise error
        if name is None:
            return
        source.read(name)


def save_model(model: Any, directory: str | os.PathLike[str], *, max_shard_size: int | str = "5GB") -> None:
    """Writes `config.json` and safetensors, sharded with an index above `max_shard_size`.

    A causal language model also gets `generation_config.json`. Quantized weights are written in the format of
    compressed-tensors, which transformers and vLLM read; loaded again, they are the same numbers.

    Files get their names when all are written, and an earlier model's are removed; other files of the
    directory, such as a tokenizer's, stay. All processes call this; process 0 writes, and the others wait for
    its end or its error.

    Raises:
        UserError: the model has adapters, for which a checkpoint has no names.
        CheckpointError: the disk is full, or the directory cannot be written.
    """
    if jax.tree.leaves(nnx.state(model, nnx.LoRAParam)):
        raise UserError(
            "the model has adapters, which a checkpoint cannot hold; merge them first (merge_lora), or write "
            "them alone (save_adapters)"
        )
    tensors: TensorSource = ModelSource(model)
    extra: dict[str, Any] = {}
    if has_quantized_weights(model):
        quantized = QuantizedModelSource(model)
        tensors = CompressedSource(quantized, quantized.scale_dtype)
        extra = {"quantization_config": compressed_config(quantized)}
    write_in_one(
        tensors,
        lambda source: write_model(model, source, directory, max_shard_size, model.dtype, extra),
    )


def write_in_one(source: TensorSource, write: Callable[[TensorSource], None]) -> None:
    """Calls `write` with the tensors of `source` in process 0; the other processes take part in the reads.

    All processes return after the write, or raise its error.
    """
    if distributed.process_count() == 1:
        write(source)
    elif distributed.is_primary():
        failure: BaseException | None = None
        try:
            write(_BroadcastSource(source))
        except BaseException as error:
            failure = error
        distributed.broadcast((None, failure and distributed.portable(failure)))
        if failure is not None:
            raise failure
    else:
        _follow(source)


def write_model(
    model: Any,
    source: TensorSource,
    directory: Target,
    max_shard_size: int | str,
    dtype: Any,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Writes the tensors of `source`, with floats of `dtype`, and the settings of `model` and `extra`."""
    config = model.config
    kept = {key: value for key, value in config.extra.items() if key not in _DROPPED}
    summary = {"architectures": [type(model).__name__], "dtype": str(jnp.dtype(dtype))}
    with exchanging(directory, config=CONFIG_NAME, replaced=MODEL_FILES) as work:
        write_tensors(source, work, max_shard_size)
        if isinstance(model, GenerationMixin):
            model.generation_config.save_pretrained(work)
        config.replace(extra=kept | summary | dict(extra)).save_pretrained(work)
