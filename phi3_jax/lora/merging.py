"""Writes a model with its adapters merged, one tensor at a time."""

import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from phi3_jax.checkpoint.layout import layout_of
from phi3_jax.model import Phi3PreTrainedModel
from phi3_jax.model.layers import Embedding, Linear, QuantizedParam
from phi3_jax.model.saving import write_in_one, write_model
from phi3_jax.parallel.sharding import readable


class MergedSource:
    """The parameters of a model as floats, with its adapters merged, as a `TensorSource`.

    All processes of a model over several must `read` the same tensors in the same order.
    """

    def __init__(self, model: Phi3PreTrainedModel, dtype: Any):
        self._dtype = np.dtype(jnp.dtype(dtype))
        self._modules = {
            ".".join(map(str, path)): module
            for path, module in nnx.iter_modules(model)
            if isinstance(module, Linear | Embedding)
        }
        self._parameters = {
            ".".join(map(str, path)): node
            for path, node in nnx.iter_graph(model)
            if isinstance(node, nnx.Param | QuantizedParam) and not isinstance(node, nnx.LoRAParam)
        }

    def names(self) -> list[str]:
        return list(self._parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        module = self._linear(name)
        shape = self._parameters[name].shape if module is None else module.shape
        return layout_of(name).checkpoint_shape(shape)

    def dtype(self, name: str) -> np.dtype:
        return self._dtype

    def read(self, name: str) -> np.ndarray:
        module, parameter = self._linear(name), self._parameters[name]
        if module is not None:
            weight = module.floats()
            weight = weight if module.adapter is None else module.adapter.merged(weight)
        elif isinstance(parameter, QuantizedParam):
            weight = parameter.get_value().floats()
        else:
            weight = parameter[...]
        return layout_of(name).to_checkpoint(np.asarray(readable(weight.astype(self._dtype))))

    def _linear(self, name: str) -> Linear | None:
        """Returns the projection whose weight this is."""
        module, _, kind = name.rpartition(".")
        found = self._modules.get(module)
        return found if isinstance(found, Linear) and kind == "weight" else None


def save_merged(model: Phi3PreTrainedModel, directory: str | os.PathLike[str], dtype: Any) -> None:
    """Writes what `save_pretrained` writes, with floats of `dtype` in place of adapters and small integers.

    The model's own memory does not grow: one weight at a time is merged. All processes call this.

    Raises:
        CheckpointError: the disk is full, or the directory cannot be written.
    """
    source = MergedSource(model, dtype)
    write_in_one(source, lambda tensors: write_model(model, tensors, directory, "5GB", dtype))
