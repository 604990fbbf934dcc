"""From a model to a directory that transformers loads."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from phi3_jax.checkpoint.atomic import atomic_directory
from phi3_jax.checkpoint.layout import layout_of
from phi3_jax.checkpoint.safetensors import write_tensors
from phi3_jax.model import Phi3ForCausalLM, Phi3PreTrainedModel


class ModelSource:
    """The parameters of a model under the checkpoint's names and in its layout."""

    def __init__(self, model: Phi3PreTrainedModel):
        flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
        self._parameters = {".".join(map(str, keys)): leaf for keys, leaf in flat}

    def names(self) -> Sequence[str]:
        return list(self._parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        return layout_of(name).checkpoint_shape(self._parameters[name].shape)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._parameters[name].dtype)

    def read(self, name: str) -> np.ndarray:
        return layout_of(name).to_checkpoint(np.asarray(self._parameters[name][...]))


def save_model(
    model: Phi3PreTrainedModel, directory: str | os.PathLike[str], *, max_shard_size: int | str = "5GB"
) -> None:
    """Writes `config.json` and safetensors, sharded with an index above `max_shard_size`.

    For a causal language model also `generation_config.json`.

    Files take their names only when all are written; what else the directory holds stays.

    Raises:
        CheckpointError: the disk is full, or the directory cannot be written.
    """
    config = model.config
    about = {"architectures": [type(model).__name__], "dtype": str(model.dtype)}
    extra = {key: value for key, value in config.extra.items() if key != "torch_dtype"} | about
    with atomic_directory(Path(directory)) as work:
        write_tensors(ModelSource(model), work, max_shard_size)
        if isinstance(model, Phi3ForCausalLM):
            model.generation_config.save_pretrained(work)
        config.replace(extra=extra).save_pretrained(work)
