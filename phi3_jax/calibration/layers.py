"""Runs one layer of a model, and sums the products of the inputs of its projections."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.model.arguments import check, locate
from phi3_jax.model.layers import Linear
from phi3_jax.model.quantizing import matrix_shape
from phi3_jax.model.rope import rope_tables


class LayerRunner:
    """Runs layers on windows of tokens, all of one length and without padding.

    Args:
        config: of the model.
        rows: windows at a time.
        length: tokens of a window.
    """

    def __init__(self, config: Phi3Config, rows: int, length: int):
        where = locate(check(config, None, np.zeros((rows, length), np.int32)), None, config, None)
        self._mask = where.mask
        self.projections = tuple(config.projections.values())
        self._tables = rope_tables(config, where.position_ids, where.rope_length)

    def outputs(self, layer: Any, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the layer's output."""
        return _outputs(layer, x, self._tables, self._mask)

    def products(self, layer: Any, x: Float[Array, "B T D"]) -> dict[str, Float[Array, "in in"]]:
        """Returns the sum of x x^T over the inputs x of each projection, float32."""
        return _products(layer, x, self._tables, self._mask, self.projections)


class _Recorder(nnx.Module):
    """Stands in place of an adapter, and keeps the inputs of its projection."""

    def __init__(self) -> None:
        self.inputs: Any = nnx.data(None)

    def __call__(self, x: Array, y: Array, base: Linear, key: Any = None) -> Array:
        self.inputs = x
        return y


def projection(layer: Any, name: str) -> Linear:
    """Returns the projection of a layer at this path."""
    block, _, own = name.partition(".")
    return getattr(getattr(layer, block), own)


@jax.jit
def _outputs(layer: Any, x: Array, tables: tuple[Array, Array], mask: Any) -> Array:
    return layer(x, tables, mask)[0]


@partial(jax.jit, static_argnums=4)
def _products(
    layer: Any, x: Array, tables: tuple[Array, Array], mask: Any, projections: tuple[str, ...]
) -> dict[str, Array]:
    recorders = {}
    for name in projections:
        projection(layer, name).adapter = recorders[name] = _Recorder()
    layer(x, tables, mask)

    def product(inputs: Array, name: str) -> Array:
        rows = inputs.reshape(-1, matrix_shape(projection(layer, name))[1]).astype(jnp.float32)
        return jax.lax.dot_general(rows, rows, (((0,), (0,)), ((), ())))

    return {name: product(recorder.inputs, name) for name, recorder in recorders.items()}
