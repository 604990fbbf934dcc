"""Models without numbers: shapes, dtypes and shardings, for loading and for compiling ahead of time."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from phi3_jax.cache.cache import KVCache
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.parallel.sharding import sharding

Model = TypeVar("Model", bound=nnx.Module)
Tree = TypeVar("Tree")


def abstract_model(
    cls: type[Model], config: Phi3Config, *, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> Model:
    """A model of class `cls` whose parameters are `jax.ShapeDtypeStruct`s; nothing is allocated.

    Raises:
        ValueError: sizes that the mesh does not divide.
    """
    build: Callable[..., Model] = cls
    return placed(nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0), dtype=dtype, mesh=mesh)), mesh)


def placed(tree: Tree, mesh: Mesh | None) -> Tree:
    """Abstract arrays with their shardings on `mesh`: parameters by their axes, all else whole."""

    def place(node: Any) -> Any:
        leaf = node.get_value() if isinstance(node, nnx.Param) else node
        axes = node.axes if isinstance(node, nnx.Param) else ()
        where = None if mesh is None else sharding(mesh, axes, leaf.ndim)
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        return node.replace(shape) if isinstance(node, nnx.Param) else shape

    return jax.tree.map(place, tree, is_leaf=lambda x: isinstance(x, nnx.Param))


def abstract_cache(model: Any, batch_size: int, max_length: int, dtype: Any = None) -> KVCache:
    """What `model.init_cache` makes, as `jax.ShapeDtypeStruct`s with their shardings."""
    mesh = model.decoder.mesh
    shapes = jax.eval_shape(lambda: model.init_cache(batch_size, max_length, dtype or model.dtype))
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        shapes,
        shapes.shardings(mesh),
    )
