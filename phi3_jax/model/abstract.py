"""Abstract models, with shapes, dtypes and shardings only, for loading and for compiling ahead of time."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from phi3_jax.cache.cache import KVCache
from phi3_jax.config.model_config import Phi3Config
from phi3_jax.model.layers import QuantizedParam
from phi3_jax.parallel.sharding import sharding

Model = TypeVar("Model", bound=Any)
Tree = TypeVar("Tree")


def abstract_model(
    cls: type[Model], config: Phi3Config, *, dtype: Any = jnp.float32, mesh: Mesh | AbstractMesh | None = None
) -> Model:
    """Returns a model whose parameters are `jax.ShapeDtypeStruct`s; nothing is allocated.

    Its class is `cls`, or the one with the same head for the config's family.

    Raises:
        UserError: sizes that the mesh does not divide, or a config of a family without that head.
    """
    build: Callable[..., Model] = cls.for_config(config)
    shapes = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0), dtype=dtype, mesh=mesh))
    return with_shardings(shapes, mesh)


def with_shardings(tree: Tree, mesh: Mesh | AbstractMesh | None) -> Tree:
    """Returns abstract arrays with shardings: a parameter's by its axes, all else whole on every device."""

    def place(leaf: Any, axes: tuple[str | None, ...] = ()) -> jax.ShapeDtypeStruct:
        where = None if mesh is None else sharding(mesh, axes, leaf.ndim)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    def place_node(node: Any) -> Any:
        if isinstance(node, QuantizedParam):
            weight = node.get_value()
            return node.replace(jax.tree.map(place, weight, weight.leaf_axes(node.axes)))
        if isinstance(node, nnx.Param):
            return node.replace(place(node.get_value(), node.axes))
        return place(node)

    return jax.tree.map(place_node, tree, is_leaf=lambda x: isinstance(x, nnx.Param | QuantizedParam))


def abstract_cache(model: Any, batch_size: int, max_length: int, dtype: Any = None) -> KVCache:
    """Returns the cache of `model.init_cache` as `jax.ShapeDtypeStruct`s with shardings."""
    mesh = model.decoder.mesh
    shapes = jax.eval_shape(lambda: model.init_cache(batch_size, max_length, dtype))
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        shapes,
        shapes.shardings(mesh),
    )
