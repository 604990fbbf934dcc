"""From a model to a directory that transformers loads."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from phi3_jax.checkpoint.atomic import atomic_directory
from phi3_jax.checkpoint.layout import TensorLayout, layout_of
from phi3_jax.checkpoint.safetensors import write_tensors
from phi3_jax.checkpoint.source import TensorSource
from phi3_jax.errors import UserError
from phi3_jax.generation.mixin import GenerationMixin
from phi3_jax.parallel import distributed


class ParameterSource:
    """Parameters under the names and in the layouts that they are stored in.

    Of a model over several processes all of them must `read` the same tensors in the same order.
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
        return layout.to_checkpoint(np.asarray(_readable(parameter[...])))


class ModelSource(ParameterSource):
    """The parameters of a model under the checkpoint's names and in its layout."""

    def __init__(self, model: Any):
        flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
        names = {".".join(map(str, keys)): leaf for keys, leaf in flat}
        super().__init__({name: (leaf, layout_of(name)) for name, leaf in names.items()})


def _readable(parameter: Any) -> Any:
    """The parameter where this process can read it: of one over several processes, a copy on every device."""
    if not isinstance(parameter, jax.Array) or parameter.is_fully_addressable:
        return parameter
    assert isinstance(parameter.sharding, NamedSharding)
    everywhere = NamedSharding(parameter.sharding.mesh, PartitionSpec())
    return jax.jit(lambda x: x, out_shardings=everywhere)(parameter)


class _Gathered:
    """In process 0: the tensors of `source`, each told to the other processes, which `_follow`."""

    def __init__(self, source: TensorSource):
        self._source = source
        self.names, self.shape, self.dtype = source.names, source.shape, source.dtype

    def read(self, name: str) -> np.ndarray:
        distributed.broadcast((name, None))
        return self._source.read(name)


def _follow(source: TensorSource) -> None:
    """In the other processes: takes part in what process 0 reads until it is done, and fails as it does."""
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

    For a causal language model also `generation_config.json`.

    Files take their names only when all are written; what else the directory holds stays. Of several
    processes all call this; process 0 writes, the others wait until it has, or has failed.

    Raises:
        ValueError: the model has adapters, for which a checkpoint has no names.
        CheckpointError: the disk is full, or the directory cannot be written.
    """
    if jax.tree.leaves(nnx.state(model, nnx.LoRAParam)):
        raise UserError(
            "the model has adapters, which a checkpoint cannot hold; merge them first (merge_lora), or write "
            "them alone (save_adapters)"
        )
    write_in_one(ModelSource(model), lambda source: _write(model, source, Path(directory), max_shard_size))


def write_in_one(source: TensorSource, write: Callable[[TensorSource], None]) -> None:
    """Calls `write` with the tensors of `source` in process 0, while the others take part in reading them.

    All processes return when it has written, or raise what it raised.
    """
    if distributed.process_count() == 1:
        write(source)
    elif distributed.is_primary():
        failed: BaseException | None = None
        try:
            write(_Gathered(source))
        except BaseException as error:
            failed = error
        distributed.broadcast((None, failed and distributed.portable(failed)))
        if failed is not None:
            raise failed
    else:
        _follow(source)


def _write(model: Any, source: TensorSource, directory: Path, max_shard_size: int | str) -> None:
    config = model.config
    about = {"architectures": [type(model).__name__], "dtype": str(model.dtype)}
    extra = {key: value for key, value in config.extra.items() if key != "torch_dtype"} | about
    with atomic_directory(directory) as work:
        write_tensors(source, work, max_shard_size)
        if isinstance(model, GenerationMixin):
            model.generation_config.save_pretrained(work)
        config.replace(extra=extra).save_pretrained(work)
