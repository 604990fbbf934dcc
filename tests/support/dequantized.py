"""Models of floats that equal quantized ones."""

from typing import Any

import jax
from flax import nnx

from phi3_jax.model.layers import Linear, QuantizedParam
from phi3_jax.model.quantizing import quantizable


def floats_of(model: Any) -> Any:
    """Returns the model with every quantized weight as the floats that it stands for."""
    model = jax.tree.map(lambda leaf: leaf, model)
    for _, module in quantizable(model):
        if isinstance(module.weight, QuantizedParam):
            if isinstance(module, Linear):
                module.weight = nnx.Param(module.floats(), axes=module.axes)
            else:
                module.weight = nnx.Param(module.weight.get_value().floats(), axes=module.weight.axes)
    return model
