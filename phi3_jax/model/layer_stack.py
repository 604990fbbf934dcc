"""Runs the layers of a decoder: a list for inference, a scanned stack for training."""

from collections.abc import Callable, Iterable
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from phi3_jax.cache.cache import KVCache
from phi3_jax.cache.layer_cache import Vectors
from phi3_jax.errors import UserError
from phi3_jax.model.masks import CausalMask

Model = TypeVar("Model", bound=Any)
Policy = Callable[..., bool]
LayerOutputs = tuple[list[Array], list[Array], list[tuple[Vectors, Vectors]]]
"""Each layer's output (only the last one's for stacked layers), attention weights, keys and values."""


def can_stack(layers: Iterable[Any]) -> bool:
    """Whether all layers have the same parts and shapes."""
    kinds = {(jax.tree.structure(layer), *(x.shape for x in jax.tree.leaves(layer))) for layer in layers}
    return len(kinds) == 1


class StackedLayers(nnx.Module):
    """All layers as one, whose parameters have a leading axis of layers.

    A scan compiles its body once, as training needs. It copies the cache, so inference uses a list.

    Raises:
        UserError: the layers differ, as where only some have adapters.
    """

    def __init__(self, layers: list[Any]):
        if not can_stack(layers):
            raise UserError(
                "the layers differ, such as in their adapters, and cannot be stacked; use a list of layers "
                "(scan_layers=False)"
            )
        self.count = len(layers)
        self.layer = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

    def unstack(self) -> list[Any]:
        return [jax.tree.map(itemgetter(index), self.layer) for index in range(self.count)]

    def __len__(self) -> int:
        return self.count


def run_layers(
    layers: nnx.List[Any] | StackedLayers,
    x: Array,
    tables: tuple[Array, Array],
    mask: CausalMask | Array,
    cache: KVCache | None,
    *,
    keep: int | None,
    output_attentions: bool,
    key: Array | None,
    remat_policy: Policy | None,
) -> LayerOutputs:
    """Runs `x` through all layers; the last one computes its last `keep` positions only (None: all)."""
    run: Callable[..., Any] = _run_layer
    if remat_policy is not None:
        run = jax.checkpoint(run, policy=remat_policy, static_argnums=(5, 6))
    if isinstance(layers, StackedLayers):
        if cache is not None or output_attentions:
            raise UserError(
                "stacked layers are for training: no cache, no attentions; unstack the model first"
            )
        return [_scan(layers, run, x, tables, mask, key)], [], []
    prefill = isinstance(mask, CausalMask) and mask.prefill
    hidden_states, attentions, present = [], [], []
    for index, layer in enumerate(layers):
        past = None if cache is None else cache.layer(index, prefill)
        own_keep = keep if index == len(layers) - 1 else None
        x, weights, vectors = run(
            layer, x, tables, mask, past, own_keep, output_attentions, _layer_key(key, index)
        )
        hidden_states.append(x)
        if output_attentions:
            attentions.append(weights)
        present.append(vectors)
    return hidden_states, attentions, present


def _scan(
    layers: StackedLayers,
    run: Callable[..., Any],
    x: Array,
    tables: tuple[Array, Array],
    mask: CausalMask | Array,
    key: Array | None,
) -> Array:
    def body(x: Array, item: tuple[Array, Any]) -> tuple[Array, None]:
        index, layer = item
        return run(layer, x, tables, mask, None, None, False, _layer_key(key, index))[0], None

    return jax.lax.scan(body, x, (jnp.arange(layers.count, dtype=jnp.int32), layers.layer))[0]


def _layer_key(key: Array | None, index: Array | int) -> Array | None:
    return None if key is None else jax.random.fold_in(key, index + 1)


@partial(jax.jit, static_argnums=(5, 6))
def _run_layer(layer: Callable[..., Any], *arguments: Any) -> Any:
    """Runs one layer; under `jit`, JAX traces it once for all layers, and XLA inlines it."""
    return layer(*arguments)


def stack_layers(model: Model) -> Model:
    """Returns the model with its layers stacked, for training; the given one is not changed."""
    model = jax.tree.map(lambda leaf: leaf, model)
    if isinstance(model.decoder.layers, StackedLayers):
        return model
    model.decoder.layers = StackedLayers(list(model.decoder.layers))
    return model


def unstack_layers(model: Model) -> Model:
    """Returns the model with its layers in a list."""
    model = jax.tree.map(lambda leaf: leaf, model)
    if isinstance(model.decoder.layers, StackedLayers):
        model.decoder.layers = nnx.List(model.decoder.layers.unstack())
    return model


def stack_states(tree: Any) -> Any:
    """Returns a tree in which the layers of each `nnx.State` are stacked, as `stack_layers` does it."""

    def stack(layers: nnx.State[Any, Any]) -> dict[Any, Any]:
        own = [layers[index] for index in sorted(layers)]
        return {_STACK: jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)}

    return _with_layers(tree, stack)


def unstack_states(tree: Any) -> Any:
    """Returns a tree in which the layers of each `nnx.State` have numbers; the inverse of `stack_states`."""

    def unstack(layers: nnx.State[Any, Any]) -> dict[Any, Any]:
        stack = layers[_STACK]
        count = len(jax.tree.leaves(stack)[0])
        return {index: jax.tree.map(itemgetter(index), stack) for index in range(count)}

    return _with_layers(tree, unstack)


_STACK = "layer"
"""The name of the one layer of a stack."""


def _with_layers(tree: Any, change: Callable[[nnx.State[Any, Any]], dict[Any, Any]]) -> Any:
    def changed(node: Any) -> Any:
        if not isinstance(node, nnx.State) or "layers" not in node.get("model", {}):
            return node
        return nnx.State({**node, "model": {**node["model"], "layers": change(node["model"]["layers"])}})

    return jax.tree.map(changed, tree, is_leaf=lambda node: isinstance(node, nnx.State))
